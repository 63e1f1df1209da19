"""The tokenizer: ids equal to Meta's for both file formats, streaming, and errors."""

import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from helpers.texts import ANY_TEXT, NAMES, repaired, sentencepiece_model, streamed
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.chat_format import ChatFormat, Llama2ChatFormat
from llama.errors import TokenizerError
from llama.tokenizer import TextDecoder, Tokenizer


@pytest.fixture(scope="session")
def open_bytes(tmp_path_factory: pytest.TempPathFactory):
    """A function that opens a tokenizer file with the given content. Its name has no suffix."""

    def open_bytes(data: bytes) -> Tokenizer:
        path = tmp_path_factory.mktemp("tokenizer") / "file"
        path.write_bytes(data)
        return Tokenizer(path)

    return open_bytes


@pytest.fixture(scope="session")
def meta(oracle, llama3_tokenizer_path: Path):
    """Meta's own tokenizer on the same file."""
    return oracle.tokenizer.Tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="session")
def llama3(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="session")
def llama2(llama2_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama2_tokenizer_path)


@pytest.fixture(scope="session")
def ranks(llama3_tokenizer_path: Path) -> list[bytes]:
    """The first 2,048 lines of Llama 3's file. They are a valid tokenizer file."""
    return llama3_tokenizer_path.read_bytes().splitlines(keepends=True)[:2048]


@pytest.fixture(scope="session")
def small(open_bytes, ranks: list[bytes]) -> Tokenizer:
    return open_bytes(b"".join(ranks))


@pytest.fixture(scope="session")
def trained(open_bytes) -> Tokenizer:
    return open_bytes(sentencepiece_model())


@pytest.fixture(scope="session", params=["small", "trained"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    """A small tokenizer, once of each format."""
    return request.getfixturevalue(request.param)


# ---- Llama 3 -------------------------------------------------------------------------------------


def test_llama3_facts(llama3: Tokenizer):
    assert llama3.n_words == 128256
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (128000, 128001, -1)
    assert llama3.stop_tokens == [128001, 128008, 128009]
    assert isinstance(llama3.chat_format(), ChatFormat)


def test_llama3_special_tokens_have_the_names_of_3_1(llama3: Tokenizer):
    assert list(llama3.special_tokens.values()) == list(range(128000, 128256))
    names = [name.removeprefix("<|").removesuffix("|>") for name in llama3.special_tokens]
    assert (
        names[:6]
        == (
            "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
            "finetune_right_pad_id reserved_special_token_2"
        ).split()
    )
    assert names[6:11] == "start_header_id end_header_id eom_id eot_id python_tag".split()
    assert names[11:] == [f"reserved_special_token_{i}" for i in range(3, 248)]


def test_llama3_sentence(llama3: Tokenizer):
    ids = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert llama3.encode("This is a test sentence.", bos=True, eos=True) == ids
    assert llama3.decode(ids) == "<|begin_of_text|>This is a test sentence.<|end_of_text|>"
    assert llama3.decode(ids[1:-1]) == "This is a test sentence."


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT, bos=st.booleans(), eos=st.booleans())
def test_llama3_encodes_as_meta(llama3: Tokenizer, meta, text: str, bos: bool, eos: bool):
    ids = llama3.encode(text, bos, eos)
    assert ids == meta.encode(text, bos=bos, eos=eos)
    assert llama3.decode(ids) == meta.decode(ids)


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(ANY_TEXT | st.sampled_from(NAMES)),
    allowed=st.just("all") | st.sets(st.sampled_from([*NAMES, "unknown"])),
)
def test_llama3_special_names_in_text_as_meta(llama3: Tokenizer, meta, parts, allowed):
    text = "".join(parts)
    ids = llama3.encode(text, False, False, allowed_special=allowed)
    assert ids == meta.encode(text, bos=False, eos=False, allowed_special=allowed)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255) | st.integers(0, 127999) | st.just(128009)))
def test_llama3_decodes_as_meta(llama3: Tokenizer, meta, ids: list[int]):
    assert llama3.decode(ids) == meta.decode(ids)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(" " * 10**6, id="blanks"),
        pytest.param("a" * 10**6, id="letters"),
        pytest.param("\n" * 25_000, id="a run as long as may be"),
        pytest.param("x" + " " * 25_001 + "y" * 25_001 + "\u3000\t" * 12_501, id="one too long"),
        pytest.param("ab c" * 99_999 + "d" * 60_000 + " e" * 9, id="a run over 400,000"),
        pytest.param("z" * 24_999 + "\ud83d\ude00" + "z" * 9, id="a cut surrogate pair"),
        pytest.param("a" * 24_995 + "<|eot_id|>" * 2, id="a cut special token"),
        pytest.param("a b " * 99_999 + "<|eot_id|>" * 2, id="one cut at 400,000"),
    ],
)
def test_llama3_cuts_long_texts_as_meta(llama3: Tokenizer, meta, text: str):
    ids = llama3.encode(text, bos=True, eos=False, allowed_special={"<|eot_id|>"})
    assert ids == meta.encode(text, bos=True, eos=False, allowed_special={"<|eot_id|>"})


def test_special_tokens_follow_any_number_of_ranks(small: Tokenizer):
    assert small.n_words == 2048 + 256
    assert list(small.special_tokens.values()) == list(range(2048, 2304))
    assert (small.bos_id, small.stop_tokens) == (2048, [2049, 2056, 2057])
    text = "Once upon a time — 很久以前 🦊"
    ids = small.encode(text, bos=True, eos=False)
    assert ids[0] == 2048
    assert small.decode(ids[1:]) == text


# ---- Llama 2 -------------------------------------------------------------------------------------


def test_llama2_facts(llama2: Tokenizer):
    assert llama2.encode("you're right", None, None) == [366, 29915, 276, 1492]
    assert (llama2.n_words, llama2.bos_id, llama2.eos_id, llama2.pad_id) == (32000, 1, 2, -1)
    # The name of a control token in a text is plain text, unless the caller allows special tokens.
    assert llama2.encode("hi<s>", False, False) == [7251, 29966, 29879, 29958]
    assert llama2.encode("hi<s>you", False, False, allowed_special={"<s>"}) == [7251, 1, 366]


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT, ids=st.lists(st.integers(0, 260) | st.integers(0, 31999)))
def test_llama2_gives_back_and_streams(llama2: Tokenizer, text: str, ids: list[int]):
    given_back = llama2.decode(llama2.encode(text, bos=True, eos=True))
    assert given_back == repaired(text).replace("▁", " ")
    assert streamed(llama2, ids) == llama2.decode(ids)


def test_sentencepiece_facts(trained: Tokenizer):
    assert trained.n_words == 380
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (1, 2, -1)
    assert trained.stop_tokens == [2]
    assert trained.special_tokens == {"<s>": 1, "</s>": 2, "<unk>": 0}
    assert isinstance(trained.chat_format(), Llama2ChatFormat)


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT)
def test_sentencepiece_encodes_as_the_library(trained: Tokenizer, text: str):
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    ids = trained.encode(text, bos=True, eos=True)
    assert ids == [1, *library.encode(repaired(text)), 2]
    # SentencePiece writes a space as ▁, so it cannot tell the two apart.
    assert trained.decode(ids) == repaired(text).replace("▁", " ")


def test_sentencepiece_special_names_need_leave(trained: Tokenizer):
    def encode(text: str, **options: object) -> list[int]:
        return trained.encode(text, False, False, **options)

    text = "the <s>fox</s> <unk>"
    assert not {0, 1, 2} & set(encode(text))
    assert trained.decode(encode(text)) == text
    assert encode(text, allowed_special={"<s>"}) == [*encode("the "), 1, *encode("fox</s> <unk>")]
    ids = [*encode("the "), 1, *encode("fox"), 2, *encode(" "), 0]
    assert encode(text, allowed_special="all") == ids


@pytest.mark.parametrize("char", [" ", "f"])
def test_sentencepiece_takes_long_runs(trained: Tokenizer, char: str):
    assert trained.decode(trained.encode(char * 10**6, None, None)) == char * 10**6


# ---- Both ----------------------------------------------------------------------------------------


def test_empty_text(either: Tokenizer):
    assert either.encode("", bos=False, eos=False) == []
    assert either.encode("", bos=True, eos=True) == [either.bos_id, either.eos_id]
    assert either.decode([]) == ""


def test_disallowed_names_are_refused(either: Tokenizer):
    name, other = list(either.special_tokens)[:2]
    text = f"a {name} b"
    for disallowed in ("all", {name}, [other, name]):
        with pytest.raises(TokenizerError, match=re.escape(f"disallowed special token {name}")):
            either.encode(text, None, None, disallowed_special=disallowed)
    plain = either.encode(text, None, None, disallowed_special={other})
    ids = either.encode(text, None, None, allowed_special={name}, disallowed_special="all")
    assert either.special_tokens[name] in set(ids) - set(plain)


@pytest.mark.parametrize("text", [None, b"bytes", 5, ["text"]])
def test_only_text_is_encoded(either: Tokenizer, text: object):
    with pytest.raises(TokenizerError, match="must be a str, not"):
        either.encode(text, True, False)


def test_surrogates_are_repaired(either: Tokenizer):
    assert either.encode("a\ud83d\ude00", None, None) == either.encode("a😀", None, None)
    assert either.encode("\udc80b", None, None) == either.encode("\ufffdb", None, None)


def test_ids_out_of_range(either: Tokenizer):
    for bad in (-1, either.n_words, 2**31, 2**70):
        message = f"token id {bad} is out of range: this tokenizer has {either.n_words} words"
        with pytest.raises(TokenizerError, match=message):
            either.decode([5, bad, 6])
        with pytest.raises(TokenizerError, match=message):
            TextDecoder(either).push(bad)


def test_ids_may_come_from_an_array(either: Tokenizer):
    ids = either.encode("the lazy fox", None, None)
    for array in (tuple(ids), np.array(ids, dtype=np.uint32), torch.tensor(ids)):
        assert either.decode(array) == "the lazy fox"


# ---- Streaming -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_streams_what_it_decodes(either: Tokenizer, data: st.DataObject):
    """Random ids, many of them single bytes, which are among the first 260, and then a text."""
    ids = data.draw(st.lists(st.integers(0, 260) | st.integers(0, either.n_words - 1)))
    ids += either.encode(data.draw(ANY_TEXT), bos=False, eos=True)
    assert streamed(either, ids) == either.decode(ids)


@pytest.fixture(
    scope="session",
    params=[{"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}],
    ids=str,
)
def other_blanks(request: pytest.FixtureRequest, open_bytes) -> Tokenizer:
    """SentencePiece models with other rules for leading blanks: all are dropped, or none."""
    return open_bytes(sentencepiece_model(**request.param))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streams_by_other_rules_for_blanks(other_blanks: Tokenizer, data: st.DataObject):
    blanks = [i for i in range(380) if set(other_blanks.decode([3, i])[1:]) <= {" "}]
    ids = data.draw(st.lists(st.sampled_from(blanks) | st.integers(0, 379)))
    assert streamed(other_blanks, ids) == other_blanks.decode(ids)


def test_streams_whole_characters_as_soon_as_they_are_there(either: Tokenizer):
    text = "né 🦊 狐 a\u0301 fox"
    decoder, shown = TextDecoder(either), ""
    for token_id in either.encode(text, bos=False, eos=False):
        shown += decoder.push(token_id)
        assert text.startswith(shown)
    assert shown == text
    assert decoder.flush() == ""


def test_a_character_waits_for_its_bytes(either: Tokenizer):
    *start, a, b, c, d = either.encode(
        "fox🦊", None, None
    )  # in these tokenizers 🦊 has four tokens of one byte
    decoder = TextDecoder(either)
    assert "".join(decoder.push(i) for i in start) == "fox"
    assert [decoder.push(i) for i in (a, b, c, d, a)] == ["", "", "", "🦊", ""]
    assert decoder.flush() == "\ufffd"


# ---- Files that are no tokenizer -----------------------------------------------------------------


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"gone\.model: cannot read .*: No such file"):
        Tokenizer(str(tmp_path / "gone.model"))
    with pytest.raises(TokenizerError, match="cannot read the tokenizer: Is a directory"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04\x00\x00archive/data.pkl", "neither a SentencePiece model nor"),
        (b"<!DOCTYPE html>\n<html>", "line 1: .* is not a new token in base64 and its rank"),
        (b"\n\nIQ== 0\n", "not a whole SentencePiece model"),
        (b"IQ== 0\n", "no token for the single byte 0x00"),
        (sentencepiece_model()[:-1], "not a whole SentencePiece model"),
        (sentencepiece_model()[:3000], "not a whole SentencePiece model"),
        (sentencepiece_model(bos_id=-1), "lacks a bos or eos token"),
    ],
)
def test_files_that_are_no_tokenizer(open_bytes, data: bytes, message: str):
    with pytest.raises(TokenizerError, match=message) as error:
        open_bytes(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",  # no rank, no number, three fields, cut base64, no base64, a known token, no UTF-8
    [b"IGFi", b"IGFi 7x", b"IGFi 7 1", b"IGF 7", b"I*Fi 7", b"IQ== 2047", b"\xff\xfe\x00"],
)
def test_corrupt_line_is_named(open_bytes, ranks: list[bytes], line: bytes):
    with pytest.raises(TokenizerError, match=r"file, line 2048: .* is not a new token") as error:
        open_bytes(b"".join([*ranks[:-1], line, b"\n"]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rank", [-1, 5, 2048])
def test_ranks_must_be_whole(open_bytes, ranks: list[bytes], rank: int):
    message = "2048 tokens must have the ranks 0 to 2047, but none has 2047"
    with pytest.raises(TokenizerError, match=message):
        open_bytes(b"".join([*ranks[:-1], ranks[-1].split()[0], b" %d\n" % rank]))


def test_order_and_blank_lines_do_not_matter(open_bytes, ranks: list[bytes], small: Tokenizer):
    shuffled = open_bytes(b"\r\n".join(line.strip() for line in reversed(ranks)) + b"\n\n")
    text = "The order of lines does not matter."
    assert shuffled.encode(text, None, None) == small.encode(text, None, None)
