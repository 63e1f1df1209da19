"""`python -m llama bench` measures what it says, on a real model."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_file import write_gguf
from make_checkpoint import SHAPES, make_checkpoint

from llama import Llama
from llama.__main__ import main
from llama.checkpoints.folder import open_checkpoint
from llama.commands.measure import measure, read_bytes, report
from llama.errors import ConfigError

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


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"
    flags = ["--prefill", "20", "--decode", "2", "--rounds", "1", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["llama", "bench", *flags])
    main()
    figures = json.loads(out.read_text())
    assert figures["ranks"] == 1
    assert "tokens/s" in capsys.readouterr().out


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


def test_gguf_holds_the_same_weights(tmp_path: Path) -> None:
    """What llama.cpp gets for benchmarks/peers.py."""
    make_checkpoint(tmp_path / "model", SHAPES["demo"])
    opened = open_checkpoint(tmp_path / "model")
    write_gguf(tmp_path / "model.gguf", opened, "BF16", 64)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for theirs, ours in (
        ("blk.0.attn_q.weight", "layers.0.attention.wq.weight"),
        ("blk.1.ffn_down.weight", "layers.1.feed_forward.w2.weight"),
        ("output.weight", "output.weight"),
    ):
        data = torch.from_numpy(tensors[theirs].data.copy()).view(torch.bfloat16)
        want = opened.part(ours, 1, 0)
        assert torch.equal(data.view_as(want), want)
