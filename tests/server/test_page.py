"""The chat page in a browser: chats, conversations, the look inside, and no markup from text."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.server import running

from llama import Llama

PROMPT = "Tell me a tale of a fox."


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=512, max_batch_size=2, mode="fast", device="cpu")


@pytest.fixture
def page(browser: Any, llama: Llama) -> Iterator[Any]:
    """The page of a running server. No message may appear in the browser's console."""
    complaints: list[str] = []
    with running(llama) as (_, url):
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        kinds = ("error", "warning")
        page.on("console", lambda m: complaints.append(m.text) if m.type in kinds else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        page.wait_for_selector("text=tales, 512 tokens")
        yield page
        page.close()
    assert complaints == []


def chat(page: Any, text: str) -> str:
    """Send a message; the text of the answer."""
    page.fill("#input", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send:not(.hidden)")
    answers = page.query_selector_all("article.assistant .text")
    answer: str = answers[-1].inner_text()
    return answer


def set_option(page: Any, name: str, value: str) -> None:
    page.evaluate("document.getElementById('settings').open = true")
    page.fill(f"#{name}", value)
    page.dispatch_event(f"#{name}", "change")


def test_a_chat_on_the_page(page: Any, llama: Llama) -> None:
    set_option(page, "temperature", "0")
    set_option(page, "max_tokens", "30")
    first = chat(page, PROMPT)
    dialog: Any = [{"role": "user", "content": PROMPT}]
    (want,) = llama.chat_completion([dialog], temperature=0, max_gen_len=30)
    assert " ".join(first.split()) == " ".join(want["generation"]["content"].split())
    chat(page, "And then?")
    assert len(page.query_selector_all("article")) == 4
    page.click("article.assistant >> nth=0 >> text=Retry")
    page.wait_for_selector("#send:not(.hidden)")
    assert page.inner_text("article.assistant .text") == first
    page.reload()  # conversations are kept in the browser
    assert page.inner_text("article.assistant .text") == first
    page.click("article.user >> text=Edit")
    assert page.input_value("#input") == PROMPT
    assert page.query_selector("article") is None


def test_look_inside(page: Any, llama: Llama) -> None:
    set_option(page, "temperature", "0")
    set_option(page, "max_tokens", "12")
    chat(page, PROMPT)
    page.click("#look")
    page.wait_for_selector("#prompt .token.special")
    ids = [int(t.get_attribute("title")[3:]) for t in page.query_selector_all("#prompt .token")]
    dialog: Any = [{"role": "user", "content": PROMPT}]
    assert ids == llama.encode_dialog(dialog)
    assert page.inner_text("#count") == str(len(ids))
    (want,) = llama.chat_completion([dialog], temperature=0, max_gen_len=12, logprobs=True)
    tokens = page.query_selector_all("#answer .token")
    assert [token.text_content() for token in tokens] == want["tokens"]
    tokens[3].hover()
    rows = page.query_selector_all("#alternatives tr")
    assert len(rows) == 5
    assert json.loads(rows[0].query_selector("code").text_content()) == want["tokens"][3]
    assert rows[0].query_selector("strong") is not None  # greedy: the likeliest was chosen


def test_text_is_never_markup(page: Any) -> None:
    evil = '<img src=x onerror="document.title=1"> **bold** `a<b`\n```\n<script>\n```\n- one\n- two'
    page.evaluate(
        "text => { talk().messages.push({role: 'assistant', content: text, tokens: []}); draw(); }",
        evil,
    )
    assert page.query_selector("article img") is None
    assert page.inner_text("article strong") == "bold"
    assert page.inner_text("article p code") == "a<b"
    assert page.inner_text("article pre code") == "<script>"
    assert len(page.query_selector_all("article li")) == 2
    assert page.title() == "tales"


def test_conversations_system_message_and_stop(page: Any, tmp_path: Path) -> None:
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("#system", "Be brief.")
    page.dispatch_event("#system", "change")
    page.fill("#input", PROMPT)
    page.keyboard.press("Enter")
    page.wait_for_selector("article.assistant")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:not(.hidden)")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert saved["conversations"][0]["system"] == "Be brief."
    page.keyboard.press("Alt+n")
    assert len(page.query_selector_all("#list li")) == 2
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#list li[aria-current='true'] button:last-child")
    assert len(page.query_selector_all("#list li")) == 1
    page.set_input_files("#file", tmp_path / "saved.json")
    page.wait_for_selector("#list li:nth-child(2)")
    (tmp_path / "other.json").write_text("{}")
    page.set_input_files("#file", tmp_path / "other.json")
    assert "no conversations of this page" in page.inner_text(".error")


def test_dark_and_phone_width(page: Any) -> None:
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    page.set_viewport_size({"width": 390, "height": 760})
    assert page.is_visible("#input")
    assert not page.is_visible("#new")
    page.click("#menu")
    assert page.is_visible("#new")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    has_name = "e.textContent.trim() || e.getAttribute('aria-label') || e.closest('label')"
    controls = "[...document.querySelectorAll('button, input, textarea')]"
    assert page.evaluate(f"{controls}.every(e => {has_name})")
