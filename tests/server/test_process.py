"""`llama serve` as a process: start, signals, ranks, and mistakes on the command line."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.ranks import free_port

ROOT = Path(__file__).parent.parent.parent
SERVE = ["serve", "llama/bundled", "--device", "cpu", "--max_seq_len", "256", "--name", "tales"]
BODY: Any = {"model": "tales", "prompt": "Once", "max_tokens": 200, "temperature": 0}


def restore_signals() -> None:
    """A test run from a background job ignores SIGINT, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def serving(ranks: int = 1, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yields the process and its address, once it answers."""
    port = free_port()
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    launcher += ["--master_port", str(free_port()), "-m", "llama"]
    command = [*(launcher if ranks > 1 else ["-m", "llama"]), *SERVE, "--port", str(port), *flags]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=restore_signals,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield process, url
    finally:
        if process.poll() is None:
            ranks_left = rank_processes(process.pid) if ranks > 1 else []
            process.kill()
            for rank in ranks_left:  # they hold the pipes open
                os.kill(rank, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_calls_finish(number: signal.Signals) -> None:
    with serving() as (process, url):
        body = {**BODY, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(number)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert process.wait(timeout=20) == 0
        _, log = process.communicate()
        assert re.search(r"Serving tales and a chat page on http://127.0.0.1:\d+: context 256", log)
        assert "Traceback" not in log


def test_a_second_signal_ends_at_once() -> None:
    with serving() as (process, url):
        body = {**BODY, "stream": True, "ignore_eos": True, "n": 8}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


def test_two_ranks_serve_as_one() -> None:
    body = {**BODY, "max_tokens": 16}  # later, the ranks' rounding may decide between two tokens
    with serving() as (_, url):
        want = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
    with serving(2) as (process, url):
        found = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"]
        assert found == want
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_death_of_a_rank_ends_all(rank: int) -> None:
    with serving(2) as (process, url):
        children = rank_processes(process.pid)
        body = {**BODY, "stream": True, "ignore_eos": True, "n": 8}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
            os.kill(children[rank], signal.SIGKILL)
            start = time.monotonic()
            process.wait(timeout=30)
            assert time.monotonic() - start < 10
        assert not any(Path(f"/proc/{child}").exists() for child in children)
        port = int(url.rpartition(":")[2])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))  # the port is free


def rank_processes(launcher: int) -> list[int]:
    """The processes of the ranks, by rank."""
    found = {}
    for task in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((task / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher:
                environment = (task / "environ").read_bytes().split(b"\0")
                (rank,) = [e[5:] for e in environment if e.startswith(b"RANK=")]
                found[int(rank)] = int(task.name)
        except (OSError, ValueError):
            continue
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0 can be reached from other machines: give an --api"),
        (["--port", "70000"], "port is 70000: it must be 0 to 65535"),
        (["--port", "{taken}"], "cannot serve on 127.0.0.1:{taken}: Address already in use"),
        (["--host", "no.such.host.invalid", "--api_key", "x"], "host no.such.host.invalid: "),
    ],
)
def test_mistakes_on_the_command_line(flags: list[str], message: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = ["-m", "llama", *SERVE, *(flag.replace("{taken}", port) for flag in flags)]
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2
    assert message.replace("{taken}", port) in done.stderr
    assert "Traceback" not in done.stderr
