"""Make `llama serve` face malformed requests, slow sockets, a full queue and clients that leave.

python benchmarks/serve_faults.py --out benchmarks/results/serve_faults.json

Each part raises an error where the server fails: an answer of 5xx, a wrong text afterwards, an
accepted call that does not finish. The figures are the rest: how many, and how fast.
"""

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fire
import httpx
from processor import processor
from serve import server
from tqdm import tqdm

from llama.errors import BenchmarkError

MODEL = "model"
PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Hi"}
DEEP_CALL = {"id": "1", "function": {"name": "add", "arguments": "[" * 9999}}
VALUES: list[Any] = [
    None, True, False, 0, -1, 10**30, 1e308, -1e308, 0.5, "", "x", "\ud800", "\0", [], {}, [[]],
    [None], {"a": {}}, ["a"] * 200, [1.5], [-1], [10**9], "9" * 5000, [[1], "a"],
    [{"role": "user"}], [TOOL], [TOOL] * 200, [{**TOOL, "function": {}}], "required",
    [USER, {"role": "tool", "content": "1", "tool_call_id": "x"}],
    [USER, {"role": "assistant", "tool_calls": [DEEP_CALL]}],
]  # fmt: skip
FIELDS = [
    "temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream_options", "max_tokens",
    "logprobs", "echo", "suffix", "tools", "tool_choice", "response_format", "date", "unknown",
]  # fmt: skip


def good(model: str) -> dict[str, dict[str, Any]]:
    """A right body for each path."""
    return {
        "/v1/chat/completions": {"model": model, "messages": [USER], "max_tokens": 2},
        "/v1/completions": {"model": model, "prompt": "Once", "max_tokens": 2},
        "/tokenize": {"prompt": "Once"},
        "/detokenize": {"tokens": [1, 2, 3]},
    }


def malformed(rng: random.Random, path: str, model: str = MODEL) -> bytes:
    """A body with one or several faults, of JSON or of its fields."""
    body = json.loads(json.dumps(good(model)[path]))
    for _ in range(rng.randrange(1, 4)):
        body[rng.choice([*body, *FIELDS])] = rng.choice(VALUES)
    text = json.dumps(body)
    kind = rng.randrange(9)
    if kind == 0:
        text = text[: rng.randrange(len(text))]
    elif kind == 1:
        text = text.replace(":", rng.choice([": NaN, ", ": -Infinity,", "::"]), 1)
    elif kind == 2:
        text = rng.choice(["[", '{"a":']) * 10_000 + text
    elif kind == 3:
        text = text.replace("2", "9" * 5000, 1)
    data = text.encode("utf-8", "surrogatepass")
    if kind == 4:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(128, 256)]) + data[at:]
    if kind == 5 and rng.random() < 0.05:
        data += b" " * (5 << 20)  # more than the server reads
    return data


def in_chunks(data: bytes) -> Any:
    """An async body without a length."""

    async def chunks() -> Any:
        for at in range(0, len(data), 1 << 16):
            yield data[at : at + (1 << 16)]

    return chunks()


async def greedy_text(client: httpx.AsyncClient) -> str:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        raise BenchmarkError(f"a right call got status {response.status_code}")
    return str(response.json()["choices"][0]["text"])


async def wait_until_idle(client: httpx.AsyncClient) -> None:
    """Wait until the server has no open request."""
    while (await client.get("/health")).json()["open_requests"]:
        await asyncio.sleep(0.005)


async def face_malformed(
    client: httpx.AsyncClient, n_requests: int, n_clients: int, first: int = 0
) -> Any:
    """Send seeded malformed requests, whose seeds count up from `first`. Returns how many got each
    status."""
    before = await greedy_text(client)
    statuses: Counter[int] = Counter()
    numbers = iter(range(first, first + n_requests))
    bar = tqdm(total=n_requests, desc="Malformed requests", unit="request")

    async def one_client() -> None:
        for number in numbers:
            rng = random.Random(number)
            path = rng.choice(PATHS)
            data = malformed(rng, path)
            content = in_chunks(data) if rng.random() < 0.3 else data
            kind = rng.choice(["application/json"] * 9 + ["text/plain"])
            response = await client.post(path, content=content, headers={"content-type": kind})
            statuses[response.status_code] += 1
            if response.status_code >= 500:
                raise BenchmarkError(
                    f"request {number} got status {response.status_code}: {response.text:.200}"
                )
            bar.update()

    await asyncio.gather(*(one_client() for _ in range(n_clients)))
    bar.close()
    if await greedy_text(client) != before:
        raise BenchmarkError("a right call gets another text than before")
    return {str(status): count for status, count in sorted(statuses.items())}


async def face_slow_sockets(
    client: httpx.AsyncClient, url: str, n_sockets: int, rounds: int = 5
) -> Any:
    """Sockets send a byte a second. Returns a healthy client's time beside them and alone, in
    turns."""
    host, port = url.removeprefix("http://").split(":")

    async def healthy() -> float:
        start = time.perf_counter()
        for _ in range(5):
            await greedy_text(client)
        return time.perf_counter() - start

    async def drip(writer: asyncio.StreamWriter) -> None:
        for byte in b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 1000:
            writer.write(bytes([byte]))
            await asyncio.sleep(1)

    alone, beside = [], []
    await healthy()
    for _ in range(rounds):
        alone.append(await healthy())
        opened = await asyncio.gather(
            *(asyncio.open_connection(host, int(port)) for _ in range(n_sockets))
        )
        tasks = [asyncio.create_task(drip(writer)) for _, writer in opened]
        await asyncio.sleep(1)
        beside.append(await healthy())
        for task, (_, writer) in zip(tasks, opened, strict=True):
            task.cancel()
            writer.close()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "sockets": n_sockets,
        "alone_s": statistics.median(alone),
        "beside_s": statistics.median(beside),
        "ratio": statistics.median(b / a for a, b in zip(alone, beside, strict=True)),
    }


async def face_overflow(client: httpx.AsyncClient, n_calls: int) -> Any:
    """Send more calls at once than slots and queue hold. Returns the counts, and the seconds until
    the calls beyond got status 429."""
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 100, "ignore_eos": True}
    refusals: list[float] = []
    n_finished = 0

    async def call() -> None:
        nonlocal n_finished
        start = time.perf_counter()
        response = await client.post("/v1/completions", json=body)
        if response.status_code == 429:
            refusals.append(time.perf_counter() - start)
            return
        if response.status_code != 200:
            raise BenchmarkError(f"an accepted call got status {response.status_code}")
        n_finished += response.json()["usage"]["completion_tokens"] == 100

    await asyncio.gather(*(call() for _ in range(n_calls)))
    if not refusals or len(refusals) + n_finished != n_calls:
        raise BenchmarkError(f"{n_calls} calls: {len(refusals)} refused, {n_finished} finished")
    return {"calls": n_calls, "finished": n_finished, "refused": len(refusals),
            "refused_within_s": max(refusals)}  # fmt: skip


async def face_leaving(client: httpx.AsyncClient, rounds: int) -> Any:
    """Leave a stream after its first chunk, or before it. Returns the longest time until the
    server has no open request."""
    longest = 0.0
    for i in range(rounds):
        body = {"model": MODEL, "prompt": "Once upon a time " * 30, "max_tokens": 100, "n": 4,
                "ignore_eos": True, "stream": True}  # fmt: skip
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if i % 2:
                async for _ in response.aiter_lines():
                    break
        start = time.perf_counter()
        await wait_until_idle(client)
        longest = max(longest, time.perf_counter() - start)
    return {"rounds": rounds, "free_within_s": longest}


async def face_all(url: str, requests: int, sockets: int, clients: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return {
            "malformed": await face_malformed(client, requests, clients),
            "slow_sockets": await face_slow_sockets(client, url, sockets),
            "overflow": await face_overflow(client, 200),
            "leaving": await face_leaving(client, 20),
        }


def main(
    ckpt_dir: str = "llama/bundled",
    requests: int = 20_000,
    sockets: int = 500,
    clients: int = 16,
    out: str | None = None,
) -> None:
    """Run all parts on a server of their own, and print the figures.

    Args:
        ckpt_dir: a checkpoint folder.
        requests: malformed requests.
        sockets: slow sockets at a time.
        clients: malformed requests at a time.
        out: file for the figures as JSON.
    """
    with server(ckpt_dir, 8, ["--max_seq_len", "256", "--max_waiting", "64"]) as served:
        figures = asyncio.run(face_all(served.url, requests, sockets, clients))
    report = {"processor": processor(), **figures}
    for name, figures in report.items():
        print(f"{name}: {figures}")
    if out is not None:
        Path(out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
