"""`llama bench` on a real model: the figures are consistent, and wrong figures are errors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import SHAPES, make_checkpoint

from llama import Llama
from llama.commands.limits import check_rate, product_rate, read_rate
from llama.commands.measure import _steps, measure, read_bytes, report
from llama.engine.build import make_engine
from llama.errors import BenchmarkError, ConfigError

FEW: dict[str, Any] = dict(prefill=40, decode=3, rounds=1)


@pytest.mark.parametrize("build", [dict(mode="reference"), dict(mode="fast", quantize="int8")])
def test_figures_agree_with_each_other(build: dict[str, Any]) -> None:
    figures = measure(None, **FEW, **build)
    assert figures is not None
    prefill = figures["prefill"]
    assert prefill["tokens"] == 40
    assert prefill["tokens_per_s"] * prefill["first_token_s"] == pytest.approx(40)
    assert list(figures["decode"]) == [1, 4, 8]
    for rows, row in figures["decode"].items():
        step = rows / row["tokens_per_s"]
        assert row["bytes_per_s"] * step > figures["weight_bytes"]
        assert row["of_read"] == pytest.approx(row["bytes_per_s"] / figures["read_bytes_per_s"])
    assert figures["memory"]["peak"] > figures["cache_bytes"]
    assert "decode, 8 at a time" in report(figures)


def test_a_prompt_as_long_as_the_context_is_computed() -> None:
    """In an earlier version such a prompt filled the cache, so nothing was computed."""
    figures = measure(None, prefill=10**6, decode=2, rounds=1)
    assert figures is not None
    assert figures["prefill"]["tokens"] == 1023
    assert figures["prefill"]["first_token_s"] > 1e-3


def test_work_that_was_not_done_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.engine.engine.Engine.step", lambda engine: engine._waiting.clear())
    monkeypatch.setattr("llama.commands.measure.count_tokens", lambda events: 0)
    with pytest.raises(
        BenchmarkError, match="prefill: 0 tokens were generated, but 1 were requested"
    ):
        measure(None, **FEW)


def test_impossible_rates_are_an_error() -> None:
    device = torch.device("cpu")
    check_rate("read", 1e9, read_rate(1 << 20, device), "bytes")
    with pytest.raises(BenchmarkError, match="prefill: 1e\\+18 operations a second, but the limit"):
        check_rate("prefill", 1e18, product_rate(device, 256), "operations")
    with pytest.raises(BenchmarkError, match="the work was not done"):
        check_rate("nothing", 0.0, 1.0, "tokens")


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = Llama.build().model
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(BenchmarkError, match=r"a request failed|has the logprob"):
        list(_steps(make_engine(model, mode="fast"), 1, 5, 3))


def test_no_tokenizer_is_needed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", SHAPES["demo"])
    assert not list((tmp_path / "model").glob("tokenizer*"))
    assert measure(str(tmp_path / "model"), **FEW) is not None


def test_bytes_of_the_weights_that_a_step_reads() -> None:
    plain = Llama.build().model
    matrices = sum(weight.numel() for weight in plain.parameters() if weight.dim() == 2)
    norms = sum(weight.nbytes for weight in plain.parameters() if weight.dim() == 1)
    embedding = 0 if plain.params.tied else plain.tok_embeddings.weight.numel()
    assert read_bytes(plain) == 4 * (matrices - embedding) + norms
    int8 = Llama.build(mode="fast", quantize="int8").model
    rows = sum(module.weight.shape[0] for module in int8.modules() if _is_product(module))
    assert read_bytes(int8) == matrices - embedding + 4 * rows + norms


def _is_product(module: Any) -> bool:
    return isinstance(getattr(module, "weight", None), tuple)


def test_command(tmp_path: Path, run: Callable[..., str]) -> None:
    out = tmp_path / "figures.json"
    flags = ["--prefill", "20", "--decode", "2", "--rounds", "1", "--out", str(out)]
    shown = run("bench", *flags)
    figures = json.loads(out.read_text())
    assert figures["ranks"] == 1
    assert "tokens/s" in shown


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(FEW, decode=0), "decode is 0: it must be 1 or above"),
        (dict(FEW, rounds="x"), "rounds is 'x': it must be 1 or above"),
        (dict(FEW, decode=10**6), "decode is 1000000, which takes 1000018 positions, but"),
    ],
)
def test_refusals(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure(None, **numbers)
