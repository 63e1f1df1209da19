"""python -m llama COMMAND: complete and chat, checkpoints, batches, training, evaluation."""

import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import fire
from fire.decorators import SetParseFn

from llama.errors import DataError, GenerationError, LlamaError, one_line

# Flags that are texts, whatever they look like: fire takes 1.50 for a number.
as_text: Callable[[Callable[..., None]], Callable[..., None]] = SetParseFn(
    str, "prompt", "stop", "ckpt_dir", "tokenizer_path", "device", "dtype", "mode", "quantize",
    "kv_cache", "draft",
)  # fmt: skip


@as_text
def complete(prompt: str | None = None, *words: str, **flags: Any) -> None:
    """Continue a text, and show the continuation as it comes. Ctrl-C ends it.

    Example: python -m llama complete "Once upon a time" --max_gen_len 100

    Without PROMPT, standard input is the prompt. In a pipe nothing but the texts is printed.

    Model:    --ckpt_dir FOLDER (or an id on the Hub; without it the bundled model)
              --tokenizer_path FILE --max_seq_len N --mode fast|reference
              --quantize int8|int4|fp8 (round the weights: mode fast; a CPU needs extra [fast],
              fp8 a newer GPU) --kv_cache int8 (keys and values in less memory: mode fast)
              --device cpu|cuda|mps --dtype float32|bfloat16|float16 --rope_factor X
    Faster:   --lookup (propose what followed in the text so far) or --draft FOLDER (a smaller
              model proposes): one forward checks several tokens
    Sampling: --temperature 0.6 (0: the likeliest) --top_p 0.9 --top_k 0 --min_p 0 --seed 1
              --repetition_penalty 1 --presence_penalty 0 --frequency_penalty 0
    End:      --max_gen_len N --stop TEXT --ignore_eos
    Samples:  --n 3 (generated at the same time, shown one after the other)

    Args:
        prompt: the text, in quotes.
    """
    from llama.commands import terminal
    from llama.generation import Llama

    build, params = terminal.read_flags(words, flags)
    if prompt is None and sys.stdin.isatty():
        raise GenerationError("no prompt: give a text in quotes, or one on standard input")
    terminal.complete(Llama.build(**build, max_batch_size=min(params.n, 4)), prompt, params)


@as_text
def chat(*words: str, **flags: Any) -> None:
    """Chat with a model; /help lists what can be typed.

    Example: python -m llama chat --ckpt_dir Llama3.2-1B-Instruct

    Each turn costs its own tokens only: the cache keeps what came before. Under torchrun the first
    rank has the terminal, and Ctrl-C ends all.
    Flags: those of `python -m llama complete --help`, but --n.
    """
    from llama.commands import terminal
    from llama.commands.chat import Chat
    from llama.generation import Llama

    build, params = terminal.read_flags(words, flags)
    if params.n != 1:
        raise GenerationError(f"n is {params.n}: a chat has one answer to each message")
    llama = Llama.build(**build, max_batch_size=1)
    with terminal.owned(llama) as is_ours:
        if is_ours:
            Chat(llama, params).run()


def train(config: str | None = None, **flags: Any) -> None:
    """Train a new model from token files. Run the same command again to go on after a stop.

    Example: python -m llama train --data 'tales_*.bin' --tokenizer tokenizer.model --out_dir run

    Every flag may also be a key of the TOML file CONFIG; flags win over the file.

    Where:   --data PATTERN (token files), --tokenizer FILE, --out_dir FOLDER, --eval_data PATTERN
    Shape:   --preset llama-3.2-1b, or --dim 256 --n_layers 4 --n_heads 4 --n_kv_heads N
             --hidden_dim N --multiple_of 32 --rope_theta 500000 --tied
    Steps:   --steps 1000 --batch 8 (rows of a rank) --seq_len 512 --accumulation 1
    Rate:    --learning_rate 1e-3 --warmup_steps 50 --final_lr 0.1 (share left at the end)
             --decay_steps N (level, then a straight line; without it a cosine)
             --weight_decay 0.1 --beta1 0.9 --beta2 0.95 --clip 1.0
             --train all|norms|all_but_embeddings
    Output:  --eval_every 100 --eval_batches 20 --checkpoint_every 200 --keep 2
             --log_dir FOLDER (TensorBoard) --sample_every N --sample_prompt TEXT
    Machine: --device cpu|cuda --autocast (bfloat16; on a GPU by itself) --seed 1
             --model_parallel_size 1 --fsdp (both under torchrun --nproc_per_node N)
    Data:    --separate_documents False lets packed documents see each other

    Args:
        config: a TOML file with the same names as keys.
    """
    from llama.commands.train import PretrainConfig, pretrain

    print(f"Saved in {pretrain(PretrainConfig.read(config, flags))}")


def finetune(config: str | None = None, **flags: Any) -> None:
    """Teach a checkpoint from dialogs; only the assistant's part is learned.

    Example: python -m llama finetune --ckpt_dir Llama3.2-1B-Instruct --data dialogs.jsonl
             --out_dir run

    DATA has a dialog a line: {"messages": [{"role": "user", "content": "…"}, {"role":
    "assistant", "content": "…"}]}. Longer ones than --seq_len are cut at a turn.
    Flags: --ckpt_dir FOLDER (without it the bundled model), --data FILE, --eval_data FILE,
    --out_dir FOLDER, and all that `python -m llama train --help` shows but the shape; here
    --steps is 100, --learning_rate 1e-4, --warmup_steps 10 and --weight_decay 0 by default.

    Args:
        config: a TOML file with the same names as keys.
    """
    from llama.commands.train import FinetuneConfig
    from llama.commands.train import finetune as run

    print(f"Saved in {run(FinetuneConfig.read(config, flags))}")


@as_text
def perplexity(
    file: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    window: int | None = None,
    mode: str = "reference",
    quantize: str | None = None,
    kv_cache: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Score a text: nats a token, perplexity, and bits a byte.

    Args:
        file: any UTF-8 text.
        ckpt_dir: a checkpoint folder; without it the bundled model.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        window: tokens seen at a time, each time after a <|begin_of_text|>; by default 512.
        mode: reference, or fast (kernels on a CPU).
        quantize: int8 or int4, on a newer GPU also fp8, with mode fast.
        kv_cache: int8, with mode fast.
        device: cpu or cuda; by default the best there is.
        dtype: float32, bfloat16 or float16; by default the checkpoint's own on the CPU.
    """
    from llama.evaluation.perplexity import WINDOW, score
    from llama.files import read_text
    from llama.generation import Llama
    from llama.parallel import is_main_rank

    text = read_text(str(file))
    max_seq_len = window if isinstance(window, int) and window > WINDOW else None
    llama = Llama.build(
        ckpt_dir, tokenizer_path, max_seq_len, max_batch_size=1,
        mode=mode, quantize=quantize, kv_cache=kv_cache,  # type: ignore[arg-type]
        device=device, dtype=dtype,
    )  # fmt: skip
    result = score(llama, [text], window)
    if is_main_rank():
        print(f"tokens          {result.tokens:,} in {result.bytes:,} bytes")
        print(f"nats a token    {result.nats_per_token:.4f}")
        print(f"perplexity      {result.perplexity:.3f}")
        print(f"bits a byte     {result.bits_per_byte:.4f}")


@as_text
def evaluate(
    tasks: str | Sequence[str],
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    out: str | None = None,
    max_seq_len: int | None = None,
    batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Run tasks of the lm-evaluation-harness (extra [eval]) and show its table.

    Example: python -m llama evaluate hellaswag,arc_easy --ckpt_dir Meta-Llama-3-8B --limit 100

    The harness fetches the data of its own tasks from the Hugging Face Hub. Contexts longer than
    max_seq_len lose their beginning. No chat format is applied.

    Args:
        tasks: names of tasks, groups or tags, with commas between.
        ckpt_dir: a checkpoint folder; without it the bundled model.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        include_path: a folder with tasks of your own, as YAML files; they may run Python code.
        limit: documents of a task at most, or their share if below 1.
        num_fewshot: examples in front of each question; by default as the task says.
        out: a file for the results as JSON.
        max_seq_len: tokens of prompt and answer together; by default as in Llama.build.
        batch_size: prompts that are continued at once.
        device: cpu or cuda; by default the best there is.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
    """
    from llama.evaluation.harness import evaluate as run

    names = tasks.split(",") if isinstance(tasks, str) else list(map(str, tasks))
    table = run(
        names, include_path, limit, num_fewshot, out and str(out), ckpt_dir=ckpt_dir,
        batch_size=batch_size, tokenizer_path=tokenizer_path, max_seq_len=max_seq_len,
        device=device, dtype=dtype,
    )  # fmt: skip
    if table:
        print(table)


def tokenize(
    *files: str, tokenizer: str, out: str, shard_tokens: int = 100_000_000, field: str = "text"
) -> None:
    """Write token files for training: every document after a <|begin_of_text|>.

    Example: python -m llama tokenize a.jsonl --tokenizer tokenizer.model --out 'a_{:04d}.bin'

    Args:
        files: UTF-8 texts, each one document, or .jsonl with a document a line.
        tokenizer: the tokenizer.model.
        out: name of the token files, with {} (or {:04d}) where their number goes.
        shard_tokens: tokens of a file at most.
        field: key of the text in a .jsonl line.
    """
    from llama.tokenizer import Tokenizer
    from llama.training.documents import read_documents, write_token_files

    if not files:
        raise DataError("no files to tokenize: name at least one")
    documents = read_documents(map(str, files), str(field))
    names, count = write_token_files(documents, Tokenizer(tokenizer), str(out), shard_tokens)
    print(f"{count:,} tokens in {', '.join(names)}")


def vocab(*files: str, ranks: int, out: str, field: str = "text") -> None:
    """Train a vocabulary in the format of Llama 3's tokenizer.model.

    Example: python -m llama vocab tales.jsonl --ranks 4096 --out tokenizer.model

    Args:
        files: UTF-8 texts, or .jsonl with a document a line.
        ranks: number of byte sequences, 257 or more; Llama 3's 256 special tokens come after them.
        out: the file to write.
        field: key of the text in a .jsonl line.
    """
    from llama.training.documents import read_documents
    from llama.training.vocabulary import train_vocabulary

    if not files:
        raise DataError("no files to learn from: name at least one")
    train_vocabulary(read_documents(map(str, files), str(field)), ranks, Path(str(out)))
    print(f"{ranks:,} ranks and 256 special tokens in {out}")


def batch(
    input: str,
    output: str,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    max_seq_len: int | None = None,
    max_batch_size: int = 16,
    model_parallel_size: int | None = None,
    seed: int = 1,
    mode: str = "fast",
    quantize: str | None = None,
    kv_cache: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    draft: str | None = None,
    lookup: bool = False,
    force: bool = False,
    **sampling: Any,
) -> None:
    """Run a file of prompts and dialogs. The same command goes on after a stop or a kill.

    Example: python -m llama batch prompts.jsonl results.jsonl --ckpt_dir Llama3.2-1B-Instruct

    A line of INPUT is {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}, with
    "id" and any of the sampling options where wanted. OUTPUT has a line for each, in this order:
    index, id, text (or message), finish_reason, generated_tokens …, or error; then the command
    ends with exit code 1. OUTPUT.job.json says what it was made from.

    Sampling of lines that do not say otherwise: --temperature 0.6 --top_p 0.9 --top_k 0 --min_p 0
    --max_gen_len N --stop '["…"]' --n 1 --logprobs K --ignore_eos … (see llama/sampling.py)

    Args:
        input: the JSONL file to read.
        output: the JSONL file to write.
        ckpt_dir: a checkpoint folder; without it the bundled model.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        max_seq_len: tokens of prompt and answer together; by default as in Llama.build.
        max_batch_size: lines that are computed together.
        model_parallel_size: ranks that share a model; with fewer than torchrun started, each such
            group takes its share of the lines. By default all.
        seed: a line without a seed of its own has one made of this and its index.
        mode: fast or reference.
        quantize: int8 or int4, on a newer GPU also fp8: round the weights (mode fast).
        kv_cache: int8: keys and values in less memory (mode fast).
        device: cpu or cuda; by default the best there is.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
        draft: folder of a smaller model that proposes tokens; a seed then gives other samples.
        lookup: propose what followed in the text so far; the results stay the same.
        force: start anew, whatever OUTPUT holds.
    """
    from llama.commands.batch import run_batch
    from llama.parallel import is_main_rank

    n_lines, n_failed = run_batch(
        str(input), str(output), sampling, seed=seed, ckpt_dir=ckpt_dir and str(ckpt_dir),
        tokenizer_path=tokenizer_path and str(tokenizer_path), max_seq_len=max_seq_len,
        max_batch_size=max_batch_size, model_parallel_size=model_parallel_size, mode=mode,  # type: ignore[arg-type]
        quantize=quantize, kv_cache=kv_cache, draft=draft, lookup=lookup,  # type: ignore[arg-type]
        device=device, dtype=dtype, force=force,
    )  # fmt: skip
    if is_main_rank():
        print(f"{n_lines:,} lines in {output}, {n_failed:,} of them failed")
        if n_failed:  # on one rank: at the first that ends so, torchrun stops the others
            sys.exit(1)


def inspect(
    model: str,
    mp: int = 1,
    max_seq_len: int | None = None,
    max_batch_size: int = 4,
    dtype: str = "bfloat16",
) -> None:
    """Show what a model is made of: modules, sizes, split over ranks, KV cache, FLOPs.

    Example: python -m llama inspect llama-3.1-70b --mp 8

    Args:
        model: a published model (llama-2-7b, llama-3-8b, llama-3.1-405b, llama-3.2-1b, …) or a
            checkpoint folder; no weight is read.
        mp: ranks that share the model.
        max_seq_len: tokens of a row of the KV cache; by default the model's context.
        max_batch_size: rows of the KV cache.
        dtype: float32, bfloat16 or float16, for the sizes in bytes.
    """
    from llama.checkpoints.inspect import describe

    print(describe(str(model), mp, max_seq_len, max_batch_size, dtype))


@as_text
def convert(
    src: str,
    dst: str,
    to: str = "meta",
    mp: int = 1,
    dtype: str | None = None,
    force: bool = False,
    quantize: str | None = None,
) -> None:
    """Write a checkpoint anew, in Meta's or Hugging Face's layout, or quantized.

    Example: python -m llama convert Llama-2-70b Llama-2-70b-hf --to hf

    Args:
        src: a checkpoint folder of either layout.
        dst: the new folder.
        to: meta (params.json and consolidated.NN.pth) or hf (config.json and .safetensors).
        mp: number of shards of a Meta folder.
        dtype: float32, bfloat16 or float16; by default the weights stay as they are.
        force: replace dst where it exists.
        quantize: int8 or int4: round the matrices once and for all, for mode fast on a CPU; to meta
            alone, as params.json and consolidated.NN.safetensors.
    """
    from llama.checkpoints.convert import convert as run

    written = run(str(src), str(dst), to, mp, dtype, force, quantize)  # type: ignore[arg-type]
    print(f"Written to {written}")


def verify(folder: str, manifest: bool = True) -> None:
    """Check a checkpoint folder: every tensor, its numbers, and the files' checksums.

    Ends with exit code 1 where something is wrong.

    Args:
        folder: a checkpoint folder, Meta's or Hugging Face's.
        manifest: write SHA256SUMS where there is none and nothing is wrong.
    """
    from llama.checkpoints.verify import verify as run

    title, problems = run(str(folder), manifest)
    print(title)
    for problem in problems:
        print(f"wrong: {problem}")
    print(f"{len(problems)} problem(s)" if problems else "all is well")
    if problems:
        sys.exit(1)


@as_text
def doctor(
    folder: str,
    mp: int = 1,
    max_seq_len: int | None = None,
    max_batch_size: int = 4,
    tokenizer_path: str | None = None,
    mode: str = "reference",
    quantize: str | None = None,
    kv_cache: str | None = None,
    draft: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Tell whether a checkpoint will run here: memory, tokenizer, kind of model, device.

    Ends with exit code 1 where it will not.

    Example: python -m llama doctor Meta-Llama-3-8B --max_seq_len 8192

    Args:
        folder: a checkpoint folder, Meta's or Hugging Face's, or the id of one on the Hub.
        mp: ranks of this machine that share the model.
        max_seq_len: tokens of a row of the KV cache; by default as in Llama.build.
        max_batch_size: rows of the KV cache.
        tokenizer_path: tokenizer.model; by default the one in the folder.
        mode: reference or fast, quantize: int8, int4 or fp8, kv_cache: int8; as in Llama.build.
        draft: folder of a smaller model that is to propose tokens; with mode fast.
        device: cuda, mps or cpu; by default the best there is.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
    """
    from llama.checkpoints.doctor import PROBLEM, examine, report
    from llama.parallel import is_main_rank

    findings = examine(
        str(folder), tokenizer_path, max_seq_len, max_batch_size, mp, device, dtype,
        mode, quantize, kv_cache, draft,  # type: ignore[arg-type]
    )  # fmt: skip
    if is_main_rank():
        print(report(findings))
    if any(found.level == PROBLEM for found in findings):
        sys.exit(1)


@as_text
def bench(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    prefill: int = 512,
    decode: int = 32,
    rounds: int = 3,
    mode: str = "fast",
    quantize: str | None = None,
    kv_cache: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    out: str | None = None,
) -> None:
    """How fast a model runs on this machine: loading, the first token, prefill, decoding one, four
    and eight prompts at a time, memory, and how near that is to the speed at which memory can be
    read, which is the limit of decoding.

    Example: python -m llama bench Llama3.2-1B --quantize int8

    Medians of rounds, after one that warms up. Under torchrun the ranks share the model.

    Args:
        ckpt_dir: a checkpoint folder; without it the bundled model.
        tokenizer_path: tokenizer.model; by default the one in ckpt_dir.
        prefill: tokens of the long prompt.
        decode: tokens decoded for each prompt.
        rounds: of every measurement.
        mode: fast or reference.
        quantize: int8 or int4, on a newer GPU also fp8, with mode fast.
        kv_cache: int8, with mode fast.
        device: cpu or cuda; by default the best there is.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
        out: file for the figures as JSON.
    """
    from llama.commands.bench import measure, report
    from llama.files import atomic_file

    figures = measure(
        ckpt_dir and str(ckpt_dir), prefill, decode, rounds, tokenizer_path=tokenizer_path,
        mode=mode, quantize=quantize, kv_cache=kv_cache, device=device, dtype=dtype,
    )  # fmt: skip
    if figures is None:
        return
    print(report(figures))
    if out is not None:
        with atomic_file(str(out)) as file:
            file.write((json.dumps(figures, indent=2) + "\n").encode())


COMMANDS: dict[str, Callable[..., None]] = {
    "complete": complete,
    "chat": chat,
    "doctor": doctor,
    "bench": bench,
    "inspect": inspect,
    "convert": convert,
    "verify": verify,
    "batch": batch,
    "train": train,
    "finetune": finetune,
    "perplexity": perplexity,
    "evaluate": evaluate,
    "tokenize": tokenize,
    "vocab": vocab,
}


def check_flags(command: Callable[..., None], words: Sequence[str]) -> None:
    """Raise LlamaError for a flag the command lacks: fire would run it first and then complain."""
    parameters = signature(command).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    for word in words:
        if flag := re.match(r"--?([A-Za-z][\w-]*)", word):
            name = flag[1].replace("-", "_")
            # fire also takes --noforce, and -f where no other name begins so
            if not any(
                name in (p.name, f"no{p.name}") or (len(name) == 1 and p.name.startswith(name))
                for p in parameters
            ):
                raise LlamaError(f"unknown option(s): {name}")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):  # else commands with free flags take it for one of them
        arguments = [*arguments[:1], "--", "--help"] if arguments[0] in COMMANDS else ["--help"]
        for command in COMMANDS.values():
            vars(command).pop("FIRE_METADATA", None)  # which help would show as a group of commands
    with one_line():
        if "--" not in arguments and arguments and arguments[0] in COMMANDS:
            check_flags(COMMANDS[arguments[0]], arguments[1:])
        fire.Fire(COMMANDS, arguments, name="python -m llama")


if __name__ == "__main__":
    main()
