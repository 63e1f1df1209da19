"""Ranks that are killed, stopped, fail or never start, and ranks that do not fit together."""

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers.damaged import WIDER, write_folder
from helpers.fault_plan import RESULTS, Trials
from helpers.ranks import free_port, run_ranks
from make_checkpoint import make_checkpoint

from llama import Llama
from llama.errors import LlamaError

ROOT = Path(__file__).parent.parent.parent
PROGRAM = ROOT / "tests/helpers/losing_rank.py"
TIMEOUT = 3  # seconds, as LLAMA_TIMEOUT
START = 60  # seconds in which the ranks start and meet the point where one of them is lost
MARK = "LLAMA_TEST_RUN"  # in the environment of all processes of a trial


class Ended:
    """How a run of torchrun ended: its output, and the seconds since the rank was lost."""

    def __init__(self, text: str, seconds: float) -> None:
        self.text, self.seconds = text, seconds
        self.errors = re.findall(r"^.*error: (.*)$", text, re.MULTILINE)

    def require_seconds(self, most: float) -> None:
        """Only `make faults` has the machine for itself, so only there the time is checked."""
        assert RESULTS is None or self.seconds < most, self.seconds

    def require_named(self, rank: int) -> None:
        """The rank is named by our error, or by torchrun as the first that failed."""
        root = re.search(r"Root Cause.*?rank +: (\d+)", self.text, re.DOTALL)
        by_torchrun = root is not None and int(root[1]) == rank
        assert by_torchrun or any(f"rank {rank} " in error for error in self.errors), self.text


def lose(mode: str, ranks: int, point: str, rank: int, fault: str) -> Ended:
    """Run tests/helpers/losing_rank.py to its end, and check that nothing of it is left."""
    mark, port = uuid.uuid4().hex, free_port()
    environment = os.environ | {
        MARK: mark, "LLAMA_TIMEOUT": str(TIMEOUT), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks),
        "--master_port", str(port), PROGRAM,
        mode, point, str(rank), fault,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, bufsize=1,
    )  # fmt: skip
    try:
        lost_at, lines = time.monotonic(), []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "is lost now" in line:
                lost_at = time.monotonic()
        assert process.wait(timeout=START) != 0
        seconds = time.monotonic() - lost_at
        assert processes_with(mark) == []
    finally:
        process.kill()
        for pid in processes_with(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
    return Ended("".join(lines), seconds)


def processes_with(mark: str) -> list[int]:
    """The processes of a trial that run, without those that have ended and are not waited for."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def outcomes(cases: list[tuple[Any, Any]]) -> list[tuple[str, float]]:
    """On a rank: what it says of each case, which has a folder and options for each rank, and after
    how many seconds."""
    found = []
    rank = int(os.environ["RANK"])
    version = importlib.metadata.version
    for case in cases:
        folder, options = case[rank]
        importlib.metadata.version = lambda name, options=options: (
            options.get("version") or version(name)
        )
        options = {name: value for name, value in options.items() if name != "version"}
        start = time.monotonic()
        try:
            Llama.build(folder, device="cpu", **options)
            message = "built"
        except LlamaError as error:
            message = str(error)
        found.append((message, time.monotonic() - start))
    return found


def chosen(cases: list[Any], number: int) -> list[Any]:
    """That many of the cases, spread over the list."""
    return [cases[i * len(cases) // number] for i in range(number)]


@pytest.mark.fault(13)
def test_a_killed_rank(trials: Trials) -> None:
    cases = [
        (mode, ranks, point, rank)
        for mode, ranks, point in product(
            ("fast", "reference"), (2, 4), ("load", "prefill", "decode", "idle")
        )
        for rank in {0, ranks - 1}
    ]
    for mode, ranks, point, rank in chosen(cases, trials.number(1, len(cases))):
        with trials.trial(f"{mode}, {ranks} ranks, rank {rank}, {point}"):
            ended = lose(mode, ranks, point, rank, "SIGKILL")
            ended.require_named(rank)
            ended.require_seconds(5)


@pytest.mark.fault(14)
def test_a_rank_that_does_not_answer(trials: Trials) -> None:
    faults = [("SIGSTOP", point) for point in ("load", "prefill", "decode", "idle")]
    faults += [("exception", "load"), ("exception", "decode"), ("sleep", "start")]
    cases = [
        (mode, 2 if rank < 2 else 4, fault, point, rank)
        for mode, rank, (fault, point) in product(("fast", "reference"), (0, 1, 3), faults)
    ]
    for mode, ranks, fault, point, rank in chosen(cases, trials.number(2, len(cases))):
        with trials.trial(f"{mode}, {ranks} ranks, rank {rank}, {fault} at {point}"):
            ended = lose(mode, ranks, point, rank, fault)
            ended.require_named(rank)
            ended.require_seconds(TIMEOUT + 5)
            if fault != "exception":
                assert len(set(ended.errors)) == 1, ended.errors


@pytest.mark.fault(14)
def test_the_rank_with_the_store_is_stopped(trials: Trials) -> None:
    """Without torchrun the store is in rank 0, and does not answer while that is stopped."""
    port = free_port()
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "LLAMA_TIMEOUT": str(TIMEOUT),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }  # fmt: skip
        command = [sys.executable, PROGRAM, "reference", "decode", "0", "SIGSTOP"]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    with trials.trial("rank 0 of 2, SIGSTOP in decode"):
        try:
            _, said = processes[1].communicate(timeout=START)
            assert "error: rank 0 was stopped" in said
            assert processes[1].returncode == 2
            processes[0].communicate(timeout=START)
            assert processes[0].returncode == 2
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def damage(folder: Path, fault: str) -> Path:
    """Spoil a folder of two shards."""
    first, second = folder / "consolidated.00.pth", folder / "consolidated.01.pth"
    if fault == "missing":
        second.unlink()
    elif fault == "copied":
        shutil.copy(first, second)
    elif fault == "added":
        shutil.copy(first, folder / "consolidated.02.pth")
    elif fault == "renamed":
        second.rename(folder / "consolidated.03.pth")
    elif fault == "empty":
        second.write_bytes(b"")
    elif fault == "removed":
        shutil.rmtree(folder)
    elif fault == "no params":
        (folder / "params.json").unlink()
    elif fault == "other norms":
        settings = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps(settings | {"norm_eps": 1e-3}))
    elif fault == "other weights":
        first.unlink()
        second.unlink()
        make_checkpoint(folder, WIDER, 2, seed=1)
    return folder


@pytest.mark.fault(5)
def test_ranks_that_do_not_fit_together(trials: Trials, tmp_path: Path) -> None:
    faults = "missing copied added renamed empty removed".split()
    faults += ["no params", "other norms", "other weights"]
    whole = write_folder(tmp_path / "whole", WIDER, 2)
    spoiled = [damage(Path(shutil.copytree(whole, tmp_path / fault)), fault) for fault in faults]
    cases = {f"{folder.name} on rank 1": ((whole, {}), (folder, {})) for folder in spoiled}
    cases |= {f"{folder.name} on both": ((folder, {}),) * 2 for folder in spoiled[:7]}
    options: list[dict[str, Any]] = [
        {"mode": "fast"}, {"max_seq_len": 64}, {"max_batch_size": 2}, {"dtype": "float32"},
        {"mode": "fast", "quantize": "int8"}, {"version": "9.9"},
    ]  # fmt: skip
    cases |= {f"{other} on rank 1": ((whole, {}), (whole, other)) for other in options}
    cases["no fault"] = ((whole, {}),) * 2
    of_ranks = run_ranks(2, tmp_path, outcomes, list(cases.values()))
    for name, (first, seconds), (second, _) in zip(cases, *of_ranks, strict=True):
        with trials.trial(name):
            # A rank that fails alone has its own message, and the other one names the rank.
            assert first.removeprefix("rank 1: ") == second
            assert (second == "built") == (name == "no fault")
            assert seconds < 10
