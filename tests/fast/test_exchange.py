"""Ranks of one machine sum and concatenate tensors as gloo does, and notice a rank that has
ended."""

from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor

from llama import parallel
from llama.errors import ParallelError
from llama.fast.cpu import shared_memory
from llama.fast.cpu.kernels import exchange
from llama.fast.cpu.kernels.exchange import Exchange

# Lengths of the sums, some longer than one message, and shapes of the tensors to join.
LENGTHS = [1, 2048, exchange.MIN_SIZE, 2 * exchange.MIN_SIZE + 7]
SHAPES = [(1, 64), (5, 96), (3, exchange.MIN_SIZE // 2)]


def numbers(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def sum_and_join(has_memory: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    if not has_memory:
        shared_memory._make = lambda n_bytes, key: None  # as if there were no shared memory
    parallel.initialize()
    ours = Exchange(widest=1)
    assert (ours._memory is not None) == has_memory
    rank, sums = parallel.mp_rank(), []
    for _ in range(3):  # repeated, so that memory is written again after it was read
        for length in LENGTHS:
            x = numbers(rank, length)
            ours.sum(x)
            sums.append(x)
    return sums, [ours.join(numbers(rank, *shape)) for shape in SHAPES]


@pytest.mark.parametrize(("ranks", "has_memory"), [(3, True), (2, False)])
def test_sums_and_joins(tmp_path: Path, ranks: int, has_memory: bool) -> None:
    results = run_ranks(ranks, tmp_path, sum_and_join, has_memory)
    for sums, joined in results:
        for length, got in zip(3 * LENGTHS, sums, strict=True):
            torch.testing.assert_close(got, sum(numbers(rank, length) for rank in range(ranks)))
        for shape, got in zip(SHAPES, joined, strict=True):
            assert torch.equal(got, torch.cat([numbers(r, *shape) for r in range(ranks)], 1))
    for sums, _ in results[1:]:
        assert all(
            map(torch.equal, sums, results[0][0])
        )  # equal to the bit, or the ranks' tokens could differ


def wait_for_one_that_ends() -> str:
    parallel.initialize()
    ours = Exchange(widest=1)
    if parallel.mp_rank() == 1:
        return ""
    try:
        while True:  # rank 1 may have written before it ended
            ours.sum(torch.ones(4))
    except ParallelError as error:
        return str(error)


def test_a_rank_that_ends_is_noticed(tmp_path: Path) -> None:
    message, _ = run_ranks(2, tmp_path, wait_for_one_that_ends)
    assert message == "rank 1 ended before the others"


def test_one_rank_alone_shares_nothing() -> None:
    parallel.initialize()
    alone, x = Exchange(widest=1), torch.ones(2, 3)
    assert alone.is_alone
    assert torch.equal(alone.join(x), x)
