"""llama inspect, convert, verify, doctor: describe, convert and check checkpoints."""

import os
import sys

from llama.commands.flags import as_text
from llama.errors import ConfigError
from llama.terminal_text import say

MOST_LAYERS = 1000  # of which `inspect` draws a tree or a graph


@as_text
def inspect(
    model: str | None = None,
    mp: int = 1,
    max_seq_len: int | None = None,
    max_batch_size: int = 4,
    dtype: str = "bfloat16",
    tree: bool = False,
    tensorboard: str | None = None,
    train: bool = False,
    batch: int = 1,
    seq_len: int | None = None,
    lora_r: int | None = None,
    lora_targets: str | None = None,
    quantize: str | None = None,
    checkpoint_activations: bool = False,
) -> None:
    """Describe a model: modules, sizes, split over ranks, KV cache, FLOPs. No weight is loaded.

    With --train it tells the memory of a training step instead, without autocast and FSDP.

    Reads:
        MODEL: its params.json or config.json, or the header of a GGUF file. A line of params.json:
            {"dim": 2048, "n_layers": 16, "n_heads": 32, "vocab_size": 128256, "norm_eps": 1e-05, …}

    Writes:
        Standard output: a table of the modules, and the sizes.
        TENSORBOARD: a folder with an event file, if the flag is given.

    Examples:
        llama inspect llama-3.1-70b --mp 8 --tree
        llama inspect llama-3.1-8b --train --lora_r 16 --quantize int4

    Args:
        model: a published model (llama-2-7b, llama-3-8b, llama-3.1-405b, llama-3.2-1b, …), else a
            checkpoint folder, GGUF file or id on the Hub; by default the bundled model.
        mp (ranks): ranks that share the model.
        max_seq_len (tokens): most tokens in a row of the KV cache; by default the model's context.
        max_batch_size (rows): rows of the KV cache.
        dtype: dtype for the sizes in bytes: float32, bfloat16 or float16; weights that are trained
            are float32.
        tree: also print the tree of modules, as print(model) does, with the parameters of each
            module and the shapes of its weights on one rank.
        tensorboard: a folder for the graph of the operations, which TensorBoard shows. It is the
            graph of a prompt of 8 tokens on one rank. It needs the extra [train].
        train: tell the memory of a training step.
        batch (rows): rows of the step.
        seq_len (tokens): tokens of a row; by default 2048, or the context if smaller.
        lora_r: rank of the changes that LoRA trains; by default all weights are trained.
        lora_targets: matrices that get a change; by default all seven of a layer.
        quantize: int8 or int4, for the frozen weights with LoRA; by default as the folder is saved.
        checkpoint_activations: keep only the input of each layer.
    """
    from llama.checkpoints.folder import BUNDLED
    from llama.checkpoints.inspect import describe, resolve
    from llama.checkpoints.load import parse_dtype
    from llama.checkpoints.module_tree import module_tree
    from llama.files import check_can_make_folder
    from llama.training.lora import LoraOptions
    from llama.training.memory import describe_training

    of_training = {
        "batch": batch != 1, "seq_len": seq_len is not None, "lora_r": lora_r is not None,
        "lora_targets": lora_targets is not None, "quantize": quantize is not None,
        "checkpoint_activations": checkpoint_activations,
    }  # fmt: skip
    if not train and any(of_training.values()):
        given = next(name for name, is_given in of_training.items() if is_given)
        raise ConfigError(f"--{given} is about a training step: give --train too")
    if tensorboard is not None:
        check_can_make_folder(tensorboard)
    name = str(model or BUNDLED)
    if train:
        lora = None if lora_r is None else LoraOptions.read(lora_r, None, 0.0, lora_targets)
        options = batch, seq_len, lora, dtype, quantize, checkpoint_activations, mp
        say(describe_training(name, *options))  # type: ignore[arg-type]
    else:
        say(describe(name, mp, max_seq_len, max_batch_size, dtype))
    _, args, _ = resolve(name)
    if (tree or tensorboard is not None) and args.n_layers > MOST_LAYERS:
        raise ConfigError(f"n_layers is {args.n_layers}: at most {MOST_LAYERS} can be drawn")
    if tree:
        say("\n" + module_tree(args, mp))
    if tensorboard is not None:
        from llama.explain.graph import model_graph
        from llama.tensorboard_files import write_graph

        write_graph(str(tensorboard), model_graph(args, parse_dtype(dtype)))
        say(f"\nThe graph is in {tensorboard}; to see it: tensorboard --logdir {tensorboard}")


@as_text
def convert(
    src: str,
    dst: str,
    to: str = "meta",
    mp: int = 1,
    dtype: str | None = None,
    force: bool = False,
    quantize: str | None = None,
    adapter: str | None = None,
) -> None:
    """Write a checkpoint in another layout, in other shards, quantized, as a GGUF file, or with a
    LoRA adapter.

    Reads:
        SRC: a folder with params.json and consolidated.NN.pth, a folder with config.json and
        .safetensors, or a GGUF file; and the tokenizer's files in it. A line of params.json:
            {"dim": 2048, "n_layers": 16, "n_heads": 32, "vocab_size": 128256, "norm_eps": 1e-05, …}

    Writes:
        DST: a folder in the layout that --to names, or a GGUF file. It appears when all of it is on
        disk.

    Examples:
        llama convert Llama3.2-1B Llama3.2-1B-hf --to hf
        llama convert Llama3.2-1B-hf Llama3.2-1B-int8 --quantize int8

    Args:
        src: a checkpoint folder, GGUF file or id on the Hub.
        dst: the folder or GGUF file to write.
        to: meta (params.json and consolidated.NN.pth), hf (config.json, .safetensors, and the
            other files that transformers needs) or gguf (the file of llama.cpp).
        mp (shards): number of shards of a Meta folder.
        dtype: float32, bfloat16 or float16, and for gguf also q8_0 or q4_0; by default the dtype
            of the weights, or bfloat16 for those of a quantized GGUF file.
        force: replace dst if it exists.
        quantize: round the matrices to int8 or int4, for mode fast on a CPU; the layout must be
            meta, and the shards are written as consolidated.NN.safetensors.
        adapter: folder of a LoRA adapter of this model in PEFT's format, or its id on the Hub, to
            merge into the weights.
    """
    from llama.checkpoints.convert import convert as run

    written = run(str(src), str(dst), to, mp, dtype, force, quantize, adapter)  # type: ignore[arg-type]
    say(f"Written to {written}")


def verify(folder: str | None = None, manifest: bool = True) -> None:
    """Check a checkpoint: the shapes of all tensors, finite numbers, checksums of the files.

    Reads:
        FOLDER: weights, params.json or config.json, and the checksums in SHA256SUMS or in Meta's
        checklist.chk. A line of checklist.chk:
            d41d8cd98f00b204e9800998ecf8427e  consolidated.00.pth

    Writes:
        Standard output: what the folder is, a line for each problem, and their number.
        SHA256SUMS in FOLDER, if there is none and no problem is found; later runs compare with it.

    Examples:
        llama verify Llama3.2-1B
        llama verify Llama3.2-1B-hf --nomanifest

    Exit codes:
        1: a problem was found

    Args:
        folder: a checkpoint folder, GGUF file or id on the Hub; by default the bundled model.
        manifest: write SHA256SUMS if the folder has none and no problem is found; not for the
            bundled model, a GGUF file or an id.
    """
    from llama.checkpoints.folder import BUNDLED, find_folder
    from llama.checkpoints.verify import CHECKLIST, MANIFEST
    from llama.checkpoints.verify import verify as run

    place = find_folder(folder or BUNDLED)
    has_checksums = not place.is_dir() or any((place / n).exists() for n in (MANIFEST, CHECKLIST))
    is_own = folder is not None and os.path.isdir(str(folder))
    title, problems = run(str(folder or BUNDLED), manifest and is_own)
    say(title)
    if not has_checksums:
        say(f"no {MANIFEST} or {CHECKLIST}: whether a byte was changed earlier is not known")
        if (place / MANIFEST).exists():
            say(f"{MANIFEST} is written: later runs compare with it")
    for problem in problems:
        say(f"problem: {problem}")
    print(f"{len(problems)} problem(s)" if problems else "all is well")
    if problems:
        sys.exit(1)


@as_text
def doctor(
    folder: str | None = None,
    mp: int = 1,
    max_seq_len: int | None = None,
    max_batch_size: int = 4,
    tokenizer_path: str | None = None,
    mode: str = "reference",
    quantize: str | None = None,
    kv_cache: str | None = None,
    draft: str | None = None,
    adapter: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Check whether a checkpoint runs on this machine: memory, tokenizer, kind of model, device.

    Reads:
        FOLDER: params.json or config.json, the tokenizer, and the names and shapes of the weights.
        A line of params.json:
            {"dim": 2048, "n_layers": 16, "n_heads": 32, "vocab_size": 128256, "norm_eps": 1e-05, …}

    Writes:
        Standard output: a line for each check: its subject; ok, warning or problem; and what was
        found, such as
            tokenizer  ok       Llama 3's kind, 6,400 tokens, as many as the model's

    Examples:
        llama doctor Llama3.2-1B --max_seq_len 8192
        llama doctor Llama3.2-1B --mode fast --quantize int8 --mp 2

    Exit codes:
        1: a check found a problem: the checkpoint does not run here

    Args:
        folder: a checkpoint folder, GGUF file or id on the Hub; by default the bundled model.
        mp (ranks): ranks of this machine that share the model.
        max_seq_len (tokens): most tokens in a row of the KV cache; by default as in Llama.build.
        max_batch_size (rows): rows of the KV cache.
        tokenizer_path: tokenizer.model; by default the one in the folder.
        mode: reference or fast.
        quantize: round the weights to int8 or int4, on a newer GPU also fp8; mode fast; by default
            as the folder is saved.
        kv_cache: int8, to round keys and values; mode fast; by default not rounded.
        draft: folder of a smaller model that proposes tokens; mode fast.
        adapter: folder of a LoRA adapter of this model in PEFT's format, or its id on the Hub.
        device: cuda, mps or cpu; by default the first of these that is available.
        dtype: float32, bfloat16 or float16; by default as in Llama.build.
    """
    from llama.checkpoints.doctor import PROBLEM, examine, report
    from llama.checkpoints.folder import BUNDLED
    from llama.parallel import is_main_rank, local_device

    if folder is None and dtype is None and local_device(device).type == "cpu":
        dtype = "float32"  # as in Llama.build()

    findings = examine(
        str(folder or BUNDLED), tokenizer_path, max_seq_len, max_batch_size, mp, device, dtype,
        mode, quantize, kv_cache, draft, adapter,  # type: ignore[arg-type]
    )  # fmt: skip
    if is_main_rank():
        say(report(findings))
    if any(found.level == PROBLEM for found in findings):
        sys.exit(1)
