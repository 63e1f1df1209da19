"""Compare two tensor-parallel ranks of one thread each with one rank of two threads, on two cores.

python benchmarks/ranks.py FOLDER --out benchmarks/results/ranks_1.5b.json

Each measurement is a run of `llama bench`, and the two are interleaved. The ratio is that of their
decoding speeds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import fire
from tqdm import tqdm


def bench(ranks: int, folder: str, decode: int) -> dict[str, float]:
    """Tokens a second of decoding, by the number of rows."""
    with tempfile.TemporaryDirectory() as work:
        out = f"{work}/figures.json"
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        command = [sys.executable, *launcher, "-m", "llama", "bench", folder]
        command += ["--prefill=32", f"--decode={decode}", "--rounds=2", f"--out={out}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(2 // ranks)}
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
        figures = json.loads(Path(out).read_text())
    return {rows: row["tokens_per_s"] for rows, row in figures["decode"].items()}


def main(folder: str, decode: int = 12, rounds: int = 3, out: str | None = None) -> None:
    """Measure, and print medians.

    Args:
        folder: a checkpoint folder.
        decode: tokens decoded for each row.
        rounds: how often both are measured.
        out: a file, to which the figures are written as JSON.
    """
    taken: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for _ in tqdm(range(rounds), unit="round"):
        for ranks, found in taken.items():
            found.append(bench(ranks, folder, decode))
    medians = {
        f"{ranks} ranks": {rows: statistics.median(one[rows] for one in found) for rows in found[0]}
        for ranks, found in taken.items()
    }
    ratio = {
        rows: statistics.median(
            two[rows] / one[rows] for one, two in zip(*taken.values(), strict=True)
        )
        for rows in taken[1][0]
    }
    for name, row in (medians | {"ratio": ratio}).items():
        print(f"{name:10}" + "".join(f"{rows:>4} rows {value:8.2f}" for rows, value in row.items()))
    if out is not None:
        figures = {"tokens_per_s": medians, "ratio": ratio, "rounds": rounds}
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
