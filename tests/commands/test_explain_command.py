"""The command `llama explain`: it writes the page, and checks its words before it loads a model."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "words", [["A fox"], ["A fox", "--mp", "4"], ["A fox", "--chat", "--dtype", "bfloat16"], ["-"]]
)
def test_a_page(
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    exit_code: Callable[..., int],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A fox")))
    assert exit_code("explain", *words, "-o", "5") == 0
    page = (tmp_path / "5").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert '"text":" fox"' in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "fox"], "unexpected 'fox': put the prompt in quotes"),
        (
            ["a", "--out", "nowhere/a.html"],
            "cannot write nowhere/a.html: there is no folder nowhere",
        ),
        (["a", "--out", "."], "cannot write .: it is a folder"),
        (["a", "--mp", "two"], "--mp is 'two': it must be a whole number"),
        (["a", "--format", "llama3"], "--format is a chat format, which needs --chat"),
        (["a", "--ckpt_dir", "nowhere"], "no such folder: nowhere"),
        (["a", "--layers", "2"], "unknown option --layers; see llama explain --help"),
    ],
)
def test_mistakes(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    fail: Callable[..., str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert fail("explain", *words).startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []
