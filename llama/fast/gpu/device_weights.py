"""Weights in int8, int4 and fp8 on a GPU: stored row after row, widened inside the products.

The kernels of a CPU want rows interleaved, a GPU's threads want neighbours: so the same rounded
numbers lie in another order here. Each product multiplies by the matrix that is stood for, in the
activations' dtype; a compiler puts the widening into the product's loads, so that a decode step
reads the narrow weights alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import RowParallelLinear
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from llama.errors import ConfigError
from llama.fast.quantize import GROUP, LANES, OFFSET, QUAD, Quantized, quantize_int4, quantize_int8
from llama.model import Transformer

LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max


class ScaledWeight(nn.Module):
    """A matrix (N, K) of int8 or fp8 (e4m3) values, with a scale for each row."""

    values: Tensor  # (N, K)
    scale: Tensor  # float32 (N,)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix, rounded once."""
        return (self.values.float() * self.scale[:, None]).to(dtype)


class GroupedWeight(nn.Module):
    """A matrix (N, K) of four-bit values, with a scale for each 32 of a row; see `quantize_int4`.

    A byte holds two neighbours, the first in its low bits, 0 to 15 for -8 to 7.
    """

    packed: Tensor  # uint8 (N, K / 2)
    scales: Tensor  # bfloat16 (N, K / 32)

    def __init__(self, packed: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix, rounded once."""
        places = torch.arange(0, 8, 4, dtype=torch.uint8, device=self.packed.device)
        steps = ((self.packed[..., None] >> places) & 15).float() - OFFSET  # (N, K / 2, 2)
        scaled = steps.view(len(steps), -1, GROUP) * self.scales.float()[..., None]
        return scaled.flatten(1).to(dtype)


def narrow_weight(weight: Tensor | Quantized, width: str, n: int) -> ScaledWeight | GroupedWeight:
    """Round a matrix of n rows to int8, int4 or fp8, or take it as a folder holds it.

    A folder may pad the rows. Raises ConfigError where the matrix cannot be rounded.
    """
    k = weight.shape[1]
    if width == "fp8":
        assert isinstance(weight, Tensor)  # folders are never saved in fp8
        largest = weight.abs().amax(1, keepdim=True).float()
        if not largest.isfinite().all():
            raise ConfigError("a matrix with weights that are not finite cannot be quantized")
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / LARGEST_FP8
        values = (weight / scale).clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn)
        return ScaledWeight(values, scale[:, 0])
    if width == "int8":
        eights, scale = quantize_int8(weight) if isinstance(weight, Tensor) else weight
        values = eights.transpose(1, 2).reshape(-1, k)
        return ScaledWeight(values[:n].contiguous(), scale[:n].contiguous())
    packed, scales = quantize_int4(weight) if isinstance(weight, Tensor) else weight
    # Of a group's bytes in its row, four hold the numbers j to j + 3 and j + 16 to j + 19.
    quads = packed.unflatten(2, (-1, LANES, QUAD)).permute(0, 3, 1, 2, 4)  # (N / 8, r, g, quad, 4)
    bits = torch.cat((quads.flatten(3) & 15, quads.flatten(3) >> 4), -1).reshape(-1, k)[:n]
    by_row = scales.transpose(1, 2).reshape(-1, k // GROUP)[:n]
    return GroupedWeight(bits[:, ::2] | bits[:, 1::2] << 4, by_row.contiguous())


def _moved(weight: Tensor | Quantized, device: torch.device) -> Tensor | Quantized:
    if isinstance(weight, Tensor):
        return weight.detach().to(device)
    return type(weight)(*(tensor.to(device) for tensor in weight))


class NarrowLinear(nn.Module):
    """A linear layer of fairscale's with a narrow weight, and the same collectives."""

    def __init__(self, layer: Any, width: str, device: torch.device) -> None:
        super().__init__()
        self.adds_up = isinstance(layer, RowParallelLinear)
        rows = layer.out_features if self.adds_up else layer.output_size_per_partition
        self.weight = narrow_weight(_moved(layer.weight, device), width, rows)
        self.gathers = not self.adds_up and layer.gather_output

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight(x.dtype))
        if self.adds_up:
            return reduce_from_model_parallel_region(out)
        return gather_from_model_parallel_region(out) if self.gathers else out


def narrow(model: Transformer, width: str, device: torch.device) -> None:
    """Round a model's matrices, all but the embedding, one after the other, and move them to the
    device. Narrow ones stay as they are."""
    layers: list[tuple[Any, str]] = [(model, "output")]
    for block in model.layers:
        layers += [(block.attention, name) for name in ("wq", "wk", "wv", "wo")]
        layers += [(block.feed_forward, name) for name in ("w1", "w2", "w3")]
    for parent, name in layers:
        layer = getattr(parent, name)
        if not isinstance(layer, NarrowLinear):
            setattr(parent, name, NarrowLinear(layer, width, device))
