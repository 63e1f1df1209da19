"""`llama parity` prints a table, writes a certificate, checks one, and ends with the exit code."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoints.folder import BUNDLED, open_checkpoint
from llama.commands.parity_tables import report
from llama.explain import oracles
from llama.explain.certificate import read_certificate
from llama.explain.oracles import LlamaModels

ROOT = Path(__file__).parent.parent.parent
Parity = Callable[..., int]


@pytest.fixture
def parity(exit_code: Callable[..., int]) -> Parity:
    """The exit code of `llama parity` with these words, on the CPU and with few tokens."""

    def parity(*words: str) -> int:
        few = () if {"--check", "--max_gen_len"} & set(words) else ("--max_gen_len", "4")
        return exit_code("parity", *words, "--device", "cpu", *few)

    return parity


Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize("against", ["llama-models", "transformers"])
def test_a_certificate_is_written_and_checked(
    against: str, parity: Parity, capsys: Output, tmp_path: Path
) -> None:
    path = str(tmp_path / "c.json")
    assert parity("A king", "--against", against, "--out", path) == 0
    assert capsys.readouterr().out == report(read_certificate(path)) + "\n"
    assert parity("--check", path) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "the certificate holds here"
    assert sum("  holds" in line for line in shown) == (6 if against == "llama-models" else 4)


def test_the_table_has_a_line_for_each_layer(parity: Parity, capsys: Output) -> None:
    assert parity() == 0
    shown = capsys.readouterr().out.splitlines()
    layers = [f"layers.{i}" for i in range(open_checkpoint(BUNDLED).args.n_layers)]
    for name in ("tok_embeddings", *layers, "norm", "logits"):
        (row,) = [line.split() for line in shown if line.split()[:1] == [name]]
        assert set(row[1:]) == {"0"}
        assert len(row) == (7 if name.startswith("layers.") else 3)
    assert shown[-2] == "tokens    4 of 4 are equal"
    assert shown[-1].startswith("bit-equal to llama-models")


class Perturbed(LlamaModels):
    """Meta's model with one weight changed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        with torch.no_grad():
            self.module("layers.2.feed_forward.w3").weight[0] *= 1.01


def test_a_difference_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, parity: Parity, capsys: Output, tmp_path: Path
) -> None:
    path = str(tmp_path / "c.json")
    assert parity("--out", path) == 0
    monkeypatch.setitem(oracles.ORACLES, "llama-models", Perturbed)
    capsys.readouterr()
    assert parity("--out", str(tmp_path / "d.json")) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith(
        "NOT bit-equal to llama-models: layers.2.feed_forward.w3 is the first"
    )
    assert not read_certificate(tmp_path / "d.json").comparison.holds
    assert parity("--check", path) == 1
    shown = capsys.readouterr().out
    assert "logits, ulps" in shown
    assert shown.endswith("the certificate does NOT hold here\n")


def test_a_changed_weight_file_is_exit_code_1(
    parity: Parity, capsys: Output, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(BUNDLED, tmp_path / "copy"))
    path = folder / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    state["layers.0.attention.wq.weight"][0, 0] += 1
    torch.save(state, path)
    committed = str(ROOT / "docs" / "parity" / "bundled_llama_models.json")
    assert parity("--check", committed, "--ckpt_dir", str(folder)) == 1
    assert "changed: consolidated.00.pth" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "vllm"], "against is 'vllm': it must be one of llama-models, transformers"),
        (["A", "king"], "unexpected 'king': put the prompt in quotes"),
        (["--check", "nowhere.json"], "cannot read nowhere.json: No such file or directory"),
        (["--check", "c.json", "--against", "transformers"],
         "--check takes its settings from the certificate: leave out against"),
        (["--max_gen_len", "0"], "max_gen_len is 0: it must be 1 or above"),
        (["--out", "nowhere/c.json"], "cannot write nowhere/c.json: there is no folder nowhere"),
        (["--dtype", "int8"], "dtype is int8: it must be float32, bfloat16 or float16"),
    ],
)  # fmt: skip
def test_mistakes(words: list[str], message: str, parity: Parity, capsys: Output) -> None:
    assert parity(*words) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {message}"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"comparison": {"tokens": 1}}'])
def test_a_damaged_certificate_is_exit_code_2(
    content: str, parity: Parity, capsys: Output, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    assert parity("--check", str(path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} ")


def test_a_missing_package_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, parity: Parity, capsys: Output
) -> None:
    monkeypatch.setitem(sys.modules, "llama_models", None)
    assert parity() == 2
    assert "pip install 'llama-reference[parity]'" in capsys.readouterr().err


def test_the_table_in_the_documentation_is_the_certificates() -> None:
    text = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    for name in ("bundled_llama_models", "bundled_transformers"):
        shown = report(read_certificate(ROOT / "docs" / "parity" / f"{name}.json"))
        assert shown in text, "run scripts/make_certificates.py"


def test_under_torchrun_one_rank_reports(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    words = ["-m", "llama", "parity", "--device", "cpu", "--max_gen_len", "4", "--out", str(path)]
    shown = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == report(read_certificate(path)) + "\n"
    assert "bundled, float32, 2 ranks" in shown.stdout
