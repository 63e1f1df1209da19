"""The key/value cache: the keys and values of the tokens that the model has processed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each (rows, positions, local kv heads, head_dim).

    The layout is Meta's: with the strides of Meta's code, PyTorch's matrix products give the same
    bits as in Meta's code, which reference mode needs. An int8 cache also has float32 scales (rows,
    positions, local kv heads), one for each head and position: the key vector is k * k_scale.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @staticmethod
    def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "LayerCache":
        return LayerCache(*_zeros(shape, dtype, device))

    def to(self, dtype: torch.dtype, device: torch.device) -> "LayerCache":
        """The same cache in another dtype or on another device; not for an int8 cache."""
        if (self.k.dtype, self.k.device) == (dtype, device):
            return self
        with torch.inference_mode(False):
            return LayerCache(self.k.to(device, dtype), self.v.to(device, dtype))

    def update(self, start_pos: int | Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, S, K, hd). Return those of all visible tokens, (B, T, K, hd).

        The result is a view of the cache. For an int8 cache it is a new tensor in the dtype of k.
        start_pos: a number is the position of the first new token in all rows; T is then
            start_pos + S. A tensor (B, S) is the position of each new token; T is then the length
            of the whole cache.
        """
        bsz, seqlen = k.shape[:2]
        index: tuple[slice | Tensor, slice | Tensor]
        if isinstance(start_pos, int):
            end = start_pos + seqlen
            index = slice(None), slice(start_pos, end)
        else:
            end = self.k.shape[1]
            index = torch.arange(bsz, device=k.device)[:, None], start_pos

        for cached, scales, new in ((self.k, self.k_scale, k), (self.v, self.v_scale, v)):
            if scales is None:
                cached[:bsz, :end][index] = new
            else:
                cached[:bsz, :end][index], scales[:bsz, :end][index] = quantize(new)
        return self.widened(bsz, end, k.dtype)

    def widened(self, n_rows: int, n_positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the first rows and positions, (B, T, K, hd). If the cache is int8,
        they are converted to `dtype`. Otherwise they keep the cache's dtype."""

        def part(cached: Tensor, scales: Tensor | None) -> Tensor:
            cached = cached[:n_rows, :n_positions]
            if scales is None:
                return cached
            return (cached * scales[:n_rows, :n_positions, :, None]).to(dtype)

        return part(self.k, self.k_scale), part(self.v, self.v_scale)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers: the tensors of `LayerCache`, stacked along a new first
    dimension, (layers, rows, positions, local kv heads, head_dim)."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @staticmethod
    def zeros(
        n_layers: int,
        max_batch_size: int,
        max_seq_len: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        heads_first: bool = False,
    ) -> "KVCache":
        """heads_first: all positions of one head lie together in memory. Otherwise all heads of one
        position lie together, as in Meta's code."""
        shape = (n_layers, max_batch_size, max_seq_len, n_kv_heads, head_dim)
        return KVCache(*_zeros(shape, dtype, device, heads_first))

    @property
    def max_batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def max_seq_len(self) -> int:
        return self.k.shape[2]

    def part(self, first_row: int, n_rows: int, n_positions: int) -> "KVCache":
        """The first `n_positions` positions of some rows, as a cache that shares this memory."""
        rows = slice(first_row, first_row + n_rows)
        return KVCache(*(tensor[:, rows, :n_positions] for tensor in self.tensors()))

    def layer(self, layer_id: int) -> LayerCache:
        """The cache of one layer, which shares this memory."""
        return LayerCache(*(tensor[layer_id] for tensor in self.tensors()))

    def copy_row(self, source: int, destination: int, n_positions: int) -> None:
        """Copy the keys and values of the first `n_positions` positions to another row."""
        for tensor in self.tensors():
            tensor[:, destination, :n_positions] = tensor[:, source, :n_positions]

    def clear_row(self, row: int, start: int) -> None:
        """Set the keys and values of a row to zero, from position `start` on."""
        for tensor in self.tensors():
            tensor[:, row, start:] = 0

    def tensors(self) -> list[Tensor]:
        optional = [self.k, self.v, self.k_scale, self.v_scale]
        return [tensor for tensor in optional if tensor is not None]


def _zeros(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, heads_first: bool = False
) -> list[Tensor]:
    """Zeros for keys and values, and also for their scales if the dtype is int8."""
    *before, positions, heads, head_dim = shape
    inner = [heads, positions] if heads_first else [positions, heads]
    kinds = [([head_dim], dtype)] * 2 + [([], torch.float32)] * (2 if dtype == torch.int8 else 0)
    # A tensor that is made in inference_mode cannot be written to outside of inference_mode.
    with torch.inference_mode(False):
        tensors = [torch.zeros(*before, *inner, *last, dtype=d, device=device) for last, d in kinds]
        return (
            [t.transpose(len(before), len(before) + 1) for t in tensors] if heads_first else tensors
        )


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize vectors (…, hd) to int8. Returns the int8 vectors and float32 scales (…).

    The scale of a vector is its largest absolute value divided by 127."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    steps = torch.where(scale[..., None] == 0, 0, x / scale[..., None])
    return steps.round().clamp(-127, 127).to(torch.int8), scale
