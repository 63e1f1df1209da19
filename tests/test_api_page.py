"""docs/api.md is up to date. The docstrings of the public API mention every parameter, and the
examples use every name."""

import re

import api_page
import pytest
from api_page import Entry, definition, names_of
from pages import snippets

import llama

ENTRIES = {entry.value.__name__: entry for found in api_page.entries().values() for entry in found}


def test_the_page_is_up_to_date() -> None:
    written = api_page.PAGE.read_text(encoding="utf-8")
    assert written == api_page.page(), "run python scripts/api_page.py"


def test_every_public_name_is_on_the_page() -> None:
    headings = re.findall(r"^#+ ([\w.]+)$", api_page.page(), re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert {name for name in llama.__all__ if name != "Dialog"} <= set(headings)
    assert "A `Dialog` is a sequence of messages." in api_page.page()
    assert {"Engine.submit", "Engine.step", "Engine.cancel", "Llama.stream"} <= set(headings)


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=list(ENTRIES))
def test_docstrings_mention_every_parameter(entry: Entry) -> None:
    whole, methods = definition(entry)
    for found in (whole, *methods):
        assert found.docstring, found.name
        for name in names_of(found.parameters):
            assert re.search(rf"\b{name}\b", found.docstring), f"{found.name}: {name}"


@pytest.mark.parametrize("title", api_page.entries())
def test_the_example_of_a_section_uses_all_its_names(title: str) -> None:
    """test_documents.py runs the examples."""
    code = "\n".join(snippet.code for snippet in snippets(api_page.examples()[title]))
    for entry in api_page.entries()[title]:
        whole, methods = definition(entry)
        for found in (whole, *methods):
            assert re.search(rf"\b{found.name}\b", code), f"{whole.name}, {found.name}"


def test_the_contents_lead_to_headings() -> None:
    page = api_page.page()
    anchors = {api_page.anchor(title) for title in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}
    links = re.findall(r"\]\(#([\w-]+)\)", page)
    assert links
    assert set(links) <= anchors
