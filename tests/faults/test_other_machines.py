"""The network between two hosts fails: a command ends at the timeout, or its result is right."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fault_plan import Trials
from helpers.hosts import Hosts, needs_root, running
from helpers.jobs import (
    Ended,
    Words,
    batch_words,
    complete_words,
    run_command,
    train_words,
    trained_weights,
    write_inputs,
)
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


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def timeout(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> int:
    """The seconds that ranks wait for each other."""
    seconds = trials.number(few=3, all=10)
    monkeypatch.setenv("LLAMA_TIMEOUT", str(seconds))
    return seconds


@pytest.fixture
def words(inputs: Path, tmp_path: Path) -> dict[str, Words]:
    """The command of each moment and mode."""
    batch = [*batch_words(inputs, tmp_path / "batch"), "--model_parallel_size=1"]
    words = {"batch": batch, "training": train_words(inputs, tmp_path / "run", 4, 1)}
    for mode in ("fast", "reference"):
        words |= dict.fromkeys(
            (f"prefill {mode}", f"decode {mode}"), complete_words(inputs, mode, n_tokens=3)
        )
    return words


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


def run_and_lose_the_link(words: Words, moment: str, rank: int) -> tuple[Ended, float, float | None]:
    """In a rank: how the command ended, when, and when this rank's link went down."""
    link = Link(moment) if os.environ["RANK"] == str(rank) else None
    ended = run_command(words)
    return ended, time.monotonic(), link and link.down_at


@pytest.mark.parametrize("x", ["prefill reference 0","decode fast 1", "prefill fast 1", "decode reference 0", "batch  0", "batch  1", "training  1", "training  0"])
def test_x(x, words, trials, timeout, tmp_path):
    moment, mode, rank = x.split(" ")
    with trials.trial(x), running(2, tmp_path) as hosts:
            t=time.monotonic()
            for e, s, d in hosts.run_ranks(tmp_path, run_and_lose_the_link, words[f"{moment} {mode}".strip()], moment, int(rank)):
                print("END", e.code, e.errors[-600:], s-t, d and d-t)
