"""Checks of benchmark figures: rates that this machine can reach, and exact counts of tokens."""

import math
import time
from collections.abc import Callable, Iterable

import torch

from llama.engine.request import Event
from llama.errors import BenchmarkError

# A rate may exceed the measured limit by this factor. The limit is measured too low if other
# processes use the machine at the time.
TOLERANCE = 1.25
INT8_GAIN = 4  # int8 products are at most this many times as fast as those of float32 or bfloat16
ROUNDS = 5


def best_seconds(work: Callable[[], object]) -> float:
    """The time of the fastest of several calls, in seconds."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_rate(n_bytes: int, device: torch.device) -> float:
    """Measure how many bytes a second are read from a buffer of `n_bytes`. If the buffer fits into
    the processor's caches, this is the speed of the caches."""
    buffer = torch.ones(max(1, n_bytes // 4), device=device)
    return buffer.nbytes / best_seconds(lambda: buffer.sum().item())


def product_rate(device: torch.device, size: int = 1024) -> float:
    """An upper limit for the operations a second of matrix products.

    A large product is measured in float32 and in bfloat16. The limit is the higher rate, times
    INT8_GAIN, because weights may be int8.
    """
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(size, size, dtype=dtype, device=device)
        rates.append(2 * size**3 / best_seconds(lambda x=x: (x @ x)[0, 0].item()))  # type: ignore[misc]
    return INT8_GAIN * max(rates)


def check_rate(name: str, rate: float, limit: float, unit: str) -> None:
    """Raise BenchmarkError if a rate is not above 0 or exceeds the measured limit."""
    if not 0 < rate <= TOLERANCE * limit:
        raise BenchmarkError(
            f"{name}: {rate:.3g} {unit} a second, but the limit of this machine is {limit:.3g}: "
            "the work was not done"
        )


def count_tokens(events: Iterable[Event]) -> int:
    """The number of generated tokens among the events. Raises BenchmarkError for a token whose
    logprob is above 0 or is not finite, and for a request that failed."""
    count = 0
    for event in events:
        if event.request.error is not None:
            raise BenchmarkError(f"a request failed: {event.request.error}")
        if event.token is None:
            continue
        if event.logprob is None or not math.isfinite(event.logprob) or event.logprob > 1e-3:
            raise BenchmarkError(f"token {event.token} has the logprob {event.logprob}")
        count += 1
    return count


def check_count(name: str, count: int, expected: int) -> None:
    """Raise BenchmarkError unless `expected` tokens were generated."""
    if count != expected:
        raise BenchmarkError(
            f"{name}: {count} tokens were generated, but {expected} were requested"
        )
