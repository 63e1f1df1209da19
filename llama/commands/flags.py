"""The flags that several commands share: name, type, default and meaning.

A command has its own parameters, which its signature and its docstring describe, and may take whole
groups of flags besides. The groups below say in words what their types and defaults are.
tests/commands/test_help.py compares them with the code that takes the flags.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fire.decorators import SetParseFn

Command = Callable[..., None]

# Values that stay text whatever they look like. fire would read 1.50 as a number.
as_text: Callable[[Command], Command] = SetParseFn(
    str, "prompt", "stop", "ckpt_dir", "tokenizer_path", "device", "dtype", "mode", "quantize",
    "kv_cache", "draft", "format", "model",
)  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """One flag, or one argument without a dash."""

    name: str
    kind: str  # "text", "whole number", "number", "yes or no"
    default: str | None  # None: the flag must be given
    meaning: str

    @property
    def is_switch(self) -> bool:
        return self.kind == "yes or no"


@dataclass(frozen=True)
class Group:
    title: str
    flags: tuple[Flag, ...]


def group(title: str, *rows: tuple[str, str, str | None, str]) -> Group:
    return Group(title, tuple(Flag(*row) for row in rows))


MODEL = group(
    "Model",
    ("ckpt_dir", "text", "the bundled model", "checkpoint folder, or an id on the Hub"),
    ("tokenizer_path", "text", "the one in ckpt_dir", "tokenizer.model or tokenizer.json"),
    ("max_seq_len", "whole number", "2048, or the context if smaller",
     "tokens of prompt and answer together"),
    ("seed", "whole number", "1", "of the random numbers that sampling draws"),
    ("mode", "text", "fast", "fast, or reference for Meta's numbers to the bit"),
    ("quantize", "text", "as the folder is saved",
     "int8 or int4: round the weights; mode fast; a CPU needs the extra [fast]. fp8: a newer GPU"),
    ("kv_cache", "text", "not rounded", "int8: keys and values in less memory; mode fast"),
    ("device", "text", "the best there is", "cpu, cuda or mps"),
    ("dtype", "text", "bfloat16 on a GPU, else the checkpoint's",
     "float32, bfloat16 or float16; the bundled model computes in float32 on a CPU"),
    ("rope_factor", "number", "as published", "factor of scaled RoPE; Meta's code always takes 8"),
    ("format", "text", "the folder's, else the vocabulary's",
     "chat format: llama3, llama2, chatml or zephyr"),
)  # fmt: skip
SPECULATION = group(
    "Speculation: tokens are proposed, and one forward checks several",
    ("draft", "text", "none", "folder of a smaller model that proposes; mode fast"),
    ("lookup", "yes or no", "no", "propose what followed the last tokens earlier; mode fast"),
)
SAMPLING = group(
    "Sampling",
    ("temperature", "number", "0.6", "divides the logits; 0 takes the likeliest token"),
    ("top_p", "number", "0.9", "draw from the likeliest tokens with this probability together"),
    ("top_k", "whole number", "0", "draw from this many tokens; 0: all"),
    ("min_p", "number", "0.0", "least probability of a token, as a share of the likeliest one's"),
    ("repetition_penalty", "number", "1.0", "divides the logits of tokens in the text"),
    ("presence_penalty", "number", "0.0", "subtracted from the logit of each generated token"),
    ("frequency_penalty", "number", "0.0", "subtracted once for each time a token was generated"),
    ("logit_bias", "text", "{}", "'{ID: NUMBER}', added to the logits of these token ids"),
    ("max_gen_len", "whole number", "until max_seq_len", "generated tokens at most"),
    ("stop", "text", "()", "text that ends the answer and is not part of it"),
    ("stop_tokens", "text", "the tokenizer's", "'[ID, ID]', token ids that end the answer"),
    ("ignore_eos", "yes or no", "no", "go on after a stop token"),
    ("n", "whole number", "1", "samples of each prompt"),
)
# A line of `batch` can say what its result holds.
REPORTING = group(
    "Results",
    ("logprobs", "whole number", "none", "alternatives reported for each generated token"),
    ("prompt_logprobs", "yes or no", "no", "report the logprobs of the prompt's tokens"),
)
RUN = group(
    "Run",
    ("out_dir", "text", None, "folder of the run; a run that it holds is continued"),
    ("steps", "whole number", "1000", "updates of the weights in all"),
    ("batch", "whole number", "8", "rows that a rank computes at a time"),
    ("seq_len", "whole number", "512", "tokens of a row"),
    ("accumulation", "whole number", "1", "batches of a step"),
    ("learning_rate", "number", "0.001", "the schedule's peak"),
    ("warmup_steps", "whole number", "50", "steps up to the peak; at most steps"),
    ("decay_steps", "whole number", "a cosine over all steps",
     "constant, then linear down to the end over this many steps"),
    ("final_lr", "number", "0.1", "the last learning rate, as a share of the peak"),
    ("weight_decay", "number", "0.1", "of matrices"),
    ("beta1", "number", "0.9", "of AdamW"),
    ("beta2", "number", "0.95", "of AdamW"),
    ("clip", "number", "1.0", "largest norm of the gradient"),
    ("train", "text", "all", "all, norms or all_but_embeddings"),
    ("separate_documents", "yes or no", "yes", "documents in one row do not see each other"),
    ("autocast", "yes or no", "on a GPU", "matrix products in bfloat16"),
    ("eval_every", "whole number", "100", "steps between evaluations"),
    ("eval_batches", "whole number", "20", "batches of an evaluation"),
    ("checkpoint_every", "whole number", "200", "steps between checkpoints"),
    ("keep", "whole number", "2", "newest checkpoints that stay"),
    ("seed", "whole number", "1", "of the first weights and of the order of the data"),
    ("device", "text", "this rank's GPU, else the CPU", "cpu or cuda"),
    ("model_parallel_size", "whole number", "1", "ranks that share a model; under torchrun"),
    ("fsdp", "yes or no", "where a GPU is too small", "split the model over the replicas"),
    ("log_dir", "text", "none", "folder for TensorBoard; extra [train]"),
    ("sample_every", "whole number", "0", "steps between sample texts; 0: none"),
    ("sample_prompt", "text", "Once upon a time", "beginning of a sample text"),
)  # fmt: skip
PRETRAINING = group(
    "Data and shape",
    ("data", "text", None, "pattern of token files, as 'tales_*.bin'"),
    ("tokenizer", "text", None, "tokenizer.model; it is copied into the checkpoints"),
    ("eval_data", "text", "none", "pattern of token files to evaluate on"),
    ("preset", "text", "none", "shape of a published model, as llama-3.2-1b"),
    ("dim", "whole number", "256", "width of the model"),
    ("n_layers", "whole number", "4", "layers"),
    ("n_heads", "whole number", "4", "query heads"),
    ("n_kv_heads", "whole number", "n_heads", "key/value heads"),
    ("hidden_dim", "whole number", "by Meta's rule", "feed-forward width"),
    ("multiple_of", "whole number", "32", "the feed-forward width is rounded up to a multiple"),
    ("rope_theta", "number", "500000.0", "base of RoPE's frequencies"),
    ("tied", "yes or no", "no", "the output matrix is the embedding"),
)
FINETUNING = group(
    "Data and model",
    ("data", "text", None, "JSONL file with a dialog a line"),
    ("ckpt_dir", "text", "the bundled model", "checkpoint folder to start from"),
    ("tokenizer", "text", "the one in ckpt_dir", "tokenizer.model"),
    ("eval_data", "text", "none", "JSONL file of dialogs to evaluate on"),
)


def changed(group: Group, **defaults: str) -> Group:
    """The same flags with other defaults."""
    flags = (
        Flag(flag.name, flag.kind, defaults.get(flag.name, flag.default), flag.meaning)
        for flag in group.flags
    )
    return Group(group.title, tuple(flags))


# `chat` and `complete` use the sampling options that a folder suggests.
SUGGESTED_SAMPLING = changed(
    SAMPLING,
    temperature="the folder's generation_config.json, else 0.6",
    top_p="the folder's generation_config.json, else 0.9",
)


def takes(*groups: Group, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Say which groups a command's `**flags` are, except for some flags."""

    def mark(command: Command) -> Command:
        kept = [
            Group(group.title, tuple(flag for flag in group.flags if flag.name not in without))
            for group in groups
        ]
        vars(command)["groups"] = kept
        return command

    return mark


def groups_of(command: Command) -> list[Group]:
    return vars(command).get("groups", [])


def own_flags(command: Command) -> tuple[list[Flag], list[Flag]]:
    """A command's own arguments and its own flags, from its signature and docstring."""
    meanings = _meanings(command)
    arguments, flags = [], []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        flag = _described(parameter, meanings.get(parameter.name, ""))
        is_flag = parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not _NONE
        is_optional_argument = parameter.name in ("prompt", "config", "model", "folder")
        if parameter.kind is parameter.VAR_POSITIONAL:
            if flag.meaning:
                arguments.append(flag)
        elif is_flag and not is_optional_argument:
            flags.append(flag)
        else:
            arguments.append(flag)
    return arguments, flags


def all_flags(command: Command) -> dict[str, Flag]:
    """Everything that may follow a dash, by name."""
    arguments, flags = own_flags(command)
    shared = [flag for group in groups_of(command) for flag in group.flags]
    return {flag.name: flag for flag in (*arguments, *flags, *shared)}


_NONE = inspect.Parameter.empty


def _described(parameter: inspect.Parameter, meaning: str) -> Flag:
    annotation = str(getattr(parameter.annotation, "__name__", parameter.annotation))
    kinds = {"bool": "yes or no", "int": "whole number", "float": "number"}
    kind = next((text for word, text in kinds.items() if word in annotation), "text")
    default: Any = parameter.default
    if default is _NONE:
        return Flag(parameter.name, kind, None, meaning)
    # "…; by default X" in the docstring names a default that is None in the signature.
    meaning, _, said = meaning.partition("; by default ")
    shown = {True: "yes", False: "no", None: said.rstrip(".") or "none"}
    is_named = default is None or isinstance(default, bool)
    return Flag(parameter.name, kind, shown[default] if is_named else str(default), meaning)


def _meanings(command: Command) -> dict[str, str]:
    """The texts of the docstring's `Args:`, by parameter, each in one line."""
    _, _, text = (inspect.getdoc(command) or "").partition("Args:\n")
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if begun := re.match(r" {4}(\w+): (.*)", line):
            name = begun[1]
            found[name] = begun[2].strip()
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return {name: meaning.rstrip(".") for name, meaning in found.items()}
