"""The documentation is right: its snippets run, and its commands, flags and files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llama.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Snippets that name Meta's folders are not run, because the weights cannot be part of the project.
NEEDS_WEIGHTS = re.compile(
    r"Meta-Llama|CodeLlama|openai|llama-2-|Llama-?3|for event in llama\.stream\(dialog"
)


def snippets(language: str) -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append((f"{path.name}:{line}", match[1]))
    return found


PYTHON = snippets("python")


@pytest.mark.parametrize(("place", "code"), PYTHON, ids=[place for place, _ in PYTHON])
def test_a_snippet_runs(place: str, code: str) -> None:
    compile(code, place, "exec")
    if NEEDS_WEIGHTS.search(code):
        return
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def commands() -> list[tuple[str, list[str]]]:
    """The `llama` command lines in code blocks without a language, joined and without comments."""
    found = []
    for place, block in snippets(""):
        for line in block.replace("\\\n", " ").splitlines():
            if not re.search(r"\bllama [a-z]+ ", line):
                continue
            words = shlex.split(line, comments=True)
            while words and not (words[0] == "llama" or words[:2] == ["-m", "llama"]):
                words = words[1:]
            if words:
                rest = words[1:] if words[0] == "llama" else words[2:]
                found.append((place, [word for word in rest if word not in "|>"]))
    return found


@pytest.mark.parametrize("name", sorted({words[0] for _, words in commands()}))
def test_commands_and_flags_exist(name: str) -> None:
    assert name in COMMANDS
    shown = subprocess.run(
        [sys.executable, "-m", "llama", name, "--help"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    known = set(re.findall(r"^  --(\w+)", shown, re.MULTILINE))
    for place, words in commands():
        if words[0] == name:
            flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
            assert flags <= known, place


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    pattern = r"`((?:llama|tests|benchmarks|scripts|docs)/[\w./-]*)`"
    named = set(re.findall(pattern, text))
    named |= {str((path.parent / link).relative_to(ROOT)) for link in
              re.findall(r"\]\(((?!http|\.\./|#)[\w./-]+)\)", text)}  # fmt: skip
    assert not [name for name in named if not (ROOT / name).exists()]
