"""Excerpts of the tales: they begin where a tale or a scene begins, and end with a sentence."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

# The first words of a paragraph that begins a scene.
OPENING = re.compile(
    r"Once|There (was|were|lived|once|came|stood|is)|Long|In (a|an|the|those|old|olden) |A |An |"
    r"One (fine |cold |beautiful )?(day|morning|night|evening|summer|winter|spring)|"
    r"It (was|happened|chanced)|Early|Far |Many |The next|Next |Now there|Now the|Now it|Some |"
    r"At (first|last|night)|When the|After |On (a|the) |As the|Soon |Suddenly|By and by|Two |"
    r"Three |Every "
)
NO_OPENING = re.compile(
    r"[\"'(]|(He|She|They|It|But|And|Then|So|This|These|That|I|We|You|His|Her)\b"
)
SENTENCE_END = re.compile(r"(?<=[.!?])[\"']*(\s+)(?=[\"']*[A-Z])")
ABBREVIATION = re.compile(r"\b(Mr|Mrs|Dr|St|Ms|No|vol|Mme|Messrs)\.$")
LAST = re.compile(r"[.!?][\"']*$")


@dataclass(frozen=True)
class Excerpt:
    text: str
    title: str | None  # of the tale, if the excerpt is its beginning


class Excerpts:
    """Draws random excerpts of tales."""

    def __init__(self, tales: Sequence[tuple[str, str]]) -> None:
        """tales: title and text of each."""
        self.titles = [title for title, _ in tales]
        self.tales = [[part.strip() for part in text.split("\n\n")] for _, text in tales]
        self.openings, self.others = [], []  # (tale, paragraph)
        for i, paragraphs in enumerate(self.tales):
            for k, paragraph in enumerate(paragraphs[1:], start=1):
                if OPENING.match(paragraph):
                    self.openings.append((i, k))
                elif not NO_OPENING.match(paragraph) and paragraph[:1].isupper():
                    self.others.append((i, k))

    def draw(self, rng: random.Random, shortest: int, longest: int) -> Excerpt | None:
        """An excerpt of `shortest` to `longest` characters; None if the place has none."""
        kind = rng.random()
        if kind < 0.2:
            tale, start = rng.randrange(len(self.tales)), 0
        else:
            tale, start = rng.choice(self.openings if kind < 0.7 else self.others)
        paragraphs = self.tales[tale][start:]
        text = cut(paragraphs, shortest, longest)
        if text is None:
            return None
        return Excerpt(text, self.titles[tale] if start == 0 else None)


def cut(paragraphs: Sequence[str], shortest: int, longest: int) -> str | None:
    """The most paragraphs of at most `longest` characters. If they have fewer than `shortest`,
    sentences of the next paragraph follow. None if no cut gives `shortest` to `longest`."""
    taken: list[str] = []
    length = 0
    for paragraph in paragraphs:
        if length + len(paragraph) > longest:
            break
        taken.append(paragraph)
        length += len(paragraph) + 2
    while taken and not LAST.search(taken[-1]):
        length -= len(taken.pop()) + 2
    if length < shortest and len(taken) < len(paragraphs):
        part = ""
        for sentence in sentences(paragraphs[len(taken)]):
            if length + len(part) + len(sentence) + 1 > longest:
                break
            part = f"{part} {sentence}".strip()
        if not part or not is_balanced(part) or not LAST.search(part):
            return None
        taken.append(part)
        length += len(part)
    return "\n\n".join(taken) if length >= shortest else None


def sentences(paragraph: str) -> list[str]:
    found: list[str] = []
    start = 0
    for match in SENTENCE_END.finditer(paragraph):
        if not ABBREVIATION.search(paragraph[: match.start(1)]):
            found.append(paragraph[start : match.start(1)])
            start = match.end(1)
    return [*found, paragraph[start:]]


def is_balanced(text: str) -> bool:
    """Whether every quotation that begins in the text also ends in it."""
    opened = len(re.findall(r"(?:^|[\s(-])'(?=\w)", text))
    closed = len(re.findall(r"[.,!?;:-]'", text))
    return text.count('"') % 2 == 0 and opened == closed
