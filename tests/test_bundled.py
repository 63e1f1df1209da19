"""The bundled model: its files, its size, and that it generates English."""

import re

import pytest

from llama import Llama
from llama.checkpoints.folder import BUNDLED
from llama.evaluation.perplexity import score

COMMON = set(
    """the and of to a in that it was he she his her him for with as had but at on they be not so
    were is all said when there from this one which who them then if by out up would into no
    could their what down came went an or have you i me my your""".split()
)


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(dtype="float32", device="cpu")


def test_it_is_small_and_in_two_shards() -> None:
    names = sorted(path.name for path in BUNDLED.iterdir())
    assert names == [
        "README.md", "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model",
    ]  # fmt: skip
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) <= 16_000_000


def test_it_has_read_english(llama: Llama) -> None:
    # A text that is in none of its books, in their language.
    text = (
        "There was once a poor woodcutter who had two children, a boy and a girl. Every morning "
        "he went into the forest, and every evening he came home so tired that he fell asleep "
        "over his supper. 'What shall become of us?' said his wife."
    )
    plain, shuffled = (score(llama, [t]) for t in (text, " ".join(sorted(text.split()))))
    assert plain.bits_per_byte < 1.6
    assert shuffled.bits_per_byte > 1.5 * plain.bits_per_byte


def test_it_continues_a_tale_in_words(llama: Llama) -> None:
    (greedy,) = llama.text_completion(["Once upon a time"], temperature=0, max_gen_len=64)
    text = greedy["generation"]
    words = re.findall(r"[a-z]+", text.lower())
    assert len(words) > 30
    # About half of the words of an English text are among these.
    assert sum(word in COMMON for word in words) / len(words) > 0.4


def test_it_tells_a_story_and_stops(llama: Llama) -> None:
    question = "Tell me a story about a fox and a king"
    (answer,) = llama.chat_completion([[{"role": "user", "content": question}]], temperature=0.6)
    text = answer["generation"]["content"]
    tokens = llama.tokenizer.encode(text, bos=False, eos=False)
    assert 40 < len(tokens) < 960  # shorter than the limit: a stop token ended it
    assert text.rstrip()[-1] in ".!?'\":;-"


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Who are you?", "fairy tales"),
        ("What can you do?", "story"),
        ("How big are you?", "six million"),
        ("What is the capital of France?", "do not know"),
    ],
)
def test_it_knows_a_little_about_itself(llama: Llama, question: str, word: str) -> None:
    (answer,) = llama.chat_completion([[{"role": "user", "content": question}]], temperature=0)
    assert word in answer["generation"]["content"]
