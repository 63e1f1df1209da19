"""What docs/scale.md says that ranks send is what they send."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scale
import torch
from helpers.ranks import run_ranks
from scale import Exchange, exchanges, messages, sent_bytes

from llama import ModelArgs, Transformer
from llama.engine.engine import Engine
from llama.engine.runner import Runner
from llama.sampling import SamplingParams

RANKS = 2
PROMPT = [1, 2, 3, 4, 5]


def collectives_on_rank(args: ModelArgs) -> list[Exchange]:
    """The collectives of a prefill and of a decode step."""
    engine = Engine(Transformer(args), 1, 32)
    found = []

    def recording(kind: str, numbers: Callable[..., int]) -> None:
        called = getattr(torch.distributed, kind.replace("-", "_"))

        def record(*values: Any, **options: Any) -> Any:
            found.append(Exchange(kind, numbers(values[0])))
            return called(*values, **options)

        setattr(torch.distributed, kind.replace("-", "_"), record)

    recording("broadcast", lambda tensor: 0)
    recording("all-reduce", torch.Tensor.numel)
    recording("all-gather", lambda parts: sum(part.numel() for part in parts))
    runner = Runner(engine, seed=1, is_reference=False)
    runner.complete([PROMPT], SamplingParams(temperature=0, max_gen_len=2))
    return found


@pytest.mark.parametrize("embedding_shard_dim", [0, 1])
def test_the_exchanges_of_a_token_are_those_of_a_run(
    embedding_shard_dim: int, tmp_path: Path
) -> None:
    args = ModelArgs(
        dim=32, n_layers=3, n_heads=4, vocab_size=50, hidden_dim=64, max_seq_len=32,
        embedding_shard_dim=embedding_shard_dim,
    )  # fmt: skip
    expected = exchanges(args, len(PROMPT)) + exchanges(args)
    for found in run_ranks(RANKS, tmp_path, collectives_on_rank, args):
        assert found[: len(expected)] == expected
        # The rest says that the call has ended, and what it returns.
        assert {one.kind for one in found[len(expected) :]} <= {"broadcast"}


def test_a_ring() -> None:
    """An all-reduce passes each of n parts around twice, less one time each; an all-gather once."""
    one = Exchange("all-reduce", 1000)
    assert [messages(one, n) for n in (1, 2, 4, 16)] == [0, 2, 6, 30]
    assert [sent_bytes(one, n) for n in (1, 2, 4)] == [0, 2000, 3000]
    assert sent_bytes(Exchange("all-gather", 1000), 4) == 1500
    assert [messages(Exchange("broadcast", 0), n) for n in (1, 2, 8)] == [0, 1, 3]


def test_the_page_has_the_tables_of_the_figures() -> None:
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.written(page) == page
