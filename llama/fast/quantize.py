"""Weights in eight and four bits: their formats, quantizing and dequantizing.

Only matrices (N, K) are quantized. A product reads eight rows at once, so that their sums lie in
the eight lanes of a vector. So each eight rows are stored interleaved, and N is padded with rows of
zeros to a multiple of eight. Dettmers & Zettlemoyer 2023, arxiv.org/abs/2212.09720, compare widths
and groups.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.errors import ConfigError

LANES = 8  # rows that are interleaved
QUAD = 4  # neighbouring weights of a row that are stored together
GROUP = 32  # neighbouring weights of a row that share a scale in int4
OFFSET = 8  # int4 weights of -8 to 7 are stored as 0 to 15
LAYOUT = 1  # version of the layout of the tensors below, which files record
CUT = (LANES, GROUP)  # a weight is cut only at multiples of these rows and columns
# Weights that are quantized at once. Their temporary copies stay in the processor's caches. Larger
# copies would leave holes in the heap between int8 weights. The holes would take a third of the
# weights' size.
INT8_BLOCK, INT4_BLOCK = 1 << 16, 1 << 20
GPU_BLOCK = 1 << 24  # enough to fill a GPU


class Int8Weight(NamedTuple):
    """Row 8 * i + r of the matrix is values[i, :, r] * scale[8 * i + r]."""

    values: Tensor  # int8 (N / 8, K / 4, 8, 4), -127 to 127
    scale: Tensor  # float32 (N,)

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device) -> Self:
        eights, quads = -(-shape[0] // LANES), shape[1] // QUAD
        values = torch.empty(eights, quads, LANES, QUAD, dtype=torch.int8, device=device)
        return cls(values, torch.empty(eights * LANES, dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        eights, quads, *_ = self.values.shape
        return torch.Size((eights * LANES, quads * QUAD))


class Int4Weight(NamedTuple):
    """Weight 32 * g + j of row 8 * i + r is (its four bits - 8) * scales[i, g, r].

    For j < 16, the low four bits of byte 32 * (j // 4) + 4 * r + j % 4 hold weight j of the group.
    The high four bits of that byte hold weight j + 16.
    """

    packed: Tensor  # uint8 (N / 8, K / 32, 128)
    scales: Tensor  # bfloat16 (N / 8, K / 32, 8)

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device) -> Self:
        size = -(-shape[0] // LANES), shape[1] // GROUP
        packed = torch.empty(*size, LANES * GROUP // 2, dtype=torch.uint8, device=device)
        return cls(packed, torch.empty(*size, LANES, dtype=torch.bfloat16, device=device))

    @property
    def shape(self) -> torch.Size:
        eights, groups, _ = self.packed.shape
        return torch.Size((eights * LANES, groups * GROUP))


Quantized = Int8Weight | Int4Weight


def quantize_int8(w: Tensor, largest: Tensor | None = None) -> Int8Weight:
    """Round each row of w, (N, K), to 255 steps; the row's largest weight is ±127.

    largest: (N,) the largest absolute value of each whole row, if w has only some of its columns.
    Raises ConfigError where w is not a matrix of finite numbers or K is not a multiple of 32.
    """
    check_matrix(w)
    values, flat = weight = Int8Weight.empty(w.shape, w.device)
    scale = flat.view(-1, LANES)
    if largest is not None:
        largest = F.pad(largest.float(), (0, -len(w) % LANES)).view_as(scale)
    for block, rows in _blocks(w, INT8_BLOCK):  # (n, 8, K)
        most = rows.abs().amax(-1) if largest is None else largest[block]
        scale[block] = most.clamp(min=torch.finfo(torch.float32).tiny) / 127
        steps = (rows / scale[block, :, None]).round_().clamp_(-127, 127)
        values[block] = steps.unflatten(-1, (-1, QUAD)).transpose(1, 2)
    check_finite(scale)
    return weight


def quantize_int4(w: Tensor) -> Int4Weight:
    """Round each group of 32 in the rows of w, (N, K), to sixteen steps.

    Of two scales for a group, it takes the one with the smaller squared error.
    Raises ConfigError where w is not a matrix of finite numbers or K is not a multiple of 32.
    """
    check_matrix(w)
    packed, scales = weight = Int4Weight.empty(w.shape, w.device)
    for block, rows in _blocks(w, INT4_BLOCK):  # (n, 8, K)
        split = rows.unflatten(-1, (-1, GROUP))
        scale = _best_scale(split)
        bits = (_steps(split, scale) + OFFSET).to(torch.uint8)
        # (n, r, g, half, quad, 4) -> (half, n, g, quad, r, 4)
        low, high = bits.unflatten(-1, (2, -1, QUAD)).permute(3, 0, 2, 4, 1, 5)
        packed[block] = (low | high << 4).flatten(2)
        scales[block] = scale.transpose(1, 2)
    check_finite(scales)
    return weight


def dequantize(weight: Quantized) -> Tensor:
    """The dequantized matrix: float32 (N, K)."""
    if isinstance(weight, Int8Weight):
        return weight.values.transpose(1, 2).flatten(2).flatten(0, 1) * weight.scale[:, None]
    quads = weight.packed.unflatten(2, (-1, LANES, QUAD))  # (N / 8, K / 32, quad, r, 4)
    bits = torch.stack((quads & 15, quads >> 4), 2)  # (…, K / 32, half, quad, r, 4)
    steps = bits.permute(0, 4, 1, 2, 3, 5).flatten(3) - float(OFFSET)  # (N / 8, r, K / 32, 32)
    return (steps * weight.scales.transpose(1, 2).float()[..., None]).flatten(2).flatten(0, 1)


def _steps(groups: Tensor, scale: Tensor) -> Tensor:
    """Weights as multiples of the scale, -8 to 7. Where the scale is 0, the whole group is 0."""
    scale = torch.where(scale == 0, 1, scale.float())[..., None]
    return (groups / scale).round_().clamp_(-8, 7)


def _best_scale(groups: Tensor) -> Tensor:
    """The better of two scales of each group (..., 32), in bfloat16.

    One scale maps the weight of largest magnitude to -8, and clips weights of the other sign to
    7. The other scale maps it to -7: the steps are coarser, but no weight is clipped.
    """
    least, most = groups.amin(-1), groups.amax(-1)
    largest = torch.where(-least > most, least, most)
    scales = [(largest / steps).bfloat16() for steps in (-8, -7)]
    losses = []
    for scale in scales:
        rounded = _steps(groups, scale).mul_(scale.float()[..., None])
        losses.append(rounded.sub_(groups).square_().sum(-1))
    return torch.where(losses[1] < losses[0], scales[1], scales[0])


def _blocks(w: Tensor, weights: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of n times eight rows: their indices and weights, float32 (n, 8, K).

    weights: the approximate number of weights in a block, on a CPU.
    """
    if w.device.type != "cpu":
        weights = GPU_BLOCK
    size = max(1, weights // (LANES * w.shape[1]))
    for start in range(0, -(-len(w) // LANES), size):
        rows = w[start * LANES : (start + size) * LANES].float()
        rows = F.pad(rows, (0, 0, 0, -len(rows) % LANES))
        yield slice(start, start + size), rows.unflatten(0, (-1, LANES))


def check_matrix(w: Tensor) -> None:
    """Raise ConfigError unless w is a matrix of floats whose rows are whole groups."""
    if w.dim() != 2 or not w.is_floating_point():
        shape = tuple(w.shape)
        raise ConfigError(f"only a matrix of floats can be quantized, not {w.dtype} {shape}")
    if w.shape[1] == 0 or w.shape[1] % GROUP:
        raise ConfigError(
            f"a row of {w.shape[1]} weights cannot be quantized: the number must be a multiple of "
            f"{GROUP}"
        )


def check_finite(scale: Tensor) -> None:
    """Raise ConfigError if a scale is not finite, because a weight of the matrix is not finite."""
    if not scale.isfinite().all():
        raise ConfigError("a matrix with weights that are not finite cannot be quantized")


# ---- parts ------------------------------------------------------------------------------------
# Dimension 0 of every tensor runs along the rows of the matrix, dimension 1 along its columns.


def narrow(weight: Quantized, dim: int, start: int, length: int) -> Quantized:
    """Some rows (dim 0) or columns (1), as views; `Tensor.narrow`.

    Raises ConfigError where the part does not begin and end at multiples of CUT.
    """
    if start % CUT[dim] or length % CUT[dim]:
        what = ("rows", "columns")[dim]
        raise ConfigError(
            f"cannot cut a quantized weight at {start} with {length} {what}: both numbers must be "
            f"multiples of {CUT[dim]}"
        )

    def part(tensor: Tensor) -> Tensor:
        if dim >= tensor.dim():
            return tensor
        step = weight.shape[dim] // tensor.shape[dim]
        return tensor.narrow(dim, start // step, length // step)

    return type(weight)(*map(part, weight))


def join(parts: Sequence[Quantized], dim: int) -> Quantized:
    """Concatenate parts along the rows (dim 0) or columns (1); contiguous.

    A single contiguous part is returned as it is. The int8 scales belong to rows. Along columns,
    all parts must have the same ones, and those of the first part are kept.
    """

    def joined(tensors: tuple[Tensor, ...]) -> Tensor:
        if len(tensors) == 1 or dim >= tensors[0].dim():
            return tensors[0].contiguous()
        return torch.cat(tensors, dim)

    return type(parts[0])(*map(joined, zip(*parts, strict=True)))


Width = Literal["int8", "int4", "fp8"]
KINDS: dict[str, type[Quantized]] = {"int8": Int8Weight, "int4": Int4Weight}
# Bytes of a weight, with its share of the scales.
BYTES = {"int8": 1.0, "int4": 0.5 + 2 / GROUP, "fp8": 1.0}


def is_quantized(name: str) -> bool:
    """Whether the tensor with this state-dict name is to be quantized."""
    is_matrix = "norm" not in name and not name.endswith(".bias")
    return is_matrix and not name.startswith("tok_embeddings")


def set_quantized(layer: nn.Module, weight: Quantized) -> None:
    """Replace a linear layer's parameter `weight` by a quantized one, for a FastTransformer."""
    del layer.weight
    layer.weight = weight  # type: ignore[assignment]
