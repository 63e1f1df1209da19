"""Write the tables of docs/performance.md from the figures in benchmarks/results.

python benchmarks/tables.py
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
END = "<!-- end -->"


def rows(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown, from its first line and the other lines."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def peers(figures: dict[str, Any]) -> str:
    measures = list(next(iter(figures["tokens_per_second"].values())))
    speeds = [
        [name, *(f"{row[measure]:,.1f}" for measure in measures), f"{deviation:.3f}"]
        for (name, row), deviation in zip(
            figures["tokens_per_second"].items(), figures["logits_deviation"].values(), strict=True
        )
    ]
    ratios = [
        [name, *(f"**{row[measure]:.2f}**" for measure in measures), ""]
        for name, row in figures["ratios"].items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
    table = rows(["", *measures, "logits differ by"], speeds + ratios)
    machine = f"{figures['processor']}, {figures['date']}."
    return f"{table}\n\n{machine} {figures['rounds']} rounds; {versions}."


def quality(figures: dict[str, Any]) -> str:
    body = [
        [name, f"{row['perplexity']:.3f}", f"{row['added']:+.3%}"]
        for name, row in figures["perplexity"].items()
    ]
    return rows(["", f"perplexity, {figures['tokens']:,} tokens", "added"], body)


def startup(figures: dict[str, Any]) -> str:
    body = [[name, *(f"{number:.2f}" for number in row.values())]
            for name, row in figures["medians"].items()]  # fmt: skip
    keys = next(iter(figures["medians"].values()))
    return rows(["", *(key.replace("_", " ") for key in keys)], body)


def rounding(figures: dict[str, Any]) -> str:
    body = [[name, *(f"{number:.2f}" for number in row.values())]
            for name, row in figures["medians"].items()]  # fmt: skip
    table = rows(["", "seconds", "own memory, GB", "written, GB"], body)
    return f"{table}\n\n{figures['processor']}, {figures['date']}. {figures['rounds']} rounds."


def ranks(figures: dict[str, Any]) -> str:
    table = figures["tokens_per_s"] | {"ratio": figures["ratio"]}
    body = [[name, *(f"{number:.2f}" for number in row.values())] for name, row in table.items()]
    return rows(["tokens a second", *(f"decode of {n}" for n in figures["ratio"])], body)


def speculative(figures: dict[str, Any]) -> str:
    kinds = {name: row for name, row in figures.items() if isinstance(row, dict)}
    keys = list(next(iter(kinds.values())))
    body = [[name, *(f"{row[key]:.2f}" for key in keys)] for name, row in kinds.items()]
    return rows(["", *(key.replace("_", " ") for key in keys)], body)


def serve(figures: dict[str, Any]) -> str:
    body = []
    for clients, servers in figures.items():
        if not isinstance(servers, dict):
            continue
        for name, row in servers.items():
            cells = [f"{row['tokens_per_s']:,.0f}"]
            for key in ("first_token_median_s", "first_token_p95_s", "per_token_median_s"):
                cells.append(f"{row[key] * 1000:,.1f}" if key in row else "")
            body.append([clients, name, *cells])
    head = ["", "", "tokens a second", "first token, ms", "its p95, ms", "a token, ms"]
    return f"{rows(head, body)}\n\n{figures['processor']}."


def faults(figures: dict[str, Any]) -> str:
    malformed, slow = figures["malformed"], figures["slow_sockets"]
    overflow, leaving = figures["overflow"], figures["leaving"]
    body = [
        [
            f"{sum(malformed.values()):,} malformed requests",
            ", ".join(f"{n:,} got {status}" for status, n in malformed.items()),
        ],
        [f"{slow['sockets']} slow sockets", f"a healthy call takes {slow['ratio']:.2f} × its time"],
        [
            f"{overflow['calls']} calls on 8 slots and a queue of 64",
            f"{overflow['finished']} finished, {overflow['refused']} refused within "
            f"{overflow['refused_within_s']:.2f} s",
        ],
        [
            f"{leaving['rounds']} clients that leave",
            f"their slots are free within {leaving['free_within_s']:.2f} s",
        ],
    ]
    return f"{rows(['', ''], body)}\n\n{figures['processor']}."


def train_memory(figures: dict[str, Any]) -> str:
    ways, published = figures["ways"], figures["published"]
    first = ways["all weights"]
    body = []
    for way, row in ways.items():
        measured, formula = row["peak"], row["formula"]["peak"]
        body.append(
            [
                way,
                f"{measured / 1e6:,.0f}",
                f"{formula / 1e6:,.0f}",
                f"{measured / first['peak']:.0%}",
                f"{row['cpu_seconds'] / first['cpu_seconds']:.0%}",
                *(f"{peaks[way] / 1e9:,.1f}" for peaks in published.values()),
            ]
        )
    head = ["", "110M, MB", "by formula", "of all weights", "its time"]
    head += [f"{name.rpartition('-')[2].upper()}, GB by formula" for name in published]
    about = (
        f"{figures['processor']}, {figures['date']}. Rank {figures['rank']}, one row of "
        f"{figures['seq_len']:,} tokens, {figures['threads']} thread; torch {figures['torch']}."
    )
    return f"{rows(head, body)}\n\n{about}"


def train_bytes(figures: dict[str, Any]) -> str:
    """Measured bytes for each parameter of the model. The last column is the rest of the peak."""
    ways = figures["ways"]
    count = ways["all weights"]["trained"] / 4  # float32
    body = []
    for way, row in ways.items():
        parts = [row["frozen"], row["trained"], row["optimizer"]]
        cells = [*parts, row["peak"] - sum(parts)]
        body.append([way, *(f"{part / count:.2f}" for part in cells)])
    return rows(
        ["bytes a parameter", "frozen", "trained", "AdamW's moments", "activations and the rest"],
        body,
    )


# The name of a table in the page, the file of its figures, and the function that writes it.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "peers 1.5b avx512bf16": ("peers_1.5b_amd_epyc_avx512bf16", peers),
    "peers 110m avx512bf16": ("peers_110m_amd_epyc_avx512bf16", peers),
    "peers 8b int8": ("peers_8b_int8_amd_epyc_avx512bf16", peers),
    "peers 8b int4": ("peers_8b_int4_amd_epyc_avx512bf16", peers),
    "peers 1.5b avx2": ("peers_1.5b_amd_epyc_avx2", peers),
    "peers 110m avx2": ("peers_110m_amd_epyc_avx2", peers),
    "peers 1.5b zen 3": ("peers_1.5b_zen_3_avx2", peers),
    "peers 110m zen 3": ("peers_110m_zen_3_avx2", peers),
    "rounding 1.5b": ("rounding_1.5b_amd_epyc_avx512bf16", rounding),
    "rounding 8b": ("rounding_8b_amd_epyc_avx512bf16", rounding),
    "quality": ("quality", quality),
    "startup": ("startup_1.5b", startup),
    "ranks": ("ranks_1.5b", ranks),
    "speculative": ("speculative_bundled", speculative),
    "serve bundled": ("serve_bundled", serve),
    "serve 110m": ("serve_110m_bfloat16", serve),
    "serve 110m int8": ("serve_110m_int8", serve),
    "serve faults": ("serve_faults", faults),
    "train bytes": ("train_memory_110m", train_bytes),
    "train memory": ("train_memory_110m", train_memory),
}


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, (file, table) in TABLES.items():
        figures = json.loads((RESULTS / f"{file}.json").read_text())
        before, rest = page.split(f"<!-- {name} -->", 1)
        after = rest.split(END, 1)[1]
        page = f"{before}<!-- {name} -->\n{table(figures)}\n{END}{after}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
