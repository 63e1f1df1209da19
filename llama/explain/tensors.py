"""What each tensor of a forward is: meaning, formula, shape, line of code, and split over ranks.

A tensor that a module returns has the module's name, such as `layers.3.attention.wq`. A tensor
that is computed inside a module has a name below the module, such as `layers.3.attention.weights`.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from llama.cache import LayerCache
from llama.config import ModelArgs
from llama.model import (
    Attention,
    FeedForward,
    RMSNorm,
    Transformer,
    TransformerBlock,
    apply_rotary_emb,
    meta_attention,
)


@dataclass(frozen=True)
class Kind:
    """A tensor outside the layers, or a tensor that every layer has.

    Letters of shapes: B batch rows, S new tokens, T visible keys, D dim, H query heads, K key/value
    heads, hd head_dim, F feed-forward width, V vocabulary.
    """

    name: str  # with `layers.N.` for a tensor of the layers
    shape: str  # letters of the whole tensor, such as "B S H hd"
    formula: str
    meaning: str
    function: Callable[..., Any]  # whose code computes the tensor
    code: str  # a part of the line that computes it; it occurs once in the function
    split: int | None = None  # the dimension of which each rank computes a part; None: no such
    exchange: str = ""  # "all-reduce" or "all-gather": it gives every rank the whole tensor
    input_of: str = ""  # the module that takes it as its input, if no module returns it
    is_inside: bool = False  # whether it is neither an output nor the input of a module
    is_editable: bool = True  # whether a changed value takes full effect in the rest of the forward

    @property
    def is_output(self) -> bool:
        """Whether the module of the same name returns it."""
        return not self.input_of and not self.is_inside

    @property
    def place(self) -> str:
        """File, line and function of the code, such as "llama/model.py:214 Attention.forward"."""
        lines, first = inspect.getsourcelines(self.function)
        offset = next(i for i, line in enumerate(lines) if self.code in line)
        file = self.function.__module__.replace(".", "/") + ".py"
        return f"{file}:{first + offset} {self.function.__qualname__}"


BLOCK = TransformerBlock.forward
KINDS = (
    Kind(
        "tok_embeddings", "B S D", "h[s] = tok_embeddings.weight[tokens[s]]",
        "Each token id selects one row of the embedding matrix.",
        Transformer.features, "self.tok_embeddings(tokens)", exchange="all-reduce",
    ),
    Kind(
        "freqs_cis", "S hd/2 2", "cos and sin of position · θ^(-2j / hd)",
        "The rotation of each pair of features j at each position: its cosine, then its sine.",
        Transformer.layer_inputs, "return start_pos, self.freqs_cis",
        is_editable=False, is_inside=True,
    ),
    Kind(
        "layers.N.attention_norm", "B S D", "x / sqrt(mean(x²) + eps) · weight",
        "The residual stream, brought to a common size, as the input of attention.",
        RMSNorm.forward, "self._norm(x.float())",
    ),
    Kind(
        "layers.N.attention.wq", "B S H·hd", "attention_norm · wqᵀ",
        "The queries of all heads, before they are rotated.",
        Attention.forward, "self.wq(x)", split=-1,
    ),
    Kind(
        "layers.N.attention.wk", "B S K·hd", "attention_norm · wkᵀ",
        "The keys of all key/value heads, before they are rotated.",
        Attention.forward, "self.wk(x)", split=-1,
    ),
    Kind(
        "layers.N.attention.wv", "B S K·hd", "attention_norm · wvᵀ",
        "The values of all key/value heads.",
        Attention.forward, "self.wv(x)", split=-1,
    ),
    Kind(
        "layers.N.attention.queries", "B S H hd", "(q[2j] + i q[2j+1]) · freqs_cis[s, j]",
        "The queries, each pair of features rotated by the angle of its position.",
        apply_rotary_emb, "rotate(xq)", split=2, is_inside=True,
    ),
    Kind(
        "layers.N.attention.keys", "B S K hd", "(k[2j] + i k[2j+1]) · freqs_cis[s, j]",
        "The keys, each pair of features rotated by the angle of its position.",
        apply_rotary_emb, "rotate(xk)", split=2, is_inside=True,
    ),
    Kind(
        "layers.N.attention.cache_k", "B T K hd", "keys of all tokens so far",
        "The KV cache of this layer after the new keys were stored in it.",
        LayerCache.update, "cached[:bsz, :end][index] = new", split=2,
        is_editable=False, is_inside=True,
    ),
    Kind(
        "layers.N.attention.cache_v", "B T K hd", "values of all tokens so far",
        "The KV cache of this layer after the new values were stored in it.",
        LayerCache.update, "cached[:bsz, :end][index] = new", split=2,
        is_editable=False, is_inside=True,
    ),
    Kind(
        "layers.N.attention.scores", "B H S T", "queries · keysᵀ / sqrt(hd) + mask",
        "The match of each query with each key. The mask is minus infinity for later tokens.",
        meta_attention, "scores = xq @", split=1, is_inside=True,
    ),
    Kind(
        "layers.N.attention.weights", "B H S T", "softmax(scores)",
        "How much of each token's value each query takes. A row sums to 1.",
        meta_attention, "softmax(-1)", split=1, is_inside=True,
    ),
    Kind(
        "layers.N.attention.heads", "B S H hd", "weights · values",
        "For each head, the average of the values, weighted by its attention.",
        meta_attention, "weights @ values", split=2, input_of="layers.N.attention.wo",
    ),
    Kind(
        "layers.N.attention.wo", "B S D", "heads · woᵀ",
        "What attention adds to the residual stream.",
        Attention.forward, "self.wo(", exchange="all-reduce",
    ),
    Kind(
        "layers.N.after_attention", "B S D", "residual stream + wo",
        "The residual stream after attention.",
        BLOCK, "h = x +", is_editable=False, input_of="layers.N.ffn_norm",
    ),
    Kind(
        "layers.N.ffn_norm", "B S D", "x / sqrt(mean(x²) + eps) · weight",
        "The residual stream, brought to a common size, as the input of the feed-forward.",
        RMSNorm.forward, "self._norm(x.float())",
    ),
    Kind(
        "layers.N.feed_forward.w1", "B S F", "ffn_norm · w1ᵀ",
        "The gate, before silu.",
        FeedForward.forward, "self.w1(x)", split=-1,
    ),
    Kind(
        "layers.N.feed_forward.w3", "B S F", "ffn_norm · w3ᵀ",
        "The features that are multiplied by the gate.",
        FeedForward.forward, "self.w3(x)", split=-1,
    ),
    Kind(
        "layers.N.feed_forward.gated", "B S F", "silu(w1) · w3",
        "The features after the gate.",
        FeedForward.forward, "F.silu(self.w1(x))", split=-1, input_of="layers.N.feed_forward.w2",
    ),
    Kind(
        "layers.N.feed_forward.w2", "B S D", "gated · w2ᵀ",
        "What the feed-forward adds to the residual stream.",
        FeedForward.forward, "self.w2(", exchange="all-reduce",
    ),
    Kind(
        "layers.N", "B S D", "after_attention + w2",
        "The residual stream after the layer.",
        BLOCK, "return h +",
    ),
    Kind(
        "norm", "B S D", "x / sqrt(mean(x²) + eps) · weight",
        "The residual stream after all layers, brought to a common size.",
        RMSNorm.forward, "self._norm(x.float())",
    ),
    Kind(
        "output", "B S V", "norm · outputᵀ",
        "The logits: one score for each token of the vocabulary.",
        Transformer.logits, "self.output(features)", split=-1, exchange="all-gather",
    ),
)  # fmt: skip


def kind_of(name: str) -> Kind:
    """The kind of the tensor with this name. Raises KeyError if no tensor has the name."""
    return _BY_NAME[re.sub(r"^layers\.\d+", "layers.N", name)]


def names(n_layers: int) -> list[str]:
    """The names of all tensors of a forward, in the order in which they are computed."""
    found: list[str] = []
    for is_of_layer, kinds in groupby(KINDS, lambda kind: kind.name.startswith("layers.")):
        group = [kind.name for kind in kinds]
        for i in range(n_layers if is_of_layer else 1):
            found += [name.replace("layers.N", f"layers.{i}") for name in group]
    return found


def owners(kind: Kind, args: ModelArgs, mp_size: int) -> list[tuple[int, int]] | None:
    """The part of each rank along `kind.split`: its first index, and its last index plus 1. None:
    the tensor is not computed in parts.

    With more ranks than key/value heads, several ranks own the same head.
    """
    if kind.split is None:
        return None
    sizes = {
        "H": args.n_heads, "K": args.local_kv_heads(1), "H·hd": args.n_heads * args.head_dim,
        "K·hd": args.local_kv_heads(1) * args.head_dim, "F": args.ffn_dim, "V": args.vocab_size,
    }  # fmt: skip
    letter = kind.shape.split(" ")[kind.split]
    size = sizes[letter]
    if not letter.startswith("K"):
        part = size // mp_size
        return [(rank * part, (rank + 1) * part) for rank in range(mp_size)]
    heads, width = args.local_kv_heads(1), size // args.local_kv_heads(1)
    local = max(1, heads // mp_size)
    first_heads = [rank * heads // mp_size for rank in range(mp_size)]
    return [(first * width, (first + local) * width) for first in first_heads]


_BY_NAME = {kind.name: kind for kind in KINDS}
