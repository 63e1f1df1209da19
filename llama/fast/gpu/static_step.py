"""A step of static shapes, which a GPU runs as one CUDA graph.

Most kernels of a decode step run for less time than Python takes to launch them. So the step is
captured once, and then all of its kernels are launched at once. The kernels read
positions on the device, so one graph serves all lengths. Rows are filled up to powers of two, so
few graphs serve all batches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.fast.gpu.cuda_graph import Graphs, next_power_of_two
from llama.fast.gpu.transformer import GpuTransformer

MAX_TOKENS = 64  # most tokens of a step with proposals


class StaticStep:
    """Decodes for the first rows of a cache: ids and positions in, logits out.

    It belongs to one network and one cache. Their tensors must keep their addresses.
    """

    def __init__(self, model: GpuTransformer, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        device, rows = model.device, cache.max_batch_size
        on_gpu = device.type == "cuda"
        # The start positions of the rows, then the ids. Pinned memory is copied to the GPU without
        # a synchronisation. There are two tensors, because the last copy may still be under way.
        size = rows + max(rows, MAX_TOKENS)
        self._numbers = [
            torch.zeros(size, dtype=torch.long, device="cpu", pin_memory=on_gpu) for _ in range(2)
        ]
        self._inputs = torch.zeros(size, dtype=torch.long, device=device)
        self._logits = torch.zeros(
            max(rows, MAX_TOKENS), model.vocab_size, dtype=torch.float32, device=device
        )
        self._graphs = Graphs(device)

    def n_rows(self, n: int) -> int:
        """The number of rows that a step computes if n rows are needed."""
        return min(next_power_of_two(n), self.cache.max_batch_size)

    def takes(self, n_rows: int, seqlen: int) -> bool:
        """Whether the step can compute seqlen tokens of each row."""
        return n_rows == self.n_rows(n_rows) and (seqlen == 1 or n_rows * seqlen <= MAX_TOKENS)

    def __call__(self, tokens: Sequence[Sequence[int]], start_pos: Sequence[int]) -> Tensor:
        """Ids (B, S) of the first B rows, and the position of each row's first id -> logits,
        float32 (B, S, V). `takes` must be true for B and S. The next step overwrites the logits."""
        n_rows, seqlen = len(tokens), len(tokens[0])
        assert self.takes(n_rows, seqlen), (n_rows, seqlen)
        self._upload([*start_pos, *(token for row in tokens for token in row)])
        self._run(n_rows, seqlen)
        return self._logits[: n_rows * seqlen].view(n_rows, seqlen, -1)

    def launch(self, ids: Tensor, places: Sequence[int], start_pos: Sequence[int]) -> None:
        """Start a step with one token for each row. The tokens' ids are still on the device.

        ids: a vector of any length. places: for each row, the index of its id in this vector.
        """
        n_rows = len(start_pos)
        self._upload([*start_pos, *places])
        rows = self._inputs[n_rows : 2 * n_rows]
        rows.copy_(ids.index_select(0, rows))
        self._run(n_rows, 1)

    def logits(self, n_rows: int) -> Tensor:
        """The logits (B, 1, V) of the step that was launched last."""
        return self._logits[:n_rows, None]

    def _upload(self, numbers: list[int]) -> None:
        self._numbers.reverse()
        self._numbers[0][: len(numbers)] = torch.tensor(numbers, device="cpu")
        self._inputs.copy_(self._numbers[0], non_blocking=True)

    def _run(self, n_rows: int, seqlen: int) -> None:
        n = n_rows * seqlen

        def work() -> None:
            starts, ids = self._inputs[: n_rows + n].split([n_rows, n])
            cache = self.cache.part(0, n_rows, self.cache.max_seq_len)
            features = self.model.features(ids.view(n_rows, seqlen), starts, cache)
            self._logits[:n] = self.model.logits(features).flatten(0, 1)

        self._graphs.run((n_rows, seqlen), work)
