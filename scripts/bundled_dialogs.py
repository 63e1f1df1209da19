"""The dialogs that the bundled model is trained on.

The request names what the story is about, and an excerpt of a tale is the answer. For many dialogs
other nouns and names are put into request and excerpt, so that the model must read the request.
"""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from bundled_corpus import Tale
from bundled_excerpts import Excerpt, Excerpts, is_balanced, sentences
from bundled_phrases import (
    ABOUT,
    AFTER_NAME,
    ASK,
    BEGIN,
    CONTINUE,
    MORE,
    NAMED,
    NAMED_KIND,
    OTHER,
    QUALITIES,
    QUALITY,
    REPEAT,
    STORY,
    SYSTEM,
    TALK,
    TITLED,
)
from bundled_words import WORD, Lexicon, Noun, exchange, with_article

from llama.chat_format import ChatFormat, Dialog, Message
from llama.training.chat_data import Example, encode_dialog

SHORTEST_STORY = 130  # tokens of a dialog with a story
CHARACTERS = 3.7  # of a token, at least
FIRST_WORDS = 30  # a subject stands among the first words of the story,
OFTEN = 2  # and at least so often in it
EXCHANGED = 0.7  # fraction of the subjects that another noun replaces
RENAMED = 0.35  # fraction of the stories whose persons get other names
REPEATED = 0.05  # fraction of the draws that only repeat words of the request
NEVER_ASKED = 0.04  # fraction of the rarer nouns that no request names, for the benchmark
RARE = 100  # tales that have a rarer noun, at most


class DialogSource:
    """Draws random dialogs. Their stories are excerpts of the given tales."""

    def __init__(self, tales: Sequence[Tale], formatter: ChatFormat) -> None:
        self.formatter = formatter
        self.excerpts = Excerpts([(tale.title, tale.text) for tale in tales])
        self.lexicon = lexicon = Lexicon([tale.text for tale in tales])
        asked = [noun for noun in lexicon.nouns.values() if not is_never_asked(noun)]
        # What may stand in the place of a noun or a name: those of the same kind, and how likely.
        self.nouns = {
            kind: _weighted([noun for noun in asked if noun.kind in kinds])
            for kind, kinds in {
                "he": ("he", "they"),
                "she": ("she", "they"),
                "they": ("he", "she", "they"),
                "it": ("it",),
            }.items()
        }
        self.names = {
            kind: _weighted([name for name in lexicon.names.values() if name.kind == kind])
            for kind in ("he", "she")
        }

    def draw(self, rng: random.Random, room: int) -> Example | None:
        """Draw one dialog and encode it. None if it has more than `room` tokens, or if the excerpt
        that was drawn does not serve."""
        if room < SHORTEST_STORY or rng.random() < 0.03:
            questions, answer = rng.choice(TALK)
            dialog: Dialog | None = [
                _user(_vary(rng, rng.choice(questions.split("|")))),
                _assistant(answer),
            ]
        elif rng.random() < REPEATED:
            dialog = self._repeated(rng)
        else:
            dialog = self._story(rng, room)
        if dialog is None:
            return None
        if rng.random() < 0.08:
            dialog = [{"role": "system", "content": rng.choice(SYSTEM)}, *dialog]
        example = encode_dialog(self.formatter, dialog)
        return example if len(example) <= room else None

    def _story(self, rng: random.Random, room: int) -> Dialog | None:
        """A story of up to `room` tokens, after a request of one kind. Of the draws, 8% are
        retold, 3% have no subject, 11% are to continue, up to 4% have a title, 10% a name, and the
        rest subjects. Many draws do not serve."""
        longest = (room - 50) * CHARACTERS
        shortest = longest * rng.uniform(0.4, 0.85)
        kind = rng.random()
        if kind < 0.08:
            return self._retold(rng, longest / 2)
        excerpt = self.excerpts.draw(rng, int(shortest), int(longest))
        if excerpt is None:
            return None
        if rng.random() < RENAMED:
            excerpt = self._renamed(rng, excerpt)
        if kind < 0.11:
            return [_user(self._request(rng, excerpt.text)), _assistant(excerpt.text)]
        if kind < 0.16:
            return self._continued(rng, excerpt.text)
        if kind < 0.22:
            return self._begun(rng, excerpt.text)
        if kind < 0.26 and excerpt.title is not None and is_plain(excerpt.title):
            title = _vary(rng, rng.choice(TITLED).format(_as_title(excerpt.title)))
            return [_user(title), _assistant(excerpt.text)]
        if kind < 0.36:
            return self._of_name(rng, excerpt.text)
        dialog = self._about(rng, excerpt.text)
        return self._in_turns(rng, dialog) if dialog is not None and kind > 0.92 else dialog

    def _repeated(self, rng: random.Random) -> Dialog:
        """Some nouns to say again. The model learns to copy from the request sooner than from
        stories, because here nothing else predicts the words."""
        nouns, weights = self.nouns[rng.choice(["it", "they"])]
        words = rng.choices(nouns, cum_weights=weights, k=rng.randint(2, 30))
        listed = ", ".join(noun.word for noun in words)
        return [_user(rng.choice(REPEAT).format(listed)), _assistant(listed)]

    # ---- requests -----------------------------------------------------------------------------

    def _request(self, rng: random.Random, text: str, about: str = "") -> str:
        """A request for a story: "Tell me a short story about a fox and a king"."""
        words = len(text.split())
        size = ""
        if rng.random() < 0.3:
            size = "very short " if words < 75 else "short " if words < 140 else ""
            size = "long " if words > 350 else size
        ask, story = rng.choice(ASK), f"a {size}{rng.choice(STORY)} {about}".strip()
        if ask.startswith("{}"):
            story = story[0].upper() + story[1:]
        return _vary(rng, ask.format(story))

    def _about(self, rng: random.Random, text: str) -> Dialog | None:
        """A request that names one, two or three subjects of the text."""
        wanted = rng.choice([1, 1, 2, 2, 2, 2, 3])
        subjects = self._subjects(rng, text, self.lexicon.nouns, wanted)
        if len(subjects) < min(2, wanted):
            return None
        others: dict[str, str] = {}
        for noun in subjects:
            if rng.random() < EXCHANGED and (other := self._other(rng, noun, text, others)):
                others[noun.word] = other
        text = exchange(text, others) if others else text
        words = [others.get(noun.word, noun.word) for noun in subjects]
        if rng.random() < 0.03:
            request = f"Write a story. Use these words: {', '.join(words)}"
            return [_user(_vary(rng, request)), _assistant(text)]
        article = rng.random()
        named = [f"the {word}" if article < 0.06 else with_article(word) for word in words]
        about = rng.choice(ABOUT).format(_joined(named))
        return [_user(self._request(rng, text, about)), _assistant(text)]

    def _of_name(self, rng: random.Random, text: str) -> Dialog | None:
        """A request that names a person of the text."""
        found = self._subjects(rng, text, self.lexicon.names, 1)
        if not found:
            return None
        (name,) = found
        word = name.word
        if rng.random() < 0.7 and (other := self._other(rng, name, text, {})):
            text, word = exchange(text, {word: other}), other
        beings = [
            noun
            for noun in self._subjects(rng, text, self.lexicon.nouns, 2)
            if noun.kind in (name.kind, "they")
        ]
        if beings and rng.random() < 0.5:
            about = rng.choice(NAMED_KIND).format(a=with_article(beings[0].word), name=word)
        elif rng.random() < 0.25:
            after = rng.choice(AFTER_NAME).format(word)
            request = self._request(rng, text).rstrip("?.")
            return [_user(f"{request}. {after}."), _assistant(text)]
        else:
            about = rng.choice(NAMED).format(word)
        return [_user(self._request(rng, text, about)), _assistant(text)]

    def _continued(self, rng: random.Random, text: str) -> Dialog | None:
        """A first sentence or two, and what follows them."""
        paragraphs = text.split("\n\n")
        first = sentences(paragraphs[0])
        count = min(len(first), rng.choice([1, 1, 2, 3]))
        if not is_balanced(" ".join(first[:count])):
            count = len(first)
        rest = [" ".join(first[count:]), *paragraphs[1:]]
        answer = "\n\n".join(part for part in rest if part)
        if len(answer) < 200:
            return None
        return [_user(rng.choice(CONTINUE).format(" ".join(first[:count]))), _assistant(answer)]

    def _begun(self, rng: random.Random, text: str) -> Dialog:
        """A first sentence, and a story that begins with it."""
        first = sentences(text.split("\n\n")[0])[0]
        return [_user(rng.choice(BEGIN).format(first)), _assistant(text)]

    def _in_turns(self, rng: random.Random, dialog: Dialog) -> Dialog:
        """The dialog with its answer divided into two or three."""
        question, answer = dialog
        paragraphs = answer["content"].split("\n\n")
        count = min(len(paragraphs), rng.choice([2, 2, 3]))
        ends = [*sorted(rng.sample(range(1, len(paragraphs)), count - 1)), len(paragraphs)]
        turns, start = [question], 0
        for end in ends:
            if start:
                turns.append(_user(_vary(rng, rng.choice(MORE))))
            turns.append(_assistant("\n\n".join(paragraphs[start:end])))
            start = end
        return turns

    def _retold(self, rng: random.Random, longest: float) -> Dialog | None:
        """A story, and the same story with another subject or with a quality of its subject."""
        excerpt = self.excerpts.draw(rng, int(longest / 3), int(longest))
        dialog = self._about(rng, excerpt.text) if excerpt else None
        if dialog is None:
            return None
        text = dialog[1]["content"]
        subjects = self._subjects(rng, text, self.lexicon.nouns, 1)
        if not subjects:
            return None
        word = subjects[0].word
        if subjects[0].kind != "it" and rng.random() < 0.5:
            quality = rng.choice(QUALITIES)
            wish = rng.choice(QUALITY).format(noun=word, quality=quality)
            again = exchange(text, {word: f"{quality} {word}"})
        else:
            other = self._other(rng, subjects[0], text, {})
            if not other:
                return None
            wish = rng.choice(OTHER).format(old=word, new=with_article(other))
            again = exchange(text, {word: other})
        return [*dialog, _user(_vary(rng, wish)), _assistant(again)]

    # ---- subjects and names -------------------------------------------------------------------

    def _subjects(
        self, rng: random.Random, text: str, known: dict[str, Noun], most: int
    ) -> list[Noun]:
        """Up to `most` of the nouns or names that the text is about, in random order. Rare ones
        and frequent ones of the text are likelier."""
        words = [word for word in WORD.findall(text) if word[0].isalpha()]
        counts = Counter(words)
        early = {word if word[0].isupper() and word in known else word.lower()
                 for word in words[:FIRST_WORDS]}  # fmt: skip
        found: list[tuple[float, Noun]] = []
        for word in sorted(early & known.keys()):
            count = counts[word] + counts[word.capitalize()] * (not word[0].isupper())
            noun = known[word]
            if count >= OFTEN and not is_never_asked(noun):
                weight = math.sqrt(count) * math.log(2 * self.lexicon.n_tales / noun.tales)
                # The key of weighted sampling without replacement: Efraimidis and Spirakis 2006.
                found.append((rng.random() ** (1 / weight), noun))
        return [noun for _, noun in sorted(found, key=lambda pair: -pair[0])[:most]]

    def _other(self, rng: random.Random, noun: Noun, text: str, taken: dict[str, str]) -> str:
        """Another noun or name of the same kind, which is not in the text. Empty if none is
        found."""
        pool = self.names if noun.word[0].isupper() else self.nouns
        nouns, weights = pool[noun.kind]
        for other in rng.choices(nouns, cum_weights=weights, k=4):
            is_new = other.word not in text.lower() and other.word not in text
            if is_new and other.word not in taken.values():
                return other.word
        return ""

    def _renamed(self, rng: random.Random, excerpt: Excerpt) -> Excerpt:
        """The excerpt with other names for its persons."""
        names = self.lexicon.names
        others: dict[str, str] = {}
        for word in sorted(set(WORD.findall(excerpt.text)) & names.keys()):
            if other := self._other(rng, names[word], excerpt.text, others):
                others[word] = other
        text = exchange(excerpt.text, others) if others else excerpt.text
        return Excerpt(text, None if others else excerpt.title)


def _weighted(nouns: list[Noun]) -> tuple[list[Noun], list[float]]:
    """Nouns and the running sums of their weights, the square roots of their counts."""
    return nouns, list(accumulate(math.sqrt(noun.count) for noun in nouns))


def is_never_asked(noun: Noun) -> bool:
    """Whether no request names this noun. A hash of the word chooses."""
    is_chosen = hashlib.sha256(noun.word.encode()).digest()[0] < 256 * NEVER_ASKED
    return is_chosen and noun.tales <= RARE


def is_plain(title: str) -> bool:
    """Whether a title is that of a story, and not "CHAPTER XX" or a heading of another kind."""
    words = title.split()
    return 2 <= len(words) <= 9 and "\n" not in title and not any(
        word.upper().startswith(("CHAPTER", "FOOTNOTE", "CONTENTS", "VOYAGE")) for word in words
    )  # fmt: skip


def _as_title(title: str) -> str:
    return title.title() if title.isupper() else title


def _joined(parts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _vary(rng: random.Random, text: str) -> str:
    """The text with or without a full stop, and sometimes with a small first letter."""
    if text[-1].isalpha() and rng.random() < 0.5:
        text += "."
    return text[0].lower() + text[1:] if rng.random() < 0.1 else text


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
