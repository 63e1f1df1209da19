"""Commands on several hosts: their results are those of one process, or of as many ranks on one
machine. A job goes on without a host that was lost."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hosts import Hosts, needs_root, running
from helpers.jobs import (
    Words,
    batch_words,
    complete_words,
    run_command,
    train_words,
    trained_weights,
)
from helpers.ranks import run_ranks

from llama.checkpoints.folder import run_checkpoints

pytestmark = needs_root


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with running(2, tmp_path) as hosts:
        yield hosts


def torchrun(hosts: Hosts, words: Words, *options: str) -> list[subprocess.Popen[str]]:
    """A command on each of the hosts, by torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1",
                "--rdzv_backend=c10d", "--rdzv_endpoint=host0:29400", *options]  # fmt: skip
    return [
        subprocess.Popen(
            hosts.on(i, *launcher, "-m", "llama", *words), stdout=subprocess.PIPE, text=True
        )
        for i in range(len(hosts.addresses))
    ]


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_two_hosts_share_a_model(mode: str, hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    words = complete_words(inputs, mode, 4)
    (alone,) = run_ranks(1, tmp_path, run_command, words)
    first, second = hosts.run_ranks(tmp_path, run_command, words)
    assert alone.code == first.code == second.code == 0, (first.errors, second.errors)
    assert first.output == alone.output
    assert second.output == ""


def test_torchrun_on_two_hosts(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    words = complete_words(inputs, "reference", 4)
    (alone,) = run_ranks(1, tmp_path, run_command, words)
    agents = torchrun(hosts, words, "--nnodes=2")
    outputs = sorted(agent.communicate(timeout=120)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0]
    assert outputs == ["", alone.output]  # either host may have the first rank


def test_each_of_three_hosts_has_a_model_and_a_part_of_the_lines(
    inputs: Path, tmp_path: Path
) -> None:
    (alone,) = run_ranks(1, tmp_path, run_command, batch_words(inputs, tmp_path / "alone"))
    words = [*batch_words(inputs, tmp_path / "all"), "--model_parallel_size=1"]
    with running(3, tmp_path) as hosts:
        ends = hosts.run_ranks(tmp_path, run_command, words)
    assert alone.code == 0
    assert [end.code for end in ends] == [0, 0, 0], ends
    assert (tmp_path / "all").read_bytes() == (tmp_path / "alone").read_bytes()


def test_training_on_two_hosts(hosts: Hosts, inputs: Path, tmp_path: Path) -> None:
    steps = dict(steps=4, checkpoint_every=4)
    ends = run_ranks(2, tmp_path, run_command, train_words(inputs, tmp_path / "one", **steps))
    ends += hosts.run_ranks(tmp_path, run_command, train_words(inputs, tmp_path / "two", **steps))
    assert [end.code for end in ends] == [0] * 4, ends
    assert trained_weights(tmp_path / "one") == trained_weights(tmp_path / "two")


@pytest.mark.slow
def test_torchrun_goes_on_without_a_host_that_is_lost(
    hosts: Hosts, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_TIMEOUT", "10")
    out, steps = tmp_path / "run", 1000
    words = train_words(inputs, out, steps=steps, checkpoint_every=10)
    first, second = torchrun(hosts, words, "--nnodes=1:2", "--max_restarts=1")
    while not run_checkpoints(out):
        assert first.poll() is None
        time.sleep(0.1)
    hosts.lose(1)
    assert run_checkpoints(out)[-1].name != f"step_{steps:08d}"
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0
    assert second.wait() != 0
    assert re.search(rf"Continuing after step \d+ of {out}", output)
    assert run_checkpoints(out)[-1].name == f"step_{steps:08d}"
