"""The network between two hosts fails: a command ends at the timeout, or its result is right."""

import functools
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fault_plan import Trials
from helpers.hosts import needs_root, running
from helpers.jobs import (
    Ended,
    Words,
    batch_words,
    complete_words,
    run_command,
    train_words,
    trained_weights,
)
from helpers.network import Line
from helpers.ranks import run_ranks

from llama.commands.batch_files import Part
from llama.engine.worker import Worker
from llama.training.loop import Trainer

pytestmark = [needs_root, pytest.mark.fault(15)]

N_LAYERS = 4
# During which call of which method a link goes down, and after how many all-reduces of that call.
MOMENTS: dict[str, tuple[Any, str, int, int]] = {
    "prefill": (Worker, "execute", 0, N_LAYERS),
    "decode": (Worker, "execute", 1, N_LAYERS),
    "batch": (Part, "write", 3, 0),
    "training": (Trainer, "train_step", 2, 1),  # before the gradients are summed
}
MODES = ("reference", "fast")
JOBS_OF = {"decode": MODES, "prefill": MODES, "batch": ("batch",), "training": ("training",)}
LATE = 10  # seconds after the timeout: the ranks ask each other, and the machine may be slow


@pytest.fixture(scope="module")
def jobs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, "Job"]:
    """The jobs, each with what it gives without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    completion = functools.partial(complete_words, inputs, n_tokens=3)
    return {
        "fast": Job(lambda out: completion("fast"), lambda out, ended: ended.output, folder),
        "reference": Job(
            lambda out: completion("reference"), lambda out, ended: ended.output, folder
        ),
        "batch": Job(
            lambda out: [*batch_words(inputs, out), "--model_parallel_size=1"],
            lambda out, ended: out.read_text(),
            folder,
        ),
        "training": Job(
            lambda out: train_words(inputs, out, steps=4, checkpoint_every=1),
            lambda out, ended: trained_weights(out),
            folder,
        ),
    }


class Job:
    """A command, and its result without a fault, on two ranks of one machine.

    words: makes it from the path of its output. result: is made from that and how it ended.
    """

    def __init__(
        self, words: Callable[[Path], Words], result: Callable[[Path, Ended], Any], folder: Path
    ) -> None:
        self.words, self.result, self._folder = words, result, folder

    @functools.cached_property
    def expected(self) -> Any:
        return self.run_again(Path(tempfile.mkdtemp(dir=self._folder)) / "out")

    def run_again(self, out: Path) -> Any:
        """Run or continue the job on two ranks of one machine. Returns its result."""
        first, second = run_ranks(2, out.parent, run_command, self.words(out))
        assert first.code == second.code == 0, (first.errors, second.errors)
        return self.result(out, first)


class Link:
    """This rank's link, which goes down at a moment of MOMENTS."""

    def __init__(self, moment: str) -> None:
        self.down_at: float | None = None
        owner, method, self._calls, self._sums = MOMENTS[moment]
        called, all_reduce = getattr(owner, method), torch.distributed.all_reduce

        def call(*args: Any, **options: Any) -> Any:
            self._calls -= 1
            self._cut_if_due()
            return called(*args, **options)

        def call_all_reduce(*args: Any, **options: Any) -> Any:
            result = all_reduce(*args, **options)
            if self._calls < 0:
                self._sums -= 1
                self._cut_if_due()
            return result

        setattr(owner, method, call)
        torch.distributed.all_reduce = call_all_reduce

    def _cut_if_due(self) -> None:
        if self._calls < 0 and self._sums == 0 and self.down_at is None:
            subprocess.run(["ip", "link", "set", "net0", "down"], check=True)
            self.down_at = time.monotonic()


def run_and_lose_the_link(
    words: Words, moment: str, rank: int
) -> tuple[Ended, float, float | None]:
    """In a rank: how the command ended, when, and when this rank's link went down."""
    link = Link(moment) if os.environ["RANK"] == str(rank) else None
    ended = run_command(words)
    return ended, time.monotonic(), link and link.down_at


def chosen(cases: list[Any], number: int) -> list[Any]:
    """That many of the cases, spread over the list."""
    return [cases[i * len(cases) // number] for i in range(number)]


def test_a_link_goes_down(
    trials: Trials, jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks end. The rest of a job with files is done by the same command on one machine."""
    timeout = trials.number(few=3, all=10)
    cases = [
        (moment, name, rank)
        for moment, names in JOBS_OF.items()
        for name in names
        for rank in range(2)
    ]
    for moment, name, rank in chosen(cases, trials.number(1, len(cases))):
        folder = tmp_path / f"{moment} {name} {rank}"
        folder.mkdir()
        job, out = jobs[name], folder / "out"
        monkeypatch.setenv("LLAMA_TIMEOUT", str(timeout))
        with trials.trial(f"{name}, link of rank {rank} in {moment}"):
            with running(2, folder) as hosts:
                ends = hosts.run_ranks(folder, run_and_lose_the_link, job.words(out), moment, rank)
            down_at = ends[rank][2]
            for own, (ended, seconds, _) in enumerate(ends):
                assert ended.code == 2, ended.errors
                assert "Traceback" not in ended.errors
                last = ended.errors.splitlines()[-1]
                assert last.startswith(f"error: rank {1 - own} did not answer within {timeout} s")
                assert seconds - down_at < timeout + LATE
            monkeypatch.delenv("LLAMA_TIMEOUT")
            if name in ("batch", "training"):
                assert job.run_again(out) == job.expected


def test_packets_are_lost_or_late(
    trials: Trials, jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_TIMEOUT", "10")
    lines = [Line(loss=0.05), Line(delay=0.1), Line(loss=0.05, delay=0.1)]
    cases = list(itertools.product(lines, ["reference", "fast", "training"]))
    for number, (line, name) in enumerate(chosen(cases, trials.number(1, len(cases)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        with trials.trial(f"{name}, loss {line.loss}, delay {line.delay}"):
            job, out = jobs[name], folder / "out"
            with running(2, folder) as hosts:
                hosts.network.line = line
                first, second = hosts.run_ranks(folder, run_command, job.words(out))
            assert first.code == second.code == 0, (first.errors, second.errors)
            assert job.result(out, first) == job.expected
