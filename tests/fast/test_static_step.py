"""The GPU's decode step, run on a CPU: static shapes, the same tokens, no synchronisation."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import make_sharp_model
from helpers.ranks import run_ranks
from make_checkpoint import demo_pieces

from llama import Transformer, parallel, sampling
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.row_sampling import RowSampler
from llama.errors import GenerationError
from llama.fast.gpu import transformer
from llama.fast.gpu.static_step import StaticStep
from llama.fast.gpu.transformer import GpuTransformer
from llama.sampling import SamplingParams

VOCAB = len(demo_pieces()) + 256
MAX_SEQ_LEN = 168
CPU = torch.device("cpu")
OPTIONS: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=0.9),
    dict(temperature=1.3, top_p=1.0, top_k=5),
    dict(temperature=1.0, min_p=0.05),
    dict(temperature=2.0, top_p=0.8, top_k=40, min_p=0.001),
    dict(temperature=1.0, top_p=0),
    dict(temperature=0.7, presence_penalty=0.5),  # the device sampler does not support this
    dict(temperature=0, logit_bias={5: 3.0}),
]


def make_model(dtype: torch.dtype = torch.float32) -> Transformer:
    return make_sharp_model(
        dtype=dtype, dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=32,
        max_seq_len=MAX_SEQ_LEN,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


def random_tokens(n: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=n)


@torch.inference_mode()
def largest_difference(model: Transformer, rows: int, seqlen: int = 1) -> float:
    """The largest difference between the logits of static steps and of the model, relative to their
    standard deviation. Rows have different positions, from the first to the last of the cache."""
    net = GpuTransformer(model)
    cache, own = (model.make_cache(rows, MAX_SEQ_LEN) for _ in range(2))
    for both in (cache.k, cache.v, own.k, own.v):
        both.normal_(generator=torch.Generator().manual_seed(2))
    step = StaticStep(net, cache)
    largest = 0.0
    for i, position in enumerate([0, 1, 127, 128, MAX_SEQ_LEN - seqlen]):
        starts = [max(0, position - 7 * row) for row in range(rows)]
        tokens = [random_tokens(seqlen, seed=rows * i + row) for row in range(rows)]
        got = step(tokens, starts)
        want = model.logits(model.features(torch.tensor(tokens), torch.tensor(starts), own))
        assert got.shape == want.shape
        largest = max(largest, float((got - want).abs().max() / want.std()))
    assert torch.allclose(cache.k, own.k, atol=1e-4)
    return largest


@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_logits_are_the_models(model: Transformer, rows: int) -> None:
    assert largest_difference(model, rows) < 1e-4


def test_several_tokens_a_row(model: Transformer) -> None:
    assert largest_difference(model, 4, seqlen=3) < 1e-4


def test_without_triton(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "has_triton", lambda device: False)
    assert largest_difference(model, 4) < 1e-5
    assert largest_difference(make_model(torch.bfloat16), 4) < 0.05


def test_shapes_are_few(model: Transformer) -> None:
    step = StaticStep(GpuTransformer(model), model.make_cache(6, MAX_SEQ_LEN))
    assert [step.n_rows(n) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert step.takes(4, 16)
    assert not step.takes(4, 17)
    assert not step.takes(3, 1)


def test_the_step_looks_at_no_data(model: Transformer) -> None:
    """Neither the network nor the sampler reads data. On the device `meta` there is no data."""
    with torch.device("meta"):
        empty = Transformer(model.params)
        tokens = torch.zeros(4, dtype=torch.long)
        options, noise = torch.zeros(4, 4), torch.ones(4, VOCAB)
    empty.tok_embeddings.forward = lambda ids: torch.nn.functional.embedding(
        ids, empty.tok_embeddings.weight
    )
    net = GpuTransformer(empty)
    net.kernels = None  # Triton's interpreter would read data
    with torch.inference_mode():
        cache = empty.make_cache(4, MAX_SEQ_LEN)
        logits = net.logits(net.features(tokens[:, None], tokens, cache))[:, 0]
        ids, finite = sampling.draw_rows(logits, options, noise)
    assert (logits.shape, ids.shape, finite.shape) == ((4, VOCAB), (4,), (4,))


def test_no_operation_waits_for_a_count(model: Transformer) -> None:
    """Operations whose result size depends on data, such as indexing with a mask, would make a GPU
    wait. This step includes fairscale's embedding."""
    net = GpuTransformer(model)
    net.kernels = None
    step = StaticStep(net, model.make_cache(4, MAX_SEQ_LEN))
    sampler = RowSampler(4, VOCAB, VOCAB, CPU)
    requests = [request_of(options, seed=1) for options in OPTIONS[:4]]
    with torch.inference_mode(), torch.profiler.profile() as profile:
        sampler(step([[1], [2], [3], [4]], [0, 5, 2, 9])[:, 0], requests)
    called = {event.key for event in profile.key_averages()}
    assert "aten::index_put_" in called
    assert not called & {"aten::nonzero", "aten::masked_select", "aten::unique"}


# ---- the engine on it -------------------------------------------------------------------------


def plain_network(model: Transformer) -> GpuTransformer:
    """The network without its kernels, because Triton's interpreter is slow."""
    net = GpuTransformer(model)
    net.kernels = None
    return net


def results(model: Transformer, static: bool) -> list[Any]:
    """The results of requests of all kinds at different steps, some up to the end of the cache."""
    network = plain_network(model) if static else model
    engine = Engine(network, 6, MAX_SEQ_LEN, prefill_chunk=48, static=static)
    requests = []
    for i in range(32):
        params = SamplingParams(
            **OPTIONS[i % len(OPTIONS)], seed=i, max_gen_len=None if i % 11 == 0 else 1 + i,
            logprobs=2 if i % 5 == 0 else None,
        )  # fmt: skip
        length = 118 if i % 11 == 0 else 1 + i
        requests.append(engine.submit(random_tokens(length, seed=i), params))
        engine.step()
    while engine.has_work:
        engine.step()
    return [(r.tokens, r.logprobs, r.finish_reason, r.top_logprobs) for r in requests]


def test_the_engines_tokens_are_the_same(model: Transformer) -> None:
    for got, want in zip(results(model, True), results(model, False), strict=True):
        assert got[0] == want[0]
        assert got[1] == pytest.approx(want[1], abs=1e-4)
        assert got[2] == want[2] == "length"
        assert len(got[3]) == len(want[3])


def results_on_rank() -> list[Any] | None:
    parallel.initialize()
    model = make_model()
    if parallel.mp_rank() > 0:
        Engine(plain_network(model), 6, MAX_SEQ_LEN, static=True).follow()
        return None
    try:
        return results(model, True)
    finally:
        Engine(model, 1, MAX_SEQ_LEN).dismiss()


def test_two_ranks(model: Transformer, tmp_path: Path) -> None:
    first = run_ranks(2, tmp_path, results_on_rank)[0]
    assert [row[0] for row in first] == [row[0] for row in results(model, False)]


def test_broken_logits_end_their_request_alone() -> None:
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight[7] = math.nan
    engine = Engine(plain_network(model), 2, MAX_SEQ_LEN, static=True)
    good = engine.submit([1, 2], SamplingParams(temperature=0, max_gen_len=4))
    bad = engine.submit([3, 7], SamplingParams(temperature=0.5, max_gen_len=4))
    while engine.has_work:
        engine.step()
    assert good.finish_reason == "length"
    assert isinstance(bad.error, GenerationError)
    assert "not finite at temperature 0.5" in str(bad.error)


# ---- choices ----------------------------------------------------------------------------------


def request_of(options: dict[str, Any], seed: int) -> Request:
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(**options)
    return Request([1], params, 0, False, False, generator, frozenset(), 9, None)


def test_choices_are_those_of_a_row_alone() -> None:
    sampler = RowSampler(8, VOCAB, VOCAB, CPU)
    plain = [options for options in OPTIONS if sampler.takes(SamplingParams(**options))]
    assert len(plain) == len(OPTIONS) - 2
    for n in range(1, 9):
        for seed in range(20):
            logits = 3 * torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed))
            options = [plain[(seed + i) % len(plain)] for i in range(n)]
            drawn = sampler(logits, [request_of(o, seed + i) for i, o in enumerate(options)])
            for i, (token, logprob) in enumerate(drawn):
                alone = request_of(options[i], seed + i)
                want = sampling.choose(logits[i], alone.params, [1], [], alone.generator)
                assert token == want
                assert logprob == pytest.approx(sampling.logprob_of(logits[i], want).item())
