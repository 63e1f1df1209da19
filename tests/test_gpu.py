"""On a GPU: logits bit-equal to Meta's, the same texts as on the CPU, kernels equal to PyTorch.

Run by `make test-gpu`.
"""

from typing import Any

import pytest
import torch
from helpers.metas import CONFIGURATIONS, both_models, logits_of

from llama import Llama, ModelArgs, Transformer
from llama.engine.engine import Engine
from llama.explain.parity import compare
from llama.fast.gpu.device_weights import narrow
from llama.fast.gpu.transformer import GpuTransformer
from llama.sampling import SamplingParams

pytestmark = pytest.mark.gpu
PROMPTS = ["Once upon a time there was a king", "The fox said", "A ship sailed", "In a wood"]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible")


def build(device: str, **options: Any) -> Llama:
    return Llama.build(device=device, **({"dtype": "float32"} | options))


def texts(llama: Llama) -> list[str]:
    rows = llama.text_completion(PROMPTS, temperature=0, max_gen_len=40)
    return [row["generation"] for row in rows]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_are_bit_equal_to_metas(oracle: Any, name: str, dtype: torch.dtype) -> None:
    with CUDA:
        ours, metas = both_models(oracle, dtype, **CONFIGURATIONS[name])
        tokens = torch.randint(0, ours.vocab_size, (3, 40))
    for got, want in zip(logits_of(ours, tokens), logits_of(metas, tokens), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("against", ["llama-models", "transformers"])
def test_parity_with_other_implementations(against: str, dtype: str) -> None:
    found = compare(against=against, device="cuda", dtype=dtype)
    assert found.holds, found.verdict
    assert found.device == "cuda"


def test_logits_are_those_of_the_cpu() -> None:
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.inference_mode():
        want = build("cpu").model(tokens, 0)
        got = build("cuda").model(tokens.cuda(), 0).cpu()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["reference", "fast"])
def test_greedy_texts_are_those_of_the_cpu(mode: Any) -> None:
    assert texts(build("cuda", mode=mode)) == texts(build("cpu"))


def test_a_stream_is_the_whole() -> None:
    llama = build("cuda", mode="fast")
    events = llama.stream(PROMPTS[0], temperature=0, max_gen_len=40)
    assert "".join(event.text for event in events) == texts(llama)[0]


def make_network(dtype: torch.dtype, width: str | None, invariant: bool = False) -> GpuTransformer:
    torch.manual_seed(0)
    args = ModelArgs(
        dim=1024, n_layers=3, n_heads=16, n_kv_heads=4, vocab_size=4096, multiple_of=256,
        max_seq_len=600, max_batch_size=8,
    )  # fmt: skip
    with CUDA:
        model = Transformer(args).to(dtype)
    if width is not None:
        narrow(model, width, CUDA)
    return GpuTransformer(model, invariant)


@torch.inference_mode()
@pytest.mark.parametrize("cache", [None, torch.int8], ids=str)
@pytest.mark.parametrize("width", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_kernels_agree_with_pytorch(dtype: Any, width: str | None, cache: Any) -> None:
    """A prompt in two chunks, then one token and four of each of eight rows."""
    network = make_network(dtype, width)
    kernels = network.kernels
    assert kernels is not None
    prompt, more = (torch.randint(0, 4096, size, device=CUDA) for size in ((1, 500), (8, 4)))
    ends = [500 - 40 * row for row in range(8)]
    found = []
    for network.kernels in (None, kernels):
        held = network.make_cache(8, 600, cache)
        for row, end in enumerate(ends):
            part = held.part(row, 1, 600)
            network.features(prompt[:, : end // 2], 0, part)
            network.features(prompt[:, end // 2 : end], end // 2, part)
        logits = [
            network.logits(network.features(more[:, :n], torch.tensor(ends, device=CUDA), held))
            for n in (1, 4)
        ]
        found.append(logits)
    for want, got in zip(*found, strict=True):
        assert ((got - want).abs().max() / want.std()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("width", [None, "int8", "fp8", "int4"])
def test_invariant_logits_do_not_depend_on_company(width: str | None) -> None:
    """They do not depend on chunks or proposals either, to the last bit."""
    network = make_network(torch.bfloat16, width, invariant=True)
    prompts = torch.randint(0, 4096, (8, 300)).tolist()
    prompts = [prompt[: 300 - 30 * i] * (1 + i % 2) for i, prompt in enumerate(prompts)]

    def logprobs(rows: list[list[int]], slots: int, **options: Any) -> list[list[float]]:
        engine = Engine(network, slots, 600, static=True, **options)
        params = SamplingParams(temperature=0, max_gen_len=30, prompt_logprobs=True)
        requests = [engine.submit(row, params) for row in rows]
        while engine.has_work:
            engine.step()
        return [request.prompt_logprobs + request.logprobs for request in requests]

    together = logprobs(prompts, 8)
    assert [logprobs([row], 1)[0] for row in prompts] == together
    assert logprobs(prompts, 8, prefill_chunk=37) == together
    assert logprobs(prompts, 3, lookup=True) == together


def test_int8_is_near() -> None:
    plain, int8 = (build("cuda", mode="fast", quantize=width) for width in (None, "int8"))
    for got, want in zip(int8.score(PROMPTS), plain.score(PROMPTS), strict=True):
        assert got == pytest.approx(want, abs=0.3)
