"""Checkpoint folders of Meta or Hugging Face, and GGUF files: find their files, and open them."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from llama import config, parallel
from llama.checkpoints import gguf_checkpoint, hub, hugging_face
from llama.checkpoints.adapter import Adapter
from llama.checkpoints.adapter_config import CONFIG
from llama.checkpoints.params import read_params
from llama.checkpoints.pickled import check_kind
from llama.checkpoints.shards import Checkpoint, find_shards, read_shard
from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.fast.quantize import (
    KINDS,
    LAYOUT,
    Width,
    is_quantized,
)
from llama.files import MappedFiles, read_json, why_unreadable
from llama.gguf_file import is_gguf, parts_of, read_gguf
from llama.tokenizer_files.from_gguf import has_vocabulary

log = logging.getLogger("llama")
BUNDLED = Path(__file__).parent.parent / "bundled"  # the model in this package

STEP = re.compile(r"step_\d{8}")

# Files that show that a folder cannot be opened, and what the user can do instead.
FOREIGN = {
    CONFIG: "this is a LoRA adapter: open its base model, and name this folder as the adapter",
}


def run_checkpoints(out_dir: Path) -> list[Path]:
    """The complete checkpoints of a training run, oldest first: folders such as `step_00000200`."""
    if not out_dir.is_dir():
        return []
    return sorted(path for path in out_dir.iterdir() if STEP.fullmatch(path.name))


def find_folder(ckpt_dir: str | Path) -> Path:
    """The folder that holds the weights: `ckpt_dir` with Meta's or Hugging Face's files, or the
    `original/` inside it, where Hugging Face's repositories keep Meta's files. For a GGUF file, or
    a folder with the file or the parts of one such model, it is the path of the first part."""
    folder = Path(ckpt_dir)
    if is_gguf(folder):
        return parts_of(folder)[0]
    if not os.path.isdir(folder):  # also False for a name that is no valid file name
        raise CheckpointError(f"no such checkpoint folder: {folder}")
    if has_params(folder):
        return folder
    if os.path.lexists(folder / "config.json") and hugging_face.weight_files(folder):
        return folder
    if has_params(folder / "original"):
        return folder / "original"
    if steps := run_checkpoints(folder):
        if parallel.is_main_rank():
            log.info("%s is a training run: opened at its newest step, %s", folder, steps[-1].name)
        return find_folder(steps[-1])
    if files := sorted({parts_of(path)[0] for path in folder.glob("*.gguf")}):
        if len(files) > 1:
            names = ", ".join(path.name for path in files)
            raise CheckpointError(f"{folder} has several GGUF models: name one of {names}")
        return files[0]
    for pattern, advice in FOREIGN.items():
        if found := sorted(folder.glob(pattern)):
            raise CheckpointError(f"{found[0]}: {advice}")
    raise CheckpointError(
        f"{folder} has no params.json, no config.json with .safetensors or pytorch_model.bin, no "
        ".gguf file and no original/ folder"
    )


def find_tokenizer(folder: Path, ckpt_dir: Path) -> Path:
    """The tokenizer file for the weights in `folder`, which `find_folder` found for `ckpt_dir`.

    Hugging Face's repositories keep Meta's tokenizer in `original/`. Meta's Llama 2 downloads keep
    it in the parent folder. A GGUF file without a vocabulary may have the file beside it.
    """
    own = [folder, ckpt_dir, ckpt_dir / "original"]
    if is_gguf(folder):
        if has_vocabulary(folder):
            return folder
        own.append(folder.parent)
    places = [place / name for name in ("tokenizer.model", "tokenizer.json") for place in own]
    for place in (*places, ckpt_dir.parent / "tokenizer.model"):
        if os.path.lexists(place):  # opening a bad file later gives the reason
            return place
    raise CheckpointError(
        f"{folder} has no tokenizer.model or tokenizer.json: name one with tokenizer_path"
    )


def has_params(folder: Path) -> bool:
    return os.path.lexists(folder / "params.json")


def read_args(folder: Path, rope_factor: float | None = None) -> ModelArgs:
    """The model's shape, from params.json, config.json or a GGUF file."""
    if is_gguf(folder):
        return gguf_checkpoint.read_args(read_gguf(folder), rope_factor)
    if has_params(folder):
        return read_params(folder / "params.json", rope_factor)
    return hugging_face.read_config(folder / "config.json", rope_factor)


def read_quantization(folder: Path) -> Width | None:
    """The width that a folder's matrices are quantized to, from `params.json`, or None."""
    path = folder / "params.json"
    stated = read_json(path).get("quantization") if has_params(folder) else None
    if stated is None:
        return None
    width = stated.get("width") if isinstance(stated, dict) else None
    if not isinstance(width, str) or width not in KINDS:
        raise CheckpointError(f"{path}: quantization is {stated!r}, not one of {', '.join(KINDS)}")
    if stated.get("layout") != LAYOUT:
        raise CheckpointError(
            f"{path}: quantized in layout {stated.get('layout')!r}, but this version reads "
            f"{LAYOUT}: convert the model again"
        )
    return cast(Width, width)


def open_checkpoint(ckpt_dir: str | Path, rope_factor: float | None = None) -> Checkpoint:
    """Open a folder in Meta's or Hugging Face's layout, or a GGUF file; see `read_params` for
    rope_factor."""
    folder = find_folder(ckpt_dir)
    files = MappedFiles(path for path in _weight_files(folder) if why_unreadable(path) is None)
    opened = _open(folder, rope_factor)
    opened.files = files
    return opened


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that hold the weights. Some of them may be unreadable."""
    if is_gguf(folder):
        return iter(parts_of(folder))
    if has_params(folder):
        return folder.glob("consolidated.*")
    name = Path(hugging_face.weight_files(folder) or hugging_face.WEIGHTS[0])
    return folder.glob(f"{name.stem}*{name.suffix}")


def _open(folder: Path, rope_factor: float | None) -> Checkpoint:
    if is_gguf(folder):
        return gguf_checkpoint.open_gguf(folder, rope_factor)
    args = read_args(folder, rope_factor)
    if quantization := read_quantization(folder):
        if args.vocab_size == -1:
            raise CheckpointError(f"{folder}: vocab_size is -1: a quantized folder must state it")
        shards = [_read_quantized(path) for path in find_shards(folder, quantization)]
        if len(shards) > 1:
            args.embedding_shard_dim = _embedding_shard_dim(shards[0], args)
        return Checkpoint(folder, args, shards, quantization=quantization)
    if has_params(folder):
        shards = [read_shard(path) for path in find_shards(folder)]
        if len(shards) > 1:  # one shard does not show the split: the default is kept
            args.embedding_shard_dim = _embedding_shard_dim(shards[0], args)
        args.tied = all(_is_tied(shard) for shard in shards) or _is_tied_in_effect(shards, args)
        return Checkpoint(folder, args, shards)
    tensors = hugging_face.map_tensors(folder)
    for name, tensor in tensors.items():
        check_kind(folder, name, tensor)
    if not args.tied and "output.weight" not in tensors:
        raise CheckpointError(
            f"{folder}: lm_head.weight is missing, and config.json does not say "
            '"tie_word_embeddings": true. If the model is tied, add that key'
        )
    embedding = tensors.get("tok_embeddings.weight")
    if args.tied and embedding is not None:
        output = tensors.setdefault("output.weight", embedding)
        if not torch.equal(output, embedding):
            raise CheckpointError(
                f"{folder}: config.json ties lm_head.weight to the embedding, but the two differ "
                "in the files"
            )
    return Checkpoint(folder, args, [tensors], is_hugging_face=True)


def find_adapter(name: str | Path) -> Path:
    """The folder of a LoRA adapter.

    name: this folder, a training run with such folders, or the adapter's id on the Hugging Face
        Hub.
    """
    folder = hub.local_folder(name)
    steps = run_checkpoints(folder)
    return steps[-1] if steps and not os.path.lexists(folder / CONFIG) else folder


def adapter_warning(adapter: Adapter, folder: Path) -> str | None:
    """A warning if the adapter was trained on a model of another name than that in `folder`."""
    if adapter.base is None:
        return None
    base = model_name(Path(adapter.base))
    if is_gguf(folder):  # the name goes on with the type of the matrices
        is_same = folder.name.lower().startswith(base)
    else:
        is_same = model_name(folder.resolve()) == base
    if is_same:
        return None
    return f"{adapter.folder} was trained on {adapter.base}, and is used on {folder}"


def model_name(place: Path) -> str:
    """The model's name in the path of its folder, in lower case."""
    if place.name == "original":  # inside a repository of Hugging Face
        place = place.parent
    if place.parent.name == "snapshots":  # in models--owner--name in Hugging Face's cache
        return place.parent.parent.name.lower().rpartition("--")[2]
    return place.name.lower()


def _read_quantized(path: Path) -> dict[str, Tensor]:
    """A shard of a quantized folder, mapped. `check_complete` checks the quantized tensors."""
    tensors = hugging_face.map_file(path)
    for name, tensor in tensors.items():
        if not is_quantized(name):
            check_kind(path, name, tensor)
    return tensors


def _embedding_shard_dim(shard: dict[str, Tensor], args: ModelArgs) -> int:
    """The dimension along which `tok_embeddings` is split: 1 if a shard lacks some features."""
    embedding = shard.get("tok_embeddings.weight")
    return int(embedding is not None and embedding.shape[-1:] != (args.dim,))


def _is_tied(shard: dict[str, Tensor]) -> bool:
    """Whether output and embedding are one tensor in the file."""
    pair = [shard.get("tok_embeddings.weight"), shard.get("output.weight")]
    first, second = (None if t is None else (t.data_ptr(), t.shape) for t in pair)
    return first is not None and first == second


def _is_tied_in_effect(shards: list[dict[str, Tensor]], args: ModelArgs) -> bool:
    """Whether the published model of this shape is tied, and the two matrices are equal here.

    Meta's files of Llama 3.2 hold the matrix twice. A fine-tune may change one copy, so both copies
    are read whole and compared."""
    names = ("tok_embeddings.weight", "output.weight")
    return any(config.PRESETS[name].tied for name in args.published()) and all(
        all(name in shard for name in names) and torch.equal(*(shard[name] for name in names))
        for shard in shards
    )
