"""What this machine can do at most, measured beside a benchmark: no figure may exceed it."""

import math
import time
from collections.abc import Callable, Iterable

import torch

from llama.engine.request import Event
from llama.errors import BenchmarkError

TOLERANCE = 1.25  # neighbours on the machine may slow a limit down while it is measured
INT8_GAIN = 4  # products of int8 are at most that much faster than those of float32
ROUNDS = 5


def best_seconds(work: Callable[[], object]) -> float:
    """The shortest time of several calls."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_rate(n_bytes: int, device: torch.device) -> float:
    """Bytes a second at which memory of that size is read, all of it from the caches if it fits."""
    buffer = torch.ones(max(1, n_bytes // 4), device=device)
    return buffer.nbytes / best_seconds(lambda: buffer.sum().item())


def product_rate(device: torch.device, size: int = 1024) -> float:
    """Operations a second of a large matrix product, in the faster of float32 and bfloat16, and
    INT8_GAIN times as many, because weights may be int8."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(size, size, dtype=dtype, device=device)
        rates.append(2 * size**3 / best_seconds(lambda x=x: (x @ x)[0, 0].item()))  # type: ignore[misc]
    return INT8_GAIN * max(rates)


def check_rate(name: str, rate: float, limit: float, unit: str) -> None:
    """Raise BenchmarkError where a rate is above what the machine was measured to reach."""
    if not 0 < rate <= TOLERANCE * limit:
        raise BenchmarkError(
            f"{name}: {rate:.3g} {unit} a second, but this machine reaches {limit:.3g}: the work "
            "was not done"
        )


def count_tokens(events: Iterable[Event]) -> int:
    """The generated tokens among the events. Raises BenchmarkError for one whose logits were not
    finite, or a request that failed."""
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
    """Raise BenchmarkError where another number of tokens came than were asked for."""
    if count != expected:
        raise BenchmarkError(f"{name}: {count} tokens came, but {expected} were asked for")
