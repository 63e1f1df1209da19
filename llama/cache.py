"""The key/value cache: what a decoder keeps of the tokens it has seen."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, each (layers, rows, positions, local kv heads, head_dim).

    The layout of one layer is Meta's, so that reference mode multiplies the same strides.
    """

    def __init__(
        self,
        n_layers: int,
        max_batch_size: int,
        max_seq_len: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (n_layers, max_batch_size, max_seq_len, n_kv_heads, head_dim)
        # Made inside generation, used outside: an inference tensor could not be written there.
        with torch.inference_mode(False):
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def max_batch_size(self) -> int:
        return self.k.shape[1]

    @property
    def max_seq_len(self) -> int:
        return self.k.shape[2]

    def update(self, layer_id: int, start_pos: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, S, K, hd) at positions start_pos…start_pos + S - 1.

        Returns the layer's keys and values of all positions so far, (B, start_pos + S, K, hd),
        as views.
        """
        bsz, seqlen = k.shape[:2]
        end = start_pos + seqlen
        keys, values = self.k[layer_id, :bsz, :end], self.v[layer_id, :bsz, :end]
        keys[:, start_pos:] = k
        values[:, start_pos:] = v
        return keys, values
