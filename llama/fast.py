"""The same network for speed on a CPU, in compiled code, with the weights as they are or quantized.

Activations and cache are float32 whatever the weights are: a CPU gains nothing from rounding them
in between.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from llama import parallel
from llama.cache import KVCache
from llama.errors import ConfigError
from llama.kernels import FLOATS, Product, Weight, has_vnni, is_installed
from llama.model import Transformer
from llama.quantize import GROUP, Int4Weight, Int8Weight, Quantized, quantize_int4, quantize_int8

# "reference": one prompt alone gets exactly what Meta's code computes. "fast": the last bits may
# differ, since prompts are cut into pieces, what the cache holds is reused, and on the CPU the
# products are those of this file.
Mode = Literal["reference", "fast"]
Width = Literal["int8", "int4", "fp8"]
CacheWidth = Literal["int8"]
# Of a CPU, and of folders; a GPU has `device_weights`.
QUANTIZERS: dict[str, Callable[[Tensor], Quantized]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
}
KINDS: dict[str, type[Quantized]] = {"int8": Int8Weight, "int4": Int4Weight}
MOST = 512  # tokens computed at once
# Of a weight, with its share of the scales.
BYTES = {"int8": 1.0, "int4": 0.5 + 2 / GROUP, "fp8": 1.0}


def check_mode(
    mode: Mode, quantize: Width | None, device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether the mode means a `FastTransformer` here, which is for CPUs. Raises ConfigError for an
    unknown mode or width, or where quantizing needs more."""
    if mode not in get_args(Mode):
        raise ConfigError(f"mode is {mode!r}: {' or '.join(get_args(Mode))}")
    if quantize not in (None, *get_args(Width)):
        raise ConfigError(f"quantize is {quantize!r}: {' or '.join(get_args(Width))}")
    can = device.type == "cpu" and dtype in FLOATS and is_installed()
    if quantize is not None and (mode != "fast" or device.type not in ("cpu", "cuda")):
        raise ConfigError("quantized weights are for mode fast on the CPU or a CUDA GPU")
    if quantize == "fp8" and not has_fp8(device):
        raise ConfigError(f"quantize is 'fp8': {device} has no products of that, only newer GPUs")
    if quantize is not None and device.type == "cpu" and not is_installed():
        raise ConfigError("quantized weights need numba: pip install 'llama-reference[fast]'")
    return mode == "fast" and (can or (quantize is not None and device.type == "cpu"))


def drawback(
    mode: Mode, quantize: Width | None, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Why fast mode is slower here than elsewhere, for a log."""
    if mode != "fast" or device.type != "cpu":
        return None
    if not is_installed():
        return "fast mode without numba is slower: pip install 'llama-reference[fast]'"
    if dtype not in FLOATS:
        return f"fast mode has kernels for float32 and bfloat16: with {dtype} it is slower"
    if quantize is not None and not has_vnni():
        return f"without VNNI instructions fast mode is slower in {quantize}"
    return None


def has_fp8(device: torch.device) -> bool:
    """Whether it is a GPU that widens e4m3 by itself, from Ada and Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


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
        from llama.kernels.exchange import Exchange  # which need numba
        from llama.step import Step

        self.model = model
        self.params = model.params
        self.vocab_size = model.vocab_size
        self.device = model.device
        self.output = _product([model.output], quantize)
        self.products = [_products(block, quantize) for block in model.layers]
        self.exchange = Exchange(widest=self.output.rows)
        self.step = Step(model, self.products, self.exchange, MOST)

    def make_cache(
        self, max_batch_size: int, max_seq_len: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        return self.model.make_cache(max_batch_size, max_seq_len, dtype or torch.float32)

    def features(self, tokens: Tensor, start_pos: int | Tensor, cache: KVCache) -> Tensor:
        """Ids (B, S) -> float32 (B, S, D); see `Transformer.features`. The features of a token do
        not depend, to the last bit, on which tokens are computed beside it."""
        bsz, seqlen = tokens.shape
        out = torch.empty(bsz, seqlen, self.params.dim)
        starts = torch.as_tensor(start_pos).expand(bsz)
        for row in range(0, bsz, MOST):
            rows = slice(row, min(row + MOST, bsz))
            part = cache.part(row, rows.stop - row, cache.max_seq_len)
            width = max(1, MOST // part.max_batch_size)
            for column in range(0, seqlen, width):
                columns = slice(column, column + width)
                out[rows, columns] = self.step(tokens[rows, columns], starts[rows] + column, part)
        return out

    def logits(self, features: Tensor) -> Tensor:
        """(…, D) -> float32 (…, V), those of all ranks."""
        rows = self.output(features.flatten(0, -2))
        size = self.vocab_size // parallel.mp_size()
        rows = rows[:, :size]  # what fills up eights is no token
        return self.exchange.join(rows).unflatten(0, features.shape[:-1])


def _products(block: Any, quantize: Width | None) -> list[Product]:
    """A TransformerBlock's seven matrices, to be read in four passes."""
    attention, feed_forward = block.attention, block.feed_forward
    return [
        _product([attention.wq, attention.wk, attention.wv], quantize),
        _product([attention.wo], quantize),
        _product([feed_forward.w1, feed_forward.w3], quantize, swiglu=True),
        _product([feed_forward.w2], quantize),
    ]


def _product(
    layers: list[Any],  # fairscale's, which have no types
    quantize: Width | None,
    swiglu: bool = False,
) -> Product:
    """Of the weights of one or several linear layers with the same input."""
    for layer in layers:
        if quantize is not None and isinstance(layer.weight, Tensor):
            set_quantized(layer, QUANTIZERS[quantize](layer.weight.detach()))
    weights: list[Weight] = [
        layer.weight.detach() if isinstance(layer.weight, Tensor) else layer.weight
        for layer in layers
    ]
    return Product(*weights, swiglu=swiglu)
