"""The Llama transformer, split over fairscale's tensor-parallel ranks.

Names, constructors and calls are those of Meta's `model.py`. The calls take more optional
arguments, such as a KV cache. If none is passed, each attention layer keeps a cache of its own, as
in Meta's code.

Shapes in comments, per rank: B batch rows, S new tokens, T visible keys, D dim, H query heads,
K key/value heads, hd head_dim, F feed-forward width, V vocabulary. H, K and F count only the share
of this rank.
"""

import inspect
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from llama import parallel
from llama.cache import KVCache, LayerCache
from llama.config import ModelArgs, ffn_width
from llama.errors import ConfigError, GenerationError
from llama.rope_scaling import RopeScaling


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32; Zhang & Sennrich 2019, arxiv.org/abs/1910.07467."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight  # (B, S, D)


# ---- rotary position embedding: Su et al. 2021, arxiv.org/abs/2104.09864 ------------------------


def apply_scaling(freqs: Tensor, scaling: RopeScaling | None = None) -> Tensor:
    """Scale RoPE for a longer context, as Llama 3.1 does.

    Low frequencies are divided by `scaling.factor`. High ones do not change. Those between are
    interpolated. freqs: (hd / 2,) radians per position. scaling None: Meta's constants, factor 8.
    """
    scaling = RopeScaling() if scaling is None else scaling
    if scaling.kind == "linear":
        return freqs / scaling.factor
    if scaling.kind == "dynamic":  # changes theta instead; see `ModelArgs.scaled_theta`
        return freqs
    context = scaling.original_context_length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelen = 2 * math.pi / freqs  # positions per full turn
    smooth = (context / wavelen - low) / (high - low)
    interpolated = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    is_low, is_high = wavelen > context / low, wavelen < context / high
    return torch.where(is_low, freqs / scaling.factor, torch.where(is_high, freqs, interpolated))


def precompute_freqs_cis(
    dim: int,
    end: int,
    theta: float = 10000.0,
    use_scaled: bool = False,
    *,
    scaling: RopeScaling | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The rotations exp(i * position * frequency): complex64 (end, dim / 2).

    dim: of one head. end: number of positions. use_scaled: scale with Meta's constants.
    scaling: scale with these constants instead.
    """
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
    if use_scaled or scaling is not None:
        freqs = apply_scaling(freqs, scaling)
    positions = torch.arange(end, device=device, dtype=torch.float32)
    angles = torch.outer(positions, freqs)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """Add a head dimension to the rotations, and a batch dimension where it is missing.

    x: (B, S, H, hd / 2) complex. freqs_cis: (S, hd / 2) -> (1, S, 1, hd / 2), or
    (B, S, hd / 2) -> (B, S, 1, hd / 2).
    """
    shape = (x.shape[1], x.shape[-1]) if freqs_cis.dim() == 2 else (*x.shape[:2], x.shape[-1])
    assert freqs_cis.shape == shape, (freqs_cis.shape, x.shape)
    return freqs_cis.view(-1, x.shape[1], 1, x.shape[-1])


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each pair of neighbouring features by the angle of its position, in float32.

    xq: (B, S, H, hd), xk: (B, S, K, hd), freqs_cis: (S, hd / 2) or (B, S, hd / 2). The results have
    the same shapes and dtypes as xq and xk.
    """

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))  # (B, S, H, hd / 2)
        rotated = pairs * reshape_for_broadcast(freqs_cis, pairs)
        return torch.view_as_real(rotated).flatten(3).type_as(x)  # (B, S, H, hd)

    return rotate(xq), rotate(xk)


# ---- attention ----------------------------------------------------------------------------------


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeat each key/value head for the query heads that share it.

    (B, T, K, hd) -> (B, T, K * n_rep, hd), the copies of a head next to each other.
    """
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=2)


def causal_mask(positions: Tensor, n_keys: int, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key, minus infinity where the key comes after the query.

    positions: (..., S), those of the queries. The T keys have positions 0 to n_keys - 1. Returns
    (..., S, T).
    """
    is_after = torch.arange(n_keys, device=positions.device) > positions.unsqueeze(-1)
    mask = torch.zeros(is_after.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(is_after, -math.inf)


def meta_attention(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(hd) + mask) v with Meta's operations, which gives Meta's exact bits.

    xq: (B, S, H, hd), keys and values: (B, T, K, hd), mask: (S, T) to add -> (B, S, H, hd).
    """
    n_rep = xq.shape[2] // keys.shape[2]
    xq = xq.transpose(1, 2)  # (B, H, S, hd)
    keys = repeat_kv(keys, n_rep).transpose(1, 2)  # (B, H, T, hd)
    values = repeat_kv(values, n_rep).transpose(1, 2)  # (B, H, T, hd)
    # The scores are the largest tensor of a prefill. They are changed in place to save memory.
    scores = xq @ keys.transpose(2, 3)  # (B, H, S, T)
    scores /= math.sqrt(xq.shape[-1])
    if mask is not None:
        scores += mask
    weights = scores.float().softmax(-1).type_as(xq)  # (B, H, S, T)
    return (weights @ values).transpose(1, 2)  # (B, S, H, hd)


def fused_attention(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """`meta_attention` by PyTorch's fused kernel. The last bits may differ.

    xq: (B, S, H, hd), keys and values: (B, T, K, hd) -> (B, S, H, hd). mask: (B or 1, 1, S, T),
    floats to add, or bools that are True where a query sees a key. None: causal, which needs T = S.
    """
    bsz, seqlen, _, head_dim = xq.shape
    # PyTorch's kernel has no backward for grouped heads with a mask.
    if mask is not None and torch.is_grad_enabled():
        n_rep = xq.shape[2] // keys.shape[2]
        keys, values = repeat_kv(keys, n_rep), repeat_kv(values, n_rep)
    xq, keys, values = (x.transpose(1, 2) for x in (xq, keys, values))  # (B, H or K, S or T, hd)
    if seqlen == 1 and mask is not None:
        # The query heads of a group see the same keys. So they are passed as the queries of one
        # head, a shape that every kernel accepts.
        xq = xq.reshape(bsz, keys.shape[1], -1, head_dim)  # (B, K, H / K, hd)
    is_grouped = xq.shape[1] != keys.shape[1]
    heads = F.scaled_dot_product_attention(
        xq, keys, values, mask, is_causal=mask is None, enable_gqa=is_grouped
    )
    return heads.reshape(bsz, -1, seqlen, head_dim).transpose(1, 2)  # (B, S, H, hd)


# ---- the layers ---------------------------------------------------------------------------------


def _init_weight(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=0.02)


# A column-parallel layer computes the output features of its rank. A row-parallel layer takes the
# input features of its rank, and its output is summed over the ranks (all-reduce).
COLUMN: dict[str, Any] = dict(bias=False, gather_output=False, init_method=_init_weight)
ROW: dict[str, Any] = dict(bias=False, input_is_parallel=True, init_method=_init_weight)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads; Vaswani et al. 2017, arxiv.org/abs/1706.03762,
    Ainslie et al. 2023, arxiv.org/abs/2305.13245."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        parallel.initialize()
        mp_size = parallel.mp_size()
        self.n_kv_heads = args.local_kv_heads(1)
        self.n_local_heads = args.n_heads // mp_size
        self.n_local_kv_heads = args.local_kv_heads(mp_size)
        self.n_rep = self.n_local_heads // self.n_local_kv_heads
        self.head_dim = args.head_dim
        self.max_batch_size, self.max_seq_len = args.max_batch_size, args.max_seq_len
        self._cache: LayerCache | None = None  # made by the first call without a cache

        column, row = (kind | {"bias": args.attention_bias} for kind in (COLUMN, ROW))
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * self.head_dim, **column)
        self.wk = ColumnParallelLinear(args.dim, self.n_kv_heads * self.head_dim, **column)
        self.wv = ColumnParallelLinear(args.dim, self.n_kv_heads * self.head_dim, **column)
        self.wo = RowParallelLinear(args.n_heads * self.head_dim, args.dim, **row)

    def forward(
        self,
        x: Tensor,
        start_pos: int | Tensor | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, S, D) -> (B, S, D); see `Transformer.forward`.

        start_pos: position of the first new token, or positions (B, S) of all new tokens. None:
        whole sequences, without a cache.
        """
        bsz, seqlen, _ = x.shape
        # Column-parallel: each rank computes only its own heads.
        xq = self.wq(x).view(bsz, seqlen, self.n_local_heads, self.head_dim)  # (B, S, H, hd)
        xk = self.wk(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)  # (B, S, K, hd)
        xv = self.wv(x).view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)  # (B, S, K, hd)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        if start_pos is not None:
            cache = self._own_cache(x.dtype, x.device) if cache is None else cache
            xk, xv = cache.update(start_pos, xk, xv)  # (B, T, K, hd)
        # Meta's code passes an int. For an int, Meta's operations are used, so that the results
        # equal Meta's to the last bit.
        attend = meta_attention if isinstance(start_pos, int) else fused_attention
        heads = attend(xq, xk, xv, mask)  # (B, S, H, hd)
        # Row-parallel: the output is summed over the ranks.
        return self.wo(heads.flatten(2))  # (B, S, D)

    def _own_cache(self, dtype: torch.dtype, device: torch.device) -> LayerCache:
        """This layer's cache, in the dtype and on the device of the activations."""
        cache, rows, positions = self._cache, self.max_batch_size, self.max_seq_len
        if cache is None:
            shape = (rows, positions, self.n_local_kv_heads, self.head_dim)
            cache = LayerCache.zeros(shape, dtype, device)
        self._cache = cache.to(dtype, device)
        return self._cache

    # Meta's names for the layer's own cache, (max_batch_size, max_seq_len, K, hd).

    @property
    def cache_k(self) -> Tensor:
        weight = self.wq.weight
        return (self._cache or self._own_cache(weight.dtype, weight.device)).k

    @cache_k.setter
    def cache_k(self, keys: Tensor) -> None:
        self._cache = LayerCache(keys, self.cache_v)

    @property
    def cache_v(self) -> Tensor:
        weight = self.wq.weight
        return (self._cache or self._own_cache(weight.dtype, weight.device)).v

    @cache_v.setter
    def cache_v(self, values: Tensor) -> None:
        self._cache = LayerCache(self.cache_k, values)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); Shazeer 2020, arxiv.org/abs/2002.05202.

    The width F is two thirds of `hidden_dim`, scaled by `ffn_dim_multiplier` and rounded up to a
    multiple of `multiple_of`. multiple_of None: F is `hidden_dim`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        multiple_of: int | None = None,
        ffn_dim_multiplier: float | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        parallel.initialize()
        if multiple_of is not None:
            hidden_dim = ffn_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        column, row = (kind | {"bias": bias} for kind in (COLUMN, ROW))
        self.w1 = ColumnParallelLinear(dim, hidden_dim, **column)  # gate
        self.w2 = RowParallelLinear(hidden_dim, dim, **row)  # down
        self.w3 = ColumnParallelLinear(dim, hidden_dim, **column)  # up

    def forward(self, x: Tensor) -> Tensor:
        # Gate and up are column-parallel, so their product needs no communication. w2 is
        # row-parallel and sums the ranks' partial results.
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, S, D)


def call_with_cache(
    module: nn.Module, attention: Any, cache: LayerCache | None, *inputs: Any
) -> Tensor:
    """Call an attention layer or a block with Meta's four arguments and a cache.

    A module that was subclassed or patched may take only Meta's four arguments. In that case the
    cache takes the place of the attention layer's own cache during the call.
    """
    if cache is None:
        return module(*inputs)
    if takes_cache(module.forward):
        return module(*inputs, cache)
    own, attention._cache = attention._cache, cache
    try:
        return module(*inputs)
    finally:
        attention._cache = own


def takes_cache(forward: Any) -> bool:
    """Whether the `forward` of an attention layer or a block takes a fifth argument."""
    if getattr(forward, "__func__", None) in (Attention.forward, TransformerBlock.forward):
        return True
    try:
        inspect.signature(forward).bind(*range(5))
    except TypeError:
        return False
    return True


class TransformerBlock(nn.Module):
    """Attention, then feed-forward. Each reads the normalized residual stream, and its output is
    added to the stream."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.n_heads = args.n_heads
        self.dim = args.dim
        self.head_dim = args.head_dim
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, args.ffn_dim, bias=args.mlp_bias)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self,
        x: Tensor,
        start_pos: int | Tensor | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, S, D) -> (B, S, D); the arguments are those of `Attention.forward`."""
        inputs = self.attention_norm(x), start_pos, freqs_cis, mask
        h = x + call_with_cache(self.attention, self.attention, cache, *inputs)
        return h + self.feed_forward(self.ffn_norm(h))  # (B, S, D)


class Transformer(nn.Module):
    """Token ids in, logits of the next token out.

    The weights are random; see `init_weights`. Under `torch.device("meta")` they take no memory
    until a checkpoint is loaded. Where no process group exists, `parallel.initialize` makes one.

    params: the shape of the whole model. Each rank holds its share of the weights.
    Raises ConfigError if the ranks cannot share the model, or if vocab_size is -1.
    """

    def __init__(self, params: ModelArgs) -> None:
        super().__init__()
        parallel.initialize()
        params.check_split(parallel.mp_size())
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self._freqs_cis: Tensor | None = None  # computed at the first use, on the weights' device

        with parallel.on_meta_device():
            embedding = ParallelEmbedding if params.embedding_shard_dim else VocabParallelEmbedding
            self.tok_embeddings = embedding(params.vocab_size, params.dim, init_method=_init_weight)
            self.layers = nn.ModuleList(
                TransformerBlock(layer_id, params) for layer_id in range(params.n_layers)
            )
            self.norm = RMSNorm(params.dim, params.norm_eps)
            # This layer gathers its output: every rank has the logits of the whole vocabulary.
            self.output = ColumnParallelLinear(
                params.dim, params.vocab_size, **(COLUMN | {"gather_output": True})
            )
        if torch.get_default_device().type != "meta":
            self.to_empty(device=torch.get_default_device())
            self.init_weights()
        self.tie_weights()

    def forward(
        self,
        tokens: Tensor,
        start_pos: int | Tensor | None = None,
        cache: KVCache | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits after each of the tokens, float32 (B, S, V).

        tokens: (B, S) ids, int64. Without start_pos they are whole sequences for training, and
            gradients flow.
        start_pos: position of the first token, from 0. Keys and values of earlier tokens are read
            from the cache, those of the new ones are stored in it. No gradients flow. An int
            applies to all rows, and selects Meta's operations. A tensor (B,) has one for each row.
        cache: the keys and values. None: each layer's own cache of `params.max_batch_size` rows
            and `params.max_seq_len` positions, as in Meta's code.
        positions: (B, S), those of the tokens, for whole sequences only. None: 0 to S - 1.
        mask: (B, 1, S, S) bool, True where a query sees a key, for whole sequences only. None:
            causal.
        Raises GenerationError where the tokens do not fit the cache or the RoPE table.
        """
        with torch.set_grad_enabled(start_pos is None and torch.is_grad_enabled()):
            return self.logits(
                self.features(tokens, start_pos, cache, positions=positions, mask=mask)
            )

    def features(
        self,
        tokens: Tensor,
        start_pos: int | Tensor | None = None,
        cache: KVCache | None = None,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (B, S, D).

        tokens, start_pos, cache, positions, mask: as for `forward`.
        Raises GenerationError where the tokens do not fit the cache or the RoPE table.
        """
        self._check_fits(tokens, start_pos, cache)
        h = self.tok_embeddings(tokens)  # (B, S, D)
        if start_pos is not None:
            n_keys = self.params.max_seq_len if cache is None else cache.max_seq_len
            start_pos, freqs_cis, mask = self.layer_inputs(h, start_pos, n_keys)
        else:
            table = self.freqs_cis
            freqs_cis = table[: h.shape[1]] if positions is None else table[positions]
        for layer_id, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layer(layer_id)
            h = call_with_cache(layer, layer.attention, layer_cache, h, start_pos, freqs_cis, mask)
        return self.norm(h)

    def logits(self, features: Tensor) -> Tensor:
        """features (…, D) -> float32 logits (…, V) of the whole vocabulary, on every rank."""
        return self.output(features).float()

    def layer_inputs(
        self, h: Tensor, start_pos: int | Tensor, n_keys: int
    ) -> tuple[int | Tensor, Tensor, Tensor | None]:
        """The arguments of every layer besides h (B, S, D): start_pos, freqs_cis and mask.

        start_pos: as for `forward`. A number is returned as it is. A tensor (B,) becomes the
            position of each token, (B, S). The mask is then (B, 1, S, n_keys), for the whole cache.
        n_keys: positions of the cache.
        """
        steps = torch.arange(h.shape[1], device=h.device)
        if isinstance(start_pos, int):
            end = start_pos + len(steps)
            # A single new token sees all keys, so it needs no mask.
            mask = causal_mask(start_pos + steps, end, h.dtype) if len(steps) > 1 else None
            return start_pos, self.freqs_cis[start_pos:end], mask
        positions = start_pos[:, None] + steps  # (B, S)
        mask = causal_mask(positions, n_keys, h.dtype)[:, None]  # (B, 1, S, T)
        return positions, self.freqs_cis[positions], mask

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    @property
    def freqs_cis(self) -> Tensor:
        """The rotations of 2 * max_seq_len positions, complex64 (positions, hd / 2)."""
        if self._freqs_cis is None:
            args = self.params
            # A table made under inference_mode could not be used by a training step later.
            with torch.inference_mode(False):
                self._freqs_cis = precompute_freqs_cis(
                    args.head_dim,
                    args.max_seq_len * 2,  # Meta's length
                    args.scaled_theta,
                    scaling=args.rope_scaling,
                    device=self.device,
                )
        elif self._freqs_cis.device != self.device:
            self._freqs_cis = self._freqs_cis.to(self.device)
        return self._freqs_cis

    @freqs_cis.setter
    def freqs_cis(self, table: Tensor) -> None:
        self._freqs_cis = table

    def make_cache(
        self, max_batch_size: int, max_seq_len: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        """A cache for this rank's key/value heads, on the weights' device.

        max_batch_size: its rows.
        max_seq_len: its positions.
        dtype: of keys and values. None: that of the weights.
        """
        return KVCache.zeros(
            self.n_layers,
            max_batch_size,
            max_seq_len,
            self.params.local_kv_heads(parallel.mp_size()),
            self.params.head_dim,
            dtype or self.norm.weight.dtype,
            self.device,
        )

    def tie_weights(self) -> None:
        """Where the model is `tied`, use the embedding matrix as the output matrix."""
        if self.params.tied:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set the norms' weights to 1 and biases to 0, and draw the matrices from a normal
        distribution.

        The standard deviation is 0.02. For matrices that write to the residual stream it is divided
        by sqrt(2 * n_layers). Every rank draws the whole matrix and keeps its part, so that a seed
        gives the same model at any number of ranks.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            writes_residual = name.endswith(("wo.weight", "w2.weight"))
            std = 0.02 / math.sqrt(2 * self.n_layers) if writes_residual else 0.02
            dim = parallel.shard_dim(name, self.params.embedding_shard_dim)
            assert dim is not None, name
            shape = list(weight.shape)
            shape[dim] *= parallel.mp_size()
            whole = weight.new_empty(shape).normal_(std=std)
            weight.copy_(whole.chunk(parallel.mp_size(), dim)[parallel.mp_rank()])

    def _check_fits(
        self, tokens: Tensor, start_pos: int | Tensor | None, cache: KVCache | None
    ) -> None:
        bsz, seqlen = tokens.shape
        max_rows, max_positions = self.params.max_batch_size, self.params.max_seq_len
        if start_pos is None:
            if cache is not None:
                raise GenerationError("a cache needs a start_pos: the first new token's position")
            max_rows = bsz  # no limit, because nothing is cached
        elif cache is not None:
            max_rows = cache.max_batch_size
            max_positions = min(cache.max_seq_len, max_positions)
        if bsz > max_rows:
            raise GenerationError(f"a batch of {bsz} rows, but the KV cache has {max_rows}")
        # The values of a tensor start_pos are not checked: that would synchronize with the GPU.
        start = start_pos if isinstance(start_pos, int) else 0
        if start < 0 or start + seqlen > max_positions:
            raise GenerationError(
                f"tokens at positions {start} to {start + seqlen - 1}, but max_seq_len "
                f"is {max_positions}"
            )

    # ---- training: inference needs nothing below ------------------------------------------------

    def forward_loss(
        self,
        inputs: Tensor,
        targets: Tensor,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of the next token in nats, over the targets that are not `ignore_index`.

        inputs, targets: (B, S) ids, int64.
        ignore_index: the target that has no loss.
        reduction: "mean" or "sum" over the targets.
        positions, mask: as for `forward`.
        Returns a scalar.
        """
        logits = self(inputs, positions=positions, mask=mask)  # (B, S, V)
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction=reduction
        )

    def configure_optimizers(
        self,
        learning_rate: float,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        device_type: str = "cpu",
        train: Literal["all", "norms", "all_but_embeddings"] = "all",
    ) -> torch.optim.AdamW:
        """AdamW over the weights to train. All other weights get requires_grad False.

        learning_rate, weight_decay, betas: as for `torch.optim.AdamW`. Weight decay is for matrices
            only. The norms' weights are close to 1 and do not decay, and neither do biases.
        device_type: "cuda" takes PyTorch's fused kernels.
        train: "all"; "norms"; "all_but_embeddings" leaves out the embedding matrix, which is also
            the output matrix where the model is tied.
        Raises ConfigError for another value of train.
        """
        everything = list(self.parameters())
        choices = {
            "all": everything,
            "norms": [w for name, w in self.named_parameters() if name.endswith("norm.weight")],
            "all_but_embeddings": [w for w in everything if w is not self.tok_embeddings.weight],
        }
        if train not in choices:
            raise ConfigError(f"train is {train!r}: it must be one of {', '.join(choices)}")
        weights = choices[train]
        self.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_()
        groups = [
            {"params": [w for w in weights if w.dim() > 1], "weight_decay": weight_decay},
            {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        fused = device_type == "cuda"
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
