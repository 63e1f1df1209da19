"""The command `llama explain`: it writes the page, and checks its words before it loads a model."""

import io
import sys
from pathlib import Path

import pytest

from llama.__main__ import main

Output = pytest.CaptureFixture[str]


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run `llama explain` in this process. Returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["llama", "explain", *words])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.parametrize(
    "words", [["A fox"], ["A fox", "--mp", "4"], ["A fox", "--chat", "--dtype", "bfloat16"], ["-"]]
)
def test_a_page(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A fox")))
    assert run(monkeypatch, *words, "-o", "5") == 0
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
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {message}"]
    assert list(tmp_path.iterdir()) == []
