"""On a GPU: the same logits and texts as on the CPU. Run by `make test-gpu`."""

from typing import Any

import pytest
import torch

from llama import Llama

pytestmark = pytest.mark.gpu
PROMPTS = ["Once upon a time there was a king", "The fox said"]


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible")


def build(device: str, **options: Any) -> Llama:
    return Llama.build(device=device, dtype="float32", **options)


def texts(llama: Llama) -> list[str]:
    rows = llama.text_completion(PROMPTS, temperature=0, max_gen_len=40)
    return [row["generation"] for row in rows]


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


def test_int8_is_near() -> None:
    plain, int8 = (build("cuda", mode="fast", quantize=width) for width in (None, "int8"))
    for got, want in zip(int8.score(PROMPTS), plain.score(PROMPTS), strict=True):
        assert got == pytest.approx(want, abs=0.3)
