"""The nouns and names of the tales: what a request may ask for, and what may stand in its place."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?|[.!?,;:\"()]|--")
ARTICLES = {"a", "an", "the"}
SPEAKING = set("said cried asked answered replied exclaimed thought whispered".split())
# After one of these, or a mark, the noun before it ended its phrase.
AFTER_NOUN = set(
    "of in and was had to with that who which on at for is said came from by as were could would "
    "went did took or but when where has will so began made gave looked sat stood ran".split()
)
ENDS = {".", "!", "?"}
MALE, FEMALE = {"he", "his", "him", "himself"}, {"she", "her", "hers", "herself"}
# Nouns that no story is about.
NO_SUBJECT = set(
    "time day night morning evening moment minute hour week month year while way thing word hand "
    "head eye face voice side end place part sort kind deal bit piece lot matter fact name rest "
    "number point top bottom middle back front corner edge foot arm finger mouth ear nose heart "
    "mind manner reason case course sight sound look cry noise pair couple half quarter third "
    "first second last next other one little great good big sudden few hurry use turn step "
    "distance length moonlight whole same present best most more very poor beginning question "
    "answer chance idea thought life death world shape size state body leg knee neck shoulder "
    "breast cheek lip thumb elbow tone feeling mile yard inch pound dozen hundred thousand score "
    "instant spot full old young right left wrong rich dead living".split()
)
NO_SUBJECT_ENDINGS = ("'s", "ed", "ly", "ness", "tion", "sion", "ment", "ity", "ance", "ence")
IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "wolf": "wolves", "mouse": "mice",
    "goose": "geese", "thief": "thieves", "knife": "knives", "leaf": "leaves", "wife": "wives",
    "ox": "oxen", "sheep": "sheep", "fish": "fish", "deer": "deer", "elf": "elves",
    "loaf": "loaves", "calf": "calves", "tooth": "teeth", "shelf": "shelves",
}  # fmt: skip


@dataclass(frozen=True)
class Noun:
    """A noun, or the name of a person.

    kind: "he", "she" or "they" for one who speaks, after the pronouns that follow; else "it".
    count: its occurrences in the tales. tales: the number of tales that have it.
    """

    word: str
    kind: str
    count: int
    tales: int


class Lexicon:
    """The nouns and the names of the tales, found by counts.

    A noun often ends a phrase after "a", "an" or "the". A name has a capital inside a sentence, no
    other form, and speaks.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        total, phrases, indefinite, spoken, inside = (Counter[str]() for _ in range(5))
        tales: Counter[str] = Counter()
        pronouns: dict[str, Counter[str]] = defaultdict(Counter)
        n_tales = 0
        for text in texts:
            n_tales += 1
            words = ["."] * 3 + WORD.findall(text) + ["."] * 2
            tales.update(set(words))
            total.update(words)
            subject = ""  # the last noun or name of this sentence, to which a pronoun may refer
            for i in range(3, len(words) - 2):
                word, before, after = words[i], words[i - 1], words[i + 1]
                if word in ENDS:
                    subject = ""
                elif word in MALE or word in FEMALE:
                    pronouns[subject]["she" if word in FEMALE else "he"] += 1
                elif word[0].isupper():
                    if before[0].islower() or before == ",":
                        inside[word] += 1
                        subject = word
                    spoken[word] += before in SPEAKING or after in SPEAKING
                elif after in AFTER_NOUN or not after[0].isalpha():  # the end of a phrase
                    article = before.lower()
                    if article not in ARTICLES and before[0].islower():
                        article = words[i - 2].lower()  # an adjective is between
                    if article in ARTICLES:
                        phrases[word] += 1
                        indefinite[word] += article != "the"
                        spoken[word] += words[i - 2] in SPEAKING or after in SPEAKING
                        subject = word
        self.n_tales = n_tales

        def kind(word: str) -> str:
            if spoken[word] < max(2, 0.005 * total[word]):
                return "it"
            he, she = pronouns[word]["he"], pronouns[word]["she"]
            return "she" if she > 2 * he else "he" if he > 2 * she else "they"

        self.nouns = {
            word: Noun(word, kind(word), total[word], tales[word])
            for word, count in phrases.items()
            if count >= 8 and indefinite[word] >= 3 and count > 0.25 * total[word]
            if word not in NO_SUBJECT and len(word) > 2 and not word.endswith(NO_SUBJECT_ENDINGS)
            if not (word.endswith("ing") and total[word[:-3]] + total[word[:-3] + "e"] > 5)
        }
        self.names = {
            word: Noun(word, kind(word), total[word], tales[word])
            for word, count in inside.items()
            if count >= 5 and spoken[word] >= 3 and total[word.lower()] == 0
            if "'" not in word and kind(word) in ("he", "she") and len(word) > 2
        }


def plural(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    for ending, last in IRREGULAR.items():
        if len(ending) > 2 and word.endswith(ending):
            return word.removesuffix(ending) + last
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeio' else 'a'} {word}"


def exchange(text: str, others: Mapping[str, str]) -> str:
    """The text with other nouns or names, in all their forms; "a" and "an" go with them."""
    forms = {}
    for old, new in others.items():
        pairs = [(old, new)] if old[0].isupper() else [(plural(old), plural(new)), (old, new)]
        for a, b in pairs:
            forms[a], forms[a.capitalize()] = b, b.capitalize()

    def replaced(match: re.Match[str]) -> str:
        article, word = match[1] or "", forms[match[2]]
        if article:
            first = article[0]
            article = first + ("n " if word[0].lower() in "aeio" else " ")
        return article + word

    either = "|".join(map(re.escape, sorted(forms, key=len, reverse=True)))
    return re.sub(rf"\b([Aa]n? )?\b({either})\b", replaced, text)
