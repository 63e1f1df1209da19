"""Run requests on an engine: to their end, or as a stream of events, from any thread.

Calls from several threads run together in the engine's batch. The callers take turns. In its turn
a caller steps the engine once for all callers. It takes turns until its own requests have ended.

With several ranks the first rank of a model steps the engine, and the others follow its plans.
"""

import contextlib
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence

import torch

from llama import parallel
from llama.engine.engine import Engine
from llama.engine.request import Event, Request
from llama.engine.turns import Turns
from llama.errors import GenerationError, ParallelError
from llama.sampling import SamplingParams


class Runner:
    """Submits prompts to an engine and steps it until their requests end.

    Args:
        seed: for the random numbers of requests that run alone and have no seed of their own.
        is_reference: whether a request that runs alone is exact; see `Engine.submit`.
    """

    def __init__(self, engine: Engine, seed: int, is_reference: bool) -> None:
        self.engine = engine
        self._device = engine.model.device
        self._is_reference = is_reference
        self._seed = seed
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._turns = Turns()
        self._guard = threading.Lock()  # guards _n_leading and _is_hosting
        self._inboxes: dict[Request, deque[Event]] = {}  # of the requests of open streams
        self._to_cancel: deque[Request] = deque()  # the next step cancels these
        self._n_leading = 0  # how many blocks of `leading` are open
        self._is_hosting = False  # whether one of these blocks is a host; see `leading`

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        is_exact: bool | None = None,
        is_continued: bool = False,
    ) -> list[Request]:
        """Run one request for each sample of each prompt, until all requests have ended. All ranks
        return the same results.

        is_exact: see `Engine.submit`. None: True for a request that runs alone in reference mode.
        is_continued: whether the generated texts will be appended to the prompts' texts.
        """
        if is_exact is None:
            is_exact = self._is_exact(prompts, params)
        is_hosted = self._check_ranks()
        with self._turns:
            continued = [is_continued] * len(prompts)
            requests = self._submit(prompts, params, is_exact, is_continued=continued)
        with self.leading(requests) as is_first_rank:
            while is_first_rank and any(request.finish_reason is None for request in requests):
                with self._turns:
                    if any(request.finish_reason is None for request in requests):
                        self._step()
        for request in requests:
            if not is_hosted:
                request.share(self._device)
            if request.error is not None:
                raise request.error
        return requests

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        is_private: bool = False,
        is_continued: Sequence[bool] = (),
    ) -> Generator[Event, None, None]:
        """The events of the prompts' requests, on the first rank. Raises GenerationError at once,
        before the first event, if the engine cannot take a prompt.

        is_continued: for each prompt, whether the generated texts will be appended to its text.
        """
        for row, prompt in enumerate(prompts):
            self.engine.check(prompt, params, row)
        return self._events(prompts, params, is_private, is_continued)

    def _events(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        is_private: bool,
        is_continued: Sequence[bool],
    ) -> Generator[Event, None, None]:
        """Submit the requests when the caller asks for the first event. At the end, cancel the
        requests that have not ended."""
        self._check_ranks()
        inbox: deque[Event] = deque()
        with self._turns:
            is_exact = self._is_exact(prompts, params)
            requests = self._submit(prompts, params, is_exact, is_private, is_continued)
            self._inboxes |= dict.fromkeys(requests, inbox)
        try:
            with self.leading(requests) as is_first_rank:
                n_open = len(requests) if is_first_rank else 0
                while n_open:
                    if not inbox:
                        with self._turns:
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
    def leading(self, requests: Sequence[Request] = ()) -> Iterator[bool]:
        """Yields True on the first rank, which steps the engine inside the block.

        The other ranks execute the first rank's plans until the first rank's block ends. Only then
        do they get False. At the end of the block the first rank cancels the given requests that
        have not ended, and dismisses the other ranks. If no requests are given, the block is a
        host: while it is open, threads of the first rank may make any calls.
        """
        if parallel.mp_rank() > 0:
            self.engine.follow()
            yield False
            return
        with self._guard:
            self._n_leading += 1
            self._is_hosting |= not requests
        failed, is_connected = True, True
        try:
            yield True
            failed = False
        except GeneratorExit:  # a stream that is closed early is no failure
            failed = False
            raise
        except ParallelError:  # a rank is lost, so the others have this error too
            is_connected = False
            raise
        finally:
            self._cancel(requests)
            with self._guard:
                self._n_leading -= 1
                is_last = self._n_leading == 0
                self._is_hosting &= bool(requests)
            if is_last and is_connected:
                self.engine.dismiss(failed)

    def _check_ranks(self) -> bool:
        """Whether a host block is open, so that only the first rank makes this call; see `leading`.

        Raises GenerationError if the other ranks are busy with another call.
        """
        if self._n_leading > 0 and not self._is_hosting and parallel.mp_size() > 1:
            raise GenerationError(
                "a call or a stream is open: with several ranks end it first, or make both inside "
                "a block of llama.runner.leading()"
            )
        return self._is_hosting

    def _submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        is_exact: bool,
        is_private: bool = False,
        is_continued: Sequence[bool] = (),
    ) -> list[Request]:
        """Submit a request for each sample. A request that runs alone and has no seed uses the
        generator made from the runner's `seed`."""
        parallel.check_fork()
        if not prompts:
            raise GenerationError("no prompts: give at least one")
        device = self.engine.model.device
        if device != self._device:  # the model was moved
            self._device = device
            self._generator = torch.Generator(device).manual_seed(self._seed)
        is_alone = len(prompts) * params.n == 1 and not self.engine.has_work
        generator = self._generator if is_alone and params.seed is None else None
        for row, prompt in enumerate(prompts):  # none is submitted if one is wrong
            self.engine.check(prompt, params, row)
        requests: list[Request] = []
        for prompt, continued in zip(prompts, is_continued or [False] * len(prompts), strict=True):
            for sample in params.samples():
                request = self.engine.submit(
                    prompt, sample, len(requests), generator, is_private, is_exact, continued
                )
                requests.append(request)
        return requests

    def _is_exact(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> bool:
        return self._is_reference and len(prompts) * params.n == 1

    def _cancel(self, requests: Sequence[Request]) -> None:
        """Cancel the requests that have not ended: now if the turn is free, otherwise in the next
        step. Waiting for the turn could be a deadlock: Python may close a forgotten stream at any
        point, also while this thread has the turn."""
        self._to_cancel.extend(request for request in requests if request.finish_reason is None)
        if self._to_cancel and self._turns.take_if_free():
            try:
                self._cancel_all()
            finally:
                self._turns.give_back()

    def _cancel_all(self) -> None:
        while self._to_cancel:
            self.engine.cancel(self._to_cancel.popleft())

    def _step(self) -> None:
        self._cancel_all()
        on_gpu = self._device.type == "cuda"
        with contextlib.ExitStack() as stack:
            if on_gpu:  # each thread has its own current GPU, which is the first one at its start
                stack.enter_context(torch.cuda.device(self._device))
            if self._turns.is_wanted:
                stack.enter_context(_interrupt_at_end())
            self._deliver(self.engine.step())

    def _deliver(self, events: Sequence[Event]) -> None:
        """Put the events of open streams in their inboxes."""
        for event in events:
            inbox = self._inboxes.get(event.request)
            if inbox is not None:
                inbox.append(event)


@contextlib.contextmanager
def _interrupt_at_end() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, so that other callers do not lose their events."""
    usual = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or usual is not signal.default_int_handler:
        yield
        return
    interrupts: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if interrupts:
        raise KeyboardInterrupt
