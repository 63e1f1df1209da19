"""GGUF files, the format of llama.cpp: header, mapped tensors, and unpacking of quantized ones.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from llama.errors import CheckpointError
from llama.files import why_unreadable
from llama.gguf_reader import open_reader, package
from llama.memory import with_huge_pages

Value = TypeVar("Value")

# The parts of a model that is split over several files: model-00001-of-00003.gguf and so on.
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 1000
FLOATS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
CHUNK = 1 << 15  # numbers that a thread unpacks or packs at a time; see `in_threads`


def is_gguf(path: Path) -> bool:
    """Whether this is the name of a GGUF file, not of a folder."""
    return path.suffix == ".gguf" and not path.is_dir()


@dataclass(frozen=True)
class PackedTensor:
    """A quantized matrix in a file, mapped. kind: the name of its type, such as "Q4_K"."""

    kind: str
    shape: tuple[int, ...]
    blocks: np.ndarray  # uint8 (rows, bytes of a row)

    def unpack(
        self,
        dtype: torch.dtype = torch.float32,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> Tensor:
        """The numbers of some rows and columns, rounded to `dtype`; contiguous. Besides the result,
        each thread holds one chunk."""
        blocks = self.blocks[rows]
        n_columns = len(range(*columns.indices(self.shape[1])))
        result = with_huge_pages(torch.empty(len(blocks), n_columns, dtype=dtype))

        def unpack_rows(some: range) -> None:
            for row in some:
                chunk = slice(row, row + some.step)
                numbers = _unpack(blocks[chunk], self.kind)
                result[chunk] = numbers[:, columns]

        in_threads(unpack_rows, len(blocks), self.shape[1])
        return result


def in_threads(work: Callable[[range], None], n_rows: int, row_length: int) -> None:
    """Call `work` in several threads, each with the first rows of its chunks.

    A chunk is so small that PyTorch uses one thread for it. More threads in each of these threads
    would wait for each other.
    """
    step = max(1, CHUNK // row_length)
    share = step * math.ceil(n_rows / step / torch.get_num_threads())
    shares = [range(i, min(i + share, n_rows), step) for i in range(0, n_rows, share)]
    with ThreadPoolExecutor(len(shares)) as pool:
        list(pool.map(work, shares))


def _unpack(blocks: np.ndarray, kind: str) -> Tensor:
    """The numbers of blocks, float32."""
    if kind == "Q8_0":
        return _unpack_q8_0(blocks)
    gguf = package()
    with np.errstate(all="ignore"):  # a scale may be infinite
        return torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))


def _unpack_q8_0(blocks: np.ndarray) -> Tensor:
    """What the package gives, in half of its time. A block is a float16 scale and 32 int8."""
    rows = torch.from_numpy(blocks)
    scales = rows.view(torch.float16)[:, ::17].float()  # a block is as long as 17 float16
    steps = rows.view(torch.int8).unflatten(1, (-1, 34))[..., 2:].float()
    return steps.mul_(scales.unsqueeze(-1)).flatten(1)


@dataclass(frozen=True)
class GgufFile:
    """An opened model: the header of its first file, and the tensors of all its files.

    values: the numbers and texts of the header. arrays: its arrays, as fields of the package's
    reader. tensors: by their names in the file.
    """

    path: Path
    values: dict[str, Any]
    arrays: dict[str, Any]
    tensors: dict[str, Tensor | PackedTensor]

    def get(self, key: str, kind: type[Value]) -> Value | None:
        """A number or text, None if the file lacks it. Raises CheckpointError for another kind."""
        if key in self.arrays:
            raise CheckpointError(f"{self.path}: {key} is an array, not of type {kind.__name__}")
        return checked(self.path, self.values, key, kind)

    def get_list(self, key: str, kind: type[Value]) -> list[Value] | None:
        """The elements of an array, None if the file lacks it. Raises CheckpointError for elements
        of another kind."""
        if key not in self.arrays:
            return None
        try:
            elements = self.arrays[key].contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {key} is not UTF-8 text") from error
        if not all(type(element) is kind for element in elements):
            raise CheckpointError(f"{self.path}: {key} is not an array of type {kind.__name__}")
        return elements


def checked(path: Path, values: dict[str, Any], key: str, kind: type[Value]) -> Value | None:
    """A value of a header, None if there is none. Raises CheckpointError for another kind."""
    value = values.get(key)
    if kind is float and type(value) is int:
        value = float(value)
    if value is not None and type(value) is not kind:
        raise CheckpointError(f"{path}: {key} is {value!r:.40}, not of type {kind.__name__}")
    return value


# ---- opening a file ---------------------------------------------------------------------------


def parts_of(path: Path) -> list[Path]:
    """The files of the model that this file belongs to, in order."""
    found = PART.fullmatch(path.name)
    if found is None:
        return [path]
    count = int(found["count"])
    if not 0 < count <= MAX_PARTS:
        raise CheckpointError(f"{path}: a model has 1 to {MAX_PARTS} parts, not {count}")
    numbers = range(1, count + 1)
    return [path.with_name(f"{found['stem']}-{i:05d}-of-{count:05d}.gguf") for i in numbers]


def read_gguf(path: Path) -> GgufFile:
    """Open the model in a file, with all its parts. The tensors are mapped, not read.

    Raises CheckpointError for a file that is missing, damaged or big-endian, and for a tensor whose
    type the package cannot unpack.
    """
    parts = parts_of(path)
    tensors: dict[str, Tensor | PackedTensor] = {}
    readers = [open_reader(part) for part in parts]
    for part, reader in zip(parts, readers, strict=True):
        for found in reader.tensors:
            if found.name in tensors:
                raise CheckpointError(f"{part}: {found.name} is in an earlier part too")
            tensors[found.name] = _mapped(part, found)
    values, arrays = _contents(parts[0], readers[0])
    file = GgufFile(parts[0], values, arrays, tensors)
    stated = file.get("split.tensors.count", int)
    if len(parts) > 1 and stated not in (None, len(tensors)):
        raise CheckpointError(
            f"{parts[0]}: its parts have {len(tensors)} tensors, split.tensors.count is {stated}"
        )
    return file


def read_value(path: Path, key: str, kind: type[Value]) -> Value | None:
    """A number or text of a file's header, None if the file lacks it.

    The header is kept, without its arrays, because many places need one value of the same file.
    """
    path = parts_of(path)[0]
    if reason := why_unreadable(path):
        raise CheckpointError(f"cannot read {path}: {reason}")
    status = path.stat()
    return checked(path, _values(path, status.st_mtime_ns, status.st_size), key, kind)


@lru_cache(maxsize=4)
def _values(path: Path, mtime: int, size: int) -> dict[str, Any]:
    return _contents(path, open_reader(path))[0]


def _contents(path: Path, reader: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values and the arrays of a header. A number is the shortest decimal that is stored as the
    same float32."""
    values, arrays = {}, {}
    for key, field in reader.fields.items():
        kind = field.types[0].name
        if kind == "ARRAY":
            arrays[key] = field
            continue
        try:
            value = field.contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: {key} is not UTF-8 text") from error
        values[key] = float(str(np.float32(value))) if kind == "FLOAT32" else value
    return values, arrays


def _mapped(path: Path, found: Any) -> Tensor | PackedTensor:
    """A tensor of the package's reader, mapped."""
    kind = found.tensor_type.name
    shape = tuple(reversed(found.shape.tolist()))
    blocks = np.asarray(found.data).reshape(-1).view(np.uint8)
    if kind in FLOATS:
        return torch.from_numpy(blocks).view(FLOATS[kind]).view(shape)
    if not _is_unpacked(kind) or len(shape) != 2:
        raise CheckpointError(
            f"{path}: {found.name} {shape} is of type {kind}, which is not opened"
        )
    return PackedTensor(kind, shape, blocks.reshape(shape[0], -1))


@cache
def _is_unpacked(kind: str) -> bool:
    """Whether the package can unpack a type."""
    gguf = package()
    type_ = gguf.GGMLQuantizationType[kind]
    _, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), type_)
    except NotImplementedError:
        return False
    return True
