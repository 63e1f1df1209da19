"""A decode step of static shapes, which a GPU runs as one CUDA graph.

Launching a kernel from Python takes longer than most kernels of a decode step run. Captured once,
the step is launched whole. So that a few graphs serve all steps, rows and positions are filled up
to powers of two, and what is filled up is hidden by the causal rule or forgotten.
"""

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region
from torch import Tensor

from llama import parallel
from llama.cache import KVCache
from llama.fast.gpu.cuda_graph import Graphs, next_power_of_two
from llama.model import Transformer

log = logging.getLogger("llama")

MIN_KEYS = 128  # positions; reading fewer would save no measurable time
MAX_SHAPES = 1024  # pairs of rows and positions that layers are compiled for


class StaticStep:
    """Decodes one token for the first rows of a cache: ids and positions in, logits out.

    Made for a model and a cache, both of which stay in their places.

    backend: of torch.compile, one graph for all layers and one for the output; None: on a GPU
        inductor, which joins small kernels and widens narrow weights inside products; else none.
    """

    def __init__(self, model: Transformer, cache: KVCache, backend: str | None = None) -> None:
        self.model = model
        self.cache = cache
        device, rows = model.device, cache.max_batch_size
        on_gpu = device.type == "cuda"
        # Pinned memory is copied to the GPU without a synchronisation.
        self._numbers = torch.zeros(2, rows, dtype=torch.long, pin_memory=on_gpu)
        self._inputs = torch.zeros(2, rows, dtype=torch.long, device=device)
        self._logits = torch.zeros(rows, model.vocab_size, device=device)
        if backend is None and on_gpu and can_compile():
            backend = "inductor"
        self._layer, self._output = compiled(run_layer, backend), compiled(run_output, backend)
        self._graphs = Graphs(device)

    def n_rows(self, n: int) -> int:
        """The number of rows of a step for n rows."""
        return min(next_power_of_two(n), self.cache.max_batch_size)

    def n_keys(self, n: int) -> int:
        """The number of cache positions that a step for n positions reads."""
        return min(next_power_of_two(max(n, MIN_KEYS)), self.cache.max_seq_len)

    def __call__(self, tokens: Sequence[int], start_pos: Sequence[int]) -> Tensor:
        """Ids and positions of the first B rows, B as `n_rows` gives -> logits, float32 (B, V). The
        next step overwrites the logits."""
        n_rows, n_keys = len(tokens), self.n_keys(max(start_pos) + 1)
        assert n_rows == self.n_rows(n_rows), n_rows
        self._numbers[:, :n_rows] = torch.tensor([tokens, start_pos])
        self._inputs.copy_(self._numbers, non_blocking=True)

        def work() -> None:
            tokens, positions = self._inputs[:, :n_rows]
            cache = self.cache.part(0, n_rows, n_keys)
            parts = self._layer, self._output
            self._logits[:n_rows] = decode(self.model, tokens, positions, cache, *parts)

        self._graphs.run((n_rows, n_keys), work)
        return self._logits[:n_rows]


def decode(
    model: Transformer,
    tokens: Tensor,
    positions: Tensor,
    cache: KVCache,
    layer: Callable[..., Tensor],
    output: Callable[..., Tensor],
) -> Tensor:
    """One token for each row: ids (B,), positions (B,) -> logits, float32 (B, V).

    Tensor contents are never read here, because that would synchronise with the GPU. layer, output:
    `run_layer` and `run_output`, or these compiled.
    """
    h = model.tok_embeddings(tokens[:, None])  # (B, 1, D)
    inputs = model.layer_inputs(h, positions, cache.max_seq_len)
    for layer_id, block in enumerate(model.layers):
        h = layer(block, h, *inputs, cache.layer(layer_id))
    return output(model, h)


def run_layer(block: Any, h: Tensor, *rest: Any) -> Tensor:
    """Call a TransformerBlock. This function is compiled."""
    return block(h, *rest)


def run_output(model: Transformer, h: Tensor) -> Tensor:
    """Norm and output matrix: (B, 1, D) -> (B, V)."""
    return model.logits(model.norm(h))[:, 0]


def can_compile() -> bool:
    """Whether inductor can compile for a GPU: it needs Triton and a C compiler."""
    compilers = os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")
    if importlib.util.find_spec("triton") is not None and any(compilers):
        return True
    log.warning("no Triton or no C compiler: the GPU decodes with more and smaller kernels")
    return False


def compiled(function: Callable[..., Tensor], backend: str | None) -> Callable[..., Tensor]:
    """The function, compiled for each shape.

    With several ranks it stays as it is, because a compiler does not understand fairscale's
    collectives.
    """
    if backend is None or parallel.mp_size() > 1:
        return function
    torch._dynamo.allow_in_graph(
        reduce_from_model_parallel_region
    )  # with one rank it returns its input
    # Autotuning tries reductions for one row, and products that dequantize inside for several.
    mode = "max-autotune-no-cudagraphs" if backend == "inductor" else None
    whole = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, mode=mode)

    def call(*args: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            return whole(*args)

    return call
