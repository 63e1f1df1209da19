"""The files, links and headings that the documentation names exist."""

import re
from pathlib import Path

import pytest
from pages import ROOT, with_line_numbers

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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
