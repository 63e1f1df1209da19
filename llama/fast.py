"""The same network for speed on a CPU: products of few rows through kernels, quantized weights.

Everything but the matrix products is the model's own code. Activations and cache are float32
whatever the weights are: a CPU gains nothing from rounding them in between.
"""

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from llama.cache import KVCache
from llama.errors import ConfigError
from llama.kernels import FLOATS, Product, Weight, is_installed
from llama.model import Transformer, TransformerBlock
from llama.quantize import (
    GROUP,
    Int4Weight,
    Int8Weight,
    Quantized,
    dequantize,
    quantize_int4,
    quantize_int8,
)

# "reference": one prompt alone gets exactly what Meta's code computes. "fast": the last bits may
# differ, since prompts are cut into pieces, what the cache holds is reused, and on the CPU the
# products are those of this file.
Mode = Literal["reference", "fast"]
Width = Literal["int8", "int4"]
CacheWidth = Literal["int8"]
QUANTIZERS: dict[str, Callable[[Tensor], Quantized]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
}
KINDS: dict[str, type[Quantized]] = {"int8": Int8Weight, "int4": Int4Weight}
BYTES = {"int8": 1.0, "int4": 0.5 + 2 / GROUP}  # of a weight, with its share of the scales

FEW = 48  # rows: for more, widening the weights to float32 pays, whose products are fastest
BLOCK = 1 << 22  # weights widened at a time


def check_mode(
    mode: Mode, quantize: Width | None, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether the mode means a `FastTransformer` here; else PyTorch's own products are as good as
    there is. Raises ConfigError for an unknown mode or width, or where quantizing needs more."""
    if mode not in get_args(Mode):
        raise ConfigError(f"mode is {mode!r}: {' or '.join(get_args(Mode))}")
    if quantize not in (None, *get_args(Width)):
        raise ConfigError(f"quantize is {quantize!r}: {' or '.join(get_args(Width))}")
    can = device.type == "cpu" and dtype in FLOATS and is_installed()
    if quantize is not None and (mode != "fast" or device.type != "cpu"):
        raise ConfigError("quantized weights are for mode fast on the CPU")
    if quantize is not None and not is_installed():
        raise ConfigError("quantized weights need numba: pip install 'llama-reference[fast]'")
    return mode == "fast" and (can or quantize is not None)


def cache_dtype(mode: Mode, kv_cache: CacheWidth | None) -> torch.dtype | None:
    """The cache's where one is asked for. Raises ConfigError where it cannot be had."""
    if kv_cache not in (None, *get_args(CacheWidth)):
        raise ConfigError(f"kv_cache is {kv_cache!r}: {' or '.join(get_args(CacheWidth))}")
    if kv_cache is not None and mode != "fast":
        raise ConfigError(f"a KV cache in {kv_cache} is for mode fast")
    return None if kv_cache is None else torch.int8


def is_quantized(name: str) -> bool:
    """Whether a tensor of that state-dict name is a matrix that `quantize` rounds."""
    return "norm" not in name and not name.startswith("tok_embeddings")


def set_quantized(layer: nn.Module, weight: Quantized) -> None:
    """Give a linear layer this in place of the parameter `weight`, for a FastTransformer."""
    del layer.weight
    layer.weight = weight  # type: ignore[assignment]


class FastTransformer:
    """A `Transformer` on the CPU with other products; for inference, the engine calls it alike.

    quantize: round to eight or four bits what matrices `checkpoint.load` has not rounded.
    Raises ConfigError where the kernels cannot take the weights, or numba is not installed.
    """

    def __init__(self, model: Transformer, quantize: Width | None = None) -> None:
        self.model = model
        self.params = model.params
        self.vocab_size = model.vocab_size
        self.device = model.device
        self.layers = [
            _FastBlock(cast(TransformerBlock, block), quantize) for block in model.layers
        ]
        self.output = _Projection([model.output], quantize)

    def make_cache(
        self, max_batch_size: int, max_seq_len: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        return self.model.make_cache(max_batch_size, max_seq_len, dtype or torch.float32)

    def features(self, tokens: Tensor, start_pos: int | Tensor, cache: KVCache) -> Tensor:
        """Ids (B, S) -> float32 (B, S, D); see `Transformer.features`."""
        h = self.model.tok_embeddings(tokens).float()
        place = self.model.place(h, start_pos, cache)
        for layer in self.layers:
            h = layer(h, *place, cache)
        return self.model.norm(h)

    def logits(self, features: Tensor) -> Tensor:
        """(…, D) -> float32 (…, V), those of all ranks."""
        return gather_from_model_parallel_region(self.output(features))


class _FastBlock:
    """A TransformerBlock whose seven matrices are read in four passes."""

    def __init__(self, block: TransformerBlock, quantize: Width | None) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.attend = attention.attend
        heads, kv_heads = attention.n_local_heads, attention.n_local_kv_heads
        self.widths = [n * attention.head_dim for n in (heads, kv_heads, kv_heads)]
        self.qkv = _Projection([attention.wq, attention.wk, attention.wv], quantize)
        self.wo = _Projection([attention.wo], quantize)
        self.gate_and_up = _Projection([feed_forward.w1, feed_forward.w3], quantize, swiglu=True)
        self.down = _Projection([feed_forward.w2], quantize)

    def __call__(
        self,
        x: Tensor,
        start_pos: int | Tensor | None,
        freqs_cis: Tensor,
        mask: Tensor | None,
        cache: KVCache,
    ) -> Tensor:
        xq, xk, xv = self.qkv(self.attention_norm(x)).split(self.widths, dim=-1)
        heads = self.attend(xq, xk, xv, start_pos, freqs_cis, mask, cache)
        h = x + reduce_from_model_parallel_region(self.wo(heads))
        products = self.gate_and_up(self.ffn_norm(h))
        return h + reduce_from_model_parallel_region(self.down(products))


class _Projection:
    """The weights of one or several linear layers, times the same input."""

    def __init__(
        self,
        layers: list[Any],  # fairscale's, which have no types
        quantize: Width | None,
        swiglu: bool = False,
    ) -> None:
        for layer in layers:
            if quantize is not None and isinstance(layer.weight, Tensor):
                set_quantized(layer, QUANTIZERS[quantize](layer.weight.detach()))
        self.weights: list[Weight] = [
            layer.weight.detach() if isinstance(layer.weight, Tensor) else layer.weight
            for layer in layers
        ]
        self.swiglu = swiglu
        self.few = Product(*self.weights, swiglu=swiglu)

    def __call__(self, x: Tensor) -> Tensor:
        """float32 (B, S, K) -> (B, S, all matrices' N), or (B, S, N) with SwiGLU."""
        rows = x.flatten(0, -2)
        # One row of float32 is PyTorch's own best case.
        is_few = len(rows) <= FEW and (len(rows) > 1 or self.few.kind != "float32")
        return (self.few(rows) if is_few else self._many(rows)).unflatten(0, x.shape[:-1])

    def _many(self, x: Tensor) -> Tensor:
        outputs = [_product(x, weight) for weight in self.weights]
        if self.swiglu:
            gate, up = outputs
            return F.silu(gate) * up
        return torch.cat(outputs, dim=-1)


def _product(x: Tensor, weight: Weight) -> Tensor:
    """x (n, K) times weight (N, K) transposed, in float32, a block of weights after the other."""
    if isinstance(weight, Tensor) and weight.dtype == torch.float32:
        return F.linear(x, weight)
    rows, width = weight.shape
    out = x.new_empty(len(x), rows)
    for start in range(0, rows, BLOCK // width):
        block = slice(start, start + BLOCK // width)
        out[:, block] = F.linear(x, _widened(weight, block))
    return out


def _widened(weight: Weight, rows: slice) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[rows].float()
    if isinstance(weight, Int8Weight):
        return dequantize(Int8Weight(weight.values[rows], weight.scale[rows]))
    return dequantize(Int4Weight(weight.packed[rows], weight.scales[rows]))
