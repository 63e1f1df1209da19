"""The training data of the bundled model: which tales, which excerpts, which requests."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from bundled_corpus import HELD_OUT_BOOKS, PREJUDICE, read_corpus
from bundled_dialogs import DialogSource, is_never_asked
from bundled_excerpts import cut, sentences
from bundled_loader import BATCH, TURNS, StoryLoader
from bundled_words import exchange, plural
from helpers.tales import TALES, made_up_tale, write_corpus

from llama.chat_format import ChatFormat
from llama.checkpoints.folder import BUNDLED
from llama.errors import DataError
from llama.tokenizer import Tokenizer
from llama.training.token_files import IGNORED


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(BUNDLED / "tokenizer.model")


@pytest.fixture(scope="module")
def source(corpus: Path, tokenizer: Tokenizer) -> DialogSource:
    return DialogSource(read_corpus(corpus).training, ChatFormat(tokenizer))


# ---- tales --------------------------------------------------------------------------------------


def test_every_tale_is_trained_on_or_held_out(corpus: Path) -> None:
    tales = read_corpus(corpus)
    assert len(tales.held_out_titles) == round(TALES * 0.05)
    assert len(tales.training) + len(tales.held_out_titles) == 2 * TALES
    titles = {tale.title for tale in tales.training}
    assert titles.isdisjoint(tale.title for tale in tales.held_out_titles)


def test_what_is_left_out(tmp_path: Path) -> None:
    book, title = next(iter(PREJUDICE))
    repeated = made_up_tale(1)
    added = [
        (HELD_OUT_BOOKS[0], "A chapter", made_up_tale(1001)),
        (book, title, made_up_tale(1002)),
        ("A book", "PREFACE", made_up_tale(1003)),
        ("A book", "The same tale", f"{repeated}\n\n{made_up_tale(1004)[:200]}"),
        ("A book", "With a note", f"{made_up_tale(1005)}\n\n[From a book of tales.]"),
    ]
    write_corpus(tmp_path)
    with (tmp_path / "children_books.jsonl").open("a", encoding="utf-8") as file:
        for entry in added:
            record = dict(zip(("book", "title", "text"), entry, strict=True))
            file.write(json.dumps(record) + "\n")
    tales = read_corpus(tmp_path)
    assert [tale.title for tale in tales.held_out_books] == ["A chapter"]
    kept = {tale.title: tale.text for tale in tales.training}
    assert kept.keys().isdisjoint(["A chapter", title, "PREFACE", "The same tale"])
    assert kept["With a note"] == made_up_tale(1005)


def test_a_line_without_a_title_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (tmp_path / "fairy_tales.jsonl").write_text('{"text": "Once."}\n')
    with pytest.raises(DataError, match=r"fairy_tales\.jsonl, line 1"):
        read_corpus(tmp_path)


# ---- words and excerpts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "many"),
    [("fox", "foxes"), ("lady", "ladies"), ("boy", "boys"), ("wolf", "wolves"), ("bell", "bells"),
     ("fisherman", "fishermen"), ("mouse", "mice"), ("witch", "witches")],
)  # fmt: skip
def test_plural(word: str, many: str) -> None:
    assert plural(word) == many


def test_exchange_replaces_every_form() -> None:
    text = "A fox saw an old wolf. The Wolf and the foxes; an owl came to a wolf. Foxglove."
    expected = "An owl saw an old ant. The Ant and the owls; an owl came to an ant. Foxglove."
    assert exchange(text, {"fox": "owl", "wolf": "ant"}) == expected
    assert exchange("Hans and Hansel", {"Hans": "Peter"}) == "Peter and Hansel"


def test_sentences() -> None:
    text = 'He saw Mr. Fox. "Who is there?" he asked. "Me!" "You?"'
    assert sentences(text) == ["He saw Mr. Fox.", '"Who is there?" he asked.', '"Me!"', '"You?"']


def test_an_excerpt_ends_with_a_sentence() -> None:
    paragraphs = ["One is here.", "Two are here. They stay.", "And then they said:", '"No."']
    assert cut(paragraphs, 5, 30) == "One is here."
    assert cut(paragraphs, 20, 30) == "One is here.\n\nTwo are here."
    assert cut(paragraphs, 5, 60) == "One is here.\n\nTwo are here. They stay."
    assert cut(paragraphs, 5, 500) == "\n\n".join(paragraphs)
    assert cut(paragraphs, 50, 51) is None


# ---- dialogs ------------------------------------------------------------------------------------


def test_the_lexicon_knows_beings_and_things(source: DialogSource) -> None:
    nouns = source.lexicon.nouns
    assert nouns["garden"].kind == "it"
    assert nouns["fox"].kind != "it"
    assert nouns.keys().isdisjoint(["old", "saw", "there"])


@pytest.mark.parametrize("room", [256, 512, 1024])
def test_dialogs_fit_and_only_answers_are_learned(
    source: DialogSource, tokenizer: Tokenizer, room: int
) -> None:
    rng = random.Random(1)
    found = [dialog for _ in range(200) if (dialog := source.draw(rng, room))]
    assert len(found) > 20
    for dialog in found:
        assert len(dialog) <= room
        learned = [t for t, is_learned in zip(dialog.tokens, dialog.learned, strict=True)
                   if is_learned]  # fmt: skip
        answers = tokenizer.decode(learned).split("<|eot_id|>")
        assert answers[-1] == ""
        assert all(answer.strip() == answer != "" for answer in answers[:-1])


def test_a_story_has_the_things_that_its_request_names(
    source: DialogSource, tokenizer: Tokenizer
) -> None:
    rng = random.Random(1)
    checked = 0
    for _ in range(600):
        dialog = source.draw(rng, 256)
        text = tokenizer.decode(dialog.tokens) if dialog else ""
        match = re.search(r"about an? (\w+) and an? (\w+)[^<]*<\|eot_id\|>(.+)", text, re.DOTALL)
        if match:
            checked += 1
            nouns = source.lexicon.nouns
            for word in match.group(1, 2):
                assert word in match[3].lower() or plural(word) in match[3].lower()
                assert word not in nouns or not is_never_asked(nouns[word])
    assert checked > 10


# ---- batches ------------------------------------------------------------------------------------


def test_a_loader_continues_where_another_stopped(corpus: Path, tokenizer: Tokenizer) -> None:
    tales = read_corpus(corpus).training
    loader, other = StoryLoader(tales, tokenizer), StoryLoader(tales, tokenizer)
    for _ in range(3):
        loader.next_batch()
    state = loader.state_dict()
    other.load_state_dict(state)
    for _ in TURNS:
        inputs, targets = loader.next_batch()
        assert inputs.numel() == targets.numel() == BATCH
        assert (targets != IGNORED).float().mean() > 0.4
        again = other.next_batch()
        assert torch.equal(again[0], inputs)
        assert torch.equal(again[1], targets)
