"""Made-up tales in the form of the bundled model's corpus."""

import json
import random
from pathlib import Path

BEINGS = "king queen fox wolf bear tailor miller witch giant shepherd soldier dwarf".split()
THINGS = "ring tower garden clock bell lamp sword well bridge mirror apple cloak".split()
QUALITIES = "old young poor rich kind proud small tall merry sad wise brave lazy white".split()
DEEDS = "saw took lost found sold kept wanted painted hid mended carried gave".split()
PLACES = "hill river house forest field road market castle shore mountain village".split()
TALES = 60  # of each file


def made_up_tale(seed: int) -> str:
    """Twelve paragraphs about one being and one thing."""
    rng = random.Random(seed)
    being, thing = rng.choice(BEINGS), rng.choice(THINGS)

    def sentence() -> str:
        quality, deed, place = (rng.choice(words) for words in (QUALITIES, DEEDS, PLACES))
        other = rng.choice(THINGS)
        first, second = rng.sample([f"a {being}", f"the {being}", f"a {rng.choice(BEINGS)}"], 2)
        return rng.choice(
            [
                f"{first.capitalize()} {deed} the {quality} {thing} and {second} had a {other}.",
                f'"I {deed} {rng.choice(QUALITIES)} {thing}s by the {place}," said the {being}.',
                f"In a {quality} {place} he {deed} the {thing} of {second}.",
            ]
        )

    opening = f"Once there was a {being} who had a {thing}."
    paragraphs = [" ".join(sentence() for _ in range(rng.randint(2, 5))) for _ in range(12)]
    return "\n\n".join(f"{opening} {text}" if i % 4 == 0 else text
                       for i, text in enumerate(paragraphs))  # fmt: skip


def write_corpus(folder: Path) -> None:
    """Write the two files of tales."""
    for number, name in enumerate(("fairy_tales", "children_books")):
        lines = [
            json.dumps({"book": name, "title": f"Tale {seed}", "text": made_up_tale(seed)})
            for seed in range(number * TALES, (number + 1) * TALES)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
