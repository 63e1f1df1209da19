"""Tokens keep every byte of the text. Spans of two tokenizers hold the same characters, and no
span could be shorter."""

from pathlib import Path

import pytest
from helpers.texts import ANY_TEXT, repaired, sentencepiece_model
from hypothesis import given
from make_checkpoint import demo_pieces, write_tokenizer

from llama import ChatFormat, Message, Tokenizer
from llama.chat_format import Llama2ChatFormat
from llama.checkpoints.folder import BUNDLED
from llama.explain.tokens import (
    Span,
    Spelling,
    Token,
    align,
    plain_text,
    read_tokens,
    spelled_names,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(BUNDLED / "tokenizer.model")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of Llama 3's kind with far fewer tokens."""
    path = tmp_path_factory.mktemp("other") / "tokenizer.model"
    write_tokenizer(path, demo_pieces())
    return Tokenizer(path)


@pytest.fixture(scope="module")
def llama2_kind(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("llama2_kind") / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    return Tokenizer(path)


def tokens_of(tokenizer: Tokenizer, text: str) -> list[Token]:
    return read_tokens(tokenizer, tokenizer.encode(text, bos=True, eos=False))


def whole(tokens: list[Token]) -> bytes:
    return b"".join(token.data for token in tokens if token.name is None)


@given(text=ANY_TEXT)
def test_tokens_keep_the_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokens_of(tokenizer, text)
    assert tokens[0] == Token(
        0, tokenizer.bos_id, b"<|begin_of_text|>", "<|begin_of_text|>", "<|begin_of_text|>"
    )
    assert [token.index for token in tokens] == list(range(len(tokens)))
    assert all(token.name is None for token in tokens[1:])
    assert whole(tokens) == repaired(text).encode()
    assert plain_text(tokens) == repaired(text)


def test_parts_of_a_character(tokenizer: Tokenizer) -> None:
    parts = tokens_of(tokenizer, "\N{GRINNING FACE}")[1:]
    assert [part.data for part in parts] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]
    assert [part.text for part in parts] == ["", "", "", "\N{GRINNING FACE}"]


def test_tokens_of_llama_2(llama2_tokenizer_path: Path) -> None:
    tokens = tokens_of(Tokenizer(llama2_tokenizer_path), "Once upon a \N{GRINNING FACE}\n")
    assert [(token.id, token.data, token.text, token.name) for token in tokens] == [
        (1, b"<s>", "", "<s>"),
        (9038, b" Once", "Once", None),  # a SentencePiece token keeps its blank
        (2501, b" upon", " upon", None),
        (263, b" a", " a", None),
        (29871, b" ", " ", None),
        (243, b"\xf0", "", None),
        (162, b"\x9f", "", None),
        (155, b"\x98", "", None),
        (131, b"\x80", "\N{GRINNING FACE}", None),
        (13, b"\n", "\n", None),
    ]


def test_a_spelled_name_is_no_special_token(tokenizer: Tokenizer) -> None:
    names = tokenizer.special_tokens.keys()
    text = "a<|eot_id|> <|eom_id|>"
    tokens = tokens_of(tokenizer, text)
    found = list(spelled_names(tokens, names))
    assert [spelling.name for spelling in found] == ["<|eot_id|>", "<|eom_id|>"]
    for name, first, last in found:
        spelled = tokens[first : last + 1]
        assert name in plain_text(spelled)
        assert name not in plain_text(spelled[1:])
        assert name not in plain_text(spelled[:-1])
    special = tokenizer.encode(text, bos=False, eos=False, allowed_special="all")
    assert list(spelled_names(read_tokens(tokenizer, special), names)) == []
    assert list(spelled_names(tokens, [])) == []


def test_a_name_is_not_spelled_across_a_special_token(tokenizer: Tokenizer) -> None:
    eot = tokenizer.special_tokens["<|eot_id|>"]
    ids = [tokenizer.encode(part, bos=False, eos=False) for part in ("<|eot", "_id|>")]
    names = tokenizer.special_tokens.keys()
    assert not list(spelled_names(read_tokens(tokenizer, [*ids[0], eot, *ids[1]]), names))
    together = [*ids[0], *ids[1]]
    assert list(spelled_names(read_tokens(tokenizer, together), names)) == [
        Spelling("<|eot_id|>", 0, len(together) - 1)
    ]


# ---- two lists of tokens ------------------------------------------------------------------------


def check(spans: list[Span], left: list[Token], right: list[Token]) -> None:
    """Check that the spans hold all tokens in order, and that no span could be shorter."""
    assert [token for span in spans for token in span.left] == left
    assert [token for span in spans for token in span.right] == right
    for span in spans:
        assert span.left or span.right
        if span.is_same_text and span.left[0].name is None:
            ends = [
                {plain_text(side[:n]) for n in range(1, len(side)) if side[n - 1].text}
                for side in (list(span.left), list(span.right))
            ]
            assert not ends[0] & ends[1]


@given(text=ANY_TEXT)
def test_spans_of_two_tokenizers(tokenizer: Tokenizer, other: Tokenizer, text: str) -> None:
    left, right = tokens_of(tokenizer, text), tokens_of(other, text)
    spans = align(left, right, [repaired(text)])
    check(spans, left, right)
    assert all(span.is_same_text for span in spans)
    same = align(left, left, [repaired(text)])
    assert all(span.is_cut_alike for span in same)


@given(text=ANY_TEXT)
def test_spans_of_sentencepiece_and_tiktoken(
    tokenizer: Tokenizer, llama2_kind: Tokenizer, text: str
) -> None:
    text = repaired(text).replace("\u2581", "")  # SentencePiece decodes it to a blank
    left, right = tokens_of(llama2_kind, text), tokens_of(tokenizer, text)
    spans = align(left, right, [text])
    check(spans, left, right)
    assert not spans[0].is_same_text  # <s> and <|begin_of_text|>
    assert all(span.is_same_text for span in spans[1:])


def test_cuts_inside_a_character(tokenizer: Tokenizer) -> None:
    def part(index: int, data: bytes, text: str) -> Token:
        return Token(index, index, data, text, None)

    left = [part(0, b"\xe6", ""), part(1, b"\x97\xa5", "\u65e5")]
    right = [part(0, b"\xe6\x97", ""), part(1, b"\xa5", "\u65e5")]
    (span,) = align(left, right, ["\u65e5"])
    assert span.is_same_text
    assert not span.is_cut_alike


def test_spans_of_two_chat_formats(tokenizer: Tokenizer) -> None:
    dialog: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Where does the fox live? "},
        {"role": "assistant", "content": "In a hole."},
        {"role": "user", "content": "And the owl?"},
    ]
    left, right = (
        read_tokens(tokenizer, formatter(tokenizer).encode_dialog_prompt(dialog))
        for formatter in (ChatFormat, Llama2ChatFormat)
    )
    spans = align(left, right, [message["content"].strip() for message in dialog])
    check(spans, left, right)
    same = "".join(plain_text(list(span.left)) for span in spans if span.is_same_text)
    # The markers of Llama 2's format are text. A word beside one may share a token with it.
    for words in (" b", " does the fox live?", " a hole.", " the owl?"):
        assert words in same
    assert [span.is_same_text for span in spans[:1]] == [False]


def test_a_text_that_a_tokenizer_changes_is_one_span(tokenizer: Tokenizer) -> None:
    left, right = tokens_of(tokenizer, "one way"), tokens_of(tokenizer, "another")
    (span,) = align(left, right, ["one way"])
    assert (span.left, span.right) == (left, right)
    assert not span.is_same_text
