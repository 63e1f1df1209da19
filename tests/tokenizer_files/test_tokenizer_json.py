"""tokenizer.json: the ids equal those of Hugging Face's library and of tokenizer.model; errors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import ANY_TEXT, NAMES, repaired, sentencepiece_model, streamed
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from llama import Llama, Transformer
from llama.chat_format import ChatFormat, Llama2ChatFormat
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import find_tokenizer
from llama.config import ModelArgs
from llama.errors import CheckpointError, DialogError, TokenizerError
from llama.tokenizer import Tokenizer
from llama.tokenizer_files.meta import WORD_PATTERN

HARD_TEXTS = (
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\r\n\t x \n",
    "👩‍👩‍👧‍👦 🇩🇪 🦊 é e\u0301\u0301 \u200f ﬁ ſ 'ſ I'LL",
    "很久以前，有一只狐狸。 むかしむかし 옛날 옛적에",
    "1234567890123 3.14159 ٣٤٥ ²",
    "<|begin_of_text|> <|eot_id|><s> </s><unk><0x0A> [INST] ▁▁x ▁",
    "\ud83d \udc00 \ud83d\ude00",
    "\u0000\uffff\ufeff\u2028",
    "aaaaaaaaaaaaaaaaaaaaaaa                                       b",
    "Việc hợp nhiều chương trình ektedir характеристика",
)
NAMES_3_0 = (
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)  # fmt: skip


def merges_of(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens whose concatenation is a token, best score first, as in published files.

    In Llama 2 all runs of blanks have the same score. Among equal scores, pairs with longer tokens
    come first.
    """
    cuts = [(token[:i], token[i:]) for token in scores for i in range(1, len(token))]
    pairs = [(left, right) for left, right in cuts if left in scores and right in scores]
    return sorted(pairs, key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))


def in_bytes(bpe: Library) -> Library:
    """Add Llama 3's pre-tokenizer and decoder to a tokenizer."""
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    return bpe


def trained_bytes(specials_first: bool = False) -> Library:
    """A small byte-level tokenizer, trained by the library, with one merge for each token."""
    bpe = in_bytes(Library(models.BPE(ignore_merges=True)))
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(NAMES_3_0[:10]) if specials_first else [],
    )  # fmt: skip
    bpe.train_from_iterator([Path(__file__).read_text(encoding="utf-8"), *HARD_TEXTS[:4]], trainer)
    bpe.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES_3_0[:10]])
    return bpe


def from_sentencepiece(model: bytes, legacy: bool) -> Library:
    """A tokenizer with the pieces of a SentencePiece model, as in Llama 2's published file
    (legacy) or as transformers 5 writes it."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    plain = {piece: sp.get_score(i) for piece, i in vocab.items() if not sp.is_byte(i) and i > 2}
    merges = merges_of(plain)
    if not legacy:
        from transformers import LlamaTokenizer

        return LlamaTokenizer(vocab=vocab, merges=merges).backend_tokenizer
    bpe = Library(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    return bpe


def saved(bpe: Library, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    bpe.save(str(path), pretty=False)
    return path


def transformers_ids(path: Path) -> Callable[[str], list[int]]:
    """A function that encodes a text with transformers and this file. Names of special tokens are
    plain text."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(path))
    return lambda text: theirs.encode(
        repaired(text), add_special_tokens=False, split_special_tokens=True
    )


@pytest.fixture(scope="module")
def llama3_model(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def llama3_path(
    llama3_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory, llama3_model: Tokenizer
) -> Path:
    """Llama 3.1's file. transformers' converter writes it from the real tokenizer.model."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    names = list(llama3_model.special_tokens)
    converter = TikTokenConverter(str(llama3_tokenizer_path), extra_special_tokens=names)
    return saved(converter.converted(), tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def llama3(llama3_path: Path) -> Tokenizer:
    return Tokenizer(llama3_path)


@pytest.fixture(scope="module")
def llama3_theirs(llama3_path: Path) -> Callable[[str], list[int]]:
    return transformers_ids(llama3_path)


@pytest.fixture(scope="module", params=[False, True], ids=["specials last", "specials first"])
def bytes_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(trained_bytes(request.param), tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module", params=["trained", "real"])
def sentencepiece_bytes(request: pytest.FixtureRequest) -> bytes:
    if request.param == "trained":
        return sentencepiece_model()
    return request.getfixturevalue("llama2_tokenizer_path").read_bytes()


@pytest.fixture(scope="module", params=[True, False], ids=["published", "transformers 5"])
def llama2(
    request: pytest.FixtureRequest,
    sentencepiece_bytes: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, Tokenizer, Callable[[str], list[int]], bool]:
    """For one SentencePiece model: our tokenizer of tokenizer.json, our tokenizer of
    tokenizer.model, and transformers' encoding."""
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "tokenizer.model").write_bytes(sentencepiece_bytes)
    path = saved(from_sentencepiece(sentencepiece_bytes, legacy=request.param), folder)
    ours, model = Tokenizer(path), Tokenizer(folder / "tokenizer.model")
    return ours, model, transformers_ids(path), request.param


@pytest.fixture(scope="module")
def bytes_content() -> dict[str, Any]:
    return json.loads(trained_bytes().to_str())


@pytest.fixture(scope="module")
def pieces_content() -> dict[str, Any]:
    return json.loads(from_sentencepiece(sentencepiece_model(), legacy=True).to_str())


def changed(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with changed entries. The prefix "model_" marks an entry of the part "model"."""
    copy = json.loads(json.dumps(content))
    for key, value in changes.items():
        part, key = (copy["model"], key[6:]) if key.startswith("model_") else (copy, key)
        part[key] = value
    return copy


def opened(content: Any, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Tokenizer(path)


# ---- Llama 3 -------------------------------------------------------------------------------------


def test_llama3_facts(llama3: Tokenizer, llama3_model: Tokenizer) -> None:
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "stop_tokens", "special_tokens"):
        assert getattr(llama3, name) == getattr(llama3_model, name)
    assert isinstance(llama3.chat_format(), ChatFormat)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_llama3_hard_texts(llama3: Tokenizer, llama3_model, llama3_theirs, text: str) -> None:
    ids = llama3.encode(text, bos=True, eos=True)
    assert ids == llama3_model.encode(text, bos=True, eos=True)
    assert ids[1:-1] == llama3_theirs(text)
    assert llama3.decode(ids[1:-1]) == streamed(llama3, ids[1:-1]) == repaired(text)


@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT, parts=st.lists(ANY_TEXT | st.sampled_from(NAMES)))
def test_llama3_any_text(llama3: Tokenizer, llama3_model, llama3_theirs, text, parts) -> None:
    ids = llama3.encode(text, bos=False, eos=False)
    assert ids == llama3_model.encode(text, bos=False, eos=False) == llama3_theirs(text)
    allowed = llama3.encode("".join(parts), False, False, allowed_special="all")
    assert allowed == llama3_model.encode("".join(parts), False, False, allowed_special="all")


def test_llama3_long_runs_are_cut_as_metas(llama3: Tokenizer, llama3_model: Tokenizer) -> None:
    for text in (" " * 10**6, "a" * 10**6, "ab c" * 99_999 + "d" * 60_000):
        assert llama3.encode(text, None, None) == llama3_model.encode(text, None, None)


def test_llama3_chat(llama3: Tokenizer, llama3_model: Tokenizer) -> None:
    dialog = [{"role": "user", "content": "Who are you? <|eot_id|>"}]
    prompt = llama3.chat_format().encode_dialog_prompt(dialog)
    assert prompt == llama3_model.chat_format().encode_dialog_prompt(dialog)


# ---- Byte-level vocabularies of other sizes ------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT | st.sampled_from(HARD_TEXTS) | st.text("aeinrst _>", max_size=60))
def test_trained_merges(bytes_path: Path, opened_bytes, text: str) -> None:
    ours, theirs = opened_bytes
    ids = ours.encode(text, bos=False, eos=False)
    assert ids == theirs(text)
    assert ours.decode(ids) == streamed(ours, ids) == repaired(text)


@pytest.fixture(scope="module")
def opened_bytes(bytes_path: Path) -> tuple[Tokenizer, Callable[[str], list[int]]]:
    return Tokenizer(bytes_path), transformers_ids(bytes_path)


def test_the_names_are_the_files(bytes_path: Path, opened_bytes: Any) -> None:
    """Three ids of Llama 3.0 have other names than in Llama 3.1."""
    ours, _ = opened_bytes
    first = ours.bos_id
    assert ours.special_tokens == {name: first + i for i, name in enumerate(NAMES_3_0[:10])}
    assert ours.stop_tokens == [first + 1, first + 9]
    formatter = ours.chat_format()
    ids = formatter.encode_dialog_prompt([{"role": "user", "content": "Hi"}])
    assert ours.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    for stop in (None, first + 8, first + 9):
        answer = formatter.decode_message(ours.encode("Hello", False, False), stop)
        assert answer == {"role": "assistant", "content": "Hello"}
    waiting = {"role": "assistant", "content": "x", "stop_reason": "end_of_message"}
    with pytest.raises(DialogError, match=r"has no <\|eom_id\|>, which the dialog needs"):
        formatter.encode_message(waiting)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_added_tokens_that_are_not_special(kind: str, tmp_path: Path) -> None:
    """They are recognized in a text without `allowed_special`, as in Hugging Face's library."""
    is_bytes = kind == "bytes"
    bpe = trained_bytes() if is_bytes else from_sentencepiece(sentencepiece_model(), legacy=True)
    bpe.add_special_tokens([AddedToken("<end>", normalized=False)])
    bpe.add_tokens([AddedToken("<tool>", normalized=False)])
    path = saved(bpe, tmp_path)
    ours, theirs = Tokenizer(path), transformers_ids(path)
    text = "a <tool>\n<end> b"
    ids = ours.encode(text, None, None)
    assert ids == theirs(text)
    assert ours.special_tokens["<tool>"] in ids
    assert ours.special_tokens["<end>"] not in ids
    assert "<tool>" in ours.decode(ids)
    assert ours.special_tokens["<end>"] in ours.encode(text, None, None, allowed_special={"<end>"})


def test_files_of_older_libraries(bytes_content: dict[str, Any], tmp_path: Path) -> None:
    """They write merges as "a b", and have no entry `ignore_merges`."""
    merges = [" ".join(merge) for merge in bytes_content["model"]["merges"]]
    content = changed(bytes_content, model_merges=merges)
    del content["model"]["ignore_merges"]
    older = opened(content, tmp_path)
    text = Path(__file__).read_text(encoding="utf-8")
    theirs = transformers_ids(tmp_path / "tokenizer.json")
    assert older.encode(text, False, False) == theirs(text)


# ---- Llama 2 -------------------------------------------------------------------------------------


def test_llama2_facts(llama2: Any) -> None:
    ours, model, *_ = llama2
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "stop_tokens", "special_tokens"):
        assert getattr(ours, name) == getattr(model, name)
    assert isinstance(ours.chat_format(), Llama2ChatFormat)


def assert_llama2_ids(llama2: Any, text: str) -> None:
    ours, model, theirs, is_published = llama2
    ids = ours.encode(text, bos=True, eos=True)
    assert ids[1:-1] == theirs(text)
    # A file of transformers 5 adds no blank before a text that starts with a blank.
    if is_published or not text.startswith((" ", "▁")):
        assert ids == model.encode(text, bos=True, eos=True)
        assert ours.decode(ids) == model.decode(ids)
    assert streamed(ours, ids) == ours.decode(ids)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_llama2_hard_texts(llama2: Any, text: str) -> None:
    assert_llama2_ids(llama2, text)


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT | st.text("the quick brownfox[INST]<s>▁ ", max_size=40))
def test_llama2_any_text(llama2: Any, text: str) -> None:
    assert_llama2_ids(llama2, text)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(1, 262) | st.integers(1, 379)))
def test_llama2_decodes_and_streams_any_ids(llama2: Any, ids: list[int]) -> None:
    ours, model, *_ = llama2
    assert streamed(ours, ids) == ours.decode(ids) == model.decode(ids)


def test_llama2_special_names_need_leave(llama2: Any) -> None:
    ours, model, *_ = llama2
    text = "the <s>fox</s> is"
    assert not {0, 1, 2} & set(ours.encode(text, False, False))
    for allowed in ({"<s>"}, {"</s>", "other"}, "all"):
        ids = ours.encode(text, False, False, allowed_special=allowed)
        assert {1, 2} & set(ids)
        if llama2[3]:  # transformers 5 treats a part that starts with a blank differently
            assert ids == model.encode(text, False, False, allowed_special=allowed)


def test_llama2_chat_and_long_runs(llama2: Any) -> None:
    ours, model, *_ = llama2
    dialog = [{"role": "user", "content": "Hello <s>"}, {"role": "assistant", "content": "Hi"}]
    dialog.append({"role": "user", "content": "Bye"})
    prompts = [t.chat_format().encode_dialog_prompt(dialog) for t in (ours, model)]
    assert prompts[0] == prompts[1]
    assert ours.decode(ours.encode("fox " * 50_000, None, None)) == "fox " * 50_000


def test_what_a_training_left_in_the_file(tmp_path: Path) -> None:
    bpe = from_sentencepiece(sentencepiece_model(), legacy=True)
    plain = Tokenizer(saved(bpe, tmp_path)).encode("the quick fox " * 9, None, None)
    bpe.enable_truncation(4)
    bpe.enable_padding(length=500)
    assert Tokenizer(saved(bpe, tmp_path)).encode("the quick fox " * 9, None, None) == plain


def test_the_library_is_an_extra(
    pieces_content: dict[str, Any],
    bytes_content: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"pip install 'llama-reference\[hf\]'"):
        opened(pieces_content, tmp_path)
    assert opened(bytes_content, tmp_path).encode("no library", None, None)


# ---- bos and eos ---------------------------------------------------------------------------------


def test_bos_and_eos_of_other_names(bytes_content: dict[str, Any], tmp_path: Path) -> None:
    content = changed(bytes_content)
    content["added_tokens"][0]["content"] = "<begin>"
    with pytest.raises(TokenizerError, match=r"no bos token such as .*tokenizer_config\.json: No"):
        opened(content, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for token in ("<begin>", {"content": "<begin>", "special": True}):
        config.write_text(json.dumps({"bos_token": token, "eos_token": "<|eot_id|>"}))
        tokenizer = opened(content, tmp_path)
        assert tokenizer.bos_id == tokenizer.special_tokens["<begin>"]
        assert (
            tokenizer.eos_id == tokenizer.special_tokens["<|end_of_text|>"]
        )  # the names of Llama take precedence
    config.write_text(json.dumps({"bos_token": None}))
    with pytest.raises(TokenizerError, match=r"neither <\|begin_of_text\|> nor None is there"):
        opened(content, tmp_path)


# ---- whole folders -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def hf_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as transformers writes it, with tokenizer.json as its only tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hf") / request.param
    is_bytes = request.param == "bytes"
    bpe = trained_bytes() if is_bytes else from_sentencepiece(sentencepiece_model(), legacy=True)
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, eos_token_id=7,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    saved(bpe, folder)
    return folder


def test_a_folder_with_tokenizer_json_alone(hf_folder: Path, tmp_path: Path) -> None:
    llama = Llama.build(hf_folder)
    assert llama.tokenizer.model_path == hf_folder / "tokenizer.json"
    assert llama.tokenizer.stop_tokens == [7]  # from config.json of the model
    [done] = llama.text_completion(["the fox"], max_gen_len=8, temperature=0, logprobs=True)
    assert "".join(done["tokens"]) == done["generation"]
    dialog = [{"role": "user", "content": "Hi"}]
    [answer] = llama.chat_completion([dialog], max_gen_len=8, temperature=0)
    assert answer["generation"]["role"] == "assistant"

    meta = Llama.build(convert(hf_folder, tmp_path / "meta", "meta", mp=2))
    assert meta.tokenizer.model_path == tmp_path / "meta" / "tokenizer.json"
    assert meta.text_completion(["the fox"], max_gen_len=8, temperature=0) == [
        {"generation": done["generation"]}
    ]


def test_tokenizer_model_comes_first(hf_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model" / "original").mkdir(parents=True)
    folder = tmp_path / "model"
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.model or tokenizer\.json"):
        find_tokenizer(folder, folder)
    for place in ("tokenizer.model", "model/tokenizer.json", "model/original/tokenizer.model"):
        (tmp_path / place).touch()
        assert find_tokenizer(folder, folder) == tmp_path / place


def test_a_vocabulary_without_headers_completes(
    bytes_content: dict[str, Any], tmp_path: Path
) -> None:
    content = changed(bytes_content)
    for token in content["added_tokens"][6:]:
        token["content"] = token["content"].replace("<|", "<|other_")
    tokenizer = opened(content, tmp_path)
    shape = dict(dim=32, n_layers=1, n_heads=2, vocab_size=tokenizer.n_words, max_seq_len=16)
    llama = Llama(Transformer(ModelArgs(**shape)), tokenizer)
    assert "generation" in llama.text_completion(["a"], max_gen_len=2)[0]
    with pytest.raises(DialogError, match="has no ids for Llama 3's message headers"):
        llama.chat_completion([[{"role": "user", "content": "Hi"}]])


# ---- files that are none -------------------------------------------------------------------------


def with_added(content: dict[str, Any], name: object, i: object, **flags: bool) -> dict[str, Any]:
    token = content["added_tokens"][0] | {"content": name, "id": i} | flags
    return changed(content, added_tokens=[*content["added_tokens"], token])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: json.dumps(c)[:-5], "not whole JSON"),
        (lambda c: '{"a": ' * 200_000, "not whole JSON"),
        (lambda c: {"version": "1.0"}, "needs a model"),
        (lambda c: changed(c, model=[]), "needs a model"),
        (lambda c: changed(c, model_type="Unigram"), "not a whole tokenizer"),
        (lambda c: changed(c, model_type="WordPiece"), "not a whole tokenizer"),
        (lambda c: changed(c, model_dropout=0.1), "dropout"),
        (lambda c: changed(c, model_continuing_subword_prefix="##"), "not a whole tokenizer"),
        (lambda c: changed(c, model_vocab=None), "no vocab"),
        (lambda c: changed(c, model_vocab={}), "no vocab"),
        (lambda c: changed(c, model_vocab=[["a", -1.0]]), "no vocab"),
        (lambda c: changed(c, model_merges=None), "no list of merges"),
        (lambda c: changed(c, model_merges=["abc"]), "the merge 'abc' is not of two tokens"),
        (lambda c: changed(c, model_merges=[["a", 5]]), "is not of two tokens"),
        (lambda c: changed(c, added_tokens=["<s>"]), "added_tokens is not a list of objects"),
        (lambda c: changed(c, added_tokens=[]), "no bos token such as"),
        (lambda c: with_added(c, "x\ny", 5), r"id 5 has two tokens, .* and 'x\\ny'"),
        (
            lambda c: with_added(c, c["added_tokens"][1]["content"], 9999),
            "has two ids, .* and 9999",
        ),
        (lambda c: with_added(c, "<extra>", 9999), "but none has"),
        (lambda c: with_added(c, "<extra>", "1"), "is no token"),
        (lambda c: with_added(c, None, 5), "is no token"),
        (lambda c: with_added(c, "\ud800", next_id(c)), "a lone surrogate"),
    ],
)
@pytest.mark.parametrize("kind", ["bytes_content", "pieces_content"])
def test_damaged_files(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, damage: Any, message: str
) -> None:
    assert_refused(damage(request.getfixturevalue(kind)), tmp_path, message)


def next_id(content: dict[str, Any]) -> int:
    """The first unused id."""
    ids = {*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])}
    return max(ids) + 1


def assert_refused(content: Any, folder: Path, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as error:
        opened(content, folder)
    assert str(error.value).startswith(f"{folder / 'tokenizer.json'}: ")
    assert "\n" not in str(error.value)


def swapped(content: dict[str, Any], one: str, other: str) -> dict[str, int]:
    """The vocabulary with the ids of two tokens exchanged."""
    vocab = content["model"]["vocab"]
    return vocab | {one: vocab[other], other: vocab[one]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: changed(c, pre_tokenizer=[1]), "not a whole tokenizer"),
        (lambda c: changed(c, pre_tokenizer={"pretokenizers": [1, 2]}), "not a whole tokenizer"),
        (lambda c: changed(c, model_merges=[["a", "好"]]), "is not in the vocab"),
        (lambda c: json.loads(json.dumps(c).replace('"!": ', '"!!!!": ')), "single byte 0x21"),
        (lambda c: json.loads(json.dumps(c).replace('"!": ', '"好": ')), "stands for no byte"),
    ],
)
def test_damaged_files_of_llama3s_kind(
    bytes_content: dict[str, Any], tmp_path: Path, damage: Any, message: str
) -> None:
    assert_refused(damage(bytes_content), tmp_path, message)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: changed(c, pre_tokenizer=None),
        lambda c: json.loads(json.dumps(c).replace(r"\\p{N}{1,3}", r"\\p{N}")),
        lambda c: json.loads(
            json.dumps(c).replace('"add_prefix_space": false', '"add_prefix_space": true')
        ),
        lambda c: changed(c, normalizer={"type": "NFC"}),
        lambda c: changed(c, model_vocab=swapped(c, "in", "an")),
        lambda c: changed(c, model_merges=c["model"]["merges"][1:]),
        lambda c: changed(c, model_vocab=c["model"]["vocab"] | {"a" * 257: next_id(c)}),
        lambda c: with_added(c, "<x>", next_id(c), special=False, lstrip=True),
        lambda c: with_added(c, "<|eot_id|>x", next_id(c)),
    ],
)
def test_files_that_only_the_library_reads_right(
    bytes_content: dict[str, Any], tmp_path: Path, change: Any
) -> None:
    """tiktoken would give other ids for some text."""
    content = change(bytes_content)
    tokenizer = opened(content, tmp_path)
    assert tokenizer.kind == "a kind of its own"
    library = Library.from_str(json.dumps(content))
    for text in ("in an hour", "12345", "  a\u0301 x <x>  y", "a" * 300, "\u65e5\n\n"):
        ids = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, bos=False, eos=False) == ids
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: changed(c, decoder=[]), "not a whole tokenizer"),
        (lambda c: json.dumps(c).replace("<0x41>", "<0x041>"), "no token for the single byte 0x41"),
        (lambda c: changed(c, model_merges=[["a", "好"]]), "not a whole tokenizer"),
        (lambda c: changed(c, normalizer={"type": "Other"}), "not a whole tokenizer"),
        (
            lambda c: with_added(with_added(c, "<b>", next_id(c) + 1), "<a>", next_id(c)),
            "the added token '<a>' cannot have the id 380",
        ),
    ],
)
def test_damaged_files_of_llama2s_kind(
    pieces_content: dict[str, Any], tmp_path: Path, damage: Any, message: str
) -> None:
    assert_refused(damage(pieces_content), tmp_path, message)
