"""Process groups: one rank needs none, a dead rank is noticed, and an error names a wrong size."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init
from helpers.ranks import run_ranks

from llama import parallel
from llama.errors import ParallelError
from llama.slow_ranks import SlowRanks


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


ONE_RANK = """
import os
from pathlib import Path
import torch, torch.distributed as dist
from llama import ModelArgs, Transformer

model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=50))
assert model(torch.zeros(1, 3, dtype=torch.long), 0).shape == (1, 3, 50)
assert dist.get_world_size() == 1
own = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
rows = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
addresses = {row.split()[1] for row in rows.splitlines() if f"socket:[{row.split()[9]}]" in own}
loopback = "0100007F:"  # 127.0.0.1, the bytes of the address reversed
print([address for address in addresses if not address.startswith(loopback)])
"""


def test_one_rank_needs_no_environment_stays_on_loopback_and_leaves_quietly() -> None:
    done = run_python(ONE_RANK)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_a_group_that_exists_is_used_as_it_is() -> None:
    code = """
import torch.distributed as dist
from llama import parallel
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.group.WORLD
parallel.initialize()
assert dist.group.WORLD is group
assert (parallel.mp_size(), parallel.mp_rank()) == (1, 0)
assert parallel.is_main_rank()
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def error_in(environment: dict[str, str], size: int | None) -> str:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    os.environ |= environment
    with pytest.raises(ParallelError) as caught:
        parallel.initialize(size)
    return str(caught.value)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK is not set: use torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "3", "RANK": "0"}, "model_parallel_size 2 does not divide the 3"),
    ],
)
def test_a_bad_environment_is_named(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    size = 2 if environment.get("WORLD_SIZE") == "3" else None
    (error,) = run_ranks(1, tmp_path, error_in, environment, size)
    assert message in error


def test_one_process_has_one_size() -> None:
    parallel.initialize()
    parallel.initialize(1)
    with pytest.raises(ParallelError, match="already runs with 1"):
        parallel.initialize(2)


def test_devices() -> None:
    assert parallel.local_device("cpu") == torch.device("cpu")
    with pytest.raises(ParallelError, match="unknown device 'abacus'"):
        parallel.local_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ParallelError, match="no GPU is visible to PyTorch"):
            parallel.local_device("cuda")


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("layers.3.attention.wq.weight", 0),
        ("layers.3.attention.wo.weight", 1),
        ("layers.3.feed_forward.w2.weight", 1),
        ("layers.3.attention.wq.bias", 0),
        ("layers.3.attention.wo.bias", None),
        ("layers.3.attention_norm.weight", None),
        ("norm.weight", None),
        ("output.weight", 0),
        ("tok_embeddings.weight", 1),
    ],
)
def test_shard_dims(name: str, dim: int | None) -> None:
    assert parallel.shard_dim(name, embedding_shard_dim=1) == dim


def groups_on_rank() -> list:
    """With two models of two ranks: the ranks' sizes and numbers, a broadcast, and the timeouts."""
    parallel.initialize(2)
    value = torch.tensor([dist.get_rank()])
    parallel.broadcast_from_first(value)
    waits = [
        group._get_backend(torch.device("cpu")).options._timeout
        for group in (fs_init.get_model_parallel_group(), fs_init.get_data_parallel_group())
    ]
    models = [parallel.dp_size(), parallel.dp_rank()]
    assert SlowRanks().sum(dist.get_rank()) == 6
    is_main = parallel.is_main_rank()
    return [parallel.mp_size(), parallel.mp_rank(), *models, value.item(), is_main, waits]


def test_two_models_of_two_ranks(tmp_path: Path) -> None:
    waits = [timedelta(seconds=120)] * 2
    assert run_ranks(4, tmp_path, groups_on_rank) == [
        [2, 0, 2, 0, 0, True, waits],
        [2, 1, 2, 0, 0, False, waits],
        [2, 0, 2, 1, 2, False, waits],
        [2, 1, 2, 1, 2, False, waits],
    ]


def meet_a_dead_rank(folder: Path) -> None:
    parallel.initialize()
    if dist.get_rank() == 1:
        os._exit(0)  # without closing connections, as after kill -9
    try:
        dist.all_reduce(torch.zeros(1), group=fs_init.get_model_parallel_group())
    except RuntimeError as error:
        (folder / "noticed").write_text(str(error))
    os._exit(0)


def test_a_dead_rank_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # no rank returns a result
        run_ranks(2, tmp_path, meet_a_dead_rank, tmp_path)
    assert "onnection" in (tmp_path / "noticed").read_text()


def fail_on_one_rank() -> str:
    parallel.initialize()
    error = ParallelError("disk on fire") if parallel.mp_rank() == 1 else None
    try:
        parallel.raise_together(error, torch.device("cpu"))
    except ParallelError as caught:
        return str(caught)
    return "went on"


def test_one_failing_rank_stops_all(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, fail_on_one_rank) == ["rank 1: disk on fire", "disk on fire"]


def broadcast_of_all_lengths() -> list[list[int]]:
    parallel.initialize()
    first = parallel.mp_rank() == 0
    return [
        parallel.broadcast_numbers(
            list(range(n)) if first else None, torch.int64, torch.device("cpu")
        )
        for n in (0, 1, parallel.HEAD_LENGTH, parallel.HEAD_LENGTH + 1, 1000)
    ]


def test_numbers_in_one_message_or_two(tmp_path: Path) -> None:
    first, second = run_ranks(2, tmp_path, broadcast_of_all_lengths)
    assert first == second
    assert [len(numbers) for numbers in first] == [0, 1, 63, 64, 1000]
    assert all(numbers == list(range(len(numbers))) for numbers in first)
