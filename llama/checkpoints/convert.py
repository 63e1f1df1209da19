"""Convert a checkpoint: Meta's or Hugging Face's layout, any number of shards, quantized, or GGUF.

The new folder or file is written under a temporary name beside its destination, and renamed when
all of it is on disk. So a kill or a full disk leaves nothing partial at the destination.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from llama.checkpoints import beside_weights, hub, hugging_face, shards, write_gguf
from llama.checkpoints.folder import adapter_warning, find_adapter, open_checkpoint
from llama.checkpoints.load import check_complete, parse_dtype
from llama.checkpoints.params import write_params
from llama.checkpoints.shards import Checkpoint
from llama.errors import CheckpointError, ConfigError
from llama.fast.quantize import Width, is_quantized
from llama.fast.quantizers import QUANTIZERS
from llama.files import check_can_make_folder, lock, sync_file, unlock, write_json
from llama.gguf_file import is_gguf

log = logging.getLogger("llama")

HF_FILE_BYTES = 5 * 10**9  # most bytes of weights in one `.safetensors`, as Hugging Face does


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "meta",
    mp: int = 1,
    dtype: str | None = None,
    force: bool = False,
    quantize: Width | None = None,
    adapter: str | Path | None = None,
) -> Path:
    """Write the checkpoint `src` as a new folder or GGUF file `dst`.

    to: "meta" for `params.json` and `mp` shards, "hf" for `config.json` and `.safetensors`. Both
        include the tokenizer's files and the settings for generation; see `beside_weights`. "gguf"
        for one file with all of that.
    dtype: dtype of all weights; None: each weight keeps its own, and those of a quantized GGUF file
        become bfloat16. For to="gguf" it is the type of the matrices; see `write_gguf.TYPES`.
    force: replace `dst` if it exists.
    quantize: "int8" or "int4": quantize the matrices, for fast mode. Only with to="meta"; the
        shards are then `.safetensors`.
    adapter: folder or id of a LoRA adapter, which is merged into the weights.
    Raises a LlamaError; `dst` is then unchanged.
    """
    if to not in ("meta", "hf", "gguf"):
        raise ConfigError(f"to is {to!r}: it must be meta, hf or gguf")
    if to != "meta" and mp != 1:
        raise ConfigError(f"only Meta's folders are split over ranks: to is {to}, mp is {mp}")
    if quantize is not None and quantize not in QUANTIZERS:
        raise ConfigError(f"quantize is {quantize!r}: it must be {' or '.join(QUANTIZERS)}")
    if quantize is not None and to != "meta":
        raise ConfigError(f"to is {to!r}: with quantize it must be meta")
    kind = None if dtype is None or to == "gguf" else parse_dtype(dtype)
    destination = Path(dst)
    if (destination.suffix == ".gguf") != (to == "gguf"):
        raise ConfigError(f"to is {to}, but dst is {dst}: a GGUF file, and only it, ends in .gguf")
    check_can_make_folder(destination.parent)
    if os.path.lexists(destination) and not force:
        raise CheckpointError(f"{dst} exists: it is replaced only with --force")
    src = hub.local_folder(src)
    source = open_checkpoint(src)
    if os.path.exists(destination) and destination.samefile(src):
        raise CheckpointError(f"cannot write {dst}: it is the source")
    if source.quantization is not None:
        raise CheckpointError(f"{src} is quantized to {source.quantization}: convert the original")
    source.set_vocab_size()
    if adapter is not None:
        opened = source.merge(find_adapter(adapter))
        if (warning := adapter_warning(opened, source.folder)) is not None:
            log.warning(warning)
    # All that can fail because of the source comes before anything is written.
    check_complete(source)
    if is_gguf(source.folder):  # its tensors are of several types
        kind = kind or source.dtype
    tokenizer = beside_weights.source_tokenizer(source, src)
    if to == "meta":
        if len(source.shards) == 1 and tokenizer is not None and tokenizer.is_llama_2:
            # A single shard does not tell along which dimension the embedding is to be split.
            # Meta's code of Llama 2 splits it by features (dimension 1).
            source.args.embedding_shard_dim = 0 if source.args.tied else 1
        # With more shards than key/value heads, each head is stored more than once. n_kv_heads
        # counts all copies.
        args = replace(source.args, n_kv_heads=max(source.args.local_kv_heads(1), mp))
        files = beside_weights.meta_files(source, tokenizer, src)
        if quantize is None and (params := beside_weights.metas_params(source, src, args)):
            files["params.json"] = params
    elif to == "gguf":
        matrix_type = write_gguf.parse_type(dtype, source)
        header = write_gguf.header(source, tokenizer, destination.stem, matrix_type)
    else:
        last = list(source.args.parameter_shapes())[-1]
        files = beside_weights.hugging_face_files(
            source, tokenizer, src, kind or source.shards[0][last].dtype, destination.name
        )
    try:
        with _partial_folder(destination) as partial:
            if to == "gguf":
                file = partial / destination.name
                write_gguf.write_gguf(source, file, header, matrix_type)
                sync_file(file)
                source.files.check()
                _rename(file, destination)
                return destination
            if to == "meta":
                _write_meta(source, partial, mp, kind, quantize)
                if "params.json" not in files:
                    write_params(partial / "params.json", args, quantize)
            else:
                _write_hugging_face(source, partial, kind)
            _write_files(files, partial)
            source.files.check()  # a source that was changed meanwhile gives a mixture
            partial.chmod(0o755)  # mkdtemp makes it 0700
            _rename(partial, destination)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"cannot write {dst}: {reason}") from error
    return destination


@contextlib.contextmanager
def _partial_folder(destination: Path) -> Iterator[Path]:
    """A new hidden folder beside the destination. It is removed at the end of the block, and so is
    at the start what killed processes have left. Raises DataError if another process writes to this
    destination."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    held = lock(destination)
    partial, old = (f".{destination.name}.{kind}." for kind in ("partial", "old"))
    try:
        for path in destination.parent.iterdir():
            if path.name.startswith((partial, old)):
                shutil.rmtree(path, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=partial, dir=destination.parent))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        unlock(held)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`, contiguous and in a storage of its own. A view would be saved with its
    whole storage."""
    cast = weight.to(dtype)
    is_view = cast.untyped_storage().nbytes() != cast.nbytes or not cast.is_contiguous()
    return cast.clone(memory_format=torch.contiguous_format) if is_view else cast


def _dtype(source: Checkpoint, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """None: the dtype of the weight in the source. An adapter does not change it."""
    return dtype or source.shards[0][name].dtype


def _write_meta(
    source: Checkpoint, folder: Path, mp: int, dtype: torch.dtype | None, quantize: Width | None
) -> None:
    args = source.args
    args.check_split(mp)
    names = list(args.parameter_shapes() if quantize is None else args.whole_shapes())
    progress = tqdm(total=mp * len(names), desc="Converting", unit="tensor", delay=2)
    for i in range(mp):
        shard: dict[str, Tensor] = {}
        for name in names:
            if quantize is not None and is_quantized(name):
                weight = source.quantized_part(name, mp, i, quantize)
                shard |= {f"{name}.{field}": t for field, t in weight._asdict().items()}
            else:
                shard[name] = _cast(source.part(name, mp, i, dtype), _dtype(source, name, dtype))
            progress.update()
        path = folder / shards.shard_name(i, quantize)
        if quantize is not None:
            save_file(shard, path)
            sync_file(path)
            continue
        if args.tied:
            shard["output.weight"] = shard["tok_embeddings.weight"]
        shards.write_shard(path, shard)
    progress.close()


def _write_hugging_face(source: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    names = list(source.args.parameter_shapes())
    files = _group_by_file(source, names, dtype)
    weight_map: dict[str, str] = {}
    progress = tqdm(total=len(names), desc="Converting", unit="tensor", delay=2)
    for i, group in enumerate(files):
        one = len(files) == 1
        file = "model.safetensors" if one else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for name in group:
            weight = source.part(name, 1, 0, dtype)
            if name.endswith(hugging_face.ROTATED):
                weight = hugging_face.to_hugging_face_rows(weight, source.args.head_dim)
            cast = _cast(weight, _dtype(source, name, dtype))
            tensors[hugging_face.hugging_face_name(name)] = cast
            progress.update()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        sync_file(folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    progress.close()
    if len(files) > 1:
        total = sum(_bytes(source, name, dtype) for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / (hugging_face.WEIGHTS[0] + ".index.json"), index)


def _bytes(source: Checkpoint, name: str, dtype: torch.dtype | None) -> int:
    shape = torch.Size(source.args.whole_shapes()[name])
    return shape.numel() * _dtype(source, name, dtype).itemsize


def _group_by_file(
    source: Checkpoint, names: list[str], dtype: torch.dtype | None
) -> list[list[str]]:
    """The names in order, in groups that each fit into one file."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = _bytes(source, name, dtype)
        if groups[-1] and filled + size > HF_FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write_files(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        sync_file(path)


def _rename(partial: Path, destination: Path) -> None:
    """Move the finished folder or file to its place, and delete the old one afterwards."""
    old = None
    if os.path.lexists(destination):
        old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent))
        destination.rename(old / destination.name)
    partial.rename(destination)
    if old is not None:
        shutil.rmtree(old)
