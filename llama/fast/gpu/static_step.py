"""A decode step whose shapes never change with what it computes, for a GPU to run as one graph.

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

LEAST_KEYS = 128  # positions: reading fewer would save nothing that shows
MOST_SHAPES = 1024  # of rows and positions, for which layers are compiled


class StaticStep:
    """One new token for the first rows of a cache: ids and positions in, logits out.

    Made for a model and a cache, both of which stay in their places.

    backend: of torch.compile, one graph for all layers and one for the output; None: on a GPU
        inductor, which joins small kernels and widens narrow weights inside products; else none.
    """

    def __init__(self, model: Transformer, cache: KVCache, backend: str | None = None) -> None:
        self.model = model
        self.cache = cache
        device, rows = model.device, cache.max_batch_size
        on_gpu = device.type == "cuda"
        # Pinned, the numbers go to the GPU without a wait.
        self._numbers = torch.zeros(2, rows, dtype=torch.long, pin_memory=on_gpu)
        self._inputs = torch.zeros(2, rows, dtype=torch.long, device=device)
        self._logits = torch.zeros(rows, model.vocab_size, device=device)
        if backend is None and on_gpu and can_compile():
            backend = "inductor"
        self._layer, self._output = compiled(run_layer, backend), compiled(run_output, backend)
        self._graphs = Graphs(device)

    def n_rows(self, n: int) -> int:
        """How many rows a step has that is to have n or more."""
        return min(next_power_of_two(n), self.cache.max_batch_size)

    def n_keys(self, n: int) -> int:
        """How many positions of the cache a step sees that is to see n or more."""
        return min(next_power_of_two(max(n, LEAST_KEYS)), self.cache.max_seq_len)

    def __call__(self, tokens: Sequence[int], start_pos: Sequence[int]) -> Tensor:
        """The ids of the first rows, as many as `n_rows` gives, and their positions, which the
        cache has -> logits, float32 (B, V), which the next step overwrites."""
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
    """One token for each row: ids (B,), positions (B,) -> logits, float32 (B, V). Nothing that the
    tensors hold is looked at. layer, output: `run_layer` and `run_output`, or these compiled."""
    h = model.tok_embeddings(tokens[:, None])  # (B, 1, D)
    inputs = model.layer_inputs(h, positions, cache.max_seq_len)
    for layer_id, block in enumerate(model.layers):
        h = layer(block, h, *inputs, cache.layer(layer_id))
    return output(model, h)


def run_layer(block: Any, h: Tensor, *rest: Any) -> Tensor:
    """Call a TransformerBlock: what is compiled."""
    return block(h, *rest)


def run_output(model: Transformer, h: Tensor) -> Tensor:
    """What follows the layers: (B, 1, D) -> (B, V)."""
    return model.logits(model.norm(h))[:, 0]


def can_compile() -> bool:
    """Whether inductor finds what it compiles with on a GPU: Triton and a C compiler."""
    compilers = os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")
    if importlib.util.find_spec("triton") is not None and any(compilers):
        return True
    log.warning("no Triton or no C compiler: the GPU decodes with more and smaller kernels")
    return False


def compiled(function: Callable[..., Tensor], backend: str | None) -> Callable[..., Tensor]:
    """The function, compiled for every shape that it meets, where no other rank takes part: what
    fairscale says to the others is not what a compiler understands."""
    if backend is None or parallel.mp_size() > 1:
        return function
    torch._dynamo.allow_in_graph(reduce_from_model_parallel_region)  # one rank's input as it is
    # Products are tried out: as reductions for one row, and with the widening of narrow weights
    # inside them for several.
    mode = "max-autotune-no-cudagraphs" if backend == "inductor" else None
    whole = torch.compile(function, fullgraph=True, dynamic=False, backend=backend, mode=mode)

    def call(*args: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            return whole(*args)

    return call
