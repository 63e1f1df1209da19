"""Code Llama: folders as Meta shipped them, and infilling."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import make_model, write_meta
from helpers.ranks import run_ranks
from helpers.texts import ANY_TEXT, sentencepiece_model
from hypothesis import given

from llama import Llama, Tokenizer
from llama.checkpoints.inspect import describe
from llama.errors import GenerationError
from llama.infilling import InfillingFormat
from llama.tokenizer_files.meta import INFILLING_TOKENS

VOCAB = 400


def model_file(**options: Any) -> bytes:
    return sentencepiece_model(vocab_size=VOCAB, hard_vocab_limit=False, **options)


@pytest.fixture(scope="session", params=["control_symbols", "user_defined_symbols"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    path = tmp_path_factory.mktemp("codellama") / "tokenizer.model"
    path.write_bytes(model_file(**{request.param: ",".join(INFILLING_TOKENS)}))
    return Tokenizer(path)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A folder like Code Llama's: two shards, no vocab_size in params.json."""
    model = make_model(vocab_size=tokenizer.n_words, rope_theta=1e6, embedding_shard_dim=1)
    write_meta(tmp_path / "code", model, 2)
    params = json.loads((tmp_path / "code" / "params.json").read_text())
    del params["vocab_size"]
    (tmp_path / "code" / "params.json").write_text(json.dumps(params))
    (tmp_path / "code" / "tokenizer.model").write_bytes(tokenizer.model_path.read_bytes())
    return tmp_path / "code"


def metas_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text without its first blank: Meta's code encodes it behind a character that no piece
    contains, and removes the ids of blank and character."""
    lead = tokenizer.encode("\N{WHITE SMILING FACE}", bos=False, eos=False)
    behind = tokenizer.encode(f"\N{WHITE SMILING FACE}{text}", bos=False, eos=False)
    return behind[len(lead) :]


@given(prefix=ANY_TEXT, suffix=ANY_TEXT)
def test_the_order_of_a_prompt(tokenizer: Tokenizer, prefix: str, suffix: str) -> None:
    pre, mid, suf, _ = (tokenizer.special_tokens[name] for name in INFILLING_TOKENS)
    before = tokenizer.encode(prefix, bos=False, eos=False)
    after = metas_ids(tokenizer, suffix)
    prompts = InfillingFormat(tokenizer)
    assert prompts.encode_prompt(prefix, suffix) == [
        *(tokenizer.bos_id, pre), *before, suf, *after, mid,
    ]  # fmt: skip
    assert prompts.encode_prompt(prefix, suffix, suffix_first=True) == [
        *(tokenizer.bos_id, pre, suf), *after, mid, *before,
    ]  # fmt: skip


def test_real_ids_without_the_first_blank(llama2_tokenizer_path: Path, tmp_path: Path) -> None:
    """The vocabulary of Code Llama 7B is Llama 2's and 16 more: here its ids behind a newline."""
    tokenizer = Tokenizer(llama2_tokenizer_path)
    newline = tokenizer.encode("\n", bos=False, eos=False)
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choices(" \n\tdef(x):return_1234+é日", k=rng.randrange(20)))
        behind = tokenizer.encode(f"\n{text}", bos=False, eos=False)[len(newline) :]
        assert behind == metas_ids(tokenizer, text)


def test_infilling(folder: Path) -> None:
    llama = Llama.build(folder, max_seq_len=64)
    options: dict[str, Any] = dict(temperature=0, max_gen_len=6)
    prefixes, suffixes = ["the quick", "  lazy"], [" jumps", "dog"]
    found = llama.infilling(prefixes, suffixes, logprobs=True, **options)
    prompts = InfillingFormat(llama.tokenizer)
    for result, prefix, suffix in zip(found, prefixes, suffixes, strict=True):
        (ids,), _ = llama.generate([prompts.encode_prompt(prefix, suffix)], **options)
        # SentencePiece drops a leading blank. Behind another text it keeps it.
        lead = llama.tokenizer.encode("x", bos=False, eos=False)
        assert result["generation"] == llama.tokenizer.decode([*lead, *ids]).removeprefix("x")
        assert result["full_text"] == prefix + result["generation"] + suffix
        assert len(result["tokens"]) == len(result["logprobs"]) == len(ids)
    suffix_first = llama.text_infilling(prefixes, suffixes, suffix_first=True, **options)
    assert all(set(result) == {"generation", "full_text"} for result in suffix_first)
    assert [result["generation"] for result in suffix_first] != [r["generation"] for r in found]
    several = llama.infilling(prefixes, suffixes, n=2, max_gen_len=3)
    assert [result["full_text"][:3] for result in several] == ["the", "the", "  l", "  l"]


def test_infilling_ends_at_its_own_token(folder: Path) -> None:
    llama = Llama.build(folder, max_seq_len=64)
    end = llama.tokenizer.special_tokens["▁<EOT>"]
    (result,) = llama.infilling(["the"], ["dog"], logit_bias={end: 1e6})
    assert result["generation"] == ""


def logits(folder: Path) -> torch.Tensor:
    return Llama.build(folder, max_seq_len=64).model(torch.arange(3, 23)[None], 0)


@pytest.mark.parametrize("n", [1, 2])
def test_the_vocabulary_is_the_files(folder: Path, n: int, tmp_path: Path) -> None:
    want = logits(folder)
    assert want.shape[-1] == Llama.build(folder).tokenizer.n_words
    for found in run_ranks(n, tmp_path, logits, folder):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    assert re.search(rf"output +{want.shape[-1]} × 128", describe(str(folder)))


def test_what_cannot_be_filled(folder: Path, tmp_path: Path) -> None:
    llama = Llama.build(folder, max_seq_len=64)
    with pytest.raises(GenerationError, match="1 prefixes, but 2 suffixes"):
        llama.infilling(["a"], ["b", "c"])
    with pytest.raises(GenerationError, match="must be lists of strings, not strings"):
        llama.infilling("a", ["b"])
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file())
    with pytest.raises(GenerationError, match=f"{path} has no ▁<PRE>: only Code Llama"):
        InfillingFormat(Tokenizer(path))


def test_a_text_is_never_a_marker(tokenizer: Tokenizer) -> None:
    """The library may encode the text of a user-defined piece as that piece."""
    prompts = InfillingFormat(tokenizer)
    try:
        ids = prompts.encode_prompt("a <SUF> b", "c")
    except GenerationError as error:
        assert str(error) == "the prefix contains ▁<SUF>, which infilling reserves"  # noqa: PT017
    else:
        assert ids.count(tokenizer.special_tokens["▁<SUF>"]) == 1
