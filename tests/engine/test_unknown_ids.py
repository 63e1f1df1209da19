"""A vocabulary that is larger than the tokenizer's: ids unknown to the tokenizer are never
chosen."""

from typing import Any

import pytest
import torch
from helpers.models import make_sharp_model

from llama import Transformer
from llama.checkpoints.folder import BUNDLED
from llama.engine.build import make_engine
from llama.engine.engine import Engine
from llama.fast.gpu.transformer import GpuTransformer
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

TOKENIZER = Tokenizer(BUNDLED / "tokenizer.model")
KNOWN, PADDED = TOKENIZER.n_words, TOKENIZER.n_words + 16
OPTIONS: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=1.0),
    dict(temperature=1.5, top_p=1.0, top_k=8),
    dict(temperature=0, repetition_penalty=1.2, logprobs=3),
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A model whose largest logits are those of unknown ids."""
    made = make_sharp_model(
        dtype=torch.float32, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=PADDED,
        multiple_of=32, max_seq_len=64,
    )  # fmt: skip
    with torch.no_grad():
        made.output.weight[KNOWN:] *= 4
    return made


def engines(model: Transformer, kind: str) -> Engine:
    if kind == "static":
        network = GpuTransformer(model)
        network.kernels = None
        return Engine(network, 4, 64, TOKENIZER, static=True)
    options: dict[str, Any] = dict(mode="reference" if kind == "reference" else "fast")
    options |= {"draft": dict(draft=model), "lookup": dict(lookup=True)}.get(kind, {})
    return make_engine(model, TOKENIZER, max_batch_size=4, **options)


def run(engine: Engine, **options: Any) -> list[Any]:
    params = [SamplingParams(seed=i, max_gen_len=12, ignore_eos=True, **(o | options))
              for i, o in enumerate(OPTIONS)]  # fmt: skip
    requests = [engine.submit([1, 2, 3], one) for one in params]
    while engine.has_work:
        engine.step()
    return requests


@pytest.mark.parametrize("kind", ["reference", "fast", "draft", "lookup", "static"])
def test_unknown_ids_are_never_chosen(model: Transformer, kind: str) -> None:
    for request in run(engines(model, kind)):
        assert request.error is None
        assert request.finish_reason == "length"
        assert len(request.tokens) == 12
        assert max(request.tokens) < KNOWN


def test_logprobs_count_them(model: Transformer) -> None:
    """Logprobs are those of the model's softmax, which includes the unknown ids."""
    engine = engines(model, "fast")
    request = run(engine)[0]
    with torch.inference_mode():
        tokens = torch.tensor([request.prompt_tokens + request.tokens])
        want = model(tokens, 0)[0].log_softmax(-1)
    start = len(request.prompt_tokens) - 1
    for i, token in enumerate(request.tokens):
        assert request.logprobs[i] == pytest.approx(want[start + i, token].item(), abs=1e-3)


def test_a_processor_may_ask_for_them(model: Transformer) -> None:
    """If a processor selects an unknown id, the request ends, because it cannot be decoded."""
    requests = run(
        engines(model, "fast"), logits_processor=lambda tokens, logits: logits.index_fill(
            0, torch.tensor([KNOWN + 3]), 1000.0)
    )  # fmt: skip
    assert all(request.error is not None for request in requests)
    assert str(KNOWN + 3) in str(requests[0].error)
