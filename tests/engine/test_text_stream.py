"""TextStream: pushed text joined is the whole text, cut before the first stop string."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.engine.text_stream import TextStream
from llama.errors import TokenizerError
from llama.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(request.getfixturevalue(f"{request.param}_tokenizer_path"))


def streamed(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str]) -> tuple[str, bool]:
    stream = TextStream(tokenizer, stop)
    text = "".join([stream.push(i) for i in ids])
    return text + stream.finish(), stream.stopped


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Cut a whole text at the first position where a stop string ends. The longest one is
    removed."""
    for end in range(len(text) + 1):
        ending = [string for string in stop if text[:end].endswith(string)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


# Few characters, so that stop strings occur, overlap and repeat. Some have several bytes, one is a
# combining accent, one an emoji of three code points, and one replaces broken bytes.
TEXT = st.lists(
    st.sampled_from(["a", "b", " ", "\n", "é", "e\u0301", "👩‍🚀", "語", "\ufffd", "the "])
)
STOP = st.lists(TEXT.map("".join).filter(bool).map(lambda text: text[:6]), max_size=4)


@settings(max_examples=200, deadline=None)
@given(pieces=TEXT, stop=STOP)
def test_text_is_cut_before_the_first_stop_string(
    tokenizer: Tokenizer, pieces: list[str], stop: list[str]
) -> None:
    ids = tokenizer.encode("".join(pieces), bos=False, eos=False)
    assert streamed(tokenizer, ids, stop) == cut(tokenizer.decode(ids), stop)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), stop=STOP)
def test_ids_in_any_order_are_cut_the_same(
    tokenizer: Tokenizer, data: st.DataObject, stop: list[str]
) -> None:
    """With incomplete characters, and with a stop string that occurs in the text."""
    pool = sorted(set(tokenizer.encode("ab a the é語👩‍🚀\u0301\n", bos=False, eos=False)))
    ids = data.draw(st.lists(st.sampled_from(pool), max_size=20))
    text = tokenizer.decode(ids)
    start = data.draw(st.integers(0, len(text)))
    stop = [*stop, text[start : start + 5] or "b"]
    assert streamed(tokenizer, ids, stop) == cut(text, stop)


@settings(max_examples=100, deadline=None)
@given(text=st.text(), stop=st.lists(st.text(min_size=1, max_size=3), max_size=16))
def test_any_unicode(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert streamed(tokenizer, ids, stop) == cut(tokenizer.decode(ids), stop)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("aaab", ["aab"], "a"),
        ("abcd", ["bcd", "c"], "ab"),  # "c" is complete first
        ("abcd", ["c", "bc"], "a"),  # both are complete: the longest counts
        ("abcd", ["cde"], "abcd"),
        ("one two", ["one"], ""),
    ],
)
def test_which_stop_string_counts(
    llama3_tokenizer_path: Path, text: str, stop: list[str], shown: str
) -> None:
    tokenizer = Tokenizer(llama3_tokenizer_path)
    ids = [i for char in text for i in tokenizer.encode(char, bos=False, eos=False)]
    assert streamed(tokenizer, ids, stop) == (shown, shown != text)


def test_only_what_may_start_a_stop_string_is_held_back(llama3_tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(llama3_tokenizer_path)
    ids = [tokenizer.encode(char, bos=False, eos=False)[0] for char in "xENENDz"]
    stream = TextStream(tokenizer, ["END"])
    assert [stream.push(i) for i in ids] == ["x", "", "", "EN", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    stream = TextStream(tokenizer, ["END"])
    assert [stream.push(i) for i in ids[:3]] == ["x", "", ""]
    assert stream.finish() == "EN"
    assert not stream.stopped


def test_the_flush_may_complete_a_stop_string(tokenizer: Tokenizer) -> None:
    broken = tokenizer.encode("ab 👩", bos=False, eos=False)[
        :-1
    ]  # without the last bytes of the emoji
    whole = tokenizer.decode(broken)
    assert whole.endswith("\ufffd")
    stream = TextStream(tokenizer, ["b \ufffd"])
    assert "".join([stream.push(i) for i in broken]) == "a"
    assert not stream.stopped
    assert stream.finish() == ""
    assert stream.stopped


def test_a_foreign_id_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="out of range"):
        TextStream(tokenizer).push(tokenizer.n_words)


@settings(max_examples=300)
@given(
    prompt=st.lists(st.integers(3, 31999), min_size=1, max_size=5),
    generated=st.lists(st.integers(0, 31999), max_size=6),
)
def test_a_continued_text_can_be_appended(
    llama2_tokenizer_path: Path, prompt: list[int], generated: list[int]
) -> None:
    """The text keeps the space before its first word, which `decode` drops. The test skips prompts
    that end within a character."""
    tokenizer = Tokenizer(llama2_tokenizer_path)
    before = tokenizer.decode([1, *prompt])
    if not before.strip() or "\ufffd" in before:
        return
    stream = TextStream(tokenizer, is_continued=True)
    text = "".join([stream.push(i) for i in generated]) + stream.finish()
    whole = tokenizer.decode([1, *prompt, *generated])
    if "\ufffd" not in whole:
        assert before + text == whole
