"""The flags of the commands: name, type, default and meaning.

The signature and the docstring of a command describe its own flags. Flags that several commands
share form the groups below, and a command takes a whole group with `@takes(GROUP)`.
tests/commands/test_help.py compares the groups with the code that uses their values.
"""

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fire.decorators import SetParseFn

Command = Callable[..., None]

# Titles in the docstring of a command, in their order. CONTRIBUTING.md explains them.
SECTIONS = ("Reads", "Writes", "Examples", "Exit codes", "Args")

# fire leaves the values of these flags as text. It converts the values of other flags: 1.50 becomes
# a number.
as_text: Callable[[Command], Command] = SetParseFn(
    str, "prompt", "stop", "ckpt_dir", "tokenizer_path", "device", "dtype", "mode", "quantize",
    "kv_cache", "draft", "format", "adapter", "adapters", "lora_targets", "model", "host",
    "api_key", "name", "allow_origin", "against", "check", "out", "text", "diff",
)  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """A flag, or an argument that is given by its position."""

    name: str
    kind: str  # type of the value: "text", "whole number", "number", "yes or no"
    default: str | None  # as the help shows it; None: the flag must be given
    meaning: str  # as the help shows it
    unit: str = ""  # of a number that counts or measures something, such as "tokens"

    @property
    def is_switch(self) -> bool:
        """Whether the flag needs no value."""
        return self.kind == "yes or no"


@dataclass(frozen=True)
class Group:
    """Flags that commands share, and the title above them in the help."""

    title: str
    flags: tuple[Flag, ...]


Row = tuple[str, str, str | None, str] | tuple[str, str, str | None, str, str]


def group(title: str, *rows: Row) -> Group:
    """Make a group. A row has a flag's name, kind, default, meaning and, for some numbers, unit."""
    return Group(title, tuple(Flag(*row) for row in rows))


MODEL = group(
    "Model",
    ("ckpt_dir", "text", "the bundled model", "checkpoint folder, GGUF file, or id on the Hub"),
    ("tokenizer_path", "text", "the one in ckpt_dir", "tokenizer.model or tokenizer.json"),
    ("max_seq_len", "whole number", "2048, or the context if smaller",
     "most tokens of prompt and answer together", "tokens"),
    ("seed", "whole number", "1", "seed of the random numbers for sampling"),
    ("mode", "text", "fast", "fast, or reference for logits that are bit-equal to Meta's"),
    ("quantize", "text", "as the folder is saved",
     "round the weights to int8 or int4, on a newer GPU also fp8; mode fast; a CPU needs the extra "
     "[fast]"),
    ("kv_cache", "text", "not rounded", "int8, to round keys and values; mode fast"),
    ("device", "text", "the first of these that is available", "cuda, mps or cpu"),
    ("dtype", "text", "bfloat16 on a GPU, else the checkpoint's",
     "float32, bfloat16 or float16; the bundled model computes in float32 on a CPU"),
    ("rope_factor", "number", "as published",
     "factor of scaled RoPE, for models that have it; Meta's code always uses 8"),
    ("format", "text", "the folder's, else the vocabulary's",
     "chat format: llama3, llama2, chatml or zephyr"),
    ("adapter", "text", "none",
     "folder of a LoRA adapter of this model in PEFT's format, or its id on the Hub"),
)  # fmt: skip
SPECULATION = group(
    "Speculation: tokens are proposed, and one forward checks several",
    ("draft", "text", "none", "folder of a smaller model that proposes tokens; mode fast"),
    (
        "lookup",
        "yes or no",
        "no",
        "find the last tokens earlier in the text, propose what followed them there; mode fast",
    ),
)
SAMPLING = group(
    "Sampling",
    ("temperature", "number", "0.6", "divides the logits; 0 always takes the likeliest token"),
    ("top_p", "number", "0.9",
     "draw from the smallest set of likeliest tokens with a total probability above this"),
    ("top_k", "whole number", "0", "draw from this many likeliest tokens; 0: from all", "tokens"),
    ("min_p", "number", "0.0",
     "draw from tokens with at least this fraction of the likeliest token's probability"),
    ("repetition_penalty", "number", "1.0",
     "above 1, lowers the logits of tokens in the prompt and the answer"),
    ("presence_penalty", "number", "0.0", "subtracted from the logit of each generated token"),
    ("frequency_penalty", "number", "0.0",
     "subtracted from a token's logit once for each time it was generated"),
    ("logit_bias", "text", "none",
     "'{ID: NUMBER}', numbers added to the logits of these token ids"),
    ("max_gen_len", "whole number", "until max_seq_len", "most tokens to generate", "tokens"),
    ("stop", "text", "none", "text that ends the answer and is left out of it"),
    ("stop_tokens", "text", "the tokenizer's", "'[ID, ID]', token ids that end the answer"),
    ("ignore_eos", "yes or no", "no", "continue after a stop token"),
    ("n", "whole number", "1", "samples of each prompt", "samples"),
)  # fmt: skip
# What a result of `batch` contains besides the text.
REPORTING = group(
    "Results",
    ("logprobs", "whole number", "none",
     "report each generated token's logprob, and this many of the likeliest tokens", "tokens"),
    ("prompt_logprobs", "yes or no", "no", "report the logprobs of the prompt's tokens"),
)  # fmt: skip
RUN = group(
    "Run",
    ("out_dir", "text", None, "folder for the checkpoints; a run in this folder is continued"),
    ("steps", "whole number", "1000", "optimizer steps of the whole run", "steps"),
    ("batch", "whole number", "8", "rows that a rank computes at a time", "rows"),
    ("seq_len", "whole number", "512", "tokens of a row", "tokens"),
    ("accumulation", "whole number", "1", "batches of a step, on each rank", "batches"),
    ("learning_rate", "number", "0.001", "peak of the learning rate"),
    ("warmup_steps", "whole number", "50",
     "steps in which the learning rate rises to its peak; a short run has fewer by default",
     "steps"),
    ("decay_steps", "whole number", "a cosine decay after the warm-up",
     "steps at the end in which the learning rate falls linearly; it is constant before", "steps"),
    ("final_lr", "number", "0.1", "learning rate at the end, as a fraction of the peak"),
    ("weight_decay", "number", "0.1", "weight decay of matrices; norms have none"),
    ("beta1", "number", "0.9", "AdamW's decay rate for the mean of the gradient"),
    ("beta2", "number", "0.95", "AdamW's decay rate for the mean of the squared gradient"),
    ("clip", "number", "1.0", "largest norm of the gradient"),
    ("train", "text", "all", "weights to train: all, norms or all_but_embeddings"),
    ("separate_documents", "yes or no", "yes", "no attention between the documents of a row"),
    ("autocast", "yes or no", "only on a GPU", "compute matrix products in bfloat16"),
    ("checkpoint_activations", "yes or no", "no",
     "keep only the input of each layer, and compute the rest again in the backward pass"),
    ("eval_every", "whole number", "100", "steps between evaluations", "steps"),
    ("eval_batches", "whole number", "20", "batches of an evaluation", "batches"),
    ("checkpoint_every", "whole number", "200", "steps between checkpoints", "steps"),
    ("keep", "whole number", "2",
     "how many checkpoints stay; older ones are deleted", "checkpoints"),
    ("seed", "whole number", "1", "seed of the initial weights, or of the order of the dialogs"),
    ("device", "text", "this rank's GPU, else the CPU", "cpu or cuda"),
    ("model_parallel_size", "whole number", "1",
     "ranks that share a model, under torchrun", "ranks"),
    ("fsdp", "yes or no", "if a GPU is too small",
     "split weights, gradients and optimizer state over the data-parallel ranks"),
    ("log_dir", "text", "none", "folder for TensorBoard, which needs the extra [train]"),
    ("sample_every", "whole number", "0", "steps between sample texts; 0: none", "steps"),
    ("sample_prompt", "text", "Once upon a time", "beginning of a sample text"),
)  # fmt: skip
PRETRAINING = group(
    "Data and shape",
    ("data", "text", None, "pattern of token files, such as 'tales_*.bin'"),
    ("tokenizer", "text", None, "tokenizer.model; it is copied into the checkpoints"),
    ("eval_data", "text", "none", "pattern of token files to evaluate on"),
    ("preset", "text", "none",
     "published model, such as llama-3.2-1b, whose shape replaces the flags below"),
    ("dim", "whole number", "256", "width of the model", "features"),
    ("n_layers", "whole number", "4", "layers", "layers"),
    ("n_heads", "whole number", "4", "query heads", "heads"),
    ("n_kv_heads", "whole number", "n_heads", "key/value heads", "heads"),
    ("hidden_dim", "whole number", "by Meta's rule", "feed-forward width", "features"),
    ("multiple_of", "whole number", "32",
     "the feed-forward width is rounded up to a multiple of this", "features"),
    ("rope_theta", "number", "500000.0", "base of RoPE's frequencies"),
    ("tied", "yes or no", "no", "use the embedding as the output matrix"),
)  # fmt: skip
FINETUNING = group(
    "Data and model",
    ("data", "text", None, "JSONL file with one dialog a line"),
    ("ckpt_dir", "text", "the bundled model", "checkpoint folder, GGUF file, or id on the Hub"),
    ("tokenizer", "text", "the one in ckpt_dir", "tokenizer.model"),
    ("eval_data", "text", "none", "JSONL file of dialogs to evaluate on"),
    ("adapter", "text", "none",
     "folder of a LoRA adapter that is merged into the model before the training"),
)  # fmt: skip
LORA = group(
    "LoRA: low-rank changes are trained, and the model stays as it is",
    ("lora_r", "whole number", "none", "train changes of this rank, and write them as an adapter"),
    ("lora_alpha", "number", "twice lora_r", "a change is multiplied by lora_alpha / lora_r"),
    ("lora_dropout", "number", "0.0", "fraction of a change's inputs that become 0 in training"),
    ("lora_targets", "text", "wq,wk,wv,wo,w1,w2,w3", "matrices that get a change"),
    ("quantize", "text", "as the folder is saved",
     "round the model to int8 or int4; a CPU needs the extra [fast]"),
)  # fmt: skip


def with_defaults(group: Group, **defaults: str) -> Group:
    """The same flags with other defaults."""
    flags = (replace(flag, default=defaults.get(flag.name, flag.default)) for flag in group.flags)
    return Group(group.title, tuple(flags))


# `chat` and `complete` use the sampling options that a folder suggests.
SUGGESTED_SAMPLING = with_defaults(
    SAMPLING,
    temperature="the folder's generation_config.json, else 0.6",
    top_p="the folder's generation_config.json, else 0.9",
)


def takes(*groups: Group, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Decorate a command, whose `**flags` then take the flags of these groups.

    without: names of flags that the command does not take.
    """

    def mark(command: Command) -> Command:
        kept = [
            Group(group.title, tuple(flag for flag in group.flags if flag.name not in without))
            for group in groups
        ]
        vars(command)["groups"] = kept
        return command

    return mark


def groups_of(command: Command) -> list[Group]:
    """The groups that `takes` has given to the command."""
    return vars(command).get("groups", [])


def own_flags(command: Command) -> tuple[list[Flag], list[Flag]]:
    """The arguments of a command, and the flags that are not in its groups. They are read from its
    signature and docstring."""
    described = _described(command)
    arguments, flags = [], []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        flag = _flag(parameter, *described.get(parameter.name, ("", "")))
        is_flag = parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not _NONE
        is_optional_argument = parameter.name in ("prompt", "config", "model", "folder", "text")
        if parameter.kind is parameter.VAR_POSITIONAL:
            if flag.meaning:
                arguments.append(flag)
        elif is_flag and not is_optional_argument:
            flags.append(flag)
        else:
            arguments.append(flag)
    return arguments, flags


def takes_more_words(command: Command) -> bool:
    """Whether a command has `*words`. It then says itself what is wrong with a further word."""
    parameters = inspect.signature(command).parameters.values()
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)


def all_flags(command: Command) -> dict[str, Flag]:
    """All flags and arguments of a command, by name. An argument can also be given as a flag."""
    arguments, flags = own_flags(command)
    shared = [flag for group in groups_of(command) for flag in group.flags]
    return {flag.name: flag for flag in (*arguments, *flags, *shared)}


_NONE = inspect.Parameter.empty


def _flag(parameter: inspect.Parameter, meaning: str, unit: str) -> Flag:
    """The flag of a parameter. Its kind comes from the annotation."""
    annotation = str(getattr(parameter.annotation, "__name__", parameter.annotation))
    kinds = {"bool": "yes or no", "int": "whole number", "float": "number"}
    kind = next((text for word, text in kinds.items() if word in annotation), "text")
    default: Any = parameter.default
    if default is _NONE:
        return Flag(parameter.name, kind, None, meaning, unit)
    # "…; by default X" in the docstring describes a default that is None in the signature.
    meaning, _, described = meaning.partition("; by default ")
    shown = {True: "yes", False: "no", None: described.rstrip(".") or "none"}
    is_named = default is None or isinstance(default, bool)
    text = shown[default] if is_named else str(default) or "none"
    return Flag(parameter.name, kind, text, meaning, unit)


def sections(command: Command) -> dict[str, str]:
    """The parts of a command's docstring by their titles, such as "Reads". The part before the
    first title has the title "". Each is without its indentation."""
    titles = re.compile(rf"^({'|'.join(SECTIONS)}):\n", re.MULTILINE)
    description, *rest = titles.split(inspect.getdoc(command) or "")
    parts = {"": description, **dict(zip(rest[::2], rest[1::2], strict=True))}
    return {title: textwrap.dedent(text).strip() for title, text in parts.items()}


def _described(command: Command) -> dict[str, tuple[str, str]]:
    """The meaning and the unit of each parameter in the docstring's `Args:`, without line breaks.
    A line such as "window (tokens): …" has a unit."""
    found: dict[str, tuple[str, str]] = {}
    name = ""
    for line in sections(command).get("Args", "").splitlines():
        if match := re.match(r"(\w+)(?: \((\w+)\))?: (.*)", line):
            name = match[1]
            found[name] = match[3].strip(), match[2] or ""
        elif name and line.strip():
            meaning, unit = found[name]
            found[name] = f"{meaning} {line.strip()}", unit
    return {name: (meaning.rstrip("."), unit) for name, (meaning, unit) in found.items()}
