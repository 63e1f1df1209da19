"""The shape of a Llama: `ModelArgs` and the published models."""

import math
from dataclasses import dataclass, replace
from typing import Any

from llama.errors import ConfigError, require_number
from llama.rope_scaling import RopeScaling

LLAMA_2_THETA = 10000.0
CODE_LLAMA_THETA = 1e6


@dataclass
class ModelArgs:
    """A model's shape and limits. Meta's fields and defaults come first, then fields of our own.

    Args:
        dim: width of the model, D.
        n_layers: layers.
        n_heads: query heads, H.
        n_kv_heads: key/value heads, K. None: as many as n_heads.
        vocab_size: tokens of the vocabulary, V. -1: as many as the tokenizer has.
        multiple_of: the feed-forward width is rounded up to a multiple of this.
        ffn_dim_multiplier: multiplies the feed-forward width before it is rounded. None: 1.
        norm_eps: added to the mean square in each RMSNorm.
        rope_theta: base of RoPE's frequencies.
        use_scaled_rope: scale RoPE. It is True whenever rope_scaling is given.
        max_batch_size: rows of the KV cache.
        max_seq_len: positions of the KV cache. RoPE's table has twice as many, as in Meta's code.
        hidden_dim: the feed-forward width, F. None: `ffn_width` computes it from dim, multiple_of
            and ffn_dim_multiplier.
        head_width: features of a head. None: dim / n_heads.
        rope_scaling: how RoPE is scaled. None with use_scaled_rope: with Meta's constants.
        context_length: longest trained context in tokens. None: see `context`.
        embedding_shard_dim: the dimension of the embedding matrix that ranks split. 0: vocabulary,
            as in Llama 3. 1: features, as in Llama 2.
        tied: the output matrix is the embedding matrix, as in Llama 3.2 1B and 3B.
        attention_bias: wq, wk, wv and wo add a bias, which Meta's models do not have.
        mlp_bias: w1, w2 and w3 add a bias, which Meta's models do not have.

    Raises ConfigError if the numbers do not describe a Llama.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    use_scaled_rope: bool = False
    max_batch_size: int = 32
    max_seq_len: int = 2048

    hidden_dim: int | None = None
    head_width: int | None = None
    rope_scaling: RopeScaling | None = None
    context_length: int | None = None
    embedding_shard_dim: int = 0
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        for name in ("use_scaled_rope", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be true or false")
        if self.use_scaled_rope and self.rope_scaling is None:
            self.rope_scaling = RopeScaling()
        self.use_scaled_rope = self.rope_scaling is not None
        self.check()

    def check(self) -> None:
        """Raise ConfigError if a number is out of range. Call this after assigning to a field."""
        whole = ["dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"]
        whole += ["max_batch_size", "max_seq_len"]
        whole += [
            n
            for n in ("hidden_dim", "head_width", "context_length")
            if getattr(self, n) is not None
        ]
        for name in whole:
            require_number(name, getattr(self, name), whole=True)
        for name in ("norm_eps", "rope_theta"):
            require_number(name, getattr(self, name))
        if self.ffn_dim_multiplier is not None:
            require_number("ffn_dim_multiplier", self.ffn_dim_multiplier)
        require_number("the feed-forward width", self.ffn_dim, whole=True)
        if self.vocab_size != -1:
            require_number("vocab_size", self.vocab_size, whole=True)
        if self.head_width is None and self.dim % self.n_heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"RoPE rotates pairs: head_dim {self.head_dim} must be even")
        if self.n_heads % self.local_kv_heads(1):
            raise ConfigError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.embedding_shard_dim not in (0, 1):
            raise ConfigError(
                f"embedding_shard_dim is {self.embedding_shard_dim}: it must be 0 or 1"
            )
        if self.tied and self.embedding_shard_dim != 0:
            raise ConfigError(
                "a tied embedding is split by vocabulary: embedding_shard_dim must be 0"
            )

    @property
    def has_biases(self) -> bool:
        """Whether any linear layer adds a bias."""
        return self.attention_bias or self.mlp_bias

    @property
    def scaled_theta(self) -> float:
        """The base of RoPE's frequencies: `rope_theta`, or more with scaling of kind "dynamic".

        If a text is longer than the original context, "dynamic" raises theta so that the lowest
        frequency is interpolated to the length of the text (NTK-aware scaling,
        arxiv.org/abs/2309.00071, section 3.1). This library uses max_seq_len as the length, so that
        one table serves all texts.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "dynamic":
            return self.rope_theta
        length = max(self.max_seq_len, scaling.original_context_length)
        stretch = scaling.factor * length / scaling.original_context_length - (scaling.factor - 1)
        return self.rope_theta * stretch ** (self.head_dim / (self.head_dim - 2))

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.dim // self.n_heads if self.head_width is None else self.head_width

    @property
    def ffn_dim(self) -> int:
        """The feed-forward width F: `hidden_dim` if given, else `ffn_width` of 4 * dim."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return ffn_width(4 * self.dim, self.multiple_of, self.ffn_dim_multiplier)

    def metas_width(self) -> dict[str, float]:
        """The keys of params.json that give the feed-forward width, which has no key of its own.

        If `hidden_dim` is None, they are this model's own `multiple_of` and `ffn_dim_multiplier`.
        Otherwise they are taken from the published model with this shape. If there is no such
        model, they are values from which `ffn_width` computes `hidden_dim`."""
        published = self.published()
        if self.hidden_dim is None or published:
            source = self if self.hidden_dim is None else PRESETS[published[0]]
            width: dict[str, float] = {"multiple_of": source.multiple_of}
            if source.ffn_dim_multiplier is not None:
                width["ffn_dim_multiplier"] = source.ffn_dim_multiplier
            return width
        default = int(2 * (4 * self.dim) / 3)
        if self.hidden_dim >= default:  # `ffn_width` rounds the default up to hidden_dim
            return {"multiple_of": self.hidden_dim}
        return {"multiple_of": 1, "ffn_dim_multiplier": (self.hidden_dim + 0.5) / default}

    def local_kv_heads(self, mp_size: int) -> int:
        """Key/value heads that one of mp_size ranks holds. 0 if there are more ranks than heads."""
        return (self.n_kv_heads or self.n_heads) // mp_size

    def prefill_bytes(self, rows: int, tokens: int, mp_size: int, itemsize: int) -> int:
        """Estimated bytes that one of mp_size ranks needs to compute `rows` prompts of `tokens`
        tokens at once: the scores of one layer (B, H, S, S) or the logits (B, S, V), whichever are
        more. Both include their float32 copies. itemsize: bytes of a number in the model's dtype.
        """
        low = 0 if itemsize == 4 else itemsize
        scores = rows * tokens * tokens * self.n_heads // mp_size
        return max(scores * (low + 8), rows * tokens * self.vocab_size * (low + 4))

    def same_shape(self, preset: "ModelArgs") -> bool:
        """Whether this has the preset's shape. A vocab_size of -1 counts as equal.

        The norm_eps may be smaller than the preset's, because early files of Llama 2 give 1e-6
        instead of 1e-5. It may not be larger: a model with 1e-5 is not a Llama 1 with 1e-6."""
        names = (
            "dim n_layers n_heads n_kv_heads head_dim ffn_dim rope_theta use_scaled_rope".split()
        )
        same_vocab = self.vocab_size in (preset.vocab_size, -1)
        is_close = same_vocab and preset.norm_eps >= self.norm_eps
        return is_close and all(getattr(self, n) == getattr(preset, n) for n in names)

    def published(self) -> list[str]:
        """The names of the published models with this shape."""
        return [name for name, preset in PRESETS.items() if self.same_shape(preset)]

    def workable_sizes(self) -> list[int]:
        """The numbers of ranks that heads, feed-forward width and vocabulary can be split over.

        If there are more ranks than key/value heads, each head must be stored on the same number of
        ranks.
        """
        n_kv_heads = self.local_kv_heads(1)
        parts = math.gcd(self.n_heads, self.ffn_dim, self.vocab_size)
        divisors = {n for n in range(1, math.isqrt(parts) + 1) if parts % n == 0}
        divisors |= {parts // n for n in divisors}
        return sorted(n for n in divisors if n_kv_heads % n == 0 or n % n_kv_heads == 0)

    def whole_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of the unsplit model, by its state-dict name, in order."""
        q_dim, kv_dim = (n * self.head_dim for n in (self.n_heads, self.local_kv_heads(1)))
        attention = {
            "attention.wq": (q_dim, self.dim),
            "attention.wk": (kv_dim, self.dim),
            "attention.wv": (kv_dim, self.dim),
            "attention.wo": (self.dim, q_dim),
        }
        feed_forward = {
            "feed_forward.w1": (self.ffn_dim, self.dim),
            "feed_forward.w2": (self.dim, self.ffn_dim),
            "feed_forward.w3": (self.ffn_dim, self.dim),
        }
        layer: dict[str, tuple[int, ...]] = {}
        for part, has_bias in ((attention, self.attention_bias), (feed_forward, self.mlp_bias)):
            layer |= {f"{name}.weight": shape for name, shape in part.items()}
            layer |= {f"{name}.bias": shape[:1] for name, shape in part.items() if has_bias}
        layer |= {"attention_norm.weight": (self.dim,), "ffn_norm.weight": (self.dim,)}
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (self.vocab_size, self.dim)}
        for i in range(self.n_layers):
            shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
        return shapes | {"norm.weight": (self.dim,), "output.weight": (self.vocab_size, self.dim)}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """`whole_shapes`, but without the output matrix if it is tied to the embedding."""
        shapes = self.whole_shapes()
        if self.tied:
            del shapes["output.weight"]
        return shapes

    def check_split(self, mp_size: int) -> None:
        """Raise ConfigError if mp_size ranks cannot share the model."""
        if self.vocab_size < 1:
            raise ConfigError("vocab_size is -1: set it to the tokenizer's n_words")
        if mp_size not in (sizes := self.workable_sizes()):
            raise ConfigError(
                f"this model cannot be split over {mp_size} ranks, only over "
                f"{', '.join(map(str, sizes))}: they must divide n_heads {self.n_heads}, "
                f"feed-forward width {self.ffn_dim} and vocab_size {self.vocab_size}, and divide "
                f"or be multiples of n_kv_heads {self.n_kv_heads}"
            )

    def set_limits(self, max_seq_len: int | None, max_batch_size: int) -> None:
        """Set the KV cache's size: max_seq_len positions (None: 2048, or the context if that is
        smaller) and max_batch_size rows. Raises ConfigError for sizes out of range."""
        self.max_batch_size = max_batch_size
        self.max_seq_len = min(2048, self.context) if max_seq_len is None else max_seq_len
        self.check()
        if self.max_seq_len > self.context:
            raise ConfigError(
                f"max_seq_len {self.max_seq_len} is above the model's context, {self.context}"
            )

    @property
    def context(self) -> int:
        """The longest trained context in tokens: `context_length` if given, else the context of the
        published model with this shape, else the context of the family with these RoPE settings."""
        if self.context_length is not None:
            return self.context_length
        for name in self.published():
            if (length := PRESETS[name].context_length) is not None:
                return length
        if self.use_scaled_rope:
            return 131072
        return {LLAMA_2_THETA: 4096, CODE_LLAMA_THETA: 16384}.get(self.rope_theta, 8192)


def ffn_width(hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Two thirds of `hidden_dim`, times the multiplier, rounded up to a multiple of `multiple_of`.

    The intermediate results are truncated to integers in the same order as in Meta's code."""
    width = int(2 * hidden_dim / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return math.ceil(width / multiple_of) * multiple_of


# ---- the published models -------------------------------------------------------------------

_LLAMA_2_FIELDS: dict[str, Any] = dict(
    vocab_size=32000, rope_theta=LLAMA_2_THETA, context_length=4096, embedding_shard_dim=1
)
_LLAMA_2 = ModelArgs(**_LLAMA_2_FIELDS)
_LLAMA_1 = replace(_LLAMA_2, norm_eps=1e-6, context_length=2048)
_CODE_LLAMA_FIELDS = _LLAMA_2_FIELDS | dict(
    vocab_size=32016, rope_theta=CODE_LLAMA_THETA, context_length=16384
)
_CODE_LLAMA = ModelArgs(**_CODE_LLAMA_FIELDS, ffn_dim_multiplier=1.0)
_13B: dict[str, Any] = dict(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40)
_LLAMA_3 = ModelArgs(vocab_size=128256, n_kv_heads=8, rope_theta=5e5, context_length=8192)
_LLAMA_3_8B = replace(_LLAMA_3, multiple_of=1024, ffn_dim_multiplier=1.3)
_LLAMA_3_70B = replace(_LLAMA_3_8B, dim=8192, n_layers=80, n_heads=64, multiple_of=4096)


def _extended(args: ModelArgs, factor: float = 8.0) -> ModelArgs:
    return replace(args, rope_scaling=RopeScaling(factor), context_length=131072)


_LLAMA_31_405B = replace(
    _extended(_LLAMA_3),
    dim=16384,
    n_layers=126,
    n_heads=128,
    multiple_of=4096,
    ffn_dim_multiplier=1.2,
)

PRESETS: dict[str, ModelArgs] = {
    "llama-2-7b": _LLAMA_2,
    "llama-2-13b": replace(_LLAMA_2, **_13B),
    "llama-2-70b": replace(_LLAMA_3_70B, **_LLAMA_2_FIELDS),
    "llama-1-7b": _LLAMA_1,
    "llama-1-13b": replace(_LLAMA_1, **_13B),
    "llama-1-30b": replace(_LLAMA_1, dim=6656, n_layers=60, n_heads=52, n_kv_heads=52),
    "llama-1-65b": replace(_LLAMA_1, dim=8192, n_layers=80, n_heads=64, n_kv_heads=64,
                           norm_eps=1e-5),
    "codellama-7b": _CODE_LLAMA,
    "codellama-13b": replace(_CODE_LLAMA, **_13B),
    "codellama-34b": replace(_CODE_LLAMA, dim=8192, n_layers=48, n_heads=64, n_kv_heads=8,
                             vocab_size=32000),
    "codellama-70b": replace(_LLAMA_3_70B, **_CODE_LLAMA_FIELDS),
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3-70b": _LLAMA_3_70B,
    "llama-3.1-8b": _extended(_LLAMA_3_8B),
    "llama-3.1-70b": _extended(_LLAMA_3_70B),
    "llama-3.1-405b": _LLAMA_31_405B,
    # Meta's folder for 16 ranks stores each of the 8 key/value heads twice: one head per rank.
    "llama-3.1-405b-mp16": replace(_LLAMA_31_405B, n_kv_heads=16),
    "llama-3.2-1b": replace(_extended(_LLAMA_3, 32.0), dim=2048, n_layers=16,
                            ffn_dim_multiplier=1.5, tied=True),
    "llama-3.2-3b": replace(_extended(_LLAMA_3, 32.0), dim=3072, n_layers=28, n_heads=24,
                            ffn_dim_multiplier=1.0, tied=True),
    "llama-3.3-70b": _extended(_LLAMA_3_70B),
}  # fmt: skip
