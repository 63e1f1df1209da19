"""The engine: a row's tokens do not depend on other rows, chunks, prefix reuse or ranks."""

import gc
import random
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import MAX_SEQ_LEN, SHAPE, VOCAB, make_model
from helpers.ranks import run_ranks
from make_checkpoint import demo_pieces, write_tokenizer

from llama import ModelArgs, Tokenizer, Transformer
from llama.engine.engine import Engine
from llama.engine.request import Event, Request
from llama.errors import GenerationError
from llama.sampling import SamplingParams


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path, demo_pieces())
    return Tokenizer(path)


def random_prompts(n: int, longest: int = 60, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    lengths = [numbers.randint(1, longest) for _ in range(n)]
    return [[numbers.randrange(256) for _ in range(length)] for length in lengths]


def drain(engine: Engine) -> list[Event]:
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def run_alone(model: Transformer, prompt: list[int], params: SamplingParams) -> Request:
    engine = Engine(model, 1, MAX_SEQ_LEN)
    request = engine.submit(prompt, params)
    drain(engine)
    return request


def result_of(request: Request) -> tuple[list[int], list[float], str | None]:
    return request.tokens, request.logprobs, request.finish_reason


# ---- rows and their neighbours ----------------------------------------------------------------


def run_many(prompts: list[list[int]], options: list[dict[str, Any]]) -> list[Any]:
    """The results of requests that are submitted at random steps, between others that are
    cancelled."""
    model = make_model()
    engine = Engine(model, 8, MAX_SEQ_LEN, prefill_chunk=24)
    numbers = random.Random(3)
    requests = []
    left = list(zip(prompts, options, strict=True))
    while left or engine.has_work:
        for _ in range(min(len(left), numbers.choice([0, 0, 1, 2, 5]))):
            prompt, option = left.pop(0)
            requests.append(engine.submit(prompt, SamplingParams(**option)))
            if len(requests) % 13 == 0:  # this request is cancelled after three steps
                spoiled = engine.submit(prompt[::-1], SamplingParams(temperature=1.0, seed=1))
                for _ in range(3):
                    engine.step()
                engine.cancel(spoiled)
        engine.step()
    return [result_of(request) for request in requests]


def run_many_on_rank(prompts: list[list[int]], options: list[dict[str, Any]]) -> Any:
    from llama import parallel

    parallel.initialize()
    if parallel.mp_rank() > 0:
        Engine(make_model(), 8, MAX_SEQ_LEN).follow()
        return None
    model = make_model()
    results = None
    try:
        results = run_many(prompts, options)
    finally:
        Engine(model, 1, MAX_SEQ_LEN).dismiss()
    return results


def many() -> tuple[list[list[int]], list[dict[str, Any]]]:
    """More than two hundred prompts. Some have a common prefix. Half are greedy, half are
    sampled."""
    prompts = random_prompts(180)
    prompts += [prompts[0][:1] * 20 + prompt[:30] for prompt in prompts[:40]]
    random.Random(5).shuffle(prompts)
    options: list[dict[str, Any]] = []
    for i in range(len(prompts)):
        how = dict(temperature=0) if i % 2 else dict(temperature=0.9, seed=i)
        options.append(how | dict(max_gen_len=1 + i % 12))
    return prompts, options


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_row_in_company_is_the_row_alone(
    model: Transformer, tmp_path: Path, n_ranks: int
) -> None:
    prompts, options = many()
    if n_ranks == 1:
        results = run_many(prompts, options)
    else:
        results = run_ranks(n_ranks, tmp_path, run_many_on_rank, prompts, options)[0]
    for prompt, option, (tokens, logprobs, reason) in zip(prompts, options, results, strict=True):
        alone = run_alone(model, prompt, SamplingParams(**option))
        assert tokens == alone.tokens
        assert logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        assert reason == alone.finish_reason == "length"


def test_a_request_without_a_seed_has_random_numbers_of_its_own(model: Transformer) -> None:
    """They depend only on the engine's seed and the number of the request."""
    prompts = random_prompts(6, longest=20)
    params = SamplingParams(temperature=1.0, max_gen_len=10)

    def run(n_slots: int, seed: int) -> list[list[int]]:
        engine = Engine(model, n_slots, MAX_SEQ_LEN, seed=seed)
        requests = [engine.submit(prompt, params) for prompt in prompts]
        drain(engine)
        return [request.tokens for request in requests]

    assert run(1, seed=1) == run(4, seed=1) != run(4, seed=2)
    engine = Engine(model, 2, MAX_SEQ_LEN)
    same = [engine.submit(prompts[0], params) for _ in range(2)]
    drain(engine)
    assert same[0].tokens != same[1].tokens


def test_rows_in_use_lie_together(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight requests at a time on 32 slots never make a step of more than eight rows, although the
    least recently used slots lie at both ends after the first request."""
    engine = Engine(model, 32, MAX_SEQ_LEN)
    n_rows = []
    run = engine.worker.run

    def spy(plan: Any) -> Any:
        n_rows.append(len(plan.tokens))
        return run(plan)

    monkeypatch.setattr(engine.worker, "run", spy)
    params = SamplingParams(temperature=0, max_gen_len=4)
    for seed, n_requests in enumerate((1, 8, 8, 8, 8)):
        for prompt in random_prompts(n_requests, seed=seed):  # no prefix is reused
            engine.submit(prompt, params)
        drain(engine)
    assert max(n_rows) == 8


# ---- chunks and reuse -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_chunks_change_nothing(model: Transformer, chunk: int) -> None:
    prompt = random_prompts(2, seed=2)[0] * 80
    prompt = prompt[:80]
    params = SamplingParams(temperature=0, max_gen_len=10, prompt_logprobs=True)
    engine = Engine(model, 2, MAX_SEQ_LEN, prefill_chunk=chunk)
    request = engine.submit(prompt, params)
    drain(engine)
    whole = model(torch.tensor([prompt + request.tokens]))[0].log_softmax(-1)
    ids = torch.tensor(prompt + request.tokens)
    want = whole[:-1].gather(-1, ids[1:, None]).flatten()
    got = torch.tensor(request.prompt_logprobs[1:] + request.logprobs)
    assert torch.allclose(got, want, atol=1e-5)
    assert request.prompt_logprobs[0] == 0.0
    assert request.tokens == whole[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_a_long_prompt_does_not_stall_the_others(model: Transformer) -> None:
    engine = Engine(model, 2, MAX_SEQ_LEN, prefill_chunk=8)
    params = SamplingParams(temperature=0, max_gen_len=20)
    first = engine.submit([1, 2, 3], params)
    engine.step()
    long = engine.submit([5] * 70, params)
    for _ in range(8):
        before = len(first.tokens)
        engine.step()
        assert len(first.tokens) == before + 1
    assert not long.tokens
    engine.step()
    assert long.tokens


def counting(engine: Engine) -> list[int]:
    """A list to which every forward appends its number of tokens."""
    counts: list[int] = []
    features = engine.model.features

    def counted(tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        counts.append(tokens.numel())
        return features(tokens, *args)

    engine.model.features = counted  # type: ignore[method-assign]
    return counts


@pytest.fixture
def own_model() -> Transformer:
    return make_model()


def test_the_second_turn_costs_its_new_tokens(own_model: Transformer) -> None:
    engine = Engine(own_model, 2, MAX_SEQ_LEN)
    counts = counting(engine)
    params = SamplingParams(temperature=0, max_gen_len=8)
    first = engine.submit(random_prompts(1, seed=9)[0][:30] + [7] * 20, params)
    drain(engine)
    turn = first.prompt_tokens + first.tokens + [9, 8, 7]
    counts.clear()
    second = engine.submit(turn, params)
    drain(engine)
    # The last token of the answer, which was never fed, and the three new tokens.
    assert counts[0] == 4
    assert second.tokens == run_alone(own_model, turn, params).tokens


def test_a_busy_row_is_shared_too(own_model: Transformer) -> None:
    engine = Engine(own_model, 3, MAX_SEQ_LEN)
    counts = counting(engine)
    params = SamplingParams(temperature=0, max_gen_len=6)
    shots = list(range(40))
    requests = [engine.submit([*shots, 100 + i], params) for i in range(3)]
    drain(engine)
    assert [n for n in counts if n > 3] == [41]
    for request in requests:
        assert request.tokens == run_alone(own_model, request.prompt_tokens, params).tokens


def test_the_row_with_most_in_common_is_taken_and_a_short_beginning_is_not_worth_one(
    own_model: Transformer,
) -> None:
    engine = Engine(own_model, 2, MAX_SEQ_LEN)
    params = SamplingParams(temperature=0, max_gen_len=1)
    chats = [[1, *[i] * 30] for i in (2, 3)]
    for chat in chats:
        engine.submit(chat, params)
        drain(engine)
    counts = counting(engine)
    engine.submit([*chats[0], 5], params)
    drain(engine)
    assert counts == [1]  # only the new token, although another row was idle for longer
    engine.submit([1, 9, 9], params)  # its first token is that of both chats
    drain(engine)
    engine.submit([*chats[0], 5, 6], params)
    drain(engine)
    assert counts == [1, 3, 1]


def test_what_takes_no_token_reuses_none(own_model: Transformer) -> None:
    engine = Engine(own_model, 2, MAX_SEQ_LEN, prefill_chunk=8)
    prompt = [5] * 60
    engine.submit(prompt, SamplingParams(max_gen_len=1))
    drain(engine)
    counts = counting(engine)
    nothing = engine.submit(prompt, SamplingParams(max_gen_len=0))
    engine.submit([7] * 60, SamplingParams(max_gen_len=1))
    engine.step()
    assert nothing.finish_reason == "length"
    assert counts == [8]  # one chunk of the other prompt


def test_nothing_private_is_shared(own_model: Transformer) -> None:
    engine = Engine(own_model, 1, MAX_SEQ_LEN)
    counts = counting(engine)
    params = SamplingParams(temperature=0, max_gen_len=1)
    prompt = list(range(40))
    for is_private in (True, False, True, False):
        engine.submit(prompt, params, is_private=is_private)
        drain(engine)
    assert counts == [40] * 4
    assert not engine._slots[0].request
    engine.submit(prompt, params)
    drain(engine)
    assert counts[-1] == 1


def test_exact_is_metas_forward(own_model: Transformer) -> None:
    """An exact request computes its whole prompt with all logits, as Meta does, and reuses
    nothing."""
    engine = Engine(own_model, 2, MAX_SEQ_LEN, prefill_chunk=8)
    (prompt,) = random_prompts(1, seed=4)
    params = SamplingParams(temperature=0, max_gen_len=12)
    for _ in range(2):
        exact = engine.submit(prompt, params, is_exact=True)
        drain(engine)
        tokens, scores = list(prompt), []
        logits = own_model(torch.tensor([prompt]), 0)
        for _ in range(12):
            scores.append(logits[0, -1].log_softmax(-1).max().item())
            tokens.append(int(logits[0, -1].argmax()))
            logits = own_model(torch.tensor([tokens[-1:]]), len(tokens) - 1)
        assert exact.prompt_tokens + exact.tokens == tokens
        assert exact.logprobs == scores


# ---- ends -------------------------------------------------------------------------------------


def test_why_a_request_ends(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, 4, MAX_SEQ_LEN, tokenizer)
    prompt = random_prompts(1, seed=6)[0][:20]
    free = engine.submit(prompt, SamplingParams(temperature=0, max_gen_len=20, ignore_eos=True))
    drain(engine)
    stop = free.tokens[5]
    at = free.tokens.index(stop)
    text = free.text[3:6]
    options: dict[str, dict[str, Any]] = {
        "token": dict(stop_tokens=[stop]),
        "ignored": dict(stop_tokens=[stop], ignore_eos=True),
        "string": dict(stop=[text], ignore_eos=True),
        "cache": dict(max_gen_len=None, ignore_eos=True),
        "nothing": dict(max_gen_len=0),
    }
    requests = {
        name: engine.submit(prompt, SamplingParams(**dict(temperature=0, max_gen_len=20) | option))
        for name, option in options.items()
    }
    events = drain(engine)
    assert requests["token"].tokens == free.tokens[:at]
    assert requests["token"].stop_token == stop
    assert requests["ignored"].tokens == free.tokens
    assert requests["string"].text == free.text[: free.text.index(text)]
    assert requests["cache"].tokens[:20] == free.tokens
    assert len(requests["cache"].tokens) == MAX_SEQ_LEN - len(prompt)
    assert requests["nothing"].tokens == []
    reasons = {name: request.finish_reason for name, request in requests.items()}
    assert reasons == {
        "token": "stop", "ignored": "length", "string": "stop", "cache": "length",
        "nothing": "length",
    }  # fmt: skip
    for request in requests.values():
        mine = [event for event in events if event.request is request]
        assert "".join(event.text for event in mine) == request.text
        assert [event.token for event in mine if event.token is not None] == request.tokens
        assert [event.finish_reason for event in mine][-1] == request.finish_reason
        assert all(event.finish_reason is None for event in mine[:-1])


def test_a_full_row_and_idle_rows_between(model: Transformer) -> None:
    """Rows on both sides of a full, idle row decode. The idle row must stay valid for reuse."""
    engine = Engine(model, 3, MAX_SEQ_LEN)
    prompts = [[1] * 10, list(range(90)), [3] * 12]
    params = [SamplingParams(temperature=0, max_gen_len=n) for n in (60, None, 60)]
    requests = [engine.submit(*both) for both in zip(prompts, params, strict=True)]
    drain(engine)
    assert len(requests[1].tokens) == 6
    for request in requests:
        assert request.tokens == run_alone(model, request.prompt_tokens, request.params).tokens
    kept = engine.submit([*prompts[1], *requests[1].tokens[:3]], params[0])
    drain(engine)
    assert kept.tokens == run_alone(model, kept.prompt_tokens, params[0]).tokens


def test_cancelling_frees_the_slot_by_the_next_step(model: Transformer) -> None:
    engine = Engine(model, 1, MAX_SEQ_LEN, prefill_chunk=4)
    params = SamplingParams(temperature=0, max_gen_len=30)
    decoding = engine.submit([1, 2], params)
    waiting = engine.submit([3], params)
    last = engine.submit([4] * 9, params)
    engine.step()
    engine.cancel(waiting)
    engine.cancel(decoding)
    engine.cancel(decoding)
    events = engine.step()
    assert {e.request: e.finish_reason for e in events} == {
        waiting: "cancelled",
        decoding: "cancelled",
    }
    assert not last.tokens
    engine.cancel(last)  # while its prompt is prefilled
    assert [event.finish_reason for event in drain(engine)] == ["cancelled"]
    fresh = engine.submit([4] * 9, params)
    drain(engine)
    assert fresh.tokens == run_alone(model, [4] * 9, params).tokens


def test_ten_thousand_submits_and_cancels_leak_nothing(model: Transformer) -> None:
    engine = Engine(model, 2, MAX_SEQ_LEN)
    params = SamplingParams(max_gen_len=5)
    seen = weakref.WeakSet[Request]()
    for i in range(10_000):
        request = engine.submit([1, 2, 3], params)
        seen.add(request)
        if i % 100 == 0:
            engine.step()
        engine.cancel(request)
        if i % 50 == 0:
            drain(engine)
    drain(engine)
    del request
    gc.collect()
    assert len(seen) == 0
    assert not engine.has_work


def test_an_id_that_the_tokenizer_lacks_harms_no_other(tokenizer: Tokenizer) -> None:
    torch.manual_seed(1)
    args = SHAPE | {"vocab_size": VOCAB + 64}
    engine = Engine(Transformer(ModelArgs(**args, max_seq_len=MAX_SEQ_LEN)), 2, 32, tokenizer)
    options: dict[str, Any] = dict(temperature=0.0, max_gen_len=4, ignore_eos=True)

    def wish(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor([VOCAB + 5]), 1000.0)

    bad = engine.submit([1, 2], SamplingParams(logits_processor=wish, **options))
    good = engine.submit([3, 4], SamplingParams(logit_bias={5: 1000.0}, **options))
    drain(engine)
    assert bad.finish_reason == "error"
    assert f"token id {VOCAB + 5} is out of range" in str(bad.error)
    assert bad.tokens == bad.logprobs == []
    assert good.finish_reason == "length"
    assert good.tokens == [5] * 4


def test_an_interrupted_step_is_made_up_for(model: Transformer) -> None:
    greedy = SamplingParams(temperature=0, max_gen_len=12)
    first, second = random_prompts(2)
    alone = run_alone(model, first, greedy)
    calls = []

    def interrupted(_: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits

    engine = Engine(model, 2, MAX_SEQ_LEN)
    request = engine.submit(first, greedy)
    other = engine.submit(second, SamplingParams(logits_processor=interrupted))
    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    engine.cancel(other)
    drain(engine)
    assert request.tokens == alone.tokens
    assert request.logprobs == pytest.approx(alone.logprobs, abs=1e-5)


def test_one_bad_processor_harms_no_other(model: Transformer) -> None:
    def raises(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    engine = Engine(model, 4, MAX_SEQ_LEN)
    prompts = random_prompts(4, longest=20)
    good = SamplingParams(temperature=0, max_gen_len=8)
    bad = [
        SamplingParams(logits_processor=raises),
        SamplingParams(logits_processor=lambda tokens, logits: logits * torch.nan),
        SamplingParams(logits_processor=lambda tokens, logits: logits[:3]),
    ]
    requests = [engine.submit(p, s) for p, s in zip(prompts, [good, *bad], strict=True)]
    drain(engine)
    assert [request.finish_reason for request in requests] == ["length"] + ["error"] * 3
    assert [type(request.error) for request in requests[1:]] == [
        KeyError,
        GenerationError,
        GenerationError,
    ]
    assert requests[0].tokens == run_alone(model, prompts[0], good).tokens


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt 7 is empty"),
        ([0] * 97, {}, "prompt 7 has 97 tokens, but max_seq_len is 96"),
        ([VOCAB], {}, f"token id {VOCAB}, but vocab_size is {VOCAB}"),
        ("text", {}, "not a list of token ids"),
        ([0], {"n": 2}, "one request for each sample"),
        ([0], {"stop": ["x"]}, "need a tokenizer"),
        ([0], {"logit_bias": {VOCAB: 1.0}}, "logit_bias has token id"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Transformer, prompt: Any, options: dict[str, Any], message: str
) -> None:
    engine = Engine(model, 1, MAX_SEQ_LEN)
    with pytest.raises(GenerationError, match=message):
        engine.submit(prompt, SamplingParams(**options), row=7)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("rows", "length", "message"),
    [
        (0, 8, "max_batch_size is 0: it must be 1 or above"),
        (1, 0, f"max_seq_len is 0: it must be 1 to {MAX_SEQ_LEN}"),
        (1, MAX_SEQ_LEN + 1, f"max_seq_len is {MAX_SEQ_LEN + 1}: it must be 1 to {MAX_SEQ_LEN}"),
    ],
)
def test_an_engine_has_rows_and_fits_the_model(
    model: Transformer, rows: int, length: int, message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        Engine(model, rows, length)
