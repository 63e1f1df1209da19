"""Weight matrices on a GPU, as they are or in int8, int4 and fp8.

CPU kernels read eight rows at once, so quantized rows are interleaved for them. A GPU's threads
read neighbours in a row. So here the same rounded numbers are stored row after row.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import RowParallelLinear
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from llama.errors import ConfigError
from llama.fast.quantize import (
    GPU_BLOCK,
    GROUP,
    LANES,
    OFFSET,
    QUAD,
    Quantized,
    quantize_int4,
    quantize_int8,
)
from llama.model import Transformer

LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


class Matrix(NamedTuple):
    """A matrix (N, K).

    width "wide": values (N, K) in the activations' dtype; the scales are not used.
    "int8": int8 values (N, K) and a float32 scale for each row, (N,).
    "fp8": the bytes of e4m3 numbers, as uint8 values (N, K), and a scale for each row as in "int8".
    "int4": uint8 values (N, K / 2) and bfloat16 scales (N, K / 32); see `quantize_int4`. Byte j of
    a group's 16 holds weight j in its low bits and weight j + 16 in its high bits, 0 to 15 for -8
    to 7.
    """

    values: Tensor
    scales: Tensor
    width: str

    @property
    def n_rows(self) -> int:
        return self.values.shape[0]

    @property
    def n_columns(self) -> int:
        return self.values.shape[1] * (2 if self.width == "int4" else 1)

    def blocks(self) -> "Iterator[Matrix]":
        """The matrix in blocks of rows, each of at most about GPU_BLOCK weights."""
        size = max(1, GPU_BLOCK // self.n_columns)
        for start in range(0, self.n_rows, size):
            part = slice(start, start + size)
            yield Matrix(self.values[part], self.scales[part], self.width)

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix (N, K), rounded once."""
        if self.width == "wide":
            return self.values
        if self.width != "int4":
            is_fp8 = self.width == "fp8"
            values = self.values.view(torch.float8_e4m3fn) if is_fp8 else self.values
            return (values.float() * self.scales[:, None]).to(dtype)
        groups = self.values.view(self.n_rows, -1, GROUP // 2)
        steps = torch.cat((groups & 15, groups >> 4), -1).float() - OFFSET  # (N, K / 32, 32)
        return (steps * self.scales.float()[..., None]).flatten(1).to(dtype)


def narrowed(weight: Tensor | Quantized, width: str, n: int) -> Matrix:
    """Round a matrix of n rows to int8, int4 or fp8. If it was quantized in its folder already, it
    is only reordered. It may then have padding after its n rows.

    Raises ConfigError if a matrix cannot be rounded.
    """
    k = weight.shape[1]
    if width == "fp8":
        assert isinstance(weight, Tensor)  # folders are never saved in fp8
        largest = weight.abs().amax(1, keepdim=True).float()
        if not largest.isfinite().all():
            raise ConfigError("a matrix with weights that are not finite cannot be quantized")
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / LARGEST_FP8
        values = (weight / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
        return Matrix(values.view(torch.uint8), scale[:, 0].contiguous(), width)
    if width == "int8":
        eights, scale = quantize_int8(weight) if isinstance(weight, Tensor) else weight
        values = eights.transpose(1, 2).reshape(-1, k)
        return Matrix(values[:n].contiguous(), scale[:n].contiguous(), width)
    packed, scales = quantize_int4(weight) if isinstance(weight, Tensor) else weight
    # 128 bytes hold a group of eight rows. Each row has four quads of four bytes in them.
    quads = packed.unflatten(2, (-1, LANES, QUAD)).permute(0, 3, 1, 2, 4)  # (N / 8, 8, g, 4, 4)
    by_row = scales.transpose(1, 2).reshape(-1, k // GROUP)[:n]
    return Matrix(quads.reshape(-1, k // 2)[:n].contiguous(), by_row.contiguous(), width)


def _moved(weight: Tensor | Quantized, device: torch.device) -> Tensor | Quantized:
    if isinstance(weight, Tensor):
        return weight.detach().to(device)
    return type(weight)(*(tensor.to(device) for tensor in weight))


class _WidenedProduct(torch.autograd.Function):
    """x W^T with a quantized W (N, K), of which a block of rows is dequantized at a time.

    Gradients flow to x only. For them W is dequantized again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix, ctx.dtype = matrix, x.dtype
        return torch.cat([F.linear(x, rows.widened(x.dtype)) for rows in matrix.blocks()], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        blocks = list(ctx.matrix.blocks())
        parts = gradient.split([block.n_rows for block in blocks], -1)
        total = gradient.new_zeros(*gradient.shape[:-1], ctx.matrix.n_columns, dtype=torch.float32)
        for part, block in zip(parts, blocks, strict=True):
            total += part @ block.widened(part.dtype)
        return total.to(ctx.dtype), None


class NarrowLinear(nn.Module):
    """A fairscale linear layer whose weight is quantized. It calls the same collectives."""

    values: Tensor
    scales: Tensor

    def __init__(self, layer: Any, width: str, device: torch.device) -> None:
        super().__init__()
        self.adds_up = isinstance(layer, RowParallelLinear)
        rows = layer.out_features if self.adds_up else layer.output_size_per_partition
        values, scales, self.width = narrowed(_moved(layer.weight, device), width, rows)
        self.register_buffer("values", values)
        self.register_buffer("scales", scales)
        self.gathers = not self.adds_up and layer.gather_output

    def forward(self, x: Tensor) -> Tensor:
        if not self.adds_up:
            x = copy_to_model_parallel_region(x)
        out = _WidenedProduct.apply(x, Matrix(self.values, self.scales, self.width))
        if self.adds_up:
            return reduce_from_model_parallel_region(out)
        return gather_from_model_parallel_region(out) if self.gathers else out


def narrow(model: Transformer, width: str, device: torch.device) -> None:
    """Round a model's matrices, one after the other, and move them to the device. The embedding and
    layers that are already narrow do not change."""
    layers: list[tuple[Any, str]] = [(model, "output")]
    for block in model.layers:
        layers += [(block.attention, name) for name in ("wq", "wk", "wv", "wo")]
        layers += [(block.feed_forward, name) for name in ("w1", "w2", "w3")]
    for parent, name in layers:
        layer = getattr(parent, name)
        if not isinstance(layer, NarrowLinear):
            setattr(parent, name, NarrowLinear(layer, width, device))


@torch.no_grad()
def joined(*layers: Any) -> Matrix:
    """One matrix with the rows of all layers, one layer after the other. The layers are linear and
    have the same input.

    The layers' weights become views of this matrix, so that no weight is held twice.
    """
    if isinstance(layers[0], NarrowLinear):
        values = _join([layer.values for layer in layers])
        scales = _join([layer.scales for layer in layers])
        sizes = [len(layer.values) for layer in layers]
        parts = zip(layers, values.split(sizes), scales.split(sizes), strict=True)
        for layer, layer_values, layer_scales in parts:
            layer.values, layer.scales = layer_values, layer_scales
        return Matrix(values, scales, layers[0].width)
    values = _join([layer.weight.data for layer in layers])
    sizes = [len(layer.weight) for layer in layers]
    for layer, part in zip(layers, values.split(sizes), strict=True):
        layer.weight.data = part
    return Matrix(values, values, "wide")


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
