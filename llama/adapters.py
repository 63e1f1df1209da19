"""LoRA changes beside the weights: each row of a batch has its own adapter, or none.

A row with an adapter gets x W^T + x A^T B^T from a matrix W; Hu et al. 2021, arxiv.org/abs/
2106.09685. The rows without one get exactly the model's own numbers.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import reduce_from_model_parallel_region
from torch import Tensor, nn

from llama import parallel
from llama.errors import GenerationError

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # the modules that may have a change
# On this rank A is (r, K) and B (N, r), with alpha / r in it.
Change = tuple[Tensor, Tensor]


class RowAdapters:
    """Several adapters of a model, of which each row of a forward has one or none.

    changes: for each adapter, by name, the changes of this rank's matrices, by the name of their
        module: layers.0.attention.wq.
    """

    def __init__(self, changes: Mapping[str, Mapping[str, Change]]) -> None:
        self.names = list(changes)
        self._changes = [changes[name] for name in self.names]
        self.numbers: Sequence[int] = ()  # of the rows of the current forward; 0: no adapter

    @contextlib.contextmanager
    def chosen(self, numbers: Sequence[int]) -> Iterator[None]:
        """A block in which the rows of a forward have the adapters with these numbers."""
        self.numbers = numbers
        try:
            yield
        finally:
            self.numbers = ()

    def number(self, name: str | None) -> int:
        """The number by which a plan names an adapter; 0 for None. Raises GenerationError for an
        unknown name."""
        if name is None:
            return 0
        if not self.names:
            raise GenerationError(f"adapter is {name!r}, but the model was built without adapters")
        if name not in self.names:
            raise GenerationError(f"adapter is {name!r}: it must be one of {', '.join(self.names)}")
        return 1 + self.names.index(name)

    def of_module(self, name: str) -> dict[int, Change]:
        """The changes of a module, by the adapter's number."""
        return {
            number: changes[name]
            for number, changes in enumerate(self._changes, start=1)
            if name in changes
        }

    def attach(self, model: nn.Module) -> None:
        """Add the changes to the results of the model's layers."""
        for name, layer in model.named_modules():
            if name.endswith(TARGETS) and (changes := self.of_module(name)):
                is_row_parallel = parallel.SHARD_DIMS[name.rpartition(".")[2]] == 1
                layer.forward = functools.partial(
                    self._forward, layer.forward, changes, is_row_parallel
                )

    def _forward(
        self,
        forward: Callable[[Tensor], Tensor],
        changes: Mapping[int, Change],
        is_row_parallel: bool,
        x: Tensor,
    ) -> Tensor:
        """x (B, S, K) -> (B, S, N)."""
        out = forward(x)
        for number in sorted(changes.keys() & set(self.numbers)):
            rows = [row for row, chosen in enumerate(self.numbers) if chosen == number]
            a, b = (matrix.to(x) for matrix in changes[number])
            low = F.linear(x[rows], a)  # (rows, S, r)
            if is_row_parallel:
                low = reduce_from_model_parallel_region(low)
            out[rows] += F.linear(low, b)
        return out
