"""A row whose numbers are not finite fails alone, and its slot is clean for the next request."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fault_plan import Trials
from helpers.folders import make_model as make_small_model
from helpers.folders import write_meta
from helpers.models import MAX_SEQ_LEN, SHAPE, make_model, make_sharp_model

from llama import Transformer
from llama.checkpoints.convert import convert
from llama.checkpoints.shards import shard_name
from llama.checkpoints.verify import verify
from llama.engine.build import make_engine
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.errors import GenerationError
from llama.sampling import SamplingParams

BAD, TWIN = 77, 78  # the embedding of BAD is damaged; TWIN stands in its place in a healthy run
N_GOOD = 3
ROWS = N_GOOD + 1


def damaged_model(value: float) -> Transformer:
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight[BAD, 5] = value
    return model


def engine_of(model: Transformer, options: dict[str, Any]) -> Engine:
    if options.get("draft"):
        draft = make_sharp_model(**SHAPE | {"n_layers": 1}, max_seq_len=MAX_SEQ_LEN)
        options = options | {"draft": draft}
    return make_engine(model, max_batch_size=ROWS, **options)


def finish(engine: Engine, *requests: Request) -> None:
    """Step the engine until the requests have ended."""
    while any(request.finish_reason is None for request in requests):
        engine.step()


def prompt_of(number: int, length: int) -> list[int]:
    return [(7 * number + 3 * i) % BAD for i in range(length)]


def in_the_prompt(engine: Engine, token: int, n: int) -> Request:
    """The token is in the prompt, and the request generates n tokens."""
    prompt = [*prompt_of(9, 40), token, *prompt_of(8, 6)]
    return engine.submit(prompt, SamplingParams(temperature=0, max_gen_len=n))


def generated(engine: Engine, token: int, n: int) -> Request:
    """The token is the first that is generated, and it is fed in the next step."""
    params = SamplingParams(temperature=0, max_gen_len=n + 1, logit_bias={token: 1e9})
    return engine.submit(prompt_of(9, 40), params)


def scored(engine: Engine, token: int, n: int) -> Request:
    """The prompt is scored, and nothing is generated."""
    prompt = [*prompt_of(9, 40), token, *prompt_of(8, 6)]
    return engine.submit(prompt, SamplingParams(max_gen_len=0, prompt_logprobs=True))


WHERE: dict[str, Callable[[Engine, int, int], Request]] = {
    "prompt": in_the_prompt,
    "generated": generated,
    "scored": scored,
}
MODES: dict[str, dict[str, Any]] = {
    "reference": dict(mode="reference"),
    "fast": dict(mode="fast"),
    "fast int8": dict(mode="fast", quantize="int8"),
    "fast int4": dict(mode="fast", quantize="int4"),
    "int8 cache": dict(mode="fast", kv_cache="int8"),
    "lookup": dict(mode="fast", lookup=True),
    "draft": dict(mode="fast", draft=True),
}


def company_of(
    engine: Engine, where: str, token: int
) -> tuple[Request, list[tuple[list[int], list[float]]]]:
    """Run a row with the token beside good rows, and then another row in its slot. Returns the
    row's request, and tokens and logprobs of all other rows."""
    greedy = SamplingParams(temperature=0, max_gen_len=24, ignore_eos=True)
    good = [engine.submit(prompt_of(i, 20 + 9 * i), greedy) for i in range(N_GOOD)]
    bad = WHERE[where](engine, token, 1)
    finish(engine, bad)
    # The next row is shorter than the bad one was, so the slot keeps old positions after its end.
    after = engine.submit(prompt_of(5, 7), greedy)
    finish(engine, *good, after)
    return bad, [(request.tokens, request.logprobs) for request in (*good, after)]


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", MODES)
def test_a_row_that_is_not_finite(name: str, trials: Trials) -> None:
    values = [math.nan, math.inf, -math.inf][: trials.number(few=1, all=3)]
    for where in WHERE:
        _, expected = company_of(engine_of(make_model(), MODES[name]), where, TWIN)
        for value in values:
            with trials.trial(f"{value} in {where}, {name}"):
                engine = engine_of(damaged_model(value), MODES[name])
                bad, others = company_of(engine, where, BAD)
                assert bad.finish_reason == "error"
                assert isinstance(bad.error, GenerationError)
                assert "not finite" in str(bad.error)
                assert all(math.isfinite(x) for _, logprobs in others for x in logprobs)
                assert others == expected


@pytest.mark.fault(6)
def test_a_prompt_that_is_cancelled_before_its_logits_are_known(trials: Trials) -> None:
    """No logits said that the row's keys and values are not finite."""
    greedy = SamplingParams(temperature=0, max_gen_len=24, ignore_eos=True)

    def run(token: int) -> list[tuple[list[int], list[float]]]:
        engine = Engine(damaged_model(math.nan), 2, MAX_SEQ_LEN, prefill_chunk=16)
        long = engine.submit(prompt_of(1, 60), greedy)
        while not long.tokens:
            engine.step()
        spoiled = engine.submit([token] * 70, greedy)
        engine.step()
        engine.cancel(spoiled)
        after = engine.submit(prompt_of(2, 5), greedy)
        finish(engine, long, after)
        return [(request.tokens, request.logprobs) for request in (long, after)]

    with trials.trial("cancelled in prefill"):
        assert run(BAD) == run(TWIN)


@pytest.mark.fault(6)
def test_verify_names_the_tensor(trials: Trials, tmp_path: Path) -> None:
    model = make_small_model()
    names = list(model.state_dict())
    n = trials.number(few=3, all=10)
    for i in range(n):
        name = names[i * len(names) // n]
        value = [math.nan, math.inf, -math.inf][i % 3]
        with trials.trial(f"{value} in {name}"):
            folder = write_meta(tmp_path / str(i), model, 1)
            path = folder / shard_name(0)
            state = torch.load(path, weights_only=True)
            state[name].flatten()[-1] = value
            torch.save(state, path)
            whole = convert(folder, tmp_path / f"{i}-hf", "hf")
            for kind in (folder, whole):
                _, problems = verify(kind)
                assert len(problems) == 1
                assert "finite" in problems[0]
            assert name in verify(folder)[1][0]
