"""Vocabularies in GGUF files: ids equal those of the source and of llama.cpp; errors."""

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from helpers.texts import sentencepiece_model, streamed
from make_checkpoint import demo_pieces, write_tokenizer
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama.errors import CheckpointError, TokenizerError
from llama.gguf_reader import package
from llama.tokenizer import Tokenizer
from llama.tokenizer_files.from_gguf import has_vocabulary

# The files ggml-vocab-*.gguf with .inp and .out in the sources of llama.cpp.
VECTORS = os.environ.get("LLAMA_CPP_MODELS")


def write_keys(path: Path, keys: dict[str, Any]) -> Path:
    """Write a file with these keys and no tensors."""
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_gguf(source: Path, path: Path, padding: int = 0, **changes: Any) -> Path:
    """Write the vocabulary of a file as GGUF. changes: other values of keys; None: no such key."""
    tokenizer = Tokenizer(source)
    keys = tokenizer.as_gguf(tokenizer.n_words + padding)
    keys |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return write_keys(path, {key: value for key, value in keys.items() if value is not None})


def random_texts(n: int) -> list[str]:
    """Words, blanks, names of special tokens, and any characters."""
    rng = random.Random(0)
    words = ["fox", "The", "don't", "I'LL", "1234567", "été", "Größe", "狐狸", "むかし", "🦊", "▁"]
    words += [" ", "  ", "\n", "\r\n", "\t", "<s>", "<|eot_id|>", "<0x0A>", "!?", "ſ", "\u3000"]

    def piece() -> str:
        if rng.random() < 0.7:
            return rng.choice(words)
        code = rng.choice((rng.randrange(1, 0x500), rng.randrange(1, 0xD800), 0x1F600))
        return chr(code)

    return ["".join(piece() for _ in range(rng.randrange(20))) for _ in range(n)]


Peer = Callable[[Path], Callable[[str], list[int]] | None]


@pytest.fixture(params=["alone", pytest.param("llama.cpp", marks=pytest.mark.llama_cpp)])
def peer(request: pytest.FixtureRequest) -> Peer:
    """A function that returns llama.cpp's tokenizer of a file, or None where it is not compared."""

    def tokenizer_of(path: Path) -> Callable[[str], list[int]] | None:
        if request.param == "alone":
            return None
        import llama_cpp

        model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        return lambda text: model.tokenize(text.encode(), add_bos=False, special=False)

    return tokenizer_of


@pytest.fixture(params=["demo", "llama3", "small sentencepiece", "llama2"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in ("llama2", "llama3"):
        return request.getfixturevalue(f"{request.param}_tokenizer_path")
    path = tmp_path / "tokenizer.model"
    if request.param == "demo":
        write_tokenizer(path, demo_pieces())
    else:
        path.write_bytes(sentencepiece_model())
    return path


def test_ids_are_those_of_the_source(source: Path, peer: Peer, tmp_path: Path) -> None:
    path = as_gguf(source, tmp_path / "a.gguf")
    tokenizer, own = Tokenizer(path), Tokenizer(source)
    assert has_vocabulary(path)
    for name in ("n_words", "bos_id", "eos_id", "stop_tokens", "special_tokens", "is_llama_2"):
        assert getattr(tokenizer, name) == getattr(own, name)
    theirs = peer(path)
    for text in random_texts(2500):
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == own.encode(text, bos=False, eos=False)
        assert theirs is None or ids == theirs(text)
        assert streamed(tokenizer, ids) == own.decode(ids)


@pytest.mark.llama_cpp
@pytest.mark.skipif(VECTORS is None, reason="set LLAMA_CPP_MODELS to llama.cpp's folder models")
@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm"])
def test_the_vectors_of_llama_cpp(name: str) -> None:
    path = Path(str(VECTORS)) / f"ggml-vocab-{name}.gguf"
    tokenizer = Tokenizer(path)
    texts = path.with_name(f"{path.name}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = path.with_name(f"{path.name}.out").read_text("utf-8").split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text, bos=False, eos=False) == [int(i) for i in line.split()]


def test_a_tokenizer_json_of_llama_2s_kind(
    llama2_tokenizer_path: Path, peer: Peer, tmp_path: Path
) -> None:
    """The file has merges, and GGUF needs scores."""
    own = Tokenizer(llama2_tokenizer_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(own.as_json()))
    path = as_gguf(tmp_path / "tokenizer.json", tmp_path / "a.gguf")
    tokenizer, theirs = Tokenizer(path), peer(path)
    for text in random_texts(1000):
        ids = own.encode(text, bos=False, eos=False)
        assert tokenizer.encode(text, bos=False, eos=False) == ids
        assert theirs is None or theirs(text) == ids


def test_a_vocabulary_of_smollms_kind(peer: Peer, tmp_path: Path) -> None:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(random_texts(500), trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    keys = dict(add_bos_token=False, bos_token_id=1)
    path = as_gguf(tmp_path / "tokenizer.json", tmp_path / "a.gguf", **keys)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer, theirs = Tokenizer(path), peer(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_tokens) == (-1, 2, [2])
    for text in random_texts(2000):
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert theirs is None or ids == theirs(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["demo", "sentencepiece"])
def test_added_tokens(kind: str, peer: Peer, tmp_path: Path) -> None:
    """Control tokens are special, user-defined ones are tokens in any text, and unused ones fill
    the vocabulary to the model's size."""
    source = tmp_path / "tokenizer.model"
    if kind == "demo":
        write_tokenizer(source, demo_pieces())
    else:
        source.write_bytes(sentencepiece_model())
    keys = Tokenizer(source).as_gguf(Tokenizer(source).n_words)
    n = len(keys["tokenizer.ggml.tokens"])
    keys["tokenizer.ggml.tokens"] += ["<|im_end|>", "<think>", "<think>er", "[PAD0]"]
    keys["tokenizer.ggml.token_type"] += [3, 4, 4, 5]
    if kind == "sentencepiece":
        keys["tokenizer.ggml.scores"] += [-1000.0] * 4
    path = write_keys(tmp_path / "a.gguf", keys | {"tokenizer.ggml.eot_token_id": n})
    tokenizer, theirs = Tokenizer(path), peer(path)
    assert tokenizer.n_words == n + 4
    assert tokenizer.special_tokens["<|im_end|>"] == n
    assert n in tokenizer.stop_tokens
    for text in (
        "a <think> b",
        "<think>er<think>",
        "x<think>\n the",
        "<|im_end|> [PAD0]",
        "<think>",
    ):
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert theirs is None or ids == theirs(text), text
    assert tokenizer.encode("<think>", bos=False, eos=False) == [n + 1]
    assert tokenizer.decode([n + 1]) == "<think>"
    assert n in tokenizer.encode("<|im_end|>", bos=False, eos=False, allowed_special="all")
    # The vocabulary of the file is written again as it was.
    again = tokenizer.as_gguf(n + 5)
    assert again["tokenizer.ggml.tokens"] == [*keys["tokenizer.ggml.tokens"], f"[PAD{n + 4}]"]
    kinds, before = (each["tokenizer.ggml.token_type"] for each in (again, keys))
    assert kinds[: n + 3] == before[: n + 3]


def test_the_eos_of_an_instruct_model_ends_a_turn(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.model", demo_pieces())
    own = Tokenizer(tmp_path / "tokenizer.model")
    eot = own.special_tokens["<|eot_id|>"]
    path = as_gguf(tmp_path / "tokenizer.model", tmp_path / "a.gguf", eos_token_id=eot)
    tokenizer = Tokenizer(path)
    assert tokenizer.eos_id == own.eos_id
    assert sorted(tokenizer.stop_tokens) == sorted(own.stop_tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=None), "tokenizer.ggml.model is None, not llama or gpt2"),
        (dict(model="bert"), "tokenizer.ggml.model is 'bert', not llama or gpt2"),
        (dict(tokens=None), "it has no vocabulary"),
        (dict(tokens=["", *map(str, range(639))]), "'' with id 0 is no token"),
        (dict(tokens=["a", "b"]), "it has 640 token_type for 2 tokens"),
        (dict(token_type=[1] * 639 + [9]), "it has tokens of the unknown type 9"),
        (dict(token_type=["a"] * 640), "token_type is not an array of type int"),
        (dict(pre=None), "tokenizer.ggml.pre is None: of the ways"),
        (dict(pre="qwen2"), "tokenizer.ggml.pre is 'qwen2': of the ways"),
        (dict(merges=None), "it lacks tokenizer.ggml.merges"),
        (dict(merges=["a"]), "the merge 'a' is not of two tokens"),
        (dict(bos_token_id=None), "it lacks tokenizer.ggml.bos_token_id"),
        (dict(eos_token_id=640), "tokenizer.ggml.eos_token_id is 640, and it has 640 tokens"),
        (dict(eot_token_id="x"), "eot_token_id is 'x', not of type int"),
        (dict(tokens=["a"] * 640), "it has the token 'a' 640 times"),
    ],
)
def test_what_is_no_vocabulary(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer.model", demo_pieces())
    path = as_gguf(tmp_path / "tokenizer.model", tmp_path / "a.gguf", **changes)
    with pytest.raises((TokenizerError, CheckpointError), match=message) as caught:
        Tokenizer(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(scores=[0.0]), "it has 1 scores for 380 tokens"),
        (dict(tokens=["", *map(str, range(379))]), "not a whole SentencePiece model"),
        (dict(unknown_token_id=380), "unknown_token_id is 380"),
    ],
)
def test_what_is_no_sentencepiece_vocabulary(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    path = as_gguf(tmp_path / "tokenizer.model", tmp_path / "a.gguf", **changes)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer(path)


def test_a_vocabulary_that_gguf_does_not_have(tmp_path: Path) -> None:
    library = Library(models.WordLevel({"a": 0, "b": 1}))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="has no vocabulary of this kind"):
        Tokenizer(tmp_path / "tokenizer.json").as_gguf(2)
    write_tokenizer(tmp_path / "tokenizer.model", [bytes([i]) for i in range(256)])
    with pytest.raises(TokenizerError, match="no two of its tokens make a third"):
        Tokenizer(tmp_path / "tokenizer.model").as_gguf(512)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write_keys(tmp_path / "a.gguf", {"a": 1})
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(
        "llama.gguf_reader._reader_class", package
    )  # it is kept after the first use
    with pytest.raises(CheckpointError, match=r"pip install 'llama-reference\[gguf\]'"):
        Tokenizer(path)
