"""Shards: the tensors of a checkpoint's files, mapped, cut into a rank's parts, and written."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm

from llama import parallel
from llama.checkpoints import hugging_face
from llama.checkpoints.adapter import Adapter, open_adapter
from llama.checkpoints.pickled import read_pickled
from llama.config import ModelArgs
from llama.errors import CheckpointError, ConfigError
from llama.fast.quantize import (
    KINDS,
    Quantized,
    Width,
    is_quantized,
    join,
    narrow,
    quantize_int8,
)
from llama.fast.quantizers import QUANTIZERS
from llama.files import MappedFiles, atomic_file
from llama.memory import with_huge_pages

# The projections of keys and values.
KEYS_AND_VALUES = ("wk.weight", "wv.weight", "wk.bias", "wv.bias")
# The two weights that are one matrix in a tied model.
TIED = ("tok_embeddings.weight", "output.weight")
# Bytes. A float tensor with a smaller alignment is copied from the mapped file. safetensors
# guarantees only 8.
ALIGNMENT = 64
SPLIT_MATRIX = "layers.0.attention.wq.weight"  # each shard has a different part of it
COMPARED_ROWS = 8  # of SPLIT_MATRIX
IGNORED = "rope.freqs"  # RoPE's table in Llama 2's files, which is not needed


def shard_name(rank: int, quantization: Width | None = None) -> str:
    return f"consolidated.{rank:02d}.{'pth' if quantization is None else 'safetensors'}"


def find_shards(folder: Path, quantization: Width | None = None) -> list[Path]:
    """The shards consolidated.00.pth, consolidated.01.pth, … in the order of the ranks."""
    first = shard_name(0, quantization)
    shards = sorted(folder.glob(first.replace("00", "*")))
    if not shards:
        raise CheckpointError(f"{folder} has no shards ({first} and so on)")
    for rank, shard in enumerate(shards):
        if shard.name != (name := shard_name(rank, quantization)):
            raise CheckpointError(f"{folder} has {shard.name} where {name} is expected")
    return shards


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.pth` file; see `read_pickled`."""
    return {name: tensor for name, tensor in read_pickled(path).items() if name != IGNORED}


@dataclass
class Checkpoint:
    """An opened folder: the model's shape and its tensors by Meta's names, mapped, not yet read.

    shards: equal parts of the model, split as `parallel.shard_dim` says. A Hugging Face folder is
        one shard, whatever its number of files.
    quantization: the width of the quantized matrices (see `is_quantized`) in a folder that
        `convert` wrote. For each such matrix a shard has one tensor for each field of `Int8Weight`
        or `Int4Weight`.
    adapter: a LoRA adapter that is merged into the parts. None: there is none.
    files: the files that hold the weights, as they were before they were opened.
    """

    folder: Path
    args: ModelArgs
    shards: list[dict[str, Tensor]]
    is_hugging_face: bool = False  # Q and K have their rows in Hugging Face's order
    quantization: Width | None = None
    adapter: Adapter | None = None
    files: MappedFiles = field(default_factory=MappedFiles)

    def name_in_file(self, name: str) -> str:
        """The name of a tensor in the folder's files."""
        return hugging_face.hugging_face_name(name) if self.is_hugging_face else name

    def file_of(self, shard: int) -> Path:
        if self.is_hugging_face:
            return self.folder
        return self.folder / shard_name(shard, self.quantization)

    def stored_tensors(
        self, name: str, shape: Sequence[int]
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """The tensors of a shard that represent the model's tensor `name`: their names, shapes and
        required dtypes. A dtype of None means that any dtype is allowed."""
        if self.quantization is None or not is_quantized(name):
            return {name: (tuple(shape), None)}
        weight = KINDS[self.quantization].empty(shape, torch.device("meta"))
        return {f"{name}.{f}": (t.shape, t.dtype) for f, t in weight._asdict().items()}

    def set_vocab_size(self) -> None:
        """Take vocab_size from the output matrix if params.json says -1, as Llama 2's does."""
        output = self.shards[0].get("output.weight")
        if self.args.vocab_size == -1 and output is not None and output.dim() == 2:
            self.args.vocab_size = output.shape[0] * len(self.shards)

    def tensor(self, shard: int, name: str) -> Tensor:
        """A tensor of a shard, as it is in the file."""
        return self.shards[shard][name]

    def copied_shards(self) -> Iterator[str]:
        """A line for each shard that is a copy of an earlier one. The first rows of one matrix are
        compared, because no two parts of a trained matrix have equal rows."""
        parts = [
            next(part for name, part in shard.items() if name.startswith(SPLIT_MATRIX))
            for shard in self.shards
        ]
        for i, part in enumerate(parts):
            for j in range(i):
                if torch.equal(part[:COMPARED_ROWS], parts[j][:COMPARED_ROWS]):
                    yield f"{self.file_of(i)} is a copy of {self.file_of(j).name}"
                    break

    def stored_as(self) -> str:
        """The quantization or the dtype of the matrices, for messages."""
        first = next(iter(self.shards[0].values()))
        return self.quantization or str(first.dtype).removeprefix("torch.")

    def merge(self, adapter: Path) -> Adapter:
        """Merge the LoRA adapter in this folder into the parts that are read from now on, and
        return it. See `open_adapter` for the errors."""
        if self.quantization is not None:
            raise CheckpointError(
                f"{self.folder} is quantized to {self.quantization}: {adapter} can only be merged "
                "into the original"
            )
        self.set_vocab_size()
        self.adapter = open_adapter(adapter, self.args)
        # PEFT changes one of embedding and output, and leaves the other as it is.
        self.args.tied &= not any(self.adapter.touches(name) for name in TIED)
        return self.adapter

    @property
    def dtype(self) -> torch.dtype:
        """The default dtype of all weights: the dtype of the output matrix, or of the embedding if
        the output matrix is quantized."""
        name = "output.weight" if self.quantization is None else "tok_embeddings.weight"
        return self.shards[0][name].dtype

    def is_mapped(self, name: str, n_parts: int, dtype: torch.dtype) -> bool:
        """Whether the part of a tensor that a CPU rank loads is mapped from the file."""
        if self.adapter is not None and self.adapter.touches(name):
            return False
        if self.quantization is not None and is_quantized(name):
            parts = self._quantized_pieces(name, n_parts, 0)
            return len(parts) == 1 and all(tensor.is_contiguous() for tensor in parts[0])
        pieces = self._pieces(name, n_parts, 0)
        is_reordered = self.is_hugging_face and name.endswith(hugging_face.ROTATED)
        return (
            len(pieces) == 1
            and pieces[0].is_contiguous()
            and not is_reordered
            and pieces[0].dtype == dtype
            and (self.quantization is not None or pieces[0].data_ptr() % ALIGNMENT == 0)
        )

    def part(self, name: str, n_parts: int, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """One of `n_parts` equal parts of a tensor, its rows in Meta's order; contiguous.

        It is not copied if it is contiguous in a file. With more parts than key/value heads,
        several consecutive parts hold the same head.
        dtype: to which a quantized matrix of a GGUF file is unpacked; None: float32. All other
            tensors keep their own dtype, but a part that an adapter changes is float32.
        """
        if self.adapter is None or not self.adapter.touches(name):
            return self._part_of_base(name, n_parts, index, dtype)
        part = self._part_of_base(name, n_parts, index, torch.float32)
        dim = parallel.shard_dim(name, self.args.embedding_shard_dim)
        return self.adapter.merged(part, name, dim, *self.distinct(name, n_parts, index))

    def _part_of_base(
        self, name: str, n_parts: int, index: int, dtype: torch.dtype | None
    ) -> Tensor:
        """`part` without the adapter."""
        pieces = self._pieces(name, n_parts, index)
        if self.is_hugging_face and name.endswith(hugging_face.ROTATED):
            return hugging_face.to_meta_rows(pieces[0], self.args.head_dim)
        if len(pieces) == 1 and pieces[0].is_contiguous():
            return pieces[0]
        dim = parallel.shard_dim(name, self.args.embedding_shard_dim)
        assert dim is not None
        shape = list(pieces[0].shape)
        shape[dim] = sum(piece.shape[dim] for piece in pieces)
        return torch.cat(pieces, dim, out=with_huge_pages(pieces[0].new_empty(shape)))

    def quantized_part(self, name: str, n_parts: int, index: int, width: Width) -> Quantized:
        """A quantized part of a matrix. If the folder is quantized, it is the saved part. Otherwise
        the part is quantized here.

        An int8 scale is made from the whole row, even if the row is split over several parts. So
        the quantized weights do not depend on n_parts.
        Raises ConfigError if the matrix cannot be quantized, or cannot be split in this way.
        """
        dim = parallel.SHARD_DIMS[name.split(".")[-2]]
        try:
            if self.quantization is not None:
                return join(self._quantized_pieces(name, n_parts, index), dim)
            part = self.part(name, n_parts, index)
            if width == "int8" and dim == 1 and n_parts > 1:
                whole = [self.tensor(i, name) for i in range(len(self.shards))]
                if self.adapter is not None and self.adapter.touches(name):
                    whole = [self.part(name, 1, 0)]
                norms = [vector_norm(weight, math.inf, 1) for weight in whole]
                return quantize_int8(part, torch.stack(norms).amax(0))
            return QUANTIZERS[width](part)
        except ConfigError as error:
            raise ConfigError(f"{self.folder}: {name}: {error}") from error

    def _pieces(self, name: str, n_parts: int, index: int) -> list[Tensor]:
        """Views of the shards that together are one part, in order."""
        whole = [shard[name] for shard in self.shards]
        dim = parallel.shard_dim(name, self.args.embedding_shard_dim)
        if dim is None:
            return whole[:1]
        slices = self._slices(name, whole[0].shape[dim], n_parts, index)
        return [whole[i].narrow(dim, low, length) for i, low, length in slices]

    def _quantized_pieces(self, name: str, n_parts: int, index: int) -> list[Quantized]:
        """`_pieces` of a matrix that is saved quantized."""
        assert self.quantization is not None
        kind = KINDS[self.quantization]
        whole = [
            kind(*(shard[f"{name}.{field}"] for field in kind._fields)) for shard in self.shards
        ]
        dim = parallel.SHARD_DIMS[name.split(".")[-2]]
        size = self.args.whole_shapes()[name][dim] // len(whole)  # the stored size may be padded
        slices = list(self._slices(name, size, n_parts, index))
        if len(slices) == 1 and slices[0][2] == size:
            return [whole[slices[0][0]]]
        return [narrow(whole[i], dim, low, length) for i, low, length in slices]

    def _slices(
        self, name: str, size: int, n_parts: int, index: int
    ) -> Iterator[tuple[int, int, int]]:
        """Yield the index of each shard that holds some of a part, and the start and the length of
        this piece in the shard.

        size: the size of each shard along the split dimension.
        """
        n_parts, index = self.distinct(name, n_parts, index)
        length = size * len(self.shards) // n_parts
        start, end = length * index, length * (index + 1)
        for i in range(len(self.shards)):
            low, high = max(start - i * size, 0), min(end - i * size, size)
            if low < high:
                yield i, low, high - low

    def distinct(self, name: str, n_parts: int, index: int) -> tuple[int, int]:
        """The number of different parts, and the index among them: with more parts than key/value
        heads, several consecutive parts are equal."""
        n_kv_heads = self.args.local_kv_heads(1)
        if name.endswith(KEYS_AND_VALUES) and n_parts > n_kv_heads:
            return n_kv_heads, index * n_kv_heads // n_parts
        return n_parts, index


def write_shard(path: Path, state: dict[str, Tensor]) -> None:
    """Write one rank's tensors as Meta does, atomically. Tensors that share their memory (a tied
    embedding and output) are written once."""
    with atomic_file(path) as file:
        torch.save(state, file)
