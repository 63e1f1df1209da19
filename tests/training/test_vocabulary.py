"""A vocabulary trained here is a valid tokenizer.model."""

import subprocess
import sys
from pathlib import Path

import pytest

from llama.errors import TokenizerError
from llama.tokenizer import Tokenizer
from llama.training.vocabulary import train_vocabulary

TEXT = (Path(__file__).parent.parent / "test_tokenizer.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    train_vocabulary([TEXT], 600, path)
    return path


def test_size_and_special_tokens(path: Path) -> None:
    tokenizer = Tokenizer(path)
    assert tokenizer.n_words == 600 + 256
    assert tokenizer.bos_id == 600
    assert tokenizer.special_tokens["<|eot_id|>"] == 609


@pytest.mark.parametrize("text", [TEXT, "naïve 王様 \u0000\uffff 👑\r\n\t  x", "", " "])
def test_any_text_comes_back(path: Path, text: str) -> None:
    tokenizer = Tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(text, bos=False, eos=False)) == text


def test_it_compresses_what_it_was_trained_on(path: Path) -> None:
    assert len(Tokenizer(path).encode(TEXT, bos=False, eos=False)) < len(TEXT.encode()) / 2


def test_no_token_crosses_a_word(path: Path) -> None:
    for piece in (Tokenizer(path).decode([i]) for i in range(256, 600)):
        assert " " not in piece.strip(" "), piece


def test_the_same_text_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    code = "import sys; from llama.training.vocabulary import train_vocabulary as train; "
    code += "train([open(sys.argv[1], encoding='utf-8').read()], 600, sys.argv[2])"
    source = str(Path(__file__).parent.parent / "test_tokenizer.py")
    other = tmp_path / "other.model"
    subprocess.run([sys.executable, "-c", code, source, str(other)], check=True)
    assert other.read_bytes() == path.read_bytes()


def test_too_few_and_too_many_ranks(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="256 are the bytes"):
        train_vocabulary([TEXT], 256, tmp_path / "a")
    with pytest.raises(TokenizerError, match=r"merges for \d+ ranks only, but ranks is 5000"):
        train_vocabulary(["a short text, a short text"], 5000, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
