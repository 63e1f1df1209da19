"""A load generator for `llama serve`: time to first token, time per token, throughput.

python benchmarks/serve.py --clients 1,8,32 --out benchmarks/results/serve_bundled.json
python benchmarks/serve.py --shape 110m --quantize int8 --peer llama-server \
    --out benchmarks/results/serve_110m_int8.json

The bare engine, without a server, runs beside it with as many requests at a time. With --peer
llama.cpp's llama-server runs too, on the same weights. The measurements are interleaved, and a
server that is not measured is suspended.

Closed loop: each client sends its next call when the last has ended. Open loop, with --rate: calls
begin at random times, so many a second on average, whether others have ended or not.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import httpx
import torch
from make_checkpoint import SHAPES, make_checkpoint, write_tokenizer
from peers import WIDTHS
from processor import processor

from llama import Llama
from llama.checkpoints.convert import convert
from llama.commands.limits import check_count
from llama.errors import BenchmarkError
from llama.sampling import SamplingParams

CONTEXT = 256  # tokens of a slot
FIRST_WORD = 256  # the ids below are bytes


@dataclass
class Call:
    """The times of one call, in seconds of perf_counter."""

    start: float
    tokens: list[float]  # when each chunk of text came
    n_tokens: int  # as the server counts them

    @property
    def first(self) -> float:
        return self.tokens[0] - self.start

    @property
    def per_token(self) -> float:
        return (self.tokens[-1] - self.tokens[0]) / max(1, self.n_tokens - 1)


@dataclass
class Served:
    """A running server: its address and its process."""

    url: str
    process_id: int


@contextmanager
def serving(command: list[str]) -> Iterator[Served]:
    """Run a server that takes --port, in a process of its own, until the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise BenchmarkError(f"{command[0]} has ended with code {process.returncode}")
            try:
                if httpx.get(f"{url}/health").status_code == 200:  # llama.cpp's is 503 at first
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        yield Served(url, process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextmanager
def alone(measured: Served | None, servers: Iterable[Served]) -> Iterator[None]:
    """Suspend the other servers for the block."""
    others = [served for served in servers if served is not measured]
    for served in others:
        os.kill(served.process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        for served in others:
            os.kill(served.process_id, signal.SIGCONT)


def server(ckpt_dir: str, slots: int, flags: list[str]) -> AbstractContextManager[Served]:
    """Run `llama serve`. The model's name is "model"."""
    command = [sys.executable, "-m", "llama", "serve", ckpt_dir, "--name", "model"]
    return serving([*command, "--max_batch_size", str(slots), *flags])


def peer_server(program: str, gguf: str, slots: int) -> AbstractContextManager[Served]:
    """Run llama.cpp's llama-server with as many slots, threads and tokens a slot as ours."""
    threads = str(torch.get_num_threads())
    return serving([
        program, "--model", gguf, "--alias", "model", "--parallel", str(slots),
        "--ctx-size", str(CONTEXT * slots), "--threads", threads, "--threads-batch", threads,
        "--no-webui",
    ])  # fmt: skip


async def call(url: str, prompt: list[int], length: int) -> Call:
    """One streamed completion of `length` tokens, on a connection of its own.

    It reads the socket directly and parses at the end, because the time of an HTTP client in Python
    would count as the server's: both share the processor.
    """
    body = json.dumps({
        "model": "model", "prompt": prompt, "max_tokens": length, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    })  # fmt: skip
    host, port = url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write((head + body).encode())
    times, parts = [], []
    while part := await reader.read(1 << 16):
        parts.append(part)
        if b"data: {" in part:
            times.append(time.perf_counter())
    writer.close()
    answer = b"".join(parts).decode()
    if not answer.startswith("HTTP/1.1 200"):
        raise BenchmarkError(f"the server answered {answer[:200]!r}")
    counts = re.findall(r'"completion_tokens": ?(\d+)', answer)
    n_tokens = int(counts[-1]) if counts else 0
    check_count("a call", n_tokens, length)
    return Call(start, times, n_tokens)


class Prompts:
    """Random prompts of token ids, so that no server can reuse a prefix. Seeded."""

    def __init__(self, n_words: int, length: int) -> None:
        self._rng, self._n_words, self._length = random.Random(1), n_words, length

    def next(self) -> list[int]:
        return self._rng.choices(range(FIRST_WORD, self._n_words), k=self._length)


async def load(
    url: str, prompts: Prompts, clients: int, seconds: float, length: int, rate: float | None
) -> tuple[list[Call], float]:
    """The calls that began within `seconds`, and the seconds until the last one ended."""
    calls: list[Call] = []
    rng = random.Random(1)
    await call(url, prompts.next(), length)  # a warm-up
    start = time.perf_counter()

    async def one() -> None:
        calls.append(await call(url, prompts.next(), length))

    async def closed_loop() -> None:
        while time.perf_counter() - start < seconds:
            await one()

    if rate is None:
        await asyncio.gather(*(closed_loop() for _ in range(clients)))
    else:
        tasks = []
        while time.perf_counter() - start < seconds:
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(rng.expovariate(rate))
        await asyncio.gather(*tasks)
    return calls, time.perf_counter() - start


def served_figures(calls: list[Call], wall: float) -> dict[str, float]:
    firsts = sorted(one.first for one in calls)
    return {
        "calls": len(calls),
        "tokens_per_s": sum(one.n_tokens for one in calls) / wall,
        "first_token_median_s": statistics.median(firsts),
        "first_token_p95_s": firsts[int(0.95 * (len(firsts) - 1))],
        "per_token_median_s": statistics.median(one.per_token for one in calls),
    }


def engine_figures(
    llama: Llama, prompts: Prompts, clients: int, seconds: float, length: int
) -> dict[str, float]:
    """Tokens a second of the engine with `clients` requests at a time, without a server."""
    engine = llama.engine
    params = SamplingParams(temperature=0, max_gen_len=length, ignore_eos=True)
    start, n_tokens, n_open = time.perf_counter(), 0, 0
    while n_open or time.perf_counter() - start < seconds:
        while n_open < clients and time.perf_counter() - start < seconds:
            engine.submit(prompts.next(), params)
            n_open += 1
        for event in engine.step():
            n_tokens += event.token is not None
            n_open -= event.finish_reason is not None
    return {"tokens_per_s": n_tokens / (time.perf_counter() - start)}


def prepare(work: Path, shape: str, width: str | None) -> tuple[Path, Path]:
    """Write random weights with a made-up vocabulary: a folder, and a GGUF file in a width of
    llama.cpp. Returns both paths."""
    folder, file = work / shape, work / f"{shape}_{width}.gguf"
    n_words = SHAPES[shape]["vocab_size"]
    # A file of llama.cpp needs merges. So each word but the first is another word and a byte.
    words = [b" w", *(b" w%d" % i for i in range(n_words - FIRST_WORD - 257))]
    if not (folder / "tokenizer.model").exists():
        make_checkpoint(folder, SHAPES[shape])
        write_tokenizer(folder / "tokenizer.model", [bytes([i]) for i in range(256)] + words)
    if width is not None and not file.exists():
        convert(folder, file, "gguf", dtype=WIDTHS[width])
    return folder, file


def counts_of(clients: str | int | tuple[int, ...]) -> list[int]:
    """fire reads 1,8,32 as a tuple, and 8 as a number."""
    if isinstance(clients, tuple):
        return list(clients)
    return [int(n) for n in str(clients).split(",")]


def main(
    ckpt_dir: str = "llama/bundled",
    shape: str | None = None,
    work: str = "build/serve",
    clients: str | int | tuple[int, ...] = (1, 8, 32),
    seconds: float = 10.0,
    rounds: int = 3,
    prompt: int = 16,
    length: int = 64,
    slots: int = 32,
    rate: float | None = None,
    quantize: str | None = None,
    peer: str | None = None,
    out: str | None = None,
) -> None:
    """Measure and print.

    Args:
        ckpt_dir: a checkpoint folder.
        shape: random weights of a shape of make_checkpoint.py, in place of ckpt_dir.
        work: folder for the files of --shape.
        clients: numbers of clients at a time, with commas between.
        seconds: of each measurement.
        rounds: measurements of each, whose medians are reported.
        prompt: tokens of a prompt.
        length: tokens of an answer.
        slots: max_batch_size of the server.
        rate: calls a second, for an open loop in place of clients.
        quantize: int8 or int4.
        peer: llama.cpp's program llama-server, to be measured too; it needs --shape.
        out: file for the figures as JSON.
    """
    if peer is not None and shape is None:
        raise BenchmarkError("--peer needs --shape: both servers get the same random weights")
    gguf = Path()
    if shape is not None:
        width = {None: "BF16", "int8": "Q8_0", "int4": "Q4_0"}[quantize]
        folder, gguf = prepare(Path(work), shape, width if peer else None)
        ckpt_dir = str(folder)
    options: Any = {} if quantize is None else {"quantize": quantize}
    llama = Llama.build(ckpt_dir, max_seq_len=CONTEXT, max_batch_size=slots, mode="fast", **options)
    prompts = Prompts(llama.tokenizer.n_words - 256, prompt)
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += ["--max_seq_len", str(CONTEXT), "--max_waiting", "1000"]
    report: dict[str, Any] = {
        "processor": processor(), "model": shape or ckpt_dir, "quantize": quantize,
        "prompt": prompt, "length": length, "slots": slots,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        servers = {"llama serve": stack.enter_context(server(ckpt_dir, slots, flags))}
        if peer is not None:
            servers["llama-server"] = stack.enter_context(peer_server(peer, str(gguf), slots))
        for n in counts_of(clients) if rate is None else [0]:
            found: dict[str, list[dict[str, float]]] = defaultdict(list)
            for _ in range(rounds):
                for name, served in servers.items():
                    with alone(served, servers.values()):
                        calls = asyncio.run(load(served.url, prompts, n, seconds, length, rate))
                    found[name].append(served_figures(*calls))
                if rate is None:
                    with alone(None, servers.values()):
                        figures = engine_figures(llama, prompts, n, seconds, length)
                    found["bare engine"].append(figures)
            title = f"{n} clients" if rate is None else f"{rate:g} calls a second"
            report[title] = {
                name: {key: statistics.median(one[key] for one in rows) for key in rows[0]}
                for name, rows in found.items()
            }
            for name, medians in report[title].items():
                print(f"{title}, {name}:", *(f"{k} {v:.4g}" for k, v in medians.items()))
    if out is not None:
        Path(out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
