"""`llama serve` in a process of its own gets malformed requests, slow sockets, a full queue and
clients that leave: the parts of `benchmarks/serve_faults.py`, counted.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from helpers.fault_plan import Trials
from serve import server
from serve_faults import face_leaving, face_malformed, face_overflow, face_slow_sockets

ROUND = 100  # malformed requests of a trial

Part = Callable[[httpx.AsyncClient], Awaitable[Any]]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    flags = ["--max_seq_len", "256", "--max_waiting", "16"]
    with server("llama/bundled", 8, flags) as served:
        yield served.url


def face(url: str, part: Part) -> Any:
    """Run a part, which raises an error if the server fails. The server must be idle after it."""

    async def run() -> Any:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            figures = await part(client)
            health = (await client.get("/health")).json()
            assert health["open_requests"] == 0
            return figures

    return asyncio.run(run())


@pytest.mark.fault(19)
def test_malformed_requests(trials: Trials, url: str) -> None:
    for number in range(trials.number(few=2, all=200)):
        with trials.trial(f"malformed requests from {number * ROUND}"):
            face(url, lambda client, n=number: face_malformed(client, ROUND, 8, n * ROUND))


@pytest.mark.fault(19)
def test_slow_sockets(trials: Trials, url: str) -> None:
    for _ in range(trials.number(few=1, all=5)):
        with trials.trial("500 sockets that send a byte a second"):
            face(url, lambda client: face_slow_sockets(client, url, 500, rounds=1))


@pytest.mark.fault(19)
def test_full_queue(trials: Trials, url: str) -> None:
    for _ in range(trials.number(few=1, all=5)):
        with trials.trial("200 calls, 24 of which fit"):
            face(url, lambda client: face_overflow(client, 200))


@pytest.mark.fault(19)
def test_clients_that_leave(trials: Trials, url: str) -> None:
    for number in range(trials.number(few=4, all=100)):
        with trials.trial(f"leaving, {number}"):
            face(url, lambda client: face_leaving(client, 2))
