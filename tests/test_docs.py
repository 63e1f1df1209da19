"""The documentation is right: its snippets run, and its commands, flags and files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from guide import GUIDE
from pages import ROOT, Snippet, run, snippets, with_line_numbers

from llama.__main__ import COMMANDS

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Snippets that name Meta's folders are not run, because the weights cannot be part of the project.
NEEDS_WEIGHTS = re.compile(
    r"Meta-Llama|CodeLlama|openai|llama-2-|Llama-?3|for event in llama\.stream\(dialog"
)


PYTHON = [
    pytest.param(snippet, id=f"{path.name}:{snippet.line}")
    for path in DOCUMENTS
    if path != GUIDE  # its snippets run together; see test_guide.py
    for snippet in snippets(path.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("snippet", PYTHON)
def test_a_snippet_runs(snippet: Snippet) -> None:
    compile(snippet.code, "snippet", "exec")
    if NEEDS_WEIGHTS.search(snippet.code):
        return
    (output,) = run([snippet])
    assert snippet.output in (None, output)


def code_blocks() -> list[tuple[str, str]]:
    """The code blocks without a language, each with its document and line."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append((f"{path.name}:{line}", match[1]))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """The `llama` command lines in code blocks without a language, joined and without comments."""
    found = []
    for place, block in code_blocks():
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
    named = {ROOT / name for name in re.findall(pattern, text)}
    named |= {path.parent / link for link in re.findall(r"\]\(((?!http|#)[\w./-]+)[#)]", text)}
    assert not [name for name in named if not name.exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_lines_lead_to_the_code_they_name(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert with_line_numbers(text, path.parent) == text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_headings_lead_to_headings(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    # GitHub's name of a heading: lower case, blanks as hyphens, no punctuation.
    names = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= names
