"""GGUF files of architecture `llama`: their keys, their names of tensors, and their checkpoint.

Only this file and `write_gguf.py` know GGUF's names of tensors and settings. Q and K have their
rows in Meta's order. The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llama import parallel
from llama.checkpoints.shards import Checkpoint
from llama.config import LLAMA_2_THETA, ModelArgs, RopeScaling
from llama.errors import CheckpointError, ConfigError
from llama.fast.quantize import GROUP, LANES, QUAD, Int4Weight, Quantized, Width, check_finite
from llama.gguf_file import GgufFile, PackedTensor, read_gguf
from llama.model import apply_scaling

ARCHITECTURE = "llama"
# GGUF's name for each of Meta's module names: outside the layers, and within a layer.
MODEL_MODULES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
LAYER_MODULES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
TO_META = {theirs: metas for metas, theirs in (MODEL_MODULES | LAYER_MODULES).items()}
ROPE_DIVISORS = "rope_freqs.weight"
UNPACKED = torch.bfloat16  # the default dtype of a quantized matrix after unpacking
EMBEDDING = "tok_embeddings.weight"
# The router and the experts of a mixture, stacked or, in old files, each by its number.
EXPERTS = re.compile(r".*\.ffn_(gate_inp|\w+_exps|\w+_shexp|(gate|up|down)\.\d+)\..*")
# Keys of other architectures that would change what the network computes.
UNUSABLE = ("attention.scale", "logit_scale", "residual_scale", "embedding_scale")


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor: layers.3.attention.wq.weight becomes blk.3.attn_q.weight."""
    module, _, kind = name.rpartition(".")
    if module in MODEL_MODULES:
        return f"{MODEL_MODULES[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"blk.{layer}.{LAYER_MODULES[inner]}.{kind}"


def meta_name(name: str) -> str:
    """Meta's name of a tensor. An unknown name stays as it is."""
    module, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"blk\.(\d+)\.(.+)", module):
        layer, inner = found.groups()
        return f"layers.{layer}.{TO_META[inner]}.{kind}" if inner in TO_META else name
    return f"{TO_META[module]}.{kind}" if module in TO_META else name


# ---- the model's shape ------------------------------------------------------------------------


def read_args(file: GgufFile, rope_factor: float | None = None) -> ModelArgs:
    """The model's shape; rope_factor, if given, replaces the factor of Llama 3.1's scaled RoPE.

    Raises ConfigError or CheckpointError if the file does not describe a plain Llama text model.
    """
    _check_is_plain_llama(file)
    try:
        n_heads = _number(file, "attention.head_count")
        dim = _number(file, "embedding_length")
        args = ModelArgs(
            dim=dim,
            n_layers=_number(file, "block_count"),
            n_heads=n_heads,
            n_kv_heads=_number(file, "attention.head_count_kv", n_heads),
            vocab_size=_vocab_size(file),
            hidden_dim=_number(file, "feed_forward_length"),
            norm_eps=_norm_eps(file),
            rope_theta=file.get(f"{ARCHITECTURE}.rope.freq_base", float) or LLAMA_2_THETA,
            head_width=_head_width(file, dim, n_heads),
            context_length=file.get(f"{ARCHITECTURE}.context_length", int),
            attention_bias="blk.0.attn_q.bias" in file.tensors,
            mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
            tied="output.weight" not in file.tensors,
        )
        args.rope_scaling = _scaling(file, args, rope_factor)
        return replace(args)  # the copy derives the fields that depend on the scaling
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error


def _check_is_plain_llama(file: GgufFile) -> None:
    kind = file.get("general.type", str)
    if kind not in (None, "model"):
        raise CheckpointError(f"{file.path} holds no model: general.type is {kind!r:.40}")
    architecture = file.get("general.architecture", str)
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{file.path}: the architecture is {architecture!r:.40}, not {ARCHITECTURE!r}"
        )
    if expert := next((name for name in file.tensors if EXPERTS.fullmatch(name)), None):
        raise CheckpointError(f"{file.path}: a mixture of experts is not opened: it has {expert}")
    for key in UNUSABLE:
        if f"{ARCHITECTURE}.{key}" in file.values:
            raise CheckpointError(f"{file.path} has {key}: it is no plain Llama")
    if file.get(f"{ARCHITECTURE}.attention.causal", bool) is False:
        raise CheckpointError(f"{file.path}: attention is not causal: it generates no text")


def _number(file: GgufFile, key: str, default: int | None = None) -> int:
    """A whole number, which may also be given once for each layer."""
    key = f"{ARCHITECTURE}.{key}"
    if key in file.arrays:
        numbers = set(file.get_list(key, int) or ())
        if len(numbers) != 1:
            raise CheckpointError(f"{file.path}: {key} is not the same in all layers")
        return numbers.pop()
    number = file.get(key, int)
    number = default if number is None else number
    if number is None:
        raise CheckpointError(f"{file.path} lacks {key}")
    return number


def _norm_eps(file: GgufFile) -> float:
    key = f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"
    if (eps := file.get(key, float)) is None:
        raise CheckpointError(f"{file.path} lacks {key}")
    return eps


def _vocab_size(file: GgufFile) -> int:
    stated = file.get(f"{ARCHITECTURE}.vocab_size", int)
    embedding = file.tensors.get("token_embd.weight")
    if stated is None and embedding is not None:
        return embedding.shape[0]
    if stated is None:
        raise CheckpointError(f"{file.path} lacks token_embd.weight")
    return stated


def _head_width(file: GgufFile, dim: int, n_heads: int) -> int | None:
    """The features of a head if they are not dim / n_heads, else None."""
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    found = {name: file.get(f"{ARCHITECTURE}.{name}", int) for name in names}
    widths = {width for width in found.values() if width is not None}
    if len(widths) > 1:
        stated = ", ".join(f"{name} is {width}" for name, width in found.items())
        raise ConfigError(f"keys, values and RoPE must have the same width: {stated}")
    width = widths.pop() if widths else None
    return None if width is None or width * n_heads == dim else width


# ---- RoPE -------------------------------------------------------------------------------------


def rope_divisors(args: ModelArgs, scaling: RopeScaling) -> Tensor:
    """The numbers by which llama.cpp divides the frequencies of RoPE: float32 (hd / 2,)."""
    freqs = 1.0 / args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    return freqs / apply_scaling(freqs, scaling)


def _scaling(file: GgufFile, args: ModelArgs, rope_factor: float | None) -> RopeScaling | None:
    """The scaling of RoPE. A file gives Llama 3.1's only by its divisors. They are compared with
    those of Llama 3.1's constants."""
    kind = file.get(f"{ARCHITECTURE}.rope.scaling.type", str) or "none"
    factor = file.get(f"{ARCHITECTURE}.rope.scaling.factor", float)
    if kind not in ("none", "linear"):
        raise ConfigError(f"RoPE scaling is of type {kind!r:.40}: it must be none or linear")
    linear = RopeScaling(factor, kind="linear") if kind == "linear" and factor else None
    divisors = file.tensors.get(ROPE_DIVISORS)
    if divisors is None:
        return linear
    if not isinstance(divisors, Tensor) or divisors.shape != (args.head_dim // 2,):
        raise ConfigError(f"{ROPE_DIVISORS} has the shape {tuple(divisors.shape)}")
    original = file.get(f"{ARCHITECTURE}.rope.scaling.original_context_length", int) or 8192
    scaling = RopeScaling(float(divisors.max()), original_context_length=original)
    is_close = torch.allclose(rope_divisors(args, scaling), divisors.float(), rtol=1e-4)
    if linear is not None or not is_close:
        raise ConfigError(f"{ROPE_DIVISORS} is not the scaling of Llama 3.1 and later")
    return scaling if rope_factor is None else replace(scaling, factor=rope_factor)


# ---- the checkpoint ---------------------------------------------------------------------------


@dataclass
class GgufCheckpoint(Checkpoint):
    """An opened GGUF file; `folder` is its path. It is one shard.

    packed: the quantized matrices. In `shards` each of them is a tensor on the meta device, which
    gives its shape, and the dtype to which it is unpacked by default.
    """

    packed: dict[str, PackedTensor] = field(default_factory=dict)

    def name_in_file(self, name: str) -> str:
        return gguf_name(name)

    def file_of(self, shard: int) -> Path:
        return self.folder

    def stored_as(self) -> str:
        kinds = [tensor.kind for tensor in self.packed.values()]
        return ", ".join(sorted(set(kinds), key=kinds.count, reverse=True)) or super().stored_as()

    def tensor(self, shard: int, name: str) -> Tensor:
        return self.packed[name].unpack() if name in self.packed else super().tensor(shard, name)

    def is_mapped(self, name: str, n_parts: int, dtype: torch.dtype) -> bool:
        return name not in self.packed and super().is_mapped(name, n_parts, dtype)

    def _part_of_base(
        self, name: str, n_parts: int, index: int, dtype: torch.dtype | None
    ) -> Tensor:
        if name not in self.packed:
            return super()._part_of_base(name, n_parts, index, dtype)
        rows, columns = self._slices_of(name, n_parts, index)
        return self.packed[name].unpack(dtype or torch.float32, rows, columns)

    def quantized_part(self, name: str, n_parts: int, index: int, width: Width) -> Quantized:
        packed = self.packed.get(name)
        rows, columns = self._slices_of(name, n_parts, index)
        is_cut = columns.start % GROUP or columns.stop % GROUP
        is_changed = self.adapter is not None and self.adapter.touches(name)
        if width != "int4" or packed is None or packed.kind != "Q4_0" or is_cut or is_changed:
            return super().quantized_part(name, n_parts, index, width)
        return as_int4(packed, rows, columns)

    def _slices_of(self, name: str, n_parts: int, index: int) -> tuple[slice, slice]:
        """The rows and columns of a part of a matrix."""
        shape = self.shards[0][name].shape
        dim = parallel.shard_dim(name, self.args.embedding_shard_dim)
        assert dim is not None
        ((_, low, length),) = self._slices(name, shape[dim], n_parts, index)
        slices = [slice(0, shape[0]), slice(0, shape[1])]
        slices[dim] = slice(low, low + length)
        return slices[0], slices[1]


def as_int4(packed: PackedTensor, rows: slice, columns: slice) -> Int4Weight:
    """A part of a Q4_0 matrix with its own four-bit numbers. Only the scales are rounded, from
    float16 to bfloat16.

    A block of Q4_0 holds the scale of 32 weights, and 16 bytes. Byte j holds weight j in its low
    bits and weight j + 16 in its high bits, as in `Int4Weight`. columns: whole blocks.
    """
    blocks = torch.from_numpy(packed.blocks[rows]).unflatten(1, (-1, 2 + GROUP // 2))
    blocks = blocks[:, columns.start // GROUP : columns.stop // GROUP]
    blocks = F.pad(blocks, (0, 0, 0, 0, 0, -len(blocks) % LANES)).unflatten(0, (-1, LANES))
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)  # (N / 8, 8, K / 32)
    quads = blocks[..., 2:].unflatten(-1, (-1, QUAD))  # (N / 8, 8, K / 32, 4, 4)
    weight = Int4Weight(
        quads.permute(0, 2, 3, 1, 4).flatten(2).contiguous(),
        scales.transpose(1, 2).to(torch.bfloat16).contiguous(),
    )
    check_finite(weight.scales)
    return weight


def open_gguf(path: Path, rope_factor: float | None = None) -> GgufCheckpoint:
    """Open a file with all its parts; see `read_args` for rope_factor.

    Raises CheckpointError or ConfigError for a file that is damaged or not of a plain Llama.
    """
    file = read_gguf(path)
    args = read_args(file, rope_factor)
    shard: dict[str, Tensor] = {}
    packed: dict[str, PackedTensor] = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_DIVISORS:
            continue
        ours = meta_name(name)
        if isinstance(tensor, PackedTensor):
            packed[ours] = tensor
            tensor = torch.empty(tensor.shape, dtype=UNPACKED, device="meta")
        shard[ours] = tensor
    if args.tied and EMBEDDING in shard:
        shard["output.weight"] = shard[EMBEDDING]
    if args.tied and EMBEDDING in packed:
        packed["output.weight"] = packed[EMBEDDING]
    return GgufCheckpoint(file.path, args, [shard], packed=packed)
