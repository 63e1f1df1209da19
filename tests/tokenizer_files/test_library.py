"""A tokenizer.json of any kind: the ids are the library's, and streams join to the whole text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.texts import ANY_TEXT, repaired, streamed
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing

from llama import Tokenizer
from llama.errors import DialogError, TokenizerError

WORDS = [
    "the quick brown fox jumps over 13 lazy dogs",
    "She said: \u65e5\u672c \U0001f600",
    "don't",
] * 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def trained(model: Any, trainer: Any, **steps: Any) -> Library:
    library = Library(model)
    for name, step in steps.items():
        setattr(library, name, step)
    library.train_from_iterator(WORDS, trainer)
    return library


def smol() -> Library:
    """SmolLM2's kind: byte-level BPE with single digits, and nothing before a text."""
    return trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        decoder=decoders.ByteLevel(),
    )  # fmt: skip


def deepseek() -> Library:
    """DeepSeek LLM's kind: byte-level BPE with splits of its own, and a bos before each text."""
    library = trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<begin>", "<end>"], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\n", "isolated"),
                pre_tokenizers.Digits(True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        decoder=decoders.ByteLevel(),
    )  # fmt: skip
    library.post_processor = TemplateProcessing(
        single="<begin> $A", pair="<begin> $A <begin> $B", special_tokens=[("<begin>", 0)]
    )
    library.add_tokens([AddedToken("lazy dogs", normalized=False)])
    return library


def unigram() -> Library:
    """SentencePiece's other model, with blanks as pieces of text."""
    return trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>",
            show_progress=False,
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )  # fmt: skip


KINDS: dict[str, Callable[[], Library]] = {"smol": smol, "deepseek": deepseek, "unigram": unigram}
Opened = tuple[Tokenizer, Library]


@pytest.fixture(scope="module", params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp(request.param)
    library = KINDS[request.param]()
    library.save(str(folder / "tokenizer.json"))
    if request.param == "smol":
        config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    library.encode_special_tokens = True  # their names are plain text
    return Tokenizer(folder / "tokenizer.json"), library


@given(text=ANY_TEXT)
def test_ids_and_texts_are_the_librarys(opened: Opened, text: str) -> None:
    ours, library = opened
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    ids = library.encode(whole, add_special_tokens=False).ids
    assert ours.encode(text, bos=False, eos=False) == ids
    assert ours.encode(text, bos=True, eos=False) == library.encode(whole).ids
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
    assert streamed(ours, ids) == ours.decode(ids)


@given(data=st.data())
def test_streams_of_any_ids_join_to_the_whole_text(opened: Opened, data: st.DataObject) -> None:
    ours, _ = opened
    ids = data.draw(st.lists(st.integers(0, ours.n_words - 1), max_size=30))
    assert streamed(ours, ids) == ours.decode(ids)
    assert "".join(ours.token_texts(ids)) == ours.decode(ids)


@pytest.mark.parametrize("character", ["¡", "€", "😀"])
@pytest.mark.parametrize("n_broken", range(12))
def test_a_character_after_broken_bytes_is_whole(
    opened: Opened, n_broken: int, character: str
) -> None:
    """A run of bytes that are no characters is shown in parts. No part ends inside a character."""
    ours, _ = opened
    ids = ours.encode("¡", bos=False, eos=False)[-1:] * n_broken
    ids += ours.encode(character, bos=False, eos=False)
    assert streamed(ours, ids) == ours.decode(ids)


def test_a_continued_text_keeps_its_blank(opened: Opened) -> None:
    from llama.tokenizer import TextDecoder

    ours, _ = opened
    ids = ours.encode("the quick fox", bos=False, eos=False)
    start = ours.decode(ids[:1])
    decoder = TextDecoder(ours, is_continued=True)
    rest = "".join(map(decoder.push, ids[1:])) + decoder.flush()
    assert start + rest == ours.decode(ids)


def test_special_tokens(opened: Opened, request: pytest.FixtureRequest) -> None:
    ours, library = opened
    kind = request.node.callspec.params["opened"]
    ends = {"smol": "<|im_end|>", "unigram": "</s>"}
    assert ours.eos_id == (library.token_to_id(ends[kind]) if kind in ends else -1)
    assert ours.bos_id == (library.token_to_id("<begin>") if kind == "deepseek" else -1)
    assert ours.stop_tokens == ([ours.eos_id] if kind in ends else [])
    assert ours.n_words == library.get_vocab_size()
    for name, i in ours.special_tokens.items():
        # An added token that is not special, and any piece of a Unigram model, may come from text.
        is_special = name != "lazy dogs" and kind != "unigram"
        assert (i in ours.encode(f"a {name}", False, False)) != is_special
        assert i in ours.encode(f"a {name}", False, False, allowed_special="all")


def test_without_a_known_form_there_is_no_chat(opened: Opened) -> None:
    with pytest.raises(DialogError, match=r"tokenizer.json: no chat form is known"):
        opened[0].chat_format()


def test_a_file_that_the_library_refuses(tmp_path: Path) -> None:
    file = json.loads(smol().to_str())
    file["model"]["merges"].append(["a", "nothing"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(TokenizerError, match=r"tokenizer.json: not a whole tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


@given(text=ANY_TEXT)
def test_bytes_of_tokens_join_to_the_text(opened: Opened, text: str) -> None:
    ours, library = opened
    ids = ours.encode(text, bos=False, eos=False)
    joined = b"".join(map(ours.token_bytes, ids))
    if library.decoder.__class__.__name__ == "ByteLevel":  # also the parts of a character
        assert joined == repaired(text).encode()
    else:  # a token keeps its blank, also at the start of the text
        assert joined.decode().strip(" ") == ours.decode(ids).strip(" ")
