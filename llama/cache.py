"""The key/value cache: what a decoder keeps of the tokens it has seen."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, each (layers, rows, positions, local kv heads, head_dim).

    The layout of one layer is Meta's, so that reference mode multiplies the same strides. As int8
    they have float32 scales (layers, rows, positions, local kv heads): a head's vector at a
    position is k * k_scale, and its largest number is ±127.
    """

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
        # Made inside generation, used outside: an inference tensor could not be written there.
        with torch.inference_mode(False):
            both = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
            if dtype == torch.int8:
                both += [torch.zeros(shape[:-1], device=device) for _ in range(2)]
            return KVCache(*both)

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

    def layer(self, layer_id: int) -> "KVCache":
        """One layer, as a cache of its own on the same memory."""
        return KVCache(*(tensor[layer_id : layer_id + 1] for tensor in self.tensors()))

    def copy_row(self, source: int, destination: int, n_positions: int) -> None:
        """Give one row the first keys and values of another."""
        for tensor in self.tensors():
            tensor[:, destination, :n_positions] = tensor[:, source, :n_positions]

    def update(
        self, layer_id: int, start_pos: int | Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, S, K, hd) and return the layer's (B, T, K, hd): as views, or
        from int8 as numbers of the dtype that k and v have.

        start_pos: the first of S positions in a row, the same for all rows: then T ends with the
            last of them. Or the position of each token, (B, S): then T is all there are.
        """
        bsz, seqlen = k.shape[:2]
        place: tuple[slice | Tensor, slice | Tensor]
        if isinstance(start_pos, int):
            end = start_pos + seqlen
            place = slice(None), slice(start_pos, end)
        else:
            end = self.max_seq_len
            place = torch.arange(bsz, device=k.device)[:, None], start_pos

        def store(held: Tensor, scales: Tensor | None, new: Tensor) -> Tensor:
            held = held[layer_id, :bsz, :end]
            if scales is None:
                held[place] = new
                return held
            scales = scales[layer_id, :bsz, :end]
            held[place], scales[place] = quantize(new)
            return (held * scales[..., None]).to(new.dtype)

        return store(self.k, self.k_scale, k), store(self.v, self.v_scale, v)

    def tensors(self) -> list[Tensor]:
        both = [self.k, self.v, self.k_scale, self.v_scale]
        return [tensor for tensor in both if tensor is not None]


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (…, hd) as int8, and the float32 size of a step of each, (…): its largest / 127."""
    x = x.float()
    scale = x.abs().amax(-1) / 127
    steps = torch.where(scale[..., None] == 0, 0, x / scale[..., None])
    return steps.round().clamp(-127, 127).to(torch.int8), scale
