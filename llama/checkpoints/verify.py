"""Verify a checkpoint folder: names, shapes, finite numbers, equal copies, and checksums."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from llama import parallel
from llama.checkpoints.folder import model_name, open_checkpoint
from llama.checkpoints.inspect import weights_of
from llama.checkpoints.load import check_complete
from llama.checkpoints.shards import Checkpoint
from llama.errors import CheckpointError, LlamaError
from llama.files import atomic_file, read_json, read_text, why_unreadable
from llama.gguf_file import is_gguf, parts_of, read_value
from llama.terminal_text import printable

MANIFEST = "SHA256SUMS"  # what `sha256sum --check` reads too
CHECKLIST = "checklist.chk"  # Meta's file, with MD5 checksums
# The files that make up a checkpoint.
SUFFIXES = (".pth", ".safetensors", ".bin", ".json", ".model")
CHUNK = 1 << 24  # bytes or elements that are read at a time


def verify(folder: str | Path, write_manifest: bool = True) -> tuple[str, list[str]]:
    """A title for the folder, and a line for each problem.

    write_manifest: if there is no SHA256SUMS and no problem, write SHA256SUMS. Later calls check
        the files against it.
    Raises a LlamaError if the folder cannot be opened at all.
    """
    opened = open_checkpoint(folder)
    opened.set_vocab_size()
    problems = []
    try:
        check_complete(opened)
    except CheckpointError as error:
        problems.append(str(error))
    else:
        problems += _wrong_numbers(opened)
        problems += opened.copied_shards()
    problems += _wrong_sums(opened.folder)
    is_folder = opened.folder.is_dir()  # a GGUF file is no folder
    if write_manifest and is_folder and not problems and not (opened.folder / MANIFEST).exists():
        _write_manifest(opened.folder)
    return title_of(opened), problems


# ---- the tensors ------------------------------------------------------------------------------


def _wrong_numbers(opened: Checkpoint) -> Iterator[str]:
    """Yield a line for each tensor that is not finite, that differs from its copy in the first
    shard, or that has another dtype than the checkpoint."""
    dtype = opened.dtype
    reference = "the output matrix" if opened.quantization is None else "the embedding"
    for weight, shape in tqdm(opened.args.parameter_shapes().items(), "Tensors", delay=2):
        dim = parallel.shard_dim(weight, opened.args.embedding_shard_dim)
        opened.files.check()
        for name, (_, fixed) in opened.stored_tensors(weight, shape).items():
            first = opened.tensor(0, name)
            # A scale with one number a row has no dimension 1 to split.
            is_copied = dim is None or dim >= first.dim()
            for i in range(len(opened.shards)):
                where = f"{opened.file_of(i)}: {opened.name_in_file(name)}"
                tensor = first if i == 0 else opened.tensor(i, name)
                if not _is_finite(tensor):
                    yield f"{where} has numbers that are not finite"
                # The tensors of a GGUF file are of several types.
                if fixed is None and tensor.dtype != dtype and not is_gguf(opened.folder):
                    yield f"{where} is {tensor.dtype}, but {reference} is {dtype}"
                if is_copied and i > 0 and not torch.equal(tensor, first):
                    yield f"{where} should be equal in all shards, but differs from the first"


def _is_finite(tensor: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in tensor.flatten().split(CHUNK))


# ---- the files --------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    if is_gguf(folder):
        return parts_of(folder)
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def checksum(path: Path, algorithm: str) -> str:
    """The checksum of a file, in hexadecimal digits; algorithm: "md5" or "sha256"."""
    digest = hashlib.new(algorithm)
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=printable(path.name), unit="B", unit_scale=True, delay=2) as bar,
    ):
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _read_sums(path: Path, digits: int) -> dict[str, str]:
    """The checksums of a file in the form of md5sum and sha256sum: digest, blanks, name."""
    if reason := why_unreadable(path):
        raise CheckpointError(f"cannot read {path}: {reason}")
    sums = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        digest, _, name = line.partition(" ")
        name = name.lstrip(" *")
        if not line.strip():
            continue
        if len(digest) != digits or Path(name).name != name or not name:
            raise CheckpointError(f"{path}, line {number} is no checksum and name")
        sums[name] = digest.lower()
    return sums


def _wrong_sums(opened: Path) -> Iterator[str]:
    """Yield a line for each file that differs from its checksum. The checksums of a GGUF file are
    in a file beside it, which may list other models too."""
    folder = opened.parent if is_gguf(opened) else opened
    for file, algorithm, digits in ((CHECKLIST, "md5", 32), (MANIFEST, "sha256", 64)):
        if not os.path.lexists(folder / file):
            continue
        for name, digest in _read_sums(folder / file, digits).items():
            path = folder / name
            if is_gguf(opened) and path not in _files(opened):
                continue
            if why_unreadable(path):
                yield f"{folder / file} lists {name}, which is missing"
            elif checksum(path, algorithm) != digest:
                yield f"{path} does not have the {algorithm} checksum in {file}"


def _write_manifest(folder: Path) -> None:
    lines = [f"{checksum(path, 'sha256')}  {path.name}\n" for path in _files(folder)]
    with atomic_file(folder / MANIFEST) as file:
        file.write("".join(lines).encode())


# ---- the title -------------------------------------------------------------------------------


def title_of(opened: Checkpoint) -> str:
    """One line, such as: Llama 3.1 8B, instruct or base unknown, 1 shard, bfloat16, 16.06 GB."""
    published = [name.removesuffix("-mp16").rpartition("-") for name in opened.args.published()]
    if published:  # Llama 3.1 70B and 3.3 70B have the same shape
        families = dict.fromkeys(family for family, _, _ in published)
        versions = " or ".join(family.removeprefix("llama-") for family in families)
        name = "Code Llama" if versions == "codellama" else f"Llama {versions}"
        model = f"{name} {published[0][2].upper()}"
    else:
        total = sum(weight.parameters for weight in weights_of(opened.args, 1))
        model = f"a Llama of {total:,} parameters"
    size = sum(path.stat().st_size for path in _files(opened.folder)) / 1e9
    if is_gguf(opened.folder):
        layout = "GGUF"
    elif opened.is_hugging_face:
        layout = "Hugging Face's layout"
    else:
        layout = f"{len(opened.shards)} shard{'s' if len(opened.shards) > 1 else ''}"
    kind = kind_of(opened.folder)
    return f"{model}, {kind}, {layout}, {opened.stored_as()}, {size:.2f} GB"


# The folders of base models as Meta and Hugging Face name them. All of Llama 3.3 is instruct.
BASE_NAME = re.compile(
    r"(meta-)?llama-?(2|3|3\.1|3\.2)-\d+b(-mp\d+)?(-hf)?|codellama-\d+b(-python)?(-hf)?"
)
UNKNOWN = "instruct or base unknown"


def kind_of(folder: Path) -> str:
    """Whether the model was trained to chat: "instruct", "base" or UNKNOWN.

    It depends on the chat template, or its absence, and on the name of the folder or GGUF file."""
    if is_gguf(folder):
        has_template = read_value(folder, "tokenizer.chat_template", str) is not None
        return _kind(folder.stem.lower(), has_template)
    place = folder.resolve()
    if place.name == "original":  # inside a repository of Hugging Face
        place = place.parent
    name = model_name(place)
    if any((place / f"chat_template.{suffix}").exists() for suffix in ("jinja", "json")):
        return "instruct"
    try:
        return _kind(name, "chat_template" in read_json(place / "tokenizer_config.json"))
    except LlamaError:
        return _kind(name, None)  # Meta's folders have no such file


def _kind(name: str, has_template: bool | None) -> str:
    if has_template or "instruct" in name or "-chat" in name:
        return "instruct"
    return "base" if has_template is False or BASE_NAME.fullmatch(name) else UNKNOWN
