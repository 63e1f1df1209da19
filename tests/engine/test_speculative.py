"""Speculation: proposals change the speed, not the tokens, and are made only if they save time."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import make_sharp_model
from helpers.ranks import run_ranks
from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.checkpoints.folder import BUNDLED
from llama.engine.engine import Engine
from llama.engine.request import Event, Request
from llama.engine.speculative import MAX_PROPOSALS, NGRAM, Lookup, Proposals, StepTimes, best_length
from llama.errors import ConfigError
from llama.sampling import SamplingParams, truncate_logits

VOCAB = len(demo_pieces()) + 256
MAX_SEQ_LEN = 96
SHAPE: dict[str, Any] = dict(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=32, norm_eps=1e-5
)
PROPOSERS = ["lookup", "draft"]


def make_model(noise: float = 0.0, **changes: Any) -> Transformer:
    """A model whose likeliest token has a clear lead. With noise, a model that often agrees
    with it."""
    model = make_sharp_model(**SHAPE | changes, max_seq_len=MAX_SEQ_LEN)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape)
    return model


def make_engine(proposer: str | None, n_slots: int = 8, **options: Any) -> Engine:
    options |= dict(lookup=True) if proposer == "lookup" else {}
    options |= dict(draft=make_model(noise=0.2)) if proposer == "draft" else {}
    return Engine(make_model(), n_slots, MAX_SEQ_LEN, **options)


def propose(monkeypatch: pytest.MonkeyPatch, length: int | None = None) -> None:
    """Make the engine propose `length` tokens in every step; None: a random number in each step."""
    numbers = random.Random(0)

    def chosen(rates: Any, limits: Sequence[int], seconds: Any) -> int:
        wanted = numbers.randrange(MAX_PROPOSALS + 1) if length is None else length
        return min(wanted, max(limits))

    monkeypatch.setattr("llama.engine.proposer.best_length", chosen)


def drain(engine: Engine) -> list[Event]:
    events = []
    while engine.has_work:
        events += engine.step()
    return events


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    write_tokenizer(tmp_path / "tokenizer.model", demo_pieces())
    return Tokenizer(tmp_path / "tokenizer.model")


# ---- the same tokens --------------------------------------------------------------------------


def many(n: int, sampled: bool) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Prompts of many lengths, with and without repetitions, and all kinds of options."""
    numbers = random.Random(0)
    prompts, options = [], []
    few = dict.fromkeys(range(5), 40.0)  # few tokens in prompts and texts, so that they repeat
    kinds: list[dict[str, Any]] = [
        dict(temperature=0),
        dict(temperature=0.9, top_k=50, logit_bias=few),
        dict(temperature=0, logit_bias=few),
        dict(temperature=0, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=3),
        dict(temperature=0.7, min_p=0.05, presence_penalty=0.5, logit_bias=few, logprobs=1),
        dict(temperature=0, logits_processor=lambda tokens, logits: logits.roll(len(tokens) % 3)),
    ]
    for i in range(n):
        part = [numbers.randrange(5) for _ in range(numbers.randint(1, 30))]
        prompts.append((part * numbers.randint(1, 12))[:60])
        options.append(kinds[i % len(kinds)] | dict(seed=i, max_gen_len=1 + 5 * i % 36))
        options[-1] |= {} if sampled else dict(temperature=0)
    return prompts, options


def run_many(proposer: str | None, sampled: bool, n: int = 40) -> list[Any]:
    """The results of requests that are submitted at random steps, some of which are cancelled."""
    engine = make_engine(proposer, n_slots=5, prefill_chunk=24)
    numbers = random.Random(3)
    requests: list[Request] = []
    prompts, options = many(n, sampled)
    left = list(zip(prompts, options, strict=True))
    while left or engine.has_work:
        for _ in range(min(len(left), numbers.choice([0, 0, 1, 2, 5]))):
            prompt, option = left.pop(0)
            requests.append(engine.submit(prompt, SamplingParams(**option)))
            if len(requests) % 7 == 0:
                spoiled = engine.submit(prompt[::-1], SamplingParams(temperature=1.0, seed=1))
                for _ in range(3):
                    engine.step()
                engine.cancel(spoiled)
        engine.step()
    n_proposed = sum(request.proposed for request in requests)
    n_accepted = sum(request.accepted for request in requests)
    assert 0 < n_accepted < n_proposed or proposer is None
    return [(r.tokens, r.finish_reason, r.logprobs, r.top_logprobs) for r in requests]


def check_same(results: list[Any], plain: list[Any]) -> None:
    for (tokens, reason, *scores), (want, why, *others) in zip(results, plain, strict=True):
        assert (tokens, reason) == (want, why)
        assert scores[0] == pytest.approx(others[0], abs=1e-5)
        for got, other in zip(scores[1], others[1], strict=True):
            assert [token for token, _ in got] == [token for token, _ in other]


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Any]]:
    """The expected results for each proposer. With a draft model only greedy results are expected,
    because its proposals use random numbers."""
    return {"lookup": run_many(None, sampled=True), "draft": run_many(None, sampled=False)}


@pytest.mark.parametrize("length", [1, 4, MAX_PROPOSALS, None])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_tokens_are_those_of_plain_decoding(
    monkeypatch: pytest.MonkeyPatch, plain: dict[str, list[Any]], proposer: str, length: int | None
) -> None:
    """In a batch, with penalties, bias and processors. With lookup also for sampling with a
    seed."""
    propose(monkeypatch, length)
    check_same(run_many(proposer, sampled=proposer == "lookup"), plain[proposer])


def run_on_rank(proposer: str) -> Any:
    from llama import parallel

    parallel.initialize()
    if parallel.mp_rank() > 0:
        make_engine(proposer, n_slots=5).follow()
        return None
    with pytest.MonkeyPatch.context() as monkeypatch:
        propose(monkeypatch)
        try:
            return [result[:3] for result in run_many(proposer, proposer == "lookup", n=20)]
        finally:
            make_engine(None, 1).dismiss()


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_two_ranks(tmp_path: Path, plain: dict[str, list[Any]], proposer: str) -> None:
    results = run_ranks(2, tmp_path, run_on_rank, proposer)[0]
    for (tokens, reason, logprobs), (want, why, others, _) in zip(
        results, plain[proposer], strict=False
    ):
        assert (tokens, reason) == (want, why)
        assert logprobs == pytest.approx(others, abs=1e-5)


@pytest.mark.parametrize("options", [dict(lookup=True), dict(draft=BUNDLED)])
def test_fast_mode(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """The bundled model in float32, with the kernels for few rows."""
    texts = ["Once upon a time", "The king said: no, no, no, no,", "The cat sat. The cat sat. The"]
    how: dict[str, Any] = dict(max_gen_len=40, ignore_eos=True)
    plain = Llama.build(mode="fast", max_seq_len=128)
    one, two = plain, Llama.build(mode="fast", max_seq_len=128, **options)
    propose(monkeypatch)
    for prompts in (texts, texts[:1], texts[2:]):
        sampled = [dict(temperature=0.8, seed=5)] if "lookup" in options else []
        for more in (dict(temperature=0), *sampled):
            want = one.text_completion(prompts, **how, **more)
            assert two.text_completion(prompts, **how, **more) == want
    params = SamplingParams(temperature=0, **how)
    (request,) = two.runner.complete([two.encode_prompt(texts[2])], params)
    assert request.accepted > 0


def test_a_processor_is_called_once_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    propose(monkeypatch)
    for proposer in (None, *PROPOSERS):
        calls = []

        def noted(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
            calls.append(list(tokens))  # noqa: B023
            return logits

        params = SamplingParams(temperature=0, max_gen_len=20, logits_processor=noted)
        engine = make_engine(proposer)
        request = engine.submit([5, 6, 7] * 4, params)
        drain(engine)
        assert calls == [request.prompt_tokens + request.tokens[:n] for n in range(20)]


# ---- the same distribution --------------------------------------------------------------------


def exact_distribution(
    model: Transformer, prompt: list[int], params: SamplingParams, n: int
) -> Any:
    """The probability of every continuation of n tokens, computed from the definition of the
    options."""

    @torch.no_grad()
    def following(tokens: list[int]) -> list[float]:
        logits = model(torch.tensor([tokens]))[0, -1] / params.temperature
        probs, order = truncate_logits(logits, params).softmax(-1).sort(descending=True)
        probs[probs.cumsum(-1) - probs > params.top_p] = 0
        return (probs / probs.sum())[order.argsort()].tolist()

    found = {(): 1.0}
    for _ in range(n):
        found = {
            (*tokens, token): p * q
            for tokens, p in found.items()
            for token, q in enumerate(following([*prompt, *tokens]))
            if q > 0
        }
    return found


@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("options", [dict(top_p=1.0), dict(top_p=0.8, top_k=4)])
def test_samples_have_the_models_distribution(
    monkeypatch: pytest.MonkeyPatch, proposer: str, options: dict[str, Any]
) -> None:
    """A chi-square test of sequences of three tokens. The first token comes from the prefill."""
    propose(monkeypatch, 2)
    shape = SHAPE | dict(dim=16, n_layers=1, vocab_size=5)
    args = ModelArgs(**shape, max_batch_size=16, max_seq_len=128)
    torch.manual_seed(2)
    model, draft = Transformer(args), Transformer(args)
    with torch.no_grad():
        for one, other in zip(model.parameters(), draft.parameters(), strict=True):
            if one.dim() > 1:
                one *= 20
                other.copy_(one + 5 * other)
    how: Any = dict(lookup=True) if proposer == "lookup" else dict(draft=draft)
    engine = Engine(model, 16, 128, **how)
    numbers = random.Random(0)
    prompt = [numbers.randrange(5) for _ in range(100)]  # most n-grams of five ids occur in it
    n = 800
    params = SamplingParams(temperature=1.2, max_gen_len=4, **options)
    want = exact_distribution(model, prompt, params, 3)
    requests = [engine.submit(prompt, params) for _ in range(n)]
    drain(engine)
    counts = Counter(tuple(request.tokens[:3]) for request in requests)
    assert set(counts) <= set(want)
    share = sum(r.accepted for r in requests) / sum(r.proposed for r in requests)
    assert 0.1 < share < 0.9
    often = {tokens: n * p for tokens, p in want.items() if n * p >= 5}
    groups = [(counts[tokens], expected) for tokens, expected in often.items()]
    rare = n - sum(often.values())
    groups += [(n - sum(counts[t] for t in often), rare)] if rare >= 5 else []
    statistic = sum((count - expected) ** 2 / expected for count, expected in groups)
    degrees = len(groups) - 1
    assert degrees > 10
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


# ---- ends -------------------------------------------------------------------------------------


def looping(engine: Engine, **options: Any) -> Request:
    """A request that generates 5, 6, 7, 5, 6, 7 …, so all proposals of lookup are accepted."""

    def next_of(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        following = {5: 6, 6: 7, 7: 5}[tokens[-1]]
        return torch.full_like(logits, -1e9).index_fill(0, torch.tensor(following), 0.0)

    params = SamplingParams(temperature=0, logits_processor=next_of, **options)
    return engine.submit([5, 6, 7] * 3, params)


def test_a_step_brings_all_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    propose(monkeypatch, 6)
    engine = make_engine("lookup")
    request = looping(engine, max_gen_len=20, logprobs=2)
    engine.step()
    assert len(request.tokens) == 1 + 7  # one from the prefill, six proposals and one after them
    events = engine.step()
    assert [event.token for event in events] == request.tokens[8:15]
    assert all(len(event.top_logprobs or ()) == 2 for event in events)
    drain(engine)
    assert len(request.tokens) == len(request.logprobs) == len(request.top_logprobs) == 20
    assert (request.proposed, request.accepted) == (16, 16)
    assert request.finish_reason == "length"


def test_ends_inside_what_was_proposed(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    """Nothing is generated after a stop token, a stop string or max_gen_len."""
    propose(monkeypatch, 10)
    engine = make_engine("lookup", tokenizer=tokenizer)
    three = tokenizer.decode([5, 6, 7])
    loop: dict[str, Any] = dict(max_gen_len=50, ignore_eos=True)
    by_string = looping(engine, stop=[three[1:] + three[:2]], **loop)
    by_token = looping(engine, **loop | dict(ignore_eos=False, stop_tokens=[7]))
    by_length = looping(engine, **loop | dict(max_gen_len=8))
    events = drain(engine)
    assert by_string.text == three[:1]
    assert by_string.tokens == [5, 6, 7, 5, 6]
    assert by_token.tokens == [5, 6]
    assert by_token.stop_token == 7
    assert by_length.tokens == [5, 6, 7, 5, 6, 7, 5, 6]
    for request in (by_string, by_token, by_length):
        mine = [event for event in events if event.request is request]
        assert [event.token for event in mine if event.token is not None] == request.tokens
        assert "".join(event.text for event in mine) == request.text
        assert [event.finish_reason is None for event in mine] == [True] * (len(mine) - 1) + [False]


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_the_end_of_the_cache(monkeypatch: pytest.MonkeyPatch, proposer: str) -> None:
    """Some rows reach the end of the cache. Others have room, are idle and full, or prefill."""
    propose(monkeypatch, MAX_PROPOSALS)
    prompts = [[5, 6, 7] * 22, [1, 2] * 45, [8, 9, 9] * 30, [3] * 60, [4] * MAX_SEQ_LEN]
    params = SamplingParams(temperature=0, max_gen_len=None)
    plain, engine = (make_engine(p, prefill_chunk=16) for p in (None, proposer))
    runs = [[e.submit(p, params) for p in prompts] for e in (plain, engine)]
    drain(plain)
    drain(engine)
    assert [r.tokens for r in runs[1]] == [r.tokens for r in runs[0]]
    again = [[e.submit(p + [1] * 5, params) for p in prompts[:4]] for e in (plain, engine)]
    drain(plain)
    drain(engine)
    assert [r.tokens for r in again[1]] == [r.tokens for r in again[0]]


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_only_accepted_tokens_are_reused(monkeypatch: pytest.MonkeyPatch, proposer: str) -> None:
    propose(monkeypatch, 5)
    engine, plain = make_engine(proposer, 2), make_engine(None, 2)
    params = SamplingParams(temperature=0, max_gen_len=30)
    first = engine.submit([5, 6, 7] * 6, params)
    for _ in range(3):  # other requests reuse the row while it decodes
        engine.step()
    assert engine._slots[0].tokens == (first.prompt_tokens + first.tokens)[:-1]
    for prompt in (first.prompt_tokens + first.tokens[:3] + [9], first.prompt_tokens):
        got, want = engine.submit(prompt, params), plain.submit(prompt, params)
        drain(engine)
        drain(plain)
        assert got.tokens == want.tokens
    assert engine._slots[0].tokens == (first.prompt_tokens + first.tokens)[:-1]
    turn = [*first.prompt_tokens, *first.tokens, 1, 2, 3]
    got, want = engine.submit(turn, params), plain.submit(turn, params)
    drain(engine)
    drain(plain)
    assert got.tokens == want.tokens


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_an_interrupted_step_is_made_up_for(monkeypatch: pytest.MonkeyPatch, proposer: str) -> None:
    propose(monkeypatch, 5)
    params = SamplingParams(temperature=0, max_gen_len=30)
    calls = []

    def interrupted(_: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return logits

    engine, plain = make_engine(proposer), make_engine(None)
    prompt = [5, 6, 7] * 5
    request, want = engine.submit(prompt, params), plain.submit(prompt, params)
    other = engine.submit(prompt, SamplingParams(temperature=0, logits_processor=interrupted))
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    engine.cancel(other)
    drain(engine)
    drain(plain)
    assert request.tokens == want.tokens


def test_exact_requests_are_metas_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    propose(monkeypatch, 5)
    params = SamplingParams(temperature=0, max_gen_len=20)
    engine, plain = make_engine("lookup"), make_engine(None)
    requests = [e.submit([5, 6, 7] * 4, params, is_exact=True) for e in (engine, plain)]
    drain(engine)
    drain(plain)
    assert requests[0].logprobs == requests[1].logprobs
    assert requests[0].proposed == 0


def test_a_failing_processor_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    propose(monkeypatch, 5)

    def raises(tokens: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        if len(tokens) > 13:
            raise KeyError("mine")
        return logits

    engine, plain = make_engine("lookup"), make_engine(None)
    params = SamplingParams(temperature=0, max_gen_len=20)
    requests = [e.submit([5, 6, 7] * 4, params) for e in (engine, plain)]
    bad = engine.submit([5, 6, 7] * 4, SamplingParams(temperature=0, logits_processor=raises))
    drain(engine)
    drain(plain)
    assert bad.finish_reason == "error"
    assert len(bad.tokens) == 2
    assert requests[0].tokens == requests[1].tokens


# ---- what is proposed, and how much -----------------------------------------------------------


def test_lookup_finds_the_last_place() -> None:
    numbers = random.Random(0)
    lookup, text = Lookup(), []
    for _ in range(300):
        new = [numbers.randrange(3) for _ in range(numbers.randrange(4))]
        lookup.extend(new)
        text += new
        places = [i for i in range(NGRAM, len(text)) if text[i - NGRAM : i] == text[-NGRAM:]]
        want = []
        if places:
            want = text[places[-1] :]
            while len(want) < 9:
                want = want + text[places[-1] :]
        assert lookup.propose(9) == want[:9]


@pytest.mark.parametrize(
    ("rates", "limits", "seconds", "length"),
    [
        ([1.0], [8], lambda n: 1.0, 8),
        ([0.0], [8], lambda n: 1.0, 0),
        ([1.0], [8], lambda n: 1.0 + n, 0),  # a proposal costs as much as a step
        ([1.0], [8], lambda n: 1.0 if n < 4 else 9.0, 3),
        ([0.9, 0.9], [2, 7], lambda n: 1.0, 7),
        (
            [0.9, 0.0],
            [7, 7],
            lambda n: 1.0 + n / 2,
            0,
        ),  # the padding of the second row costs more than is gained
        ([0.5], [0], lambda n: 1.0, 0),
    ],
)
def test_as_many_are_proposed_as_pay(
    rates: list[float], limits: list[int], seconds: Callable[[int], float], length: int
) -> None:
    assert best_length(rates, limits, seconds) == length


def steps_with_proposals(is_right: bool, n_steps: int = 500) -> int:
    """The number of steps with proposals, if each costs a fifth of a step, and all or none are
    right."""
    proposals, tokens, count = Proposals(), [0], 0
    proposals.review(tokens)
    for _ in range(n_steps):
        length = best_length([proposals.rate], [8], lambda n: 1 + n / 5)
        proposals.tokens = [1] * length
        count += length > 0
        tokens += [1] * (length + 1) if is_right else [2]
        proposals.review(tokens)
    return count


def test_wrong_proposals_are_seldom_tried_again() -> None:
    assert steps_with_proposals(is_right=True) == 500
    assert 3 < steps_with_proposals(is_right=False) < 40


def test_times_are_the_medians_of_the_last() -> None:
    times = StepTimes()
    for seconds in (0.5, 0.2):
        times.add(1, 0, seconds)
        assert times.seconds(1, 0) == times.seconds(1, 4) == 0.0  # too few measurements
    times.add(1, 0, 0.3)
    assert times.seconds(1, 0) == 0.3
    assert times.seconds(2, 0) == 0.0
    expected = times.seconds(1, 4)
    assert 0.3 < expected < 4 * 0.3
    times.add(1, 4, 60.0)  # the first measurement of a kind does not count
    assert times.seconds(1, 4) == expected
    for _ in range(times.FEW):
        times.add(1, 4, 0.7)
    assert times.seconds(1, 4) == 0.7
    assert times.seconds(1, 2) == pytest.approx(0.5)  # interpolated between 0 and 4
    for _ in range(times.AGE + 1):
        times.add(1, 0, 0.3)
    assert times.seconds(1, 4) == expected  # the old measurements are dropped


def test_plain_steps_are_timed_before_proposals() -> None:
    assert best_length([1.0], [8], lambda n: 0.0) == 0


def test_a_draft_model_rests_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model that saves no time is seldom tried. It is used again when it does."""
    lengths: list[int] = []
    pays = False

    def chosen(rates: Any, limits: Sequence[int], seconds: Any) -> int:
        lengths.append(min(int(pays), max(limits)))
        return lengths[-1]

    monkeypatch.setattr("llama.engine.proposer.best_length", chosen)
    engine = make_engine("draft")

    def run() -> Request:
        lengths.clear()
        request = engine.submit([5, 6, 7] * 4, SamplingParams(temperature=0, max_gen_len=80))
        drain(engine)
        return request

    assert run().proposed == 0
    assert len(lengths) < 8
    assert run().proposed == 0
    assert len(lengths) < 3
    pays = True
    assert sum(run().proposed for _ in range(4)) > 80


# ---- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(lookup=True), "draft and lookup are for mode fast, but mode is reference"),
        (dict(draft=BUNDLED), "draft and lookup are for mode fast, but mode is reference"),
        (dict(mode="fast", draft=BUNDLED, lookup=True), "exclude each other"),
        (dict(mode="fast", draft="nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Llama.build(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=VOCAB + 64), f"vocab_size is {VOCAB + 64}, the model's 6400"),
        (
            dict(vocab_size=6400, context_length=200),
            "max_seq_len 1024 is above the model's context, 200",
        ),
        (dict(vocab_size=6400), "its tokenizer is not the model's"),
    ],
)
def test_a_draft_model_that_does_not_fit(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    make_checkpoint(tmp_path / "draft", SHAPE | changes)
    write_tokenizer(tmp_path / "draft" / "tokenizer.model", demo_pieces())
    with pytest.raises(ConfigError, match=rf"draft model .*{message}"):
        Llama.build(mode="fast", draft=tmp_path / "draft")


def test_a_draft_model_has_the_models_vocabulary_and_length() -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="vocab_size is 100, the model's"):
        Engine(model, 1, MAX_SEQ_LEN, draft=make_model(vocab_size=100))
