"""Weights in eight and four bits: the formats, how they are made, and what they stand for.

Only matrices (N, K) are quantized; a product reads each row whole, so the K weights of a row lie
together. Dettmers & Zettlemoyer 2023, arxiv.org/abs/2212.09720, compare widths and group sizes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llama.errors import ConfigError

GROUP = 32  # four-bit weights that share a scale
PAIR = 2 * GROUP  # weights of two groups share their bytes
BLOCK = 1 << 22  # weights quantized at once: the copies made on the way stay small


class Int8Weight(NamedTuple):
    """Row i of the matrix is values[i] * scale[i]."""

    values: Tensor  # int8 (N, K), -127 to 127
    scale: Tensor  # float32 (N,)

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

    @property
    def shape(self) -> torch.Size:
        rows, half = self.packed.shape
        return torch.Size((rows, 2 * half))


def quantize_int8(w: Tensor) -> Int8Weight:
    """Round each row of w, (N, K), to 255 steps; the row's largest weight is ±127.

    Raises ConfigError where w is not a matrix of finite numbers or K is not a multiple of 32.
    """
    _check(w, GROUP)
    values = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scale = torch.empty(len(w), device=w.device)
    for block in _blocks(w):
        rows = w[block].float()
        scale[block] = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        values[block] = (rows / scale[block, None]).round_().clamp_(-127, 127)
    _check_finite(scale)
    return Int8Weight(values, scale)


def quantize_int4(w: Tensor) -> Int4Weight:
    """Round each group of 32 in the rows of w, (N, K), to sixteen steps.

    A group's scale is the one of two that loses less in squares.
    Raises ConfigError where w is not a matrix of finite numbers or K is not a multiple of 64.
    """
    _check(w, PAIR)
    n, k = w.shape
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(n, k // GROUP, dtype=torch.bfloat16, device=w.device)
    for block in _blocks(w):
        groups = w[block].float().unflatten(1, (-1, GROUP))
        scale = _best_scale(groups)
        nibbles = (_steps(groups, scale) + 8).to(torch.uint8).unflatten(1, (-1, 2))
        packed[block] = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).flatten(1)
        scales[block] = scale
    _check_finite(scales)
    return Int4Weight(packed, scales)


def dequantize(weight: Int8Weight | Int4Weight) -> Tensor:
    """The matrix that is stood for: float32 (N, K)."""
    if isinstance(weight, Int8Weight):
        return weight.values * weight.scale[:, None]
    pairs = weight.packed.unflatten(1, (-1, GROUP))
    steps = torch.stack((pairs & 15, pairs >> 4), 2).flatten(1, 2) - 8.0  # (N, K / 32, 32)
    return (steps * weight.scales.float()[..., None]).flatten(1)


def _steps(groups: Tensor, scale: Tensor) -> Tensor:
    """Whole steps of the scale, -8 to 7; where the scale is 0, so is the group."""
    scale = scale.float()[..., None]
    return torch.where(scale == 0, 0, groups / scale).round_().clamp_(-8, 7)


def _best_scale(groups: Tensor) -> Tensor:
    """The better scale of each group (..., 32), as stored: the largest weight, whatever its sign,
    falls on -8, the side with a step more, or on -7, with finer steps for the other 31."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best, least = largest, torch.full_like(largest, torch.inf)
    for steps in (-8, -7):
        scale = (largest / steps).bfloat16()
        rounded = _steps(groups, scale) * scale.float()[..., None]
        loss = (rounded - groups).square_().sum(-1)
        best, least = torch.where(loss < least, scale, best), torch.minimum(loss, least)
    return best.bfloat16()


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
