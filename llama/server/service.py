"""The engine's thread: it steps the engine for all calls, and hands their events to the event loop.

The event loop never waits for the engine. It submits prompts and cancels requests through a list of
commands, which the thread runs between two steps.
"""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from llama.engine.request import Event, Request
from llama.errors import LlamaError
from llama.generation import Llama
from llama.lost_ranks import timeout
from llama.sampling import SamplingParams
from llama.server.errors import ApiError

log = logging.getLogger("llama")


class Call:
    """The requests of one call, and their events as they come.

    Iterate over it to the end, or `cancel` it.
    """

    def __init__(self, service: "Service", n_requests: int) -> None:
        self.requests: list[Request] = []
        self.n_open = n_requests
        self._service = service
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while self.n_open:
            event = await self._events.get()
            if isinstance(event, Exception):
                self.n_open = 0
                raise event
            self.n_open -= event.finish_reason is not None
            if event.request.error is not None:
                raise ApiError(500, f"the request failed: {event.request.error}")
            yield event

    def cancel(self) -> None:
        """Cancel the requests that have not ended. Their slots are free before the next step."""
        self.n_open = 0
        self._service.cancel(self)

    def put(self, event: Event | Exception) -> None:
        """Called in the event loop."""
        self._events.put_nowait(event)


class Service:
    """Runs calls on a `Llama` until `stop`.

    Args:
        max_waiting: requests that may wait for a slot. A call that exceeds this gets status 429.

    Attributes: `is_alive`, `is_stopping` (no new calls are taken), `tokens` (how many prompt,
    cached and generated tokens the ended requests had).
    """

    def __init__(self, llama: Llama, max_waiting: int) -> None:
        self.llama = llama
        self.is_alive = True
        self.is_stopping = False
        self._limit = llama.engine.cache.max_batch_size + max_waiting
        self._on_death: Callable[[], None] = lambda: None
        self._loop: asyncio.AbstractEventLoop | None = None  # the loop that all calls run in
        self._calls: dict[Request, Call] = {}  # the call of each request in flight
        self._n_open = 0  # requests that were submitted and have not ended
        self._commands: list[Callable[[], None]] = []
        self.tokens = Counter(prompt=0, cached=0, generated=0)
        self._changed = threading.Condition()
        self._is_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, on_death: Callable[[], None]) -> None:
        """Start the thread. on_death: the thread calls this if the engine fails."""
        self._on_death = on_death
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        return self._n_open == 0

    @property
    def n_open(self) -> int:
        """Requests that run or wait."""
        return self._n_open

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        is_continued: Sequence[bool],
    ) -> Call:
        """Submit `params.n` requests for each prompt. The `row` of an event is the index of its
        request in the call.

        Raises GenerationError for a prompt or params that do not fit the model, and ApiError if the
        server is full, is stopping or has lost its engine.
        """
        if not self.is_alive:
            raise ApiError(503, "the engine has failed: the server is ending")
        if self.is_stopping:
            raise ApiError(503, "the server is stopping", retry_after=30)
        for row, prompt in enumerate(prompts):
            self.llama.engine.check(prompt, params, row)
        n_requests = len(prompts) * params.n
        self._loop = asyncio.get_running_loop()
        call = Call(self, n_requests)
        with self._changed:
            if self._n_open and self._n_open + n_requests > self._limit:
                message = f"{self._n_open} requests are open: try again later"
                raise ApiError(429, message, retry_after=1)
            self._n_open += n_requests

        def submit() -> None:
            for prompt, continued in zip(prompts, is_continued, strict=True):
                for sample in params.samples():
                    request = self.llama.engine.submit(
                        prompt, sample, len(call.requests), is_continued=continued
                    )
                    call.requests.append(request)
                    self._calls[request] = call

        self._command(submit)
        return call

    def cancel(self, call: Call) -> None:
        """Cancel the requests of a call that have not ended."""

        def cancel() -> None:
            for request in call.requests:
                self.llama.engine.cancel(request)

        self._command(cancel)

    def stop(self) -> None:
        """End the thread after its current step, and the other ranks with it."""
        self._is_ended = True
        self._command(lambda: None)
        self._thread.join(timeout=10)

    def _command(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _run(self) -> None:
        try:
            with self.llama.runner.leading():
                while not self._is_ended:
                    self._run_commands()
                    self._deliver(self.llama.engine.step())
        except Exception as error:
            if isinstance(error, LlamaError):
                log.error("the engine has failed: %s", error)
            else:
                log.exception("the engine has failed")
            self.is_alive = False
            failed = ApiError(500, "the engine has failed: the server is ending")
            self._send([(call, failed) for call in set(self._calls.values())])
            self._on_death()

    def _run_commands(self) -> None:
        """Run the commands. If the engine has no work, wait for a command first, but not so long
        that the other ranks time out."""
        idle = timeout().total_seconds() / 5
        with self._changed:
            if not self._commands and not self.llama.engine.has_work:
                self._changed.wait(idle)
            commands, self._commands = self._commands, []
        for command in commands:
            command()

    def _deliver(self, events: Sequence[Event]) -> None:
        of_calls: list[tuple[Call, Event | Exception]] = []
        with self._changed:
            self._n_open -= sum(event.finish_reason is not None for event in events)
        for event in events:
            call = self._calls.get(event.request)
            if event.finish_reason is not None:
                self._calls.pop(event.request, None)
                self.tokens["prompt"] += len(event.request.prompt_tokens)
                self.tokens["cached"] += event.request.n_reused
                self.tokens["generated"] += len(event.request.tokens)
            if call is not None:
                of_calls.append((call, event))
        self._send(of_calls)

    def _send(self, events: Sequence[tuple[Call, Event | Exception]]) -> None:
        """Put the events into their calls' queues. The event loop is woken once for all events."""

        def put() -> None:
            for call, event in events:
                call.put(event)

        if events and self._loop is not None:
            self._loop.call_soon_threadsafe(put)
