"""The network on a GPU, for inference: few kernels a layer, and none that waits for the host.

Few tokens, as in a decode step, go through the Triton kernels in `kernels/`, which read the weights
at the memory's speed. Many tokens, as in a prompt, go through PyTorch's products and its flash
attention. If Triton is missing, PyTorch computes everything.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from llama import parallel
from llama.cache import KVCache, LayerCache
from llama.errors import ConfigError
from llama.fast.gpu.device_weights import Matrix, joined
from llama.model import Transformer, apply_rotary_emb, causal_mask, repeat_kv

# Up to so many tokens, the kernels multiply by a matrix faster than PyTorch.
FEW = 16  # for an unquantized matrix
FEW_NARROW = 64  # for a quantized matrix
# With `invariant`, the most prompt tokens of one call. It limits the scratch memory of attention.
MAX_INVARIANT = 256


@dataclass(frozen=True)
class Batch:
    """The tokens of a call.

    positions: (B, S).
    is_decode: True: each row has a few tokens and its own start position. False: the tokens are
        part of a prompt.
    mask: (B, 1, S, T) for attention in PyTorch; None: each token sees the tokens up to its own.
    """

    positions: Tensor
    is_decode: bool
    mask: Tensor | None


class Layer:
    """The matrices of a TransformerBlock: seven, joined to four."""

    def __init__(self, block: Any) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.qkv = joined(attention.wq, attention.wk, attention.wv)
        self.wo = joined(attention.wo)
        self.gate_up = joined(feed_forward.w1, feed_forward.w3)
        self.w2 = joined(feed_forward.w2)


class GpuTransformer:
    """A `Transformer` on a GPU. The engine calls both alike.

    The model keeps its weights as views of the joined matrices. On a CPU the same code runs without
    the kernels, for tests.

    invariant: a token's logits do not depend, to the last bit, on the tokens computed beside it,
    the chunks of its prompt, or proposals. Every token goes through the same kernels then.
    Raises ConfigError if `invariant` is set and the Triton kernels cannot run.
    """

    def __init__(self, model: Transformer, invariant: bool = False) -> None:
        self.model = model
        self.params = model.params
        self.vocab_size = model.vocab_size
        self.device = model.device
        self.invariant = invariant
        attention: Any = model.layers[0].attention
        self.n_heads: int = attention.n_local_heads
        self.n_kv_heads: int = attention.n_local_kv_heads
        self.layers = [Layer(block) for block in model.layers]
        self.output = joined(model.output)
        self.kernels: Any = None
        if has_triton(self.device):
            from llama.fast.gpu.kernels.launch import Kernels

            self.kernels = Kernels(self.n_heads, self.device)
        elif invariant:
            raise ConfigError("invariant on a GPU needs Triton and a GPU of capability 8.0")
        self._prepared: set[tuple[bool, int]] = set()

    def make_cache(
        self, max_batch_size: int, max_seq_len: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        return self.model.make_cache(max_batch_size, max_seq_len, dtype)

    def features(self, tokens: Tensor, start_pos: int | Tensor, cache: KVCache) -> Tensor:
        """Ids (B, S) -> (B, S, D); see `Transformer.features`.

        An int start_pos applies to all rows. The host knows it without waiting for the device, and
        attention needs no mask.
        """
        bsz, seqlen = tokens.shape
        if self.invariant and bsz == 1 and seqlen > MAX_INVARIANT:
            parts = [
                self.features(part, start_pos + i * MAX_INVARIANT, cache)
                for i, part in enumerate(tokens.split(MAX_INVARIANT, 1))
            ]
            return torch.cat(parts, 1)
        positions = torch.arange(seqlen, device=self.device).expand(bsz, seqlen)
        positions = positions + (start_pos[:, None] if isinstance(start_pos, Tensor) else start_pos)
        h = self.model.tok_embeddings(tokens)  # (B, S, D)
        mask = None
        if isinstance(start_pos, int):
            cache = cache.part(0, bsz, start_pos + seqlen)
        elif self.kernels is None:
            mask = causal_mask(positions, cache.max_seq_len, h.dtype)[:, None]  # (B, 1, S, T)
        batch = Batch(positions, isinstance(start_pos, Tensor), mask)
        self._prepare(h, batch, cache)
        for i, layer in enumerate(self.layers):
            h = self._layer(layer, h, batch, cache.layer(i))
        return self._norm(h, self.model.norm)

    def logits(self, features: Tensor) -> Tensor:
        """Features (…, D) -> float32 logits (…, V), gathered from all ranks."""
        rows = features.flatten(0, -2)
        if self._by_kernels(self.output, len(rows)):
            out = self.kernels.project(rows, self.output, dtype=torch.float32)
        else:
            out = F.linear(rows, self.output.widened(rows.dtype)).float()
        return gather_from_model_parallel_region(out).unflatten(0, features.shape[:-1])

    def _by_kernels(self, matrix: Matrix, n_tokens: int) -> bool:
        """Whether the kernels multiply by the matrix. If not, PyTorch does."""
        few = FEW if matrix.width == "wide" else FEW_NARROW
        return self.kernels is not None and (self.invariant or n_tokens <= few)

    def _prepare(self, h: Tensor, batch: Batch, cache: KVCache) -> None:
        """Compile the kernels for such a batch in parallel, not one after the other."""
        if self.kernels is None:
            return
        key = batch.is_decode, self.kernels.block_of_tokens(batch.positions.numel())
        if key not in self._prepared:
            self._prepared.add(key)
            first = self.layers[0]
            self.kernels.compile(lambda: self.logits(self._layer(first, h, batch, cache.layer(0))))

    def _layer(self, layer: Layer, h: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """h (B, S, D) -> (B, S, D)."""
        x = self._norm(h, layer.attention_norm)
        h = self._add(h, self._attention(x, layer.qkv, batch, cache).flatten(2), layer.wo)
        x = self._norm(h, layer.ffn_norm)
        return self._add(h, self._swiglu(x, layer.gate_up), layer.w2)

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        """What `RMSNorm` computes, in one kernel."""
        if self.kernels is not None:
            return self.kernels.norm(x, norm)
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)

    def _attention(self, x: Tensor, qkv: Matrix, batch: Batch, cache: LayerCache) -> Tensor:
        """x (B, S, D) -> heads (B, S, H, hd); keys and values of x are stored in the cache."""
        positions, kernels = batch.positions, self.kernels
        by_kernels = self._by_kernels(qkv, positions.numel())
        if by_kernels:
            xq = kernels.qkv(x, qkv, self.model.freqs_cis, positions, cache)
        else:
            x = F.linear(x, qkv.widened(x.dtype))
            if kernels is None:
                x = x.unflatten(-1, (-1, self.params.head_dim))
                xq, xk, xv = x.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
                xq, xk = apply_rotary_emb(xq, xk, self.model.freqs_cis[positions])
                return attend(xq, *cache.update(positions, xk, xv), batch.mask)
            xq = kernels.rotate(x, self.model.freqs_cis, positions, cache)
        if by_kernels or batch.is_decode:
            return kernels.attention(xq, positions, cache)
        return attend(xq, *cache.widened(len(x), cache.k.shape[1], x.dtype), None)

    def _swiglu(self, x: Tensor, gate_up: Matrix) -> Tensor:
        """x (B, S, D) -> (B, S, F)."""
        if self._by_kernels(gate_up, x.shape[:-1].numel()):
            return self.kernels.swiglu(x, gate_up)
        x = F.linear(x, gate_up.widened(x.dtype))
        if self.kernels is not None:
            return self.kernels.silu_times(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def _add(self, h: Tensor, x: Tensor, matrix: Matrix) -> Tensor:
        """h + the product of x with a row-parallel matrix, which is a sum over the ranks."""
        by_kernels = self._by_kernels(matrix, x.shape[:-1].numel())
        if by_kernels and parallel.mp_size() == 1:
            return self.kernels.project(x, matrix, residual=h)
        x = self.kernels.project(x, matrix) if by_kernels else F.linear(x, matrix.widened(x.dtype))
        if not self.invariant or parallel.mp_size() == 1:
            return h + reduce_from_model_parallel_region(x)
        # The order of an all-reduce's sums may depend on the number of tokens. So the ranks' parts
        # are gathered here, and added in the order of the ranks.
        parts = [torch.empty_like(x) for _ in range(parallel.mp_size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=get_model_parallel_group())
        for part in parts:
            h = h + part
        return h


def attend(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (B, S, H, hd) of queries to keys and values (B, T, K, hd).

    mask: (B, 1, S, T) to add. None: the last of S queries stands at the last key, and each sees
    the keys up to its own. PyTorch's flash kernel then runs, if dtype and head_dim allow it.
    """
    xq, keys, values = (x.transpose(1, 2) for x in (xq, keys, values))  # (B, H or K, S or T, hd)
    seqlen, n_keys = xq.shape[2], keys.shape[2]
    if mask is not None:
        heads = F.scaled_dot_product_attention(xq, keys, values, mask, enable_gqa=True)
    elif seqlen == n_keys:
        heads = F.scaled_dot_product_attention(xq, keys, values, is_causal=True, enable_gqa=True)
    elif has_flash(xq):
        # `causal_lower_right`, used below, selects this kernel too, but not for grouped heads.
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        heads = flash(xq, keys, values, 0.0, True)[0]
    else:
        n_rep = xq.shape[1] // keys.shape[1]
        keys, values = (repeat_kv(x.transpose(1, 2), n_rep).transpose(1, 2) for x in (keys, values))
        bias: Any = causal_lower_right(seqlen, n_keys)
        heads = F.scaled_dot_product_attention(xq, keys, values, bias)
    return heads.transpose(1, 2)


def has_flash(xq: Tensor) -> bool:
    """Whether PyTorch's flash attention takes such queries (B, H, S, hd)."""
    is_half = xq.dtype in (torch.bfloat16, torch.float16)
    is_able = xq.device.type == "cuda" and torch.cuda.get_device_capability(xq.device) >= (8, 0)
    return is_half and is_able and xq.shape[-1] % 8 == 0 and xq.shape[-1] <= 256


def has_triton(device: torch.device) -> bool:
    """Whether the kernels can run: on a GPU, or anywhere in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    if device.type != "cuda":
        return bool(triton.knobs.runtime.interpret)
    return torch.cuda.get_device_capability(device) >= (8, 0)
