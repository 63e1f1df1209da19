"""Sampling: Meta's tokens for Meta's seed, and the distribution that top_p promises."""

import math
from typing import Any

import pytest
import torch

from llama import sampling
from llama.errors import GenerationError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_same_draws_as_meta(oracle: Any, p: float) -> None:
    probs = torch.softmax(3 * torch.randn(50, 300, generator=seeded()), dim=-1)
    torch.manual_seed(7)
    want = oracle.generation.sample_top_p(probs.clone(), p)
    got = sampling.sample_top_p(probs, p, seeded(7))
    assert torch.equal(got, want)


def test_the_probabilities_are_left_alone() -> None:
    probs = torch.softmax(torch.randn(2, 10), dim=-1)
    before = probs.clone()
    sampling.sample_top_p(probs, 0.5)
    assert torch.equal(probs, before)


def test_only_the_nucleus_is_drawn_in_its_proportions() -> None:
    probs = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15]).expand(100_000, 5)
    drawn = sampling.sample_top_p(probs, 0.75, seeded()).flatten()
    counts = torch.bincount(drawn, minlength=5)
    assert counts[[0, 2]].sum() == 0
    # The nucleus is 0.4, 0.3, 0.15: chi-square with two degrees of freedom, 13.8 at p = 0.001.
    want = torch.tensor([0.4, 0.3, 0.15]) / 0.85 * 100_000
    assert ((counts[[1, 3, 4]] - want) ** 2 / want).sum() < 13.8


def test_top_p_zero_and_temperature_zero_take_the_likeliest() -> None:
    logits = torch.randn(20, 100)
    assert torch.equal(sampling.next_token(logits, 0, 0.9), logits.argmax(-1))
    assert torch.equal(sampling.next_token(logits, 0.6, 0.0), logits.argmax(-1))


def test_rows_without_a_generator_use_the_default_one() -> None:
    logits = torch.randn(20, 100)
    torch.manual_seed(3)
    first = sampling.next_token(logits, 1.0, 1.0)
    assert torch.equal(first, sampling.next_token(logits, 1.0, 1.0, seeded(3)))


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf])
def test_temperature_has_limits(temperature: float) -> None:
    with pytest.raises(GenerationError, match="temperature is"):
        sampling.check_sampling(temperature, 0.9)


@pytest.mark.parametrize("top_p", [-0.1, 1.1, math.nan])
def test_top_p_has_limits(top_p: float) -> None:
    with pytest.raises(GenerationError, match="top_p is"):
        sampling.check_sampling(0.6, top_p)
