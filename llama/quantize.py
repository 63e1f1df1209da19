"""Weights in eight and four bits: the formats, how they are made, and what they stand for.

Only matrices (N, K) are quantized; a product reads each row whole, so the K weights of a row lie
together. Dettmers & Zettlemoyer 2023, arxiv.org/abs/2212.09720, compare widths and group sizes.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from llama.errors import ConfigError

GROUP = 32  # four-bit weights that share a scale
PAIR = 2 * GROUP  # weights of two groups share their bytes
LAYOUT = 1  # of the tensors below, in files too: another one gets another number
CUT = (1, PAIR)  # rows and columns that stay together where a weight is cut
BLOCK = 1 << 20  # weights quantized at once: the copies made on the way stay small, and in caches


class Int8Weight(NamedTuple):
    """Row i of the matrix is values[i] * scale[i]."""

    values: Tensor  # int8 (N, K), -127 to 127
    scale: Tensor  # float32 (N,)

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device) -> Self:
        n, k = shape
        values = torch.empty(n, k, dtype=torch.int8, device=device)
        return cls(values, torch.empty(n, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


class Int4Weight(NamedTuple):
    """Weight j of group g in row i is (nibble - 8) * scales[i, g].

    Two neighbouring groups share 32 bytes: the low nibbles are the first group, the high ones the
    second, so that a vector of bytes is two groups after one shift.
    """

    packed: Tensor  # uint8 (N, K / 2)
    scales: Tensor  # bfloat16 (N, K / 32)

    @classmethod
    def empty(cls, shape: Sequence[int], device: torch.device) -> Self:
        n, k = shape
        packed = torch.empty(n, k // 2, dtype=torch.uint8, device=device)
        return cls(packed, torch.empty(n, k // GROUP, dtype=torch.bfloat16, device=device))

    @property
    def shape(self) -> torch.Size:
        rows, half = self.packed.shape
        return torch.Size((rows, 2 * half))


Quantized = Int8Weight | Int4Weight


def quantize_int8(w: Tensor, largest: Tensor | None = None) -> Int8Weight:
    """Round each row of w, (N, K), to 255 steps; the row's largest weight is ±127.

    largest: (N,) the absolute value of each row's largest, where w is some of its columns.
    Raises ConfigError where w is not a matrix of finite numbers or K is not a multiple of 32.
    """
    _check(w, GROUP)
    values, scale = weight = Int8Weight.empty(w.shape, w.device)
    for block in _blocks(w):
        rows = w[block].float()
        most = rows.abs().amax(1) if largest is None else largest[block].float()
        scale[block] = most.clamp(min=torch.finfo(torch.float32).tiny) / 127
        values[block] = (rows / scale[block, None]).round_().clamp_(-127, 127)
    _check_finite(scale)
    return weight


def quantize_int4(w: Tensor) -> Int4Weight:
    """Round each group of 32 in the rows of w, (N, K), to sixteen steps.

    A group's scale is the one of two that loses less in squares.
    Raises ConfigError where w is not a matrix of finite numbers or K is not a multiple of 64.
    """
    _check(w, PAIR)
    packed, scales = weight = Int4Weight.empty(w.shape, w.device)
    for block in _blocks(w):
        groups = w[block].float().unflatten(1, (-1, GROUP))
        scale = _best_scale(groups)
        nibbles = (_steps(groups, scale) + 8).to(torch.uint8).unflatten(1, (-1, 2))
        packed[block] = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).flatten(1)
        scales[block] = scale
    _check_finite(scales)
    return weight


def dequantize(weight: Quantized) -> Tensor:
    """The matrix that is stood for: float32 (N, K)."""
    if isinstance(weight, Int8Weight):
        return weight.values * weight.scale[:, None]
    pairs = weight.packed.unflatten(1, (-1, GROUP))
    steps = torch.stack((pairs & 15, pairs >> 4), 2).flatten(1, 2) - 8.0  # (N, K / 32, 32)
    return (steps * weight.scales.float()[..., None]).flatten(1)


def _steps(groups: Tensor, scale: Tensor) -> Tensor:
    """Whole steps of the scale, -8 to 7; where the scale is 0, so is the group."""
    scale = torch.where(scale == 0, 1, scale.float())[..., None]
    return (groups / scale).round_().clamp_(-8, 7)


def _best_scale(groups: Tensor) -> Tensor:
    """The better scale of each group (..., 32), as stored: the largest weight, whatever its sign,
    falls on -8, the side with a step more, or on -7, with finer steps for the other 31."""
    least, most = groups.amin(-1), groups.amax(-1)
    largest = torch.where(-least > most, least, most)
    scales = [(largest / steps).bfloat16() for steps in (-8, -7)]
    losses = []
    for scale in scales:
        rounded = _steps(groups, scale).mul_(scale.float()[..., None])
        losses.append(rounded.sub_(groups).square_().sum(-1))
    return torch.where(losses[1] < losses[0], scales[1], scales[0])


def _blocks(w: Tensor) -> list[slice]:
    size = max(1, BLOCK // w.shape[1])
    return [slice(start, start + size) for start in range(0, len(w), size)]


def _check(w: Tensor, multiple: int) -> None:
    if w.dim() != 2 or not w.is_floating_point():
        raise ConfigError(f"a matrix of floats can be quantized, not {w.dtype} {tuple(w.shape)}")
    if w.shape[1] == 0 or w.shape[1] % multiple:
        raise ConfigError(
            f"a row of {w.shape[1]} weights cannot be quantized: {multiple} go together"
        )


def _check_finite(scale: Tensor) -> None:
    if not scale.isfinite().all():
        raise ConfigError("a matrix with weights that are not finite cannot be quantized")


# ---- parts ------------------------------------------------------------------------------------
# The first dimension of every tensor goes along the rows, the second, where there is one, along
# the columns.


def narrow(weight: Quantized, dim: int, start: int, length: int) -> Quantized:
    """Some rows (dim 0) or columns (1), as views; `Tensor.narrow`.

    Raises ConfigError where that would cut through what is stored together.
    """
    if start % CUT[dim] or length % CUT[dim]:
        what = ("rows", "columns")[dim]
        raise ConfigError(
            f"quantized, {length} {what} from {start} on cannot be cut out: {CUT[dim]} go together"
        )

    def part(tensor: Tensor) -> Tensor:
        if dim >= tensor.dim():
            return tensor
        step = weight.shape[dim] // tensor.shape[dim]
        return tensor.narrow(dim, start // step, length // step)

    return type(weight)(*map(part, weight))


def join(parts: Sequence[Quantized], dim: int) -> Quantized:
    """One weight of parts along its rows (dim 0) or columns (1), contiguous; a single part that
    is so stays where it is. What parts of columns have in common, a row's scale, is the first's."""

    def joined(tensors: tuple[Tensor, ...]) -> Tensor:
        if len(tensors) == 1 or dim >= tensors[0].dim():
            return tensors[0].contiguous()
        return torch.cat(tensors, dim)

    return type(parts[0])(*map(joined, zip(*parts, strict=True)))
