"""The network between two hosts fails: a command ends at the timeout, or its result is right."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hosts import Hosts, needs_root, running
from helpers.jobs import (
    Ended,
    Words,
    complete_words,
    run_command,
    train_words,
    write_inputs,
)

from llama.engine.worker import Worker
from llama.training.loop import Trainer

pytestmark = [needs_root, pytest.mark.fault(15)]

TIMEOUT = 10  # seconds
N_TOKENS = 3
N_STEPS = 3
N_LAYERS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with running(2, tmp_path) as hosts:
        yield hosts


def break_link(owner: Any, method: str, call: int, n_sums: int) -> None:
    """The link of this rank goes down during the given call of the method, after so many of its
    all-reduces. Calls count from 0."""
    called, all_reduce = getattr(owner, method), torch.distributed.all_reduce
    left = [call, n_sums]

    def count_call(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        return called(*args, **options)

    def count_sum(*args: Any, **options: Any) -> Any:
        result = all_reduce(*args, **options)
        if left[0] < 0:
            left[1] -= 1
            if left[1] == 0:
                subprocess.run(["ip", "link", "set", "net0", "down"], check=True)
        return result

    setattr(owner, method, count_call)
    torch.distributed.all_reduce = count_sum


# During which call of which method, and after how many of its all-reduces.
MOMENTS = {
    "prefill": (Worker, "execute", 0, N_LAYERS),
    "decode": (Worker, "execute", 1, N_LAYERS),
    "training": (Trainer, "train_step", 1, 1),  # before the gradients are summed
}


def run_and_lose_the_link(words: Words, moment: str, broken: int) -> tuple[Ended, float]:
    """In a rank: run the command. The link of one rank breaks. Returns the time of the end too."""
    if int(os.environ["RANK"]) == broken:
        break_link(*MOMENTS[moment])
    return run_command(words), time.monotonic()


@pytest.mark.parametrize(
    ("moment", "mode"),
    [
        ("prefill", "reference"),
        ("decode", "fast"),
        ("decode", "reference"),
        ("prefill", "fast"),
        ("training", ""),
    ],
)
def test_a_link_goes_down(
    moment: str, mode: str, hosts: Hosts, inputs: Path, tmp_path: Path
) -> None:
    words = complete_words(inputs, mode, 3) if mode else train_words(inputs, tmp_path / "run", 3, 1)
    t = time.monotonic()
    ends = hosts.run_ranks(tmp_path, run_and_lose_the_link, words, moment, 1)
    print(time.monotonic() - t)
    for e, s in ends:
        print(e, s - t)


@pytest.mark.parametrize("mode", ["fast", "reference"])
@pytest.mark.parametrize(("delay", "loss"), [(0, 0.05), (0.1, 0), (0.1, 0.05)])
def test_bad(mode: str, delay, loss, hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    words = complete_words(inputs, mode, 2)
    hosts.network.line.delay = delay
    hosts.network.line.loss = loss
    t = time.monotonic()
    ends = hosts.run_ranks(tmp_path, run_command, words)
    print(mode, delay, loss, time.monotonic() - t, ends)


@pytest.mark.parametrize(("delay", "loss"), [(0.1, 0.05)])
def test_bad_train(delay, loss, hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    hosts.network.line.delay = delay
    hosts.network.line.loss = loss
    words = train_words(inputs, tmp_path / "run", 3, 1)
    t = time.monotonic()
    ends = hosts.run_ranks(tmp_path, run_command, words)
    print(delay, loss, time.monotonic() - t, ends)
