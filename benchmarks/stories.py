"""Measure the stories of small models: whether they are about what was asked, and how they read.

python scripts/train_bundled.py texts CORPUS texts
python benchmarks/stories.py llama/bundled another_folder --texts texts --out stories.json

Every model tells three stories about each pair of things, with the same requests and seeds.
"""

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fire
from processor import processor

from llama import Llama
from llama.errors import DataError
from llama.evaluation.perplexity import score
from llama.training.documents import read_documents

# Requests name two of these things. No request in the training data of the bundled model names one
# of the third group: see `is_never_asked` in scripts/bundled_dialogs.py. (The first bundled models
# were trained with a lower limit there, and with requests that name a veil.)
PAIRS: dict[str, list[str]] = {
    "common": [
        "fox king", "sailor island", "wolf forest", "queen mirror", "giant castle", "cat mouse",
        "princess dragon", "miller donkey", "witch tower", "fisherman fish", "bear hunter",
        "horse sword", "girl ring", "shepherd sheep", "thief palace", "dog bone", "frog well",
        "old_woman goose", "soldier tree", "bird apple",
    ],
    "other": [
        "owl bell", "clock garden", "lamp spider", "bridge rabbit", "teacher kite", "boat turtle",
        "candle window", "baker wheel", "squirrel snowman", "train elephant", "doll attic",
        "letter postman", "cloud whale", "drum soldier", "cheese moon", "umbrella duck",
        "book giraffe", "chimney robin", "carpet market", "piano bee",
    ],
    "never asked": [
        "pirate balloon", "crocodile jar", "pony violin", "hawk shield", "hedgehog mattress",
        "sparrow pan", "stork volcano", "sultan turban", "butcher nail", "raven cauldron",
        "ogre mare", "minstrel veil", "apprentice stew", "fiddler thorn", "tutor triangle",
        "enchanter echo", "peddler pickaxe", "keeper asylum", "pupil gallows", "raven fringe",
    ],
}  # fmt: skip
REQUESTS = [
    "Tell me a story about {} and {}",
    "Write a short tale with {} and {} in it.",
    "I would like to hear a story about {} and {}",
]
SEED = 1
TEMPERATURE = 0.6
RECITED = 12  # words of a run that stands in the training text
REPEATED = 4  # words of a run that a story repeats
SENTENCE_END = re.compile(r"[.!?][\"')]*$")


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def is_in(thing: str, words: Iterable[str]) -> bool:
    """Whether the thing is among the words, alone, in a plural, or as the head of a compound."""
    forms = {thing, f"{thing}s", f"{thing}es", f"{thing[:-1]}ies", f"{thing[:-1]}ves"}
    forms |= {"mouse": {"mice"}, "goose": {"geese"}, "woman": {"women"}}.get(thing, set())
    return not forms.isdisjoint(words)


def tell(llama: Llama, pairs: Sequence[str]) -> list[tuple[list[str], str]]:
    """Ask for a story about each pair in three ways. Returns the things and the stories."""
    asked, dialogs = [], []
    for pair in pairs:
        things = [thing.replace("_", " ") for thing in pair.split()]
        named = [f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in things]
        for request in REQUESTS:
            asked.append([thing.split()[-1] for thing in things])
            dialogs.append([{"role": "user", "content": request.format(*named)}])
    answers = llama.chat_completion(dialogs, temperature=TEMPERATURE, seed=SEED)  # type: ignore[arg-type]
    return [
        (things, answer["generation"]["content"])
        for things, answer in zip(asked, answers, strict=True)
    ]


def measure(stories: Sequence[tuple[list[str], str]], known: set[int]) -> dict[str, float]:
    """The figures of some stories. known: hash values of the runs of the training text."""
    found = [[is_in(thing, words_of(story)) for thing in things] for things, story in stories]
    words = [words_of(story) for _, story in stories]
    short = [run for one in words for run in runs(one, REPEATED)]
    distinct = sum(len(set(runs(one, REPEATED))) for one in words)
    long = [run for one in words for run in runs(one, RECITED)]
    return {
        "things": statistics.mean(found for pair in found for found in pair),
        "both": statistics.mean(all(pair) for pair in found),
        "distinct 4-grams": distinct / max(1, len(short)),
        "recited 12-grams": sum(hash(run) in known for run in long) / max(1, len(long)),
        "end in a sentence": statistics.mean(
            bool(SENTENCE_END.search(story.strip())) for _, story in stories
        ),
        "words": statistics.mean(map(len, words)),
    }


def main(*folders: str, texts: str, out: str | None = None, pairs: int = 20, show: int = 0) -> None:
    """Measure each model and print the figures side by side.

    Args:
        folders: checkpoint folders of the models.
        texts: folder that `scripts/train_bundled.py texts` wrote: training.jsonl,
            held_out_titles.jsonl and held_out_books.jsonl.
        out: a file, to which the figures are written as JSON.
        pairs: how many pairs of things of each group to ask for.
        show: how many stories of each group to print.
    """
    if not folders:
        raise DataError("name at least one checkpoint folder")
    known = {
        hash(run)
        for text in read_documents([Path(texts, "training.jsonl")])
        for run in runs(words_of(text), RECITED)
    }
    figures: dict[str, dict[str, Any]] = {}
    for folder in folders:
        llama = Llama.build(folder, device="cpu", dtype="float32", max_batch_size=12)
        groups = {name: tell(llama, group[:pairs]) for name, group in PAIRS.items()}
        rows: dict[str, Any] = {name: measure(told, known) for name, told in groups.items()}
        rows["all"] = measure([story for told in groups.values() for story in told], known)
        for kind in ("held_out_titles", "held_out_books"):
            held_out = read_documents([Path(texts, f"{kind}.jsonl")])
            rows["all"][f"bits a byte, {kind.replace('_', ' ')}"] = score(
                llama, held_out
            ).bits_per_byte
        figures[folder] = rows
        print(f"\n{folder}")
        for name, row in rows.items():
            print(f"  {name:12}" + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
        for name, told in groups.items():
            for things, story in told[:show]:
                print(f"\n[{name}: {', '.join(things)}]\n{story}")
    if out is not None:
        content = {"processor": processor(), "stories": sum(map(len, groups.values()))}
        Path(out).write_text(json.dumps(content | {"models": figures}, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
