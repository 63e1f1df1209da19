"""Measure how rounding weights, or keys and values, changes the perplexity of the bundled model.

python benchmarks/quality.py TALES.jsonl --out benchmarks/results/quality.json

A line of TALES.jsonl is {"text": "…"}, with a text that the model was not trained on. The command
`python scripts/train_bundled.py texts` writes such a file, held_out_titles.jsonl.
"""

import json
from pathlib import Path
from typing import Any

import fire

from llama import Llama
from llama.evaluation.perplexity import score

KINDS: dict[str, dict[str, Any]] = {
    "reference": dict(mode="reference"),
    "float32": dict(mode="fast"),
    "bfloat16": dict(mode="fast", dtype="bfloat16"),
    "int8": dict(mode="fast", quantize="int8"),
    "int4": dict(mode="fast", quantize="int4"),
    "int8 cache": dict(mode="fast", kv_cache="int8"),
    "int4, int8 cache": dict(mode="fast", quantize="int4", kv_cache="int8"),
}


def main(tales: str, out: str | None = None) -> None:
    """Measure and print.

    Args:
        tales: JSONL file of texts.
        out: a file, to which the figures are written as JSON.
    """
    lines = Path(tales).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    scores = {name: score(Llama.build(**build), texts) for name, build in KINDS.items()}
    plain = scores["reference"].perplexity
    figures = {
        name: {"perplexity": one.perplexity, "added": one.perplexity / plain - 1}
        for name, one in scores.items()
    }
    for name, row in figures.items():
        print(f"{name:18}{row['perplexity']:10.4f}{row['added']:+10.3%}")
    if out is not None:
        content = {
            "texts": len(texts),
            "tokens": scores["reference"].tokens,
            "perplexity": figures,
        }
        Path(out).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
