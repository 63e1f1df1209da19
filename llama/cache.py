"""The key/value cache: what a decoder keeps of the tokens it has seen."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each (rows, positions, local kv heads, head_dim).

    The layout is Meta's, so that reference mode multiplies matrices with the same strides. As int8
    they have float32 scales (rows, positions, local kv heads): the vector of a head at a position
    is k * k_scale, and its largest number is ±127.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @staticmethod
    def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "LayerCache":
        return LayerCache(*_zeros(shape, dtype, device))

    def to(self, dtype: torch.dtype, device: torch.device) -> "LayerCache":
        """The same numbers, not quantized, in another dtype or on another device."""
        if (self.k.dtype, self.k.device) == (dtype, device):
            return self
        with torch.inference_mode(False):
            return LayerCache(self.k.to(device, dtype), self.v.to(device, dtype))

    def update(self, start_pos: int | Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, S, K, hd) and return all that are visible, (B, T, K, hd).

        They are views of the cache. From int8 they are new tensors of the dtype that k and v have.
        start_pos: the first of S positions, the same for all rows; T then ends with the last of
            them. Or the position of each token, (B, S); T then is the whole cache.
        """
        bsz, seqlen = k.shape[:2]
        index: tuple[slice | Tensor, slice | Tensor]
        if isinstance(start_pos, int):
            end = start_pos + seqlen
            index = slice(None), slice(start_pos, end)
        else:
            end = self.k.shape[1]
            index = torch.arange(bsz, device=k.device)[:, None], start_pos

        def store(held: Tensor, scales: Tensor | None, new: Tensor) -> Tensor:
            held = held[:bsz, :end]
            if scales is None:
                held[index] = new
                return held
            scales = scales[:bsz, :end]
            held[index], scales[index] = quantize(new)
            return (held * scales[..., None]).to(new.dtype)

        return store(self.k, self.k_scale, k), store(self.v, self.v_scale, v)


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer: the tensors of `LayerCache` with a dimension of layers before
    the others, (layers, rows, positions, local kv heads, head_dim)."""

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
    ) -> "KVCache":
        shape = (n_layers, max_batch_size, max_seq_len, n_kv_heads, head_dim)
        return KVCache(*_zeros(shape, dtype, device))

    @property
    def max_batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def max_seq_len(self) -> int:
        return self.k.shape[2]

    def part(self, first_row: int, n_rows: int, n_positions: int) -> "KVCache":
        """Some rows up to some position, as a cache of its own on the same memory."""
        rows = slice(first_row, first_row + n_rows)
        return KVCache(*(tensor[:, rows, :n_positions] for tensor in self.tensors()))

    def layer(self, layer_id: int) -> LayerCache:
        """One layer, on the same memory."""
        return LayerCache(*(tensor[layer_id] for tensor in self.tensors()))

    def copy_row(self, source: int, destination: int, n_positions: int) -> None:
        """Copy the first keys and values of one row to another."""
        for tensor in self.tensors():
            tensor[:, destination, :n_positions] = tensor[:, source, :n_positions]

    def tensors(self) -> list[Tensor]:
        optional = [self.k, self.v, self.k_scale, self.v_scale]
        return [tensor for tensor in optional if tensor is not None]


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Keys and values, for int8 also their scales."""
    # A cache made under inference_mode could not be written to outside of it.
    with torch.inference_mode(False):
        tensors = [torch.zeros(*shape, dtype=dtype, device=device) for _ in range(2)]
        if dtype == torch.int8:
            tensors += [torch.zeros(*shape[:-1], device=device) for _ in range(2)]
        return tensors


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round vectors (…, hd) to int8. Returns them and their float32 scales (…): largest / 127."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    steps = torch.where(scale[..., None] == 0, 0, x / scale[..., None])
    return steps.round().clamp(-127, 127).to(torch.int8), scale
