"""The network on a GPU, for inference: few kernels a layer, and none that waits for the host.

Few tokens, as in a decode step, go through the Triton kernels in `kernels/`, which read the weights
at the memory's speed. Many tokens, as in a prompt, go through PyTorch's products and its flash
attention. Where Triton is missing, PyTorch computes everything.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from llama import parallel
from llama.cache import KVCache, LayerCache
from llama.fast.gpu.device_weights import Matrix, joined
from llama.model import Transformer, apply_rotary_emb, causal_mask, repeat_kv

MAX_FEW = 64  # tokens that the kernels take at once
ONE_TILE = 16  # tokens of their smallest tile


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
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.params = model.params
        self.vocab_size = model.vocab_size
        self.device = model.device
        attention: Any = model.layers[0].attention
        self.n_heads: int = attention.n_local_heads
        self.n_kv_heads: int = attention.n_local_kv_heads
        self.layers = [Layer(block) for block in model.layers]
        self.output = joined(model.output)
        self.kernels: Any = None
        if has_triton(self.device):
            from llama.fast.gpu.kernels.launch import Kernels

            self.kernels = Kernels(self.n_heads, self.device)
        self._prepared: set[int] = set()

    def make_cache(
        self, max_batch_size: int, max_seq_len: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        return self.model.make_cache(max_batch_size, max_seq_len, dtype)

    def features(self, tokens: Tensor, start_pos: int | Tensor, cache: KVCache) -> Tensor:
        """Ids (B, S) -> (B, S, D); see `Transformer.features`.

        A number as start_pos counts for all rows. It is known without a look at the device, and
        spares attention a mask.
        """
        bsz, seqlen = tokens.shape
        positions = torch.arange(seqlen, device=self.device).expand(bsz, seqlen)
        positions = positions + (start_pos[:, None] if isinstance(start_pos, Tensor) else start_pos)
        h = self.model.tok_embeddings(tokens)  # (B, S, D)
        # A short prompt of one row would need kernels of its own, compiled for its block of tokens.
        is_few = bsz * seqlen <= (ONE_TILE if bsz == 1 else MAX_FEW)
        if self.kernels is not None and is_few:
            self._prepare(h, positions, cache)
            for i, layer in enumerate(self.layers):
                h = self._few(layer, h, positions, cache.layer(i))
            return self.kernels.norm(h, self.model.norm)
        mask = None
        if isinstance(start_pos, int):
            cache = cache.part(0, bsz, start_pos + seqlen)
        else:
            mask = causal_mask(positions, cache.max_seq_len, h.dtype)[:, None]  # (B, 1, S, T)
        for i, layer in enumerate(self.layers):
            h = self._many(layer, h, positions, cache.layer(i), mask)
        return self.norm(h, self.model.norm)

    def logits(self, features: Tensor) -> Tensor:
        """(…, D) -> float32 (…, V), those of all ranks."""
        rows = features.flatten(0, -2)
        if self.kernels is not None and len(rows) <= MAX_FEW:
            out = self.kernels.project(rows, self.output, dtype=torch.float32)
        else:
            out = F.linear(rows, self.output.widened(rows.dtype)).float()
        return gather_from_model_parallel_region(out).unflatten(0, features.shape[:-1])

    def _prepare(self, h: Tensor, positions: Tensor, cache: KVCache) -> None:
        """Compile what these tokens need, at once and not one kernel after the other."""
        block = self.kernels.block_of_tokens(positions.numel())
        if block not in self._prepared:
            self._prepared.add(block)
            self.kernels.compile(
                lambda: self.logits(self._few(self.layers[0], h, positions, cache.layer(0)))
            )

    def _few(self, layer: Layer, h: Tensor, positions: Tensor, cache: LayerCache) -> Tensor:
        """A layer in kernels: h (B, S, D) -> (B, S, D)."""
        kernels = self.kernels
        x = kernels.norm(h, layer.attention_norm)
        q = kernels.qkv(x, layer.qkv, self.model.freqs_cis, positions, cache)  # (B, S, H, hd)
        heads = kernels.attention(q, positions, cache)
        h = self._add(h, heads.flatten(2), layer.wo)
        x = kernels.norm(h, layer.ffn_norm)
        return self._add(h, kernels.swiglu(x, layer.gate_up), layer.w2)

    def _add(self, h: Tensor, x: Tensor, matrix: Matrix) -> Tensor:
        """h + the row-parallel product of x, which all ranks add up."""
        if parallel.mp_size() == 1:
            return self.kernels.project(x, matrix, residual=h)
        return h + reduce_from_model_parallel_region(self.kernels.project(x, matrix))

    def _many(
        self, layer: Layer, h: Tensor, positions: Tensor, cache: LayerCache, mask: Tensor | None
    ) -> Tensor:
        """A layer in PyTorch's operations: h (B, S, D) -> (B, S, D)."""
        bsz, seqlen, _ = h.shape
        x = F.linear(self.norm(h, layer.attention_norm), layer.qkv.widened(h.dtype))
        x = x.view(bsz, seqlen, -1, self.params.head_dim)
        xq, xk, xv = x.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        xq, xk = apply_rotary_emb(xq, xk, self.model.freqs_cis[positions])
        keys, values = cache.update(positions, xk, xv)  # (B, T, K, hd)
        heads = attend(xq, keys, values, mask).flatten(2)  # (B, S, H * hd)
        h = h + reduce_from_model_parallel_region(F.linear(heads, layer.wo.widened(h.dtype)))
        x = F.linear(self.norm(h, layer.ffn_norm), layer.gate_up.widened(h.dtype))
        gate, up = x.chunk(2, -1)
        x = F.linear(F.silu(gate) * up, layer.w2.widened(h.dtype))
        return h + reduce_from_model_parallel_region(x)

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        """What `RMSNorm` computes, in one kernel."""
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def attend(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (B, S, H, hd) of queries to keys and values (B, T, K, hd).

    mask: (B, 1, S, T) to add. None: the last of S queries stands at the last key, and each sees
    the keys up to its own. PyTorch's flash kernel then runs, where dtype and head_dim allow it.
    """
    xq, keys, values = (x.transpose(1, 2) for x in (xq, keys, values))  # (B, H or K, S or T, hd)
    seqlen, n_keys = xq.shape[2], keys.shape[2]
    if mask is not None:
        heads = F.scaled_dot_product_attention(xq, keys, values, mask, enable_gqa=True)
    elif seqlen == n_keys:
        heads = F.scaled_dot_product_attention(xq, keys, values, is_causal=True, enable_gqa=True)
    else:
        n_rep = xq.shape[1] // keys.shape[1]
        keys, values = (repeat_kv(x.transpose(1, 2), n_rep).transpose(1, 2) for x in (keys, values))
        bias: Any = causal_lower_right(seqlen, n_keys)
        heads = F.scaled_dot_product_attention(xq, keys, values, bias)
    return heads.transpose(1, 2)


def has_triton(device: torch.device) -> bool:
    """Whether the kernels can run: on a GPU, or anywhere in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    if device.type != "cuda":
        return bool(triton.knobs.runtime.interpret)
    return torch.cuda.get_device_capability(device) >= (8, 0)
