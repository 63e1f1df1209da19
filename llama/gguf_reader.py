"""The reader of the package `gguf` (extra `[gguf]`), with limits.

Only this file imports the package. Its own reader trusts a file, so that a damaged header can keep
it busy for hours. And it makes an object of each element of an array, so that Llama 3's vocabulary
takes 14 seconds.
"""

import logging
import math
import struct
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llama.errors import CheckpointError
from llama.files import why_unreadable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# Limits of a header, far above those of any Llama. Llama 3's has 8 MB, and 540,000 elements.
MAX_COUNT = 1 << 14  # keys, and tensors
MAX_HEADER = 1 << 28  # bytes
MAX_ELEMENTS = 1 << 21  # of all arrays together
MAX_DIMENSIONS = 4


def package() -> ModuleType:
    """The package `gguf`. Raises CheckpointError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "a GGUF file needs the package gguf: pip install 'llama-reference[gguf]'"
        ) from None
    logging.getLogger("gguf").setLevel(logging.WARNING)  # its writer logs each step
    return gguf


def open_reader(path: Path) -> Any:
    """The package's reader of one file, whose tensors are mapped.

    Raises CheckpointError for a file that cannot be read, is damaged or is big-endian.
    """
    if reason := why_unreadable(path):
        raise CheckpointError(f"cannot read {path}: {reason}")
    reader = _reader_class()
    try:
        with path.open("rb") as file:
            _check_start(file.read(24))
        with np.errstate(all="ignore"):
            return reader(path, "c")  # copy on write: a change of a weight stays in memory
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or of another format: {reason}") from error


def _check_start(start: bytes) -> None:
    """Raise ValueError unless a file with these first bytes can be read."""
    if start[:4] != MAGIC:
        raise ValueError("it does not begin with GGUF")
    if len(start) < 24:
        raise ValueError(f"it ends at byte {len(start)}")
    version, n_tensors, n_keys = struct.unpack("<IQQ", start[4:])
    if version & 0xFFFF == 0:
        raise ValueError("it is big-endian, and only little-endian files are read")
    if version not in VERSIONS:
        raise ValueError(f"it is of version {version}, not 2 or 3")
    for number, what in ((n_keys, "keys"), (n_tensors, "tensors")):
        if number > MAX_COUNT:
            raise ValueError(f"it has {number} {what}, and the limit is {MAX_COUNT}")


@cache
def _reader_class() -> Any:
    gguf = package()
    array, string = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING

    class Reader(gguf.GGUFReader):  # type: ignore[name-defined]
        """The package's reader. It reads an array at once, and checks each size that a file gives
        before it uses the size. The methods raise ValueError."""

        n_elements = 0

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            part = super()._get(offset, dtype, count, override_order)
            if len(part) != count:
                raise self._ends_early()
            return part

        def _ends_early(self) -> ValueError:
            return ValueError(f"it ends at byte {len(self.data)}, before its content does")

        def _get_str(self, offset: int) -> Any:
            end = offset + 8 + int(self._get(offset, np.uint64)[0])
            if end > MAX_HEADER:
                raise ValueError(
                    f"its header has {end} bytes or more, and the limit is {MAX_HEADER}"
                )
            return super()._get_str(offset)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != array:
                return super()._get_field_parts(orig_offs, raw_type)
            element = self._get(orig_offs, np.uint32)
            length = self._get(orig_offs + 4, np.uint64)
            n, at = int(length[0]), orig_offs + 12
            kind = gguf.GGUFValueType(int(element[0]))
            self.n_elements += n
            if self.n_elements > MAX_ELEMENTS:
                raise ValueError(f"its arrays have more than {MAX_ELEMENTS} elements")
            parts = [element, length]
            if kind == string:
                size_at, data = struct.Struct("<Q").unpack_from, self.data.view(np.ndarray)
                for _ in range(n):
                    start = at + 8
                    if start > len(data):
                        raise self._ends_early()
                    at = start + size_at(data, at)[0]
                    parts.append(data[start:at])
                if at > len(data):
                    raise self._ends_early()
                return at - orig_offs, parts, list(range(2, 2 + n)), [array, kind]
            if kind not in self.gguf_scalar_to_np:
                raise ValueError(f"an array has elements of type {kind.name}")
            parts.append(self._get(at, self.gguf_scalar_to_np[kind], n))
            return 12 + parts[2].nbytes, parts, [2], [array, kind]

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            for field in fields:
                _, _, _, dims, kind, offset = field.parts
                if not 0 < len(dims) <= MAX_DIMENSIONS or 0 in dims:
                    raise ValueError(f"{field.name} has the shape {dims[:MAX_DIMENSIONS].tolist()}")
                known = gguf.GGML_QUANT_SIZES.get(int(kind[0]))
                if known is None:
                    raise ValueError(f"{field.name} is of the unknown type {int(kind[0])}")
                block, block_bytes = known
                start = int(start_offs) + int(offset[0])
                end = start + math.prod(dims.tolist()) // block * block_bytes
                if end > len(self.data):
                    size = len(self.data)
                    raise ValueError(f"{field.name} ends at byte {end}, and the file at {size}")
                if start % 8:
                    raise ValueError(f"{field.name} begins at byte {start}, not a multiple of 8")
            super()._build_tensors(start_offs, fields)

    return Reader
