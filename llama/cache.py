"""The key/value cache: what a decoder keeps of the tokens it has seen."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each (layers, rows, positions, local kv heads, head_dim).

    The layout of one layer is Meta's, so that reference mode multiplies the same strides.
    """

    k: Tensor
    v: Tensor

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
        # Made inside generation, used outside: an inference tensor could not be written there.
        with torch.inference_mode(False):
            return KVCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    @property
    def max_batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def max_seq_len(self) -> int:
        return self.k.shape[2]

    def part(self, first_row: int, n_rows: int, n_positions: int) -> "KVCache":
        """Some rows up to some position, as a cache of its own on the same memory."""
        rows = slice(first_row, first_row + n_rows)
        return KVCache(self.k[:, rows, :n_positions], self.v[:, rows, :n_positions])

    def layer(self, layer_id: int) -> "KVCache":
        """One layer, as a cache of its own on the same memory."""
        only = slice(layer_id, layer_id + 1)
        return KVCache(self.k[only], self.v[only])

    def copy_row(self, source: int, destination: int, n_positions: int) -> None:
        """Give one row the first keys and values of another."""
        for both in (self.k, self.v):
            both[:, destination, :n_positions] = both[:, source, :n_positions]

    def update(
        self, layer_id: int, start_pos: int | Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, S, K, hd) and return the layer's (B, T, K, hd), as views.

        start_pos: the first of S positions in a row, the same for all rows: then T ends with the
            last of them. Or the position of each token, (B, S): then T is all there are.
        """
        bsz, seqlen = k.shape[:2]
        if isinstance(start_pos, int):
            end = start_pos + seqlen
            keys, values = self.k[layer_id, :bsz, :end], self.v[layer_id, :bsz, :end]
            keys[:, start_pos:] = k
            values[:, start_pos:] = v
        else:
            keys, values = self.k[layer_id, :bsz], self.v[layer_id, :bsz]
            rows = torch.arange(bsz, device=k.device)[:, None]
            keys[rows, start_pos] = k
            values[rows, start_pos] = v
        return keys, values
