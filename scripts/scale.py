"""Write the tables of docs/scale.md: what ranks send for a token, and what was measured.

python scripts/scale.py
"""

import json
import math
from typing import Any, NamedTuple

from make_checkpoint import SHAPES
from tables import END, RESULTS, ROOT, rows

from llama.config import PRESETS, ModelArgs

PAGE = ROOT / "docs" / "scale.md"
FIGURES = RESULTS / "hosts_110m.json"
MODELS = {"8B": "llama-3.1-8b", "70B": "llama-3.1-70b", "405B": "llama-3.1-405b"}
RANKS = (2, 4, 8, 16)
ITEM_BYTES = 2  # of a number, in bfloat16
PLAN_BYTES = 512  # of the numbers that say what to compute; see `broadcast_numbers`
# Seconds that a message takes between two ranks of one node, and of two nodes. Both are assumed.
INSIDE, BETWEEN = 5e-6, 25e-6


class Exchange(NamedTuple):
    """One collective. numbers: of its result on each rank; 0 for the plan's broadcast."""

    kind: str
    numbers: int


def exchanges(args: ModelArgs, n_tokens: int = 1) -> list[Exchange]:
    """The collectives of a step that computes these tokens and the logits of one, in order.

    `Transformer.features` and `Transformer.logits` make them: each row-parallel layer sums its
    output, and the output layer gathers it. `Plan.send` says before what to compute.
    """
    width = n_tokens * args.dim
    embedding = "all-gather" if args.embedding_shard_dim else "all-reduce"
    return [
        Exchange("broadcast", 0),
        Exchange(embedding, width),
        *[Exchange("all-reduce", width)] * (2 * args.n_layers),  # wo and w2
        Exchange("all-gather", args.vocab_size),
    ]


def messages(exchange: Exchange, ranks: int) -> int:
    """How many messages a rank sends, one after the other, in a ring; for a broadcast in a tree."""
    around = ranks - 1  # to pass each rank's part on to every other rank
    if exchange.kind == "broadcast":
        return math.ceil(math.log2(ranks))
    return 2 * around if exchange.kind == "all-reduce" else around


def sent_bytes(exchange: Exchange, ranks: int, item_bytes: int = ITEM_BYTES) -> float:
    """How many bytes a rank sends. A message of a ring has one rank's part of the numbers."""
    if exchange.kind == "broadcast":
        return PLAN_BYTES * messages(exchange, ranks)
    return messages(exchange, ranks) * exchange.numbers * item_bytes / ranks


def on_paper() -> str:
    body = []
    for name, preset in MODELS.items():
        for ranks in RANKS:
            step = exchanges(PRESETS[preset])
            layer = step[2:4]
            n_messages = sum(messages(one, ranks) for one in step)
            waits = [n_messages * seconds * 1000 for seconds in (INSIDE, BETWEEN)]
            body.append(
                [
                    name, f"{ranks}",
                    f"{sum(messages(one, ranks) for one in layer)}",
                    f"{sum(sent_bytes(one, ranks) for one in layer) / 1e3:,.0f}",
                    f"{n_messages:,}",
                    f"{sum(sent_bytes(one, ranks) for one in step) / 1e6:,.2f}",
                    *(f"{wait:,.1f}" for wait in waits),
                ]
            )  # fmt: skip
    head = ["", "ranks", "messages a layer", "kB a layer", "messages a token", "MB a token"]
    head += [
        f"ms in {nodes} ({seconds * 1e6:g} µs a message)"
        for nodes, seconds in (("one node", INSIDE), ("two nodes", BETWEEN))
    ]
    return rows(head, body)


def measured(figures: dict[str, Any]) -> str:
    """The milliseconds of each line, and how many of its delays a decode step of one row waits."""
    lines = figures["lines"]
    first = next(iter(lines.values()))["seconds"]
    body = []
    for name, line in lines.items():
        cells = [f"{seconds * 1000:,.0f}" for seconds in line["seconds"].values()]
        added = line["seconds"]["decode 1"] - first["decode 1"]
        body.append([name, *cells, f"{added / line['delay_s']:.0f}" if line["delay_s"] else ""])
    head = ["link", *(f"{name}, ms" for name in first), "delays in a decode 1"]
    step = exchanges(ModelArgs(**SHAPES[figures["model"]]))
    about = (
        f"{figures['processor']}, {figures['date']}. Model {figures['model']} of "
        f"`benchmarks/make_checkpoint.py`; rounds: {figures['rounds']}. On paper a step has "
        f"{sum(messages(one, 2) for one in step)} messages, one after the other."
    )
    return f"{rows(head, body)}\n\n{about}"


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with these tables, by name, each between a line <!-- name --> and END."""
    for name, table in tables.items():
        before, rest = page.split(f"<!-- {name} -->", 1)
        page = f"{before}<!-- {name} -->\n{table}\n{END}{rest.split(END, 1)[1]}"
    return page


def written(page: str) -> str:
    """The page with the tables of today's figures."""
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    return with_tables(page, {"on paper": on_paper(), "measured": measured(figures)})


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
