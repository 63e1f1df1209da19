"""The texts that the bundled model is trained on, and those that are held out."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llama.errors import DataError
from llama.files import read_records

FILES = ("fairy_tales.jsonl", "children_books.jsonl")
HELD_OUT_TITLES = 0.05  # of the titles of the first file
HELD_OUT_BOOKS = ("The Book of Dragons", "American Fairy Tales")
SAME_TEXT = 0.2  # share of 8-word runs that stand in another text

# Chapters that are left out, by book and title.
PREJUDICE = {
    ("Household Tales by Brothers Grimm", "The Jew Among Thorns"): "a Jew is tormented and hanged",
    ("Household Tales by Brothers Grimm", "The Good Bargain"): "a Jew is beaten and mocked",
    ("Household Tales by Brothers Grimm", "The Bright Sun Brings It to Light"): "a Jew is killed",
    ("The Grey Fairy Book", "Udea and Her Seven Brothers"): "black servants are the villains",
    ("Fairy Tales of Hans Christian Andersen", "THE JEWISH MAIDEN"): "belittles the Jewish faith",
    ("Brown Fairy Book", "What the Rose Did to the Cypress"): "black people as ugly enemies",
    ("Peter Pan", "Chapter 5 THE ISLAND COME TRUE"): "caricature of American Indians",
    ("Peter Pan", "Chapter 10 THE HAPPY HOME"): "caricature of American Indians",
    ("Peter Pan", "Chapter 12 THE CHILDREN ARE CARRIED OFF"): "caricature of American Indians",
    ("The Phoenix and the Carpet", "CHAPTER 3. THE QUEEN COOK"): "islanders as cannibals",
    ("Five Children and It", "CHAPTER 10 SCALPS"): "caricature of American Indians",
    ("The Story of Doctor Dolittle", "THE BLACK PRINCE"): "a black prince longs to be white",
    ("The Story of Doctor Dolittle", "MEDICINE AND MAGIC"): "a black prince longs to be white",
    ("The Voyages of Doctor Dolittle", "POLYNESIA"): "slurs on black people",
    ("Just So Stories", "HOW THE LEOPARD GOT HIS SPOTS"): "skin colour explained with a slur",
}
NO_TALE = re.compile(
    r"contents|illustrations|footnotes|preface|diffusion|norse mythology|norse popular tales"
    r"|ananzi stories|to my dear little phil|introduction( to .*)?",
    re.IGNORECASE,
)
# A note in brackets that stands as a paragraph of its own.
NOTE = re.compile(r"[\[(](?:From|Adapted|Translated|Taken|Footnote)?[^\])]{3,}[\])]\.?")
# Paragraphs with one of these words are left out.
SLUR = re.compile(r"\b(nigger|darky|darkies|negress)", re.IGNORECASE)


@dataclass(frozen=True)
class Tale:
    book: str
    title: str
    text: str  # a blank line is between paragraphs


@dataclass
class Corpus:
    """Tales to train on, and two kinds of tales that are held out."""

    training: list[Tale]
    held_out_titles: list[Tale]  # of books that are trained on otherwise
    held_out_books: list[Tale]


def read_corpus(folder: str | Path) -> Corpus:
    """Read FILES, JSONL files with `book`, `title` and `text`, and divide their tales.

    A hash of the title chooses the titles that are held out from the first file. Tales of the
    second file with such a title are not used, nor are tales that repeat another one. Raises
    DataError for a file that cannot be read, or a line without these keys.
    """
    tales = [list(_read(Path(folder, name))) for name in FILES]
    titles = {tale.title.casefold() for tale in tales[0]}
    order = sorted(titles, key=lambda title: hashlib.sha256(title.encode()).hexdigest())
    held_out = set(order[: round(len(order) * HELD_OUT_TITLES)])
    corpus = Corpus([], [], [])
    corpus.held_out_titles += [t for t in tales[0] if t.title.casefold() in held_out]
    known = set[int]().union(*(_runs(tale.text) for tale in corpus.held_out_titles))
    for tale in (tale for file in tales for tale in file):
        if tale.book in HELD_OUT_BOOKS:
            corpus.held_out_books.append(tale)
            known |= _runs(tale.text)
    for tale in (tale for file in tales for tale in file):
        if tale.title.casefold() in held_out or tale.book in HELD_OUT_BOOKS:
            continue
        if (tale.book, tale.title) in PREJUDICE or _is_no_tale(tale):
            continue
        runs = _runs(tale.text)
        if len(runs & known) <= SAME_TEXT * len(runs):
            known |= runs
            corpus.training.append(replace(tale, text=_cleaned(tale.text)))
    return corpus


def _is_no_tale(tale: Tale) -> bool:
    """Whether the text is a list, a preface or another text about the book.

    Five tales got the heading "FOOTNOTE" or "CONTENTS" in print. They are long.
    """
    is_misnamed = tale.title in ("FOOTNOTE", "CONTENTS") and len(tale.text) >= 12_000
    return NO_TALE.fullmatch(tale.title.strip()) is not None and not is_misnamed


def _read(path: Path) -> Iterator[Tale]:
    for number, record in read_records(path):
        keys = ("book", "title", "text")
        if not all(isinstance(record.get(key), str) for key in keys):
            raise DataError(f"{path}, line {number} must have the texts book, title and text")
        yield Tale(*(record[key] for key in keys))


def _cleaned(text: str) -> str:
    """The text without notes, and without paragraphs that have a slur."""
    paragraphs = (part.strip() for part in text.split("\n\n"))
    kept = (part for part in paragraphs if not NOTE.fullmatch(part) and not SLUR.search(part))
    return "\n\n".join(filter(None, kept))


def _runs(text: str) -> set[int]:
    """The runs of 8 words of a text, as hash values."""
    words = re.findall(r"[a-z']+", text.lower())
    return {hash(tuple(words[i : i + 8])) for i in range(len(words) - 7)}
