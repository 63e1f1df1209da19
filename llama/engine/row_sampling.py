"""Sample the next token of many rows at once, on their device, with one synchronisation.

For requests that `RowSampler.takes` accepts, the operations are the same as in `sampling.choose`,
but on many rows. Each row uses its own request's random numbers. So the tokens are the same, unless
probabilities tie or, on a GPU, differ in their last bits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama import sampling
from llama.engine.request import Request
from llama.fast.gpu.cuda_graph import Graphs, next_power_of_two
from llama.sampling import SamplingParams

PLAIN = SamplingParams()
UNSUPPORTED = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")


class RowSampler:
    """Samples for up to max_rows requests at a time; on a GPU in CUDA graphs.

    Ids from n_words on are never drawn.
    """

    def __init__(self, max_rows: int, vocab_size: int, n_words: int, device: torch.device) -> None:
        dtype = torch.float32
        on_gpu = device.type == "cuda"
        self._max_rows = max_rows
        self._n_words = n_words
        self._numbers = torch.zeros(4, max_rows, dtype=dtype, device="cpu", pin_memory=on_gpu)
        self._options = torch.zeros(4, max_rows, dtype=dtype, device=device)
        self._logits = torch.zeros(max_rows, vocab_size, dtype=dtype, device=device)
        self._noise = torch.ones(max_rows, vocab_size, dtype=dtype, device=device)
        self._chosen = torch.zeros(3, max_rows, dtype=torch.float64, device=device)
        self._read = torch.zeros(3, max_rows, dtype=torch.float64, device="cpu", pin_memory=on_gpu)
        self._is_read = torch.cuda.Event() if on_gpu else None
        self._graphs = Graphs(device)

    @staticmethod
    def takes(params: SamplingParams) -> bool:
        """Whether a request needs no more than temperature, top_k, min_p and top_p."""
        is_plain = all(getattr(params, name) == getattr(PLAIN, name) for name in UNSUPPORTED)
        return is_plain and params.logits_processor is None

    def __call__(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        meanwhile: Callable[[Tensor], None] | None = None,
    ) -> list[tuple[int, float]]:
        """The next id of each request and its logprob, from logits (B, V).

        A request whose logits are not finite gets an error, and an id without a meaning.
        meanwhile: called with the ids (B,) on the device before the host waits for them.
        """
        n = len(requests)
        self._logits[:n] = logits
        for row, request in enumerate(requests):
            if request.params.temperature > 0:
                self._noise[row].exponential_(1, generator=request.generator)
        self._numbers[:, :n] = torch.tensor(
            [sampling.options_of(r.params) for r in requests], device="cpu"
        ).T
        self._options.copy_(self._numbers, non_blocking=True)
        is_greedy = all(request.params.temperature == 0 for request in requests)
        self._run(min(next_power_of_two(n), self._max_rows), is_greedy)
        self._read.copy_(self._chosen, non_blocking=True)
        if self._is_read is not None:
            self._is_read.record()
        if meanwhile is not None:
            meanwhile(self._chosen[0, :n].long())
        if self._is_read is not None:
            self._is_read.synchronize()
        ids, logprobs, finite = self._read[:, :n].tolist()
        for request, is_finite in zip(requests, finite, strict=True):
            if not is_finite:
                request.error = sampling.not_finite(request.params)
        return list(zip(map(int, ids), logprobs, strict=True))

    def _run(self, n_rows: int, is_greedy: bool) -> None:
        def work() -> None:
            logits = self._logits[:n_rows]
            known = logits[:, : self._n_words]
            if is_greedy:
                ids, finite = known.argmax(-1), known.amax(-1).isfinite()
            else:
                options, noise = self._options[:, :n_rows], self._noise[:n_rows, : self._n_words]
                ids, finite = sampling.draw_rows(known, options, noise)
            logprobs = sampling.logprob_of(logits, ids)
            self._chosen[:, :n_rows] = torch.stack((ids.double(), logprobs, finite))

        self._graphs.run((n_rows, is_greedy), work)
