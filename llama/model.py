"""The Llama transformer, whole, for inference and training, split over fairscale's ranks.

Shapes in comments, per rank: B batch rows, S new tokens, T visible keys, D dim, H query heads,
K key/value heads, hd head_dim, F feed-forward width, V vocabulary. H, K and F are what one of
mp_size ranks holds.
"""

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
from llama.cache import KVCache
from llama.config import ModelArgs, RopeScaling
from llama.errors import ConfigError, GenerationError


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32; Zhang & Sennrich 2019, arxiv.org/abs/1910.07467."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


# ---- rotary position embedding: Su et al. 2021, arxiv.org/abs/2104.09864 ------------------------


def scale_frequencies(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's stretching of RoPE for long contexts: slow waves are slowed by `factor`, fast
    ones stay, those in between are blended. freqs: (hd / 2,) radians a position."""
    wavelen = 2 * math.pi / freqs
    turns = scaling.original_context_length / wavelen  # full turns within the old context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (turns - low) / (high - low)
    blended = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    context = scaling.original_context_length
    is_slow, is_fast = wavelen > context / low, wavelen < context / high
    return torch.where(is_slow, freqs / scaling.factor, torch.where(is_fast, freqs, blended))


def precompute_freqs_cis(
    head_dim: int,
    end: int,
    theta: float = 10000.0,
    scaling: RopeScaling | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The rotations exp(i * position * frequency): complex64 (end, hd / 2)."""
    exponents = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    freqs = 1.0 / theta**exponents
    if scaling is not None:
        freqs = scale_frequencies(freqs, scaling)
    angles = torch.outer(torch.arange(end, device=device, dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Turn neighbouring pairs of features by their position's angles, in float32.

    xq: (B, S, H, hd), xk: (B, S, K, hd), freqs_cis: (S, hd / 2) or (B, S, hd / 2); shapes stay.
    """
    rotation = freqs_cis.unsqueeze(-2)  # one for all heads, and for all rows where it has none

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)

    return rotate(xq), rotate(xk)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Give each query head its key/value head: (B, T, K, hd) -> (B, T, K * n_rep, hd), every head
    n_rep times in a row."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=2)


def causal_mask(positions: Tensor, n_keys: int, dtype: torch.dtype) -> Tensor:
    """Added to the scores: a query sees keys whose position is not after its own.

    positions: (..., S) of the queries; the keys are at 0…T - 1 -> (..., S, T).
    """
    hidden = torch.arange(n_keys, device=positions.device) > positions.unsqueeze(-1)
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(
        hidden, -math.inf
    )


def document_mask(documents: Tensor) -> Tensor:
    """The same rule within documents (B, S), True where a query may look, (B, 1, S, S)."""
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


def document_positions(documents: Tensor) -> Tensor:
    """Positions (B, S) that begin again at 0 with every document of a row."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    is_first = documents[:, 1:] != documents[:, :-1]
    start = F.pad(torch.where(is_first, index[:, 1:], 0), (1, 0)).cummax(1).values
    return index - start


# ---- the layers -------------------------------------------------------------------------------


def _no_init(weight: Tensor) -> Tensor:
    return weight  # `Transformer.init_weights` does it, without the full matrix on every rank


# How fairscale's layers are used: a column-parallel one leaves each rank its own features, and a
# row-parallel one takes them as they are. Only the last gathers, so that all ranks have all logits.
COLUMN: dict[str, Any] = dict(bias=False, gather_output=False, init_method=_no_init)
ROW: dict[str, Any] = dict(bias=False, input_is_parallel=True, init_method=_no_init)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads; Vaswani et al. 2017, arxiv.org/abs/1706.03762,
    Ainslie et al. 2023, arxiv.org/abs/2305.13245."""

    def __init__(self, args: ModelArgs, layer_id: int) -> None:
        super().__init__()
        mp_size = parallel.mp_size()
        self.layer_id = layer_id
        self.head_dim = args.head_dim
        self.n_local_heads = args.n_heads // mp_size
        self.n_local_kv_heads = args.local_kv_heads(mp_size)
        self.n_rep = self.n_local_heads // self.n_local_kv_heads

        kv_dim = args.local_kv_heads(1) * args.head_dim
        self.wq = ColumnParallelLinear(args.dim, args.dim, **COLUMN)
        self.wk = ColumnParallelLinear(args.dim, kv_dim, **COLUMN)
        self.wv = ColumnParallelLinear(args.dim, kv_dim, **COLUMN)
        self.wo = RowParallelLinear(args.dim, args.dim, **ROW)

    def forward(
        self,
        x: Tensor,
        start_pos: int | Tensor | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        # Column-parallel: each rank projects to its own heads and attends with them alone.
        qkv = self.wq(x), self.wk(x), self.wv(x)
        # Row-parallel: every rank adds its heads' share of the output, summed over the ranks.
        return self.wo(self.attend(*qkv, start_pos, freqs_cis, mask, cache))  # (B, S, D)

    def attend(
        self,
        xq: Tensor,
        xk: Tensor,
        xv: Tensor,
        start_pos: int | Tensor | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """What lies between the projections: (B, S, H * hd), twice (B, S, K * hd) -> heads."""
        bsz, seqlen, _ = xq.shape
        xq = xq.view(bsz, seqlen, self.n_local_heads, self.head_dim)  # (B, S, H, hd)
        xk = xk.view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)  # (B, S, K, hd)
        xv = xv.view(bsz, seqlen, self.n_local_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)

        if cache is not None and start_pos is not None:
            xk, xv = cache.update(self.layer_id, start_pos, xk, xv)  # (B, T, K, hd)
        is_metas = isinstance(start_pos, int)  # Meta's call: Meta's operations, to the bit
        # Else PyTorch's kernel groups the heads by itself, but not for gradients under a mask.
        is_grouped = not is_metas and (mask is None or cache is not None)
        n_rep = 1 if is_grouped else self.n_rep
        keys = repeat_kv(xk, n_rep).transpose(1, 2)  # (B, H, T, hd)
        values = repeat_kv(xv, n_rep).transpose(1, 2)

        if not is_metas:  # the same sum without ever holding the scores
            queries = xq.transpose(1, 2)  # (B, H, S, hd)
            if seqlen == 1 and mask is not None:
                # Then a group's heads are as good as queries of one head, which all kernels take.
                queries = queries.reshape(bsz, keys.shape[1], -1, self.head_dim)
            heads = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                mask,
                is_causal=mask is None,
                enable_gqa=queries.shape[1] != keys.shape[1],
            ).reshape(bsz, -1, seqlen, self.head_dim)
        else:
            # The scores are the largest tensor there is: they are changed in place.
            scores = xq.transpose(1, 2) @ keys.transpose(2, 3)  # (B, H, S, T)
            scores /= math.sqrt(self.head_dim)
            if mask is not None:
                scores += mask
            weights = scores.float().softmax(-1).type_as(xq)
            heads = weights @ values  # (B, H, S, hd)
        return heads.transpose(1, 2).flatten(2)  # (B, S, H * hd)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); Shazeer 2020, arxiv.org/abs/2002.05202."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(dim, hidden_dim, **COLUMN)  # gate
        self.w2 = RowParallelLinear(hidden_dim, dim, **ROW)  # down
        self.w3 = ColumnParallelLinear(dim, hidden_dim, **COLUMN)  # up

    def forward(self, x: Tensor) -> Tensor:
        # Gate and up are column-parallel: the product of a rank's F features stays local.
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (B, S, D)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual stream after."""

    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args, layer_id)
        self.feed_forward = FeedForward(args.dim, args.ffn_dim)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(
        self,
        x: Tensor,
        start_pos: int | Tensor | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask, cache)
        return h + self.feed_forward(self.ffn_norm(h))  # (B, S, D)


class Transformer(nn.Module):
    """Token ids in, logits of the next token out.

    The weights are random (normal, 0.02), the same at any number of ranks for one seed; under
    `torch.device("meta")` they take no memory and wait for a checkpoint. Where no process group
    exists, one rank is set up.
    """

    def __init__(self, params: ModelArgs) -> None:
        super().__init__()
        parallel.initialize()
        params.check_split(parallel.mp_size())
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self.freqs_cis: Tensor | None = None  # made on the weights' device by the first forward
        self.cache: KVCache | None = None  # for Meta's call without one, made by the first

        with parallel.on_meta_device():
            embedding = ParallelEmbedding if params.embedding_shard_dim else VocabParallelEmbedding
            self.tok_embeddings = embedding(params.vocab_size, params.dim, init_method=_no_init)
            self.layers = nn.ModuleList(
                TransformerBlock(layer_id, params) for layer_id in range(params.n_layers)
            )
            self.norm = RMSNorm(params.dim, params.norm_eps)
            self.output = ColumnParallelLinear(
                params.dim, params.vocab_size, **(COLUMN | {"gather_output": True})
            )
        if torch.get_default_device().type != "meta":
            self.to_empty(device=torch.get_default_device())
            self.init_weights()
        self.tie_weights()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    def tie_weights(self) -> None:
        """Make the output matrix the embedding itself, where the model is `tied`."""
        if self.params.tied:
            self.output.weight = self.tok_embeddings.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every weight anew; what adds to the residual stream starts smaller with depth.

        Each matrix is drawn whole and cut, so that a seed gives one model at any number of ranks.
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
                continue
            into_residual = name.endswith(("wo.weight", "w2.weight"))
            std = 0.02 / math.sqrt(2 * self.n_layers) if into_residual else 0.02
            dim = parallel.shard_dim(name, self.params.embedding_shard_dim)
            assert dim is not None, name
            whole = list(weight.shape)
            whole[dim] *= parallel.mp_size()
            drawn = weight.new_empty(whole).normal_(std=std)
            weight.copy_(drawn.chunk(parallel.mp_size(), dim)[parallel.mp_rank()])

    def forward(
        self,
        tokens: Tensor,
        start_pos: int | Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits after each of the tokens, float32 (B, S, V).

        tokens: (B, S) ids. Without start_pos they are whole sequences, and gradients flow:
            training.
        start_pos: position of the first token; the keys and values of the earlier ones are read
            from the cache, those of the new ones stored in it. No gradients. A number counts for
            all rows, and the operations are Meta's own; a tensor (B,) says it for each row.
        cache: where they are kept; None: in the model's own, sized by `params.max_batch_size` and
            `max_seq_len`, which is Meta's call.
        documents: (B, S) the number of the document each token of a whole sequence belongs to;
            documents do not see each other and each begins at position 0. None: a row is one.
        Raises GenerationError where the tokens do not fit the cache or the RoPE table.
        """
        with torch.set_grad_enabled(start_pos is None and torch.is_grad_enabled()):
            return self.logits(self.features(tokens, start_pos, cache, documents))

    def features(
        self,
        tokens: Tensor,
        start_pos: int | Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """What `logits` is computed from, (B, S, D); the arguments are those of `forward`."""
        if start_pos is None:
            if cache is not None:
                raise GenerationError("a cache needs a start_pos: the first new token's position")
            self._check_fits(tokens, 0, tokens.shape[0], self.params.max_seq_len)
        else:
            if documents is not None:
                raise GenerationError("documents are for whole sequences: leave out start_pos")
            cache = self._own_cache() if cache is None else cache
            positions = min(cache.max_seq_len, self.params.max_seq_len)
            # What a tensor holds is not looked at: a GPU would have to be waited for.
            start = start_pos if isinstance(start_pos, int) else 0
            self._check_fits(tokens, start, cache.max_batch_size, positions)
        h = self.tok_embeddings(tokens)  # (B, S, D)
        place, freqs_cis, mask = self.place(h, start_pos, cache, documents)
        for layer in self.layers:
            h = layer(h, place, freqs_cis, mask, cache)
        return self.norm(h)

    def logits(self, features: Tensor) -> Tensor:
        """(…, D) -> float32 (…, V), those of all ranks."""
        return self.output(features).float()

    def place(
        self,
        h: Tensor,
        start_pos: int | Tensor | None,
        cache: KVCache | None,
        documents: Tensor | None = None,
    ) -> tuple[int | Tensor | None, Tensor, Tensor | None]:
        """Where the tokens stand: the place in the cache, the rotations, and who sees whom."""
        seqlen = h.shape[1]
        table = self.rope_table(h.device)
        if start_pos is None:
            if documents is None:
                return None, table[:seqlen], None
            return None, table[document_positions(documents)], document_mask(documents)
        steps = torch.arange(seqlen, device=h.device)
        if isinstance(start_pos, int):
            end = start_pos + seqlen
            # A single new token may see every key there is.
            mask = causal_mask(start_pos + steps, end, h.dtype) if seqlen > 1 else None
            return start_pos, table[start_pos:end], mask
        assert cache is not None
        positions = start_pos[:, None] + steps  # (B, S)
        mask = causal_mask(positions, cache.max_seq_len, h.dtype)
        return positions, table[positions], mask[:, None]

    def forward_loss(
        self,
        inputs: Tensor,
        targets: Tensor,
        ignore_index: int = -100,
        documents: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy of the next token in nats, over the targets that are not `ignore_index`.

        inputs, targets, documents: (B, S), as for `forward`. reduction: "mean" or "sum".
        """
        logits = self(inputs, documents=documents)
        return next_token_loss(logits, targets, ignore_index, reduction)

    def configure_optimizers(
        self,
        learning_rate: float,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        device_type: str = "cpu",
        train: Literal["all", "norms", "all_but_embeddings"] = "all",
    ) -> torch.optim.AdamW:
        """AdamW over what is to be trained; all else stops taking gradients.

        Only matrices decay: the norms' weights lie around one, not zero.
        train: "norms" trains the norms alone, "all_but_embeddings" leaves the embedding as it is
            (and the output matrix, where that is the embedding).
        """
        everything = list(self.parameters())
        choices = {
            "all": everything,
            "norms": [w for w in everything if w.dim() == 1],
            "all_but_embeddings": [w for w in everything if w is not self.tok_embeddings.weight],
        }
        if train not in choices:
            raise ConfigError(f"train is {train!r}: one of {', '.join(choices)}")
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

    def rope_table(self, device: torch.device) -> Tensor:
        """The rotations of all positions; see `precompute_freqs_cis`."""
        if self.freqs_cis is None or self.freqs_cis.device != device:
            args = self.params
            # Training may use a table that generation made: it must not be an inference tensor.
            with torch.inference_mode(False):
                self.freqs_cis = precompute_freqs_cis(
                    args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling, device
                )
        return self.freqs_cis

    def _own_cache(self) -> KVCache:
        weight, cache = next(self.parameters()), self.cache
        if cache is None or (cache.k.dtype, cache.k.device) != (weight.dtype, weight.device):
            cache = self.make_cache(self.params.max_batch_size, self.params.max_seq_len)
            self.cache = cache
        return cache

    def make_cache(
        self, max_batch_size: int, max_seq_len: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        """A cache of this rank's heads on the weights' device; dtype None: theirs."""
        weight = self.norm.weight
        return KVCache.zeros(
            self.n_layers,
            max_batch_size,
            max_seq_len,
            self.params.local_kv_heads(parallel.mp_size()),
            self.params.head_dim,
            dtype or weight.dtype,
            weight.device,
        )

    @staticmethod
    def _check_fits(tokens: Tensor, start_pos: int, max_rows: int, max_positions: int) -> None:
        bsz, seqlen = tokens.shape
        if bsz > max_rows:
            raise GenerationError(f"a batch of {bsz} rows, but the KV cache has {max_rows}")
        if start_pos < 0 or start_pos + seqlen > max_positions:
            raise GenerationError(
                f"tokens at positions {start_pos} to {start_pos + seqlen - 1}, but max_seq_len "
                f"is {max_positions}"
            )


def next_token_loss(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy in nats: logits (B, S, V), targets (B, S) -> a number."""
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction=reduction
    )
