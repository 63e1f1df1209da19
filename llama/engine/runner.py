"""Run requests on an engine: to their end, or as a stream of events, on every rank of a model.

The first rank steps the engine. The other ranks of the model follow its plans until it is done.
"""

import contextlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence

import torch

from llama import parallel
from llama.engine.engine import Engine
from llama.engine.request import Event, Request
from llama.errors import GenerationError
from llama.sampling import SamplingParams


class Runner:
    """Submits prompts to an engine and steps it until their requests end.

    Args:
        seed: of the random numbers of a request that runs alone and has no seed of its own.
        is_reference: a request that runs alone gets Meta's own forwards.
    """

    def __init__(self, engine: Engine, seed: int, is_reference: bool) -> None:
        self.engine = engine
        self._device = engine.model.device
        self._is_reference = is_reference
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._inboxes: dict[Request, deque[Event]] = {}  # of the open streams

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        is_exact: bool | None = None,
    ) -> list[Request]:
        """Run a request for each sample of each prompt to its end. Every rank returns the same.

        is_exact: see `Engine.submit`. None: only a request alone, in reference mode.
        """
        if is_exact is None:
            is_exact = self._is_exact(prompts, params)
        if self._inboxes and parallel.mp_size() > 1:  # the other ranks still follow the stream
            raise GenerationError("a stream is open: with several ranks, end or close it first")
        requests = self._submit(prompts, params, is_exact)
        with self.leading(requests) as is_first_rank:
            while is_first_rank and any(request.finish_reason is None for request in requests):
                self._step()
        for request in requests:
            request.share(self._device)
            if request.error is not None:
                raise request.error
        return requests

    def stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, is_private: bool = False
    ) -> Generator[Event, None, None]:
        """The events of the prompts' requests, on the first rank. Raises GenerationError now, not
        with the first event, where the engine cannot take a prompt."""
        for row, prompt in enumerate(prompts):
            self.engine.check(prompt, params, row)
        return self._events(prompts, params, is_private)

    def _events(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, is_private: bool
    ) -> Generator[Event, None, None]:
        """Submit when the first event is asked for. Cancel at the end what has not ended."""
        requests = self._submit(prompts, params, self._is_exact(prompts, params), is_private)
        inbox: deque[Event] = deque()
        self._inboxes |= dict.fromkeys(requests, inbox)
        try:
            with self.leading(requests) as is_first_rank:
                n_open = len(requests) if is_first_rank else 0
                while n_open:
                    if not inbox:
                        self._step()
                        continue
                    event = inbox.popleft()
                    if event.request.error is not None:
                        raise event.request.error
                    n_open -= event.finish_reason is not None
                    yield event
        finally:
            for request in requests:
                del self._inboxes[request]

    @contextlib.contextmanager
    def leading(self, requests: list[Request]) -> Iterator[bool]:
        """Yields True on the first rank, which steps the engine inside the block.

        The other ranks follow it to the end of its block, and then get False. At the end the first
        rank cancels those of the requests that have not ended, and dismisses the other ranks.
        """
        if parallel.mp_rank() > 0:
            self.engine.follow()
            yield False
            return
        failed = True
        try:
            yield True
            failed = False
        except GeneratorExit:  # a stream that is closed early is no failure
            failed = False
            raise
        finally:
            for request in requests:
                self.engine.cancel(request)
            self.engine.dismiss(failed)

    def _submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        is_exact: bool,
        is_private: bool = False,
    ) -> list[Request]:
        """A request for each sample. One alone draws from the generator that `seed` started."""
        if not prompts:
            raise GenerationError("no prompts: give at least one")
        is_alone = len(prompts) * params.n == 1
        generator = self._generator if is_alone and params.seed is None else None
        requests: list[Request] = []
        try:
            for prompt in prompts:
                for sample in params.samples():
                    row = len(requests)
                    requests.append(
                        self.engine.submit(prompt, sample, row, generator, is_private, is_exact)
                    )
        except GenerationError:
            for request in requests:
                self.engine.cancel(request)
            raise
        return requests

    def _is_exact(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> bool:
        return self._is_reference and len(prompts) * params.n == 1

    def _step(self) -> None:
        for event in self.engine.step():
            if event.request in self._inboxes:
                self._inboxes[event.request].append(event)
