"""Measure two tensor-parallel ranks on two hosts, over links of different delays and rates.

PYTHONPATH=tests python benchmarks/hosts.py FOLDER --out benchmarks/results/hosts_110m.json

The hosts are namespaces of this machine, and the link between them is a program; see
tests/helpers/hosts.py. So this needs root and Linux. Each measurement is a run of `llama bench`.
"""

import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import fire
from helpers.hosts import IS_POSSIBLE, running
from helpers.jobs import run_command
from helpers.network import Line
from processor import processor
from tqdm import tqdm

# Seconds from host to host, and bytes a second.
LINES = {
    "as fast as it can": Line(),
    "1 ms": Line(delay=0.001),
    "5 ms": Line(delay=0.005),
    "20 ms": Line(delay=0.02),
    "100 Mbit/s": Line(rate=100e6 / 8),
    "20 Mbit/s": Line(rate=20e6 / 8),
}


def bench(line: Line, words: list[str]) -> dict[str, Any]:
    """The figures of `llama bench` with a rank on each of two hosts."""
    with tempfile.TemporaryDirectory() as name, running(2, Path(name)) as hosts:
        hosts.network.line = line
        out = Path(name) / "figures.json"
        for end in hosts.run_ranks(Path(name), run_command, ["bench", *words, f"--out={out}"]):
            if end.code:
                raise SystemExit(end.errors)
        figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def main(
    folder: str, prefill: int = 128, decode: int = 8, rounds: int = 3, out: str | None = None
) -> None:
    """Measure, and print the seconds of a prefill and of a decode step.

    Args:
        folder: a checkpoint folder.
        prefill: tokens of the prompt.
        decode: tokens decoded for each row.
        rounds: how often everything is measured.
        out: a file, to which the figures are written as JSON.
    """
    if not IS_POSSIBLE:
        raise SystemExit("error: only root may make network namespaces, and needs iproute2")
    words = [folder, f"--prefill={prefill}", f"--decode={decode}", f"--rounds={rounds}"]
    figures: dict[str, Any] = {
        "processor": processor(), "date": date.today().isoformat(), "model": Path(folder).name,
        "rounds": rounds, "lines": {},
    }  # fmt: skip
    for name, line in tqdm(LINES.items(), unit="line"):
        found = bench(line, [*words, "--device=cpu"])
        seconds = {f"prefill {prefill}": found["prefill"]["first_token_s"]}
        for rows, row in found["decode"].items():
            seconds[f"decode {rows}"] = int(rows) / row["tokens_per_s"]
        figures["lines"][name] = {
            "delay_s": line.delay, "bytes_per_s": line.rate, "seconds": seconds
        }  # fmt: skip
    for name, row in figures["lines"].items():
        print(f"{name:18}", *(f"{key} {value:.4f} s" for key, value in row["seconds"].items()))
    if out is not None:
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
