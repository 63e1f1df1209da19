"""Make an engine: choose its network and the dtype of its KV cache from the mode."""

from llama.adapters import RowAdapters
from llama.engine.engine import PREFILL_CHUNK, Engine
from llama.engine.worker import Network
from llama.errors import ConfigError
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.gpu import device_weights
from llama.fast.gpu.transformer import GpuTransformer
from llama.fast.mode import CacheWidth, Mode, cache_dtype, check_mode
from llama.fast.quantize import Width
from llama.model import Transformer
from llama.tokenizer import Tokenizer

GPU_PREFILL_CHUNK = 2048  # tokens; fewer would not fill a GPU


def make_engine(
    model: Transformer,
    tokenizer: Tokenizer | None = None,
    seed: int = 1,
    mode: Mode = "reference",
    max_batch_size: int | None = None,
    quantize: Width | None = None,
    kv_cache: CacheWidth | None = None,
    draft: Transformer | None = None,
    lookup: bool = False,
    invariant: bool = False,
    adapters: RowAdapters | None = None,
) -> Engine:
    """Make an engine. `Llama.build` describes the options. max_batch_size None: the model's value.

    In mode fast the models become `FastTransformer`s on a CPU and `GpuTransformer`s on a GPU.
    """
    rows = model.params.max_batch_size if max_batch_size is None else max_batch_size

    def network(model: Transformer, adapters: RowAdapters | None = None) -> Network:
        weight, has_biases = model.norm.weight, model.params.has_biases
        if check_mode(mode, quantize, weight.device, weight.dtype, has_biases):
            return FastTransformer(model, quantize, adapters)
        if mode == "fast" and weight.device.type == "cuda" and not has_biases:
            if quantize is not None:
                device_weights.narrow(model, quantize, weight.device)
            if adapters is not None:
                raise ConfigError(
                    "adapters beside the weights run in mode reference on a GPU; in mode fast "
                    "merge one of them, as adapter"
                )
            return GpuTransformer(model, invariant)
        if adapters is not None:
            adapters.attach(model)
        if invariant:
            raise ConfigError("invariant needs the kernels of a CPU or a CUDA GPU for this model")
        return model

    main = network(model, adapters)
    is_fast_on_gpu = isinstance(main, GpuTransformer)
    return Engine(
        main, rows, model.params.max_seq_len, tokenizer, seed,
        cache_dtype=cache_dtype(mode, kv_cache), draft=draft and network(draft), lookup=lookup,
        prefill_chunk=GPU_PREFILL_CHUNK if is_fast_on_gpu else PREFILL_CHUNK, static=is_fast_on_gpu,
        adapters=adapters,
    )  # fmt: skip
