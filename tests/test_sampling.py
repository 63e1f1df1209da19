"""Sampling: the same tokens as Meta's code for a seed, the same logits as transformers for other
options, and the distribution that the options define."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama.errors import GenerationError
from llama.sampling import (
    SamplingParams,
    adjust_logits,
    choose,
    distribution,
    logprob_of,
    sample_top_p,
    top_logprobs,
    truncate_logits,
)

GREEDY = SamplingParams(temperature=0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=seeded(seed))


def adjusted(logits: Tensor, generated: Sequence[int] = (), **options: Any) -> Tensor:
    return adjust_logits(logits, SamplingParams(**options), [3, 1, 3], generated)


def theirs(processor: Any, logits: Tensor, tokens: Sequence[int] = (0,)) -> Tensor:
    """The logits (V,) after the processors of transformers."""
    return processor(torch.tensor([list(tokens)]), logits[None].clone())[0]


# ---- top_p ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_same_draws_as_meta(oracle: Any, p: float) -> None:
    probs = torch.softmax(random_logits(50, 300), dim=-1)
    torch.manual_seed(7)
    want = oracle.generation.sample_top_p(probs.clone(), p)
    got = sample_top_p(probs, p, seeded(7))
    assert torch.equal(got, want)


def test_the_probabilities_are_left_alone() -> None:
    probs = torch.softmax(torch.randn(2, 10), dim=-1)
    before = probs.clone()
    sample_top_p(probs, 0.5)
    assert torch.equal(probs, before)


def test_only_the_nucleus_is_drawn_in_its_proportions() -> None:
    probs = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15]).expand(100_000, 5)
    drawn = sample_top_p(probs, 0.75, seeded()).flatten()
    counts = torch.bincount(drawn, minlength=5)
    assert counts[[0, 2]].sum() == 0
    # The nucleus is 0.4, 0.3, 0.15: chi-square with two degrees of freedom, 13.8 at p = 0.001.
    want = torch.tensor([0.4, 0.3, 0.15]) / 0.85 * 100_000
    assert ((counts[[1, 3, 4]] - want) ** 2 / want).sum() < 13.8


@pytest.mark.parametrize("seed", range(5))
def test_the_nucleus_is_that_of_transformers(seed: int) -> None:
    logits = torch.randn(20, generator=seeded(seed))
    kept = theirs(TopPLogitsWarper(0.8), logits).isfinite()
    drawn = sample_top_p(logits.softmax(-1).expand(20_000, 20), 0.8, seeded()).unique()
    assert torch.equal(drawn, kept.nonzero().flatten())


def in_bfloat16(logits: Tensor) -> Tensor:
    """Logits with few different values, so that many tokens tie."""
    return logits.bfloat16().float()


@pytest.mark.parametrize(
    ("logits", "draws"),
    [
        (random_logits(1000), 200),
        (in_bfloat16(random_logits(1000)), 200),
        (random_logits(1000) / 10, 200),
        (in_bfloat16(random_logits(1000) / 10), 200),
        (2 * random_logits(1000), 200),
        (in_bfloat16(2 * random_logits(1000)), 200),
        (in_bfloat16(10 * random_logits(1000)), 200),
        (torch.zeros(1000), 200),
        (torch.zeros(1), 10),
        (torch.tensor([0.0, -math.inf, 0.0, 1.0, -math.inf]), 100),
        (in_bfloat16(random_logits(128_256)), 3),
    ],
)
@pytest.mark.parametrize("top_p", [0, 1e-6, 0.3, 0.5, 0.9, 0.99, 0.999999, 1 - 1e-12, 1])
def test_choose_skips_the_full_sort_and_draws_the_same(
    logits: Tensor, draws: int, top_p: float
) -> None:
    params = SamplingParams(temperature=0.8, top_p=top_p)
    probs = torch.softmax(logits / 0.8, dim=-1)
    ours, plain = seeded(), seeded()
    got = [choose(logits, params, [], [], ours).item() for _ in range(draws)]
    want = [sample_top_p(probs, top_p, plain).item() for _ in range(draws)]
    assert got == want
    assert torch.equal(ours.get_state(), plain.get_state())


def test_choose_draws_the_same_for_many_rows() -> None:
    params = SamplingParams(temperature=1, top_p=0.95)
    rows = in_bfloat16(2 * random_logits(2000, 300))
    ours, plain = seeded(), seeded()
    for row in rows:
        want = sample_top_p(row.softmax(-1), 0.95, plain)[0]
        assert torch.equal(choose(row, params, [], [], ours), want)


@pytest.mark.parametrize(
    "options", [dict(top_p=1.0), dict(top_p=0.3), dict(top_p=0.0), dict(top_k=7), dict(min_p=0.1)]
)
def test_distribution_is_what_choose_draws_from(options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=1.5, logit_bias={3: 1.0}, **options)
    logits = random_logits(500)
    probs = distribution(logits, params, [], [])
    scaled = adjust_logits(logits, params, [], []) / params.temperature
    want, order = truncate_logits(scaled, params).softmax(-1).sort(descending=True)
    want[want.cumsum(-1) - want > params.top_p] = 0
    assert torch.allclose(probs[order], want / want.sum(), atol=1e-6)
    generator = seeded()
    drawn = [choose(logits, params, [], [], generator).item() for _ in range(50)]
    assert (probs[drawn] > 0).all()


def test_choose_takes_the_likeliest_at_temperature_or_top_p_zero() -> None:
    for row in random_logits(20, 100):
        assert torch.equal(choose(row, GREEDY, [], []), row.argmax())
        assert torch.equal(choose(row, SamplingParams(top_p=0), [], []), row.argmax())


def test_choose_without_a_generator_uses_the_default_one() -> None:
    logits = random_logits(100)
    params = SamplingParams(temperature=1, top_p=1)
    torch.manual_seed(3)
    first = choose(logits, params, [], [])
    assert torch.equal(first, choose(logits, params, [], [], seeded(3)))


# ---- the other options ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 10, 99, 100, 1000])
def test_top_k_is_that_of_transformers(k: int) -> None:
    for logits in (random_logits(100), in_bfloat16(random_logits(100) / 10).round(decimals=1)):
        got = truncate_logits(logits, SamplingParams(top_k=k))
        assert torch.equal(got, theirs(TopKLogitsWarper(k), logits))


@pytest.mark.parametrize("min_p", [1e-6, 0.01, 0.1, 0.5, 1.0])
def test_min_p_is_that_of_transformers(min_p: float) -> None:
    for seed in range(20):
        logits = random_logits(100, seed=seed)
        got = truncate_logits(logits, SamplingParams(min_p=min_p))
        assert torch.equal(got, theirs(MinPLogitsWarper(min_p), logits))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = random_logits(20)
    want = theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, [3, 1, 3, 5, 5, 12])
    assert torch.equal(adjusted(logits, [5, 5, 12], repetition_penalty=penalty), want)


def test_logit_bias_is_that_of_transformers() -> None:
    bias = {3: 2.5, 7: -100.0, 0: -math.inf}
    logits = random_logits(20)
    want = theirs(SequenceBiasLogitsProcessor([[[i], b] for i, b in bias.items()]), logits)
    assert torch.equal(adjusted(logits, logit_bias=bias), want)


def test_presence_and_frequency_penalties_count_what_was_generated() -> None:
    logits = random_logits(20)
    got = adjusted(logits, [5, 12, 5, 5], presence_penalty=0.5, frequency_penalty=0.25)
    want = logits.clone()
    want[5] -= 0.5 + 3 * 0.25
    want[12] -= 0.5 + 0.25
    assert torch.equal(got, want)
    assert torch.equal(adjusted(logits, presence_penalty=0.5, frequency_penalty=0.25), logits)


def test_the_caller_s_function_sees_all_tokens_and_the_penalised_logits() -> None:
    logits = random_logits(20)
    before = logits.clone()

    def only_four(tokens: Sequence[int], logits: Tensor) -> Tensor:
        assert list(tokens) == [3, 1, 3, 5]
        assert logits[5] == before[5] - 1 + 2
        logits[:4] = logits[5:] = -math.inf
        return logits

    params = SamplingParams(presence_penalty=1, logit_bias={5: 2}, logits_processor=only_four)
    assert choose(logits, params, [3, 1, 3], [5]).item() == 4
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("result", "name"),
    [(None, "NoneType"), ([0.0] * 20, "list"), (torch.zeros(19), r"\[19\]")],
)
def test_the_caller_s_function_must_give_logits(result: Any, name: str) -> None:
    params = SamplingParams(logits_processor=lambda tokens, logits: result)
    with pytest.raises(GenerationError, match=f"returned {name}: it must be a tensor of 20 logits"):
        choose(random_logits(20), params, [1], [])


def test_all_options_together_draw_in_the_proportions_of_transformers() -> None:
    logits = torch.randn(30, generator=seeded(4))
    params = SamplingParams(temperature=1.5, top_k=20, min_p=0.1, top_p=0.9)
    chain = [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), MinPLogitsWarper(0.1)]
    probs = theirs(LogitsProcessorList([*chain, TopPLogitsWarper(0.9)]), logits).softmax(-1)
    generator = seeded()
    drawn = torch.stack([choose(logits, params, [], [], generator) for _ in range(10_000)])
    counts = torch.bincount(drawn, minlength=30)
    assert counts[probs == 0].sum() == 0
    counts, want = counts[probs > 0], probs[probs > 0] * 10_000
    assert len(counts) == 16  # chi-square with 15 degrees of freedom: 37.7 at p = 0.001
    assert ((counts - want) ** 2 / want).sum() < 37.7


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=3, min_p=0.1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_must_be_finite(params: SamplingParams, bad: float) -> None:
    logits = random_logits(20)
    logits[7] = bad
    for row in (logits, torch.full((20,), -math.inf)):
        with pytest.raises(GenerationError, match="logits of the next token are not finite"):
            choose(row, params, [1], [])


# ---- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_the_model_s_own() -> None:
    logits = random_logits(5, 20)
    want = logits.double().softmax(-1).log().float()
    tokens = torch.tensor([0, 19, 3, 3, 7])
    torch.testing.assert_close(logprob_of(logits, tokens), want[range(5), tokens])
    torch.testing.assert_close(logprob_of(logits[1], 19), want[1, 19])


def test_top_logprobs_are_the_likeliest_first() -> None:
    logits = torch.tensor([0.5, 0.125, 0.25, 0.125]).log()
    pairs = top_logprobs(logits, 2)
    assert [token for token, _ in pairs] == [0, 2]
    assert [math.exp(logprob) for _, logprob in pairs] == pytest.approx([0.5, 0.25])
    assert top_logprobs(logits, 0) == []


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, 10**400, "1", None, True]),
        ("top_p", [-0.1, 1.1, math.nan, "1", False]),
        ("top_k", [-1, 1.5, True, None]),
        ("min_p", [-0.1, 1.1, math.nan, None]),
        ("repetition_penalty", [0, -1, math.nan, math.inf, "1"]),
        ("presence_penalty", [math.nan, -math.inf, None, True]),
        ("frequency_penalty", [math.nan, math.inf, "0"]),
        ("logit_bias", [None, [(1, 2.0)], {"1": 1.0}, {-1: 1.0}, {True: 1.0}, {1: math.nan}]),
        ("logit_bias", [{1: math.inf}, {1: "2"}, {1.0: 2.0}]),
        ("seed", [-1, 2**63, 1.0, True, "1"]),
        ("max_gen_len", [-1, 2.0, True]),
        ("stop", ["end", b"end", [""], [1], {"end"}, None, ["a"] * 17]),
        ("stop_tokens", [5, [-1], ["a"], [True], "ab"]),
        ("ignore_eos", [1, None]),
        ("logprobs", [-1, True, 1.0]),
        ("prompt_logprobs", [1, None]),
        ("n", [0, 1.0, True, None]),
        ("logits_processor", ["f", 1]),
    ],
)
def test_every_value_has_limits(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(GenerationError, match=f"^{name} is .+$"):
            SamplingParams(**{name: value})


def test_the_ends_of_the_ranges_are_valid() -> None:
    SamplingParams(temperature=0, top_p=0, min_p=0, seed=0, max_gen_len=0, logprobs=0)
    SamplingParams(temperature=1e9, top_p=1, min_p=1, seed=2**63 - 1, stop=["a"] * 16)
    SamplingParams(logit_bias={0: -math.inf, 1: 3}, stop_tokens={1, 2}, stop=("a",))


def test_a_bare_stop_string_asks_for_a_list() -> None:
    with pytest.raises(GenerationError, match="stop is one string, 'end': give a list of strings"):
        SamplingParams(stop="end")


def test_a_long_value_is_shown_in_short() -> None:
    with pytest.raises(GenerationError) as caught:
        SamplingParams(stop_tokens=[-1] * 100_000)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(logit_bias={10: 1.0}), "logit_bias has token id 10, but vocab_size is 10"),
        (dict(stop_tokens=[3, 12]), "stop_tokens has token id 12, but vocab_size is 10"),
        (dict(logprobs=11), "logprobs is 11, but vocab_size is 10"),
    ],
)
def test_ids_are_in_the_vocabulary(options: dict[str, Any], message: str) -> None:
    params = SamplingParams(**options)
    params.check_vocabulary(13)
    with pytest.raises(GenerationError, match=message):
        params.check_vocabulary(10)
