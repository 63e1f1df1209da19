"""A Transformer that runs in compiled kernels on a CPU, with float or quantized weights.

Activations are float32. A product with int8 or int4 weights rounds its input to int8. A product
with bfloat16 weights rounds it to bfloat16 if the processor multiplies bfloat16. The KV cache is
float32 or int8.
"""

from typing import Any

import torch
from fairscale.nn.model_parallel.layers import RowParallelLinear
from torch import Tensor

from llama import parallel
from llama.adapters import RowAdapters
from llama.cache import KVCache
from llama.fast.cpu.kernels.buffer import float_buffer
from llama.fast.cpu.kernels.product import Product, Weight
from llama.fast.quantize import Width, set_quantized
from llama.fast.quantizers import QUANTIZERS
from llama.model import Transformer

MAX_TOKENS = 512  # of one call of the layer list


class FastTransformer:
    """A `Transformer` on a CPU with compiled kernels, for inference. It has the methods that the
    engine calls.

    quantize: "int8" or "int4", for the matrices that are not quantized yet.
    adapters: LoRA changes; `adapters.numbers` says which rows of a forward have them.
    Raises ConfigError where the kernels cannot take the weights, or numba is not installed.
    """

    def __init__(
        self,
        model: Transformer,
        quantize: Width | None = None,
        adapters: RowAdapters | None = None,
    ) -> None:
        from llama.fast.cpu.kernels.exchange import Exchange
        from llama.fast.cpu.layer_list import LayerList

        self.model = model
        self.params = model.params
        self.vocab_size = model.vocab_size
        self.device = model.device
        self.output = _product([model.output], quantize)
        self.products = [_products(block, quantize) for block in model.layers]
        self.exchange = Exchange(widest=self.output.rows)
        self.adapters = adapters
        self.layer_list = LayerList(model, self.products, self.exchange, MAX_TOKENS, adapters)

    def make_cache(
        self, max_batch_size: int, max_seq_len: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        """A cache of this rank's heads, as `Transformer.make_cache`. The positions of a head lie
        together in memory, because attention reads a head at a time."""
        return KVCache.zeros(
            self.model.n_layers,
            max_batch_size,
            max_seq_len,
            self.params.local_kv_heads(parallel.mp_size()),
            self.params.head_dim,
            dtype or torch.float32,
            self.device,
            heads_first=True,
        )

    def features(self, tokens: Tensor, start_pos: int | Tensor, cache: KVCache) -> Tensor:
        """Ids (B, S) -> float32 (B, S, D); see `Transformer.features`. To the last bit, a token's
        features do not depend on which tokens are computed with it."""
        bsz, seqlen = tokens.shape
        numbers = () if self.adapters is None else self.adapters.numbers
        if bsz * seqlen <= MAX_TOKENS:
            return self.layer_list(tokens, start_pos, cache, numbers)
        out = float_buffer(bsz, seqlen, self.params.dim)
        starts = torch.as_tensor(start_pos, device="cpu").expand(bsz)
        for row in range(0, bsz, MAX_TOKENS):
            rows = slice(row, min(row + MAX_TOKENS, bsz))
            part = cache.part(row, rows.stop - row, cache.max_seq_len)
            width = max(1, MAX_TOKENS // part.max_batch_size)
            for column in range(0, seqlen, width):
                columns = slice(column, column + width)
                out[rows, columns] = self.layer_list(
                    tokens[rows, columns], starts[rows] + column, part, numbers[rows]
                )
        return out

    def logits(self, features: Tensor) -> Tensor:
        """Features (…, D) -> logits of the whole vocabulary, float32 (…, V)."""
        rows = self.output(features.flatten(0, -2))
        size = self.vocab_size // parallel.mp_size()
        rows = rows[:, :size]  # int8 and int4 rows are padded to multiples of eight
        return self.exchange.join(rows).unflatten(0, features.shape[:-1])


def _products(block: Any, quantize: Width | None) -> list[Product]:
    """The four products of a TransformerBlock's seven matrices."""
    attention, feed_forward = block.attention, block.feed_forward
    return [
        _product([attention.wq, attention.wk, attention.wv], quantize),
        _product([attention.wo], quantize),
        _product([feed_forward.w1, feed_forward.w3], quantize, swiglu=True),
        _product([feed_forward.w2], quantize),
    ]


def _product(
    layers: list[Any],  # fairscale has no types
    quantize: Width | None,
    swiglu: bool = False,
) -> Product:
    """One product of the weights of one or several linear layers with the same input.

    The bias of a row-parallel layer is not part of it: the layer list adds it to the ranks' sum.
    """
    for layer in layers:
        if quantize is not None and isinstance(layer.weight, Tensor):
            set_quantized(layer, QUANTIZERS[quantize](layer.weight.detach()))
    weights: list[Weight] = [
        layer.weight.detach() if isinstance(layer.weight, Tensor) else layer.weight
        for layer in layers
    ]
    is_biased = layers[0].bias is not None and not isinstance(layers[0], RowParallelLinear)
    biases = [layer.bias.detach() for layer in layers] if is_biased else None
    return Product(*weights, biases=biases, swiglu=swiglu)
