"""Compare this library with Meta's code, transformers and llama.cpp.

All have the same random weights, token ids and number of threads. The measurements are interleaved.

python benchmarks/peers.py --work build/peers --shape 110m --out benchmarks/results

Each peer and width is a process of its own. It is suspended while another one is measured, because
idle threads may spin. Needs the extras [fast] and [bench]. Installing [bench] needs a C++ compiler
for llama-cpp-python.
"""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import fire
import numpy as np
from make_checkpoint import SHAPES, make_checkpoint
from processor import file_name, processor
from tqdm import tqdm

from llama import ModelArgs
from llama.checkpoints.convert import convert
from llama.checkpoints.params import write_params
from llama.fast.quantize import Width
from llama.fast.quantizers import QUANTIZERS

CONTEXT = 640
PREFILL = 512
ROWS = 8
# Largest deviation of the logits from reference mode's for each width; see `deviation`. A wrong
# order of q and k gives 0.16 and more. Widths of four bits have no limit, because rounding random
# weights gives more.
LIMITS = {"bfloat16": 0.06, "BF16": 0.06, "int8": 0.12, "Q8_0": 0.12}
LONG = 20  # seconds; a measurement that takes longer is made in the first round only
# Name and width of each peer. The logits of the others are compared with those of the first.
# Rivals stand side by side, because they are measured one after the other.
LINES = [
    ("llama-reference", "reference"),
    ("llama-models", "bfloat16"),
    ("transformers", "bfloat16"),
    ("llama-reference", "bfloat16"),
    ("llama.cpp", "BF16"),
    ("llama-reference", "int8"),
    ("llama.cpp", "Q8_0"),
    ("llama-reference", "int4"),
    ("llama.cpp", "Q4_0"),
]
WIDTHS = {"BF16": "bfloat16", "Q8_0": "q8_0", "Q4_0": "q4_0"}  # as `convert` calls them
SHARDS = {"8b": 4}  # of the checkpoint, one of which is held in memory while it is written
# The widths of llama.cpp that ours are compared with.
RIVALS = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
PACKAGES = ("llama_models", "transformers", "llama_cpp", "gguf", "matplotlib", "numba")


class Peer:
    """A running benchmarks/peer.py."""

    def __init__(self, name: str, width: str, work: Path, threads: int) -> None:
        self.name = f"{name} {width}"
        self.log = work / f"{name}_{width}.log"
        command = [sys.executable, str(Path(__file__).with_name("peer.py"))]
        command += [name, width, str(work), str(CONTEXT)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=self.log.open("w"), env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def ask(self, **order: Any) -> dict[str, Any]:
        """Resume the process for one measurement, and return its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit(f"error: {self.name} ended; its log is {self.log}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def prepare(work: Path, shape: str, lines: Sequence[tuple[str, str]]) -> None:
    """Write the checkpoint in the formats that the peers read and that do not exist yet."""
    metas = work / "meta"
    if not (metas / "params.json").exists():
        make_checkpoint(metas, SHAPES[shape], mp_size=SHARDS.get(shape, 1))
        # params.json gets the factor of RoPE, which is a constant in Meta's code.
        write_params(metas / "params.json", ModelArgs(**SHAPES[shape]))
    for name, width in lines:
        path = work / width
        if name == "transformers" and not (work / "hf").exists():
            convert(metas, work / "hf", "hf")
        elif width in QUANTIZERS and not path.exists():
            convert(metas, path, "meta", quantize=cast(Width, width))
        elif width in WIDTHS and not (path := work / f"{width}.gguf").exists():
            convert(metas, path, "gguf", dtype=WIDTHS[width])


def deviation(path: Path, other: Path) -> float:
    """Root mean square of the difference of two peers' logits, divided by that of the first's."""
    ours, theirs = np.load(path), np.load(other)
    return float(np.sqrt(np.mean((theirs - ours) ** 2) / np.mean(ours**2)))


def table(medians: dict[str, dict[str, float]]) -> str:
    """A table of tokens a second, with one line for each peer."""
    measures = list(next(iter(medians.values())))
    lines = [" " * 28 + "".join(f"{name:>14}" for name in measures)]
    for peer, row in medians.items():
        lines.append(f"{peer:28}" + "".join(f"{row[name]:14.1f}" for name in measures))
    return "\n".join(lines)


def ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The speed of fast mode divided by llama.cpp's, at each width: the median of the ratios in
    each round."""
    found = {}
    for ours, theirs in RIVALS.items():
        if f"llama-reference {ours}" not in rounds[0]:
            continue
        pairs = [(r[f"llama-reference {ours}"], r[f"llama.cpp {theirs}"]) for r in rounds]
        found[f"{ours} / {theirs}"] = {
            name: statistics.median(a[name] / b[name] for a, b in pairs) for name in pairs[0][0]
        }
    return found


def draw(medians: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """Write a bar chart of the medians as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = list(next(iter(medians.values())))
    figure, axes = pyplot.subplots(1, len(measures), figsize=(12, 4), sharey=True)
    for axis, name in zip(axes, measures, strict=True):
        colors = ["C0" if peer.startswith(LINES[0][0]) else "C7" for peer in medians]
        bars = axis.barh(list(medians), [row[name] for row in medians.values()], color=colors)
        axis.bar_label(bars, fmt="%.0f" if max(bars.datavalues) > 100 else "%.1f", padding=2)
        axis.margins(x=0.2)  # for the labels
        axis.set_title(f"{name}, tokens a second")
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)


def main(
    work: str, shape: str = "110m", rounds: int = 3, threads: int = 2, decode: int = 64,
    widths: str | None = None, out: str | None = None,
) -> None:  # fmt: skip
    """Measure decode of one row, prefill of 512 tokens and decode of 8 rows. Print the medians.

    Args:
        work: folder for the weights in all formats; existing files are used again.
        shape: 110m, 1.5b or 8b.
        rounds: how often everything is measured, after a short warm-up. A measurement that takes
            longer than 20 seconds is made in the first round only.
        threads: number of threads of every peer.
        decode: tokens decoded for one row; 8 rows decode a quarter of it each.
        widths: fast mode's widths to measure beside llama.cpp's, such as int8,int4, and no other
            peer; by default all.
        out: a folder for the figures as JSON and a chart as PNG. The processor is part of their
            names.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise SystemExit(
            f"error: no {', '.join(missing)}: pip install 'llama-reference[bench,fast]'"
        )
    folder = Path(work) / str(shape)
    folder.mkdir(parents=True, exist_ok=True)
    lines = LINES
    if widths is not None:
        own = [str(width) for width in (widths.split(",") if isinstance(widths, str) else widths)]
        if unknown := [width for width in own if width not in RIVALS]:
            raise SystemExit(f"error: no width {', '.join(unknown)}, only {', '.join(RIVALS)}")
        wanted = {("llama-reference", w) for w in own} | {("llama.cpp", RIVALS[w]) for w in own}
        lines = [line for line in LINES if line in wanted]
    prepare(folder, str(shape), lines)
    orders: dict[str, dict[str, Any]] = {
        "decode": dict(measure="decode", rows=1, tokens=decode),
        "prefill": dict(measure="prefill", rows=1, tokens=PREFILL),
        "decode of 8": dict(measure="decode", rows=ROWS, tokens=decode // 4),
    }
    peers: list[Peer] = []
    versions: dict[str, str] = {}
    deviations: dict[str, float] = {}
    system = ""  # what llama.cpp says of its instruction sets
    try:
        for name, width in lines:  # one after the other, because loading needs memory
            peers.append(Peer(name, width, folder, threads))
            logits = folder / f"{name}_{width}.npy"
            answer = peers[-1].ask(measure="logits", out=str(logits))
            versions |= answer["versions"]
            system = answer["system"] or system
            first = folder / "{}_{}.npy".format(*lines[0])
            deviations[peers[-1].name] = differs = deviation(first, logits)
            limit = LIMITS.get(width, math.inf) if lines[0] == LINES[0] else math.inf
            if differs > limit:
                raise SystemExit(
                    f"error: the logits of {peers[-1].name} differ by {differs:.3f} from reference "
                    f"mode's, and the limit is {limit}: it does not compute the same network"
                )
        for peer in peers:  # warm up
            for order in orders.values():
                peer.ask(**(order | {"tokens": -(-order["tokens"] // 16)}))
        results: list[dict[str, dict[str, float]]] = []
        for i in tqdm(range(rounds), unit="round"):
            found: dict[str, dict[str, float]] = {peer.name: {} for peer in peers}
            for name, order in orders.items():
                for peer in peers[:: 1 if i % 2 == 0 else -1]:
                    before = results[0][peer.name][name] if results else math.inf
                    found[peer.name][name] = (
                        before
                        if order["rows"] * order["tokens"] / before > LONG
                        else peer.ask(**order)["tokens_per_second"]
                    )
            results.append(found)
    finally:
        for peer in peers:
            peer.close()
    medians = {
        peer.name: {name: statistics.median(r[peer.name][name] for r in results) for name in orders}
        for peer in peers
    }
    report = {
        "shape": shape, "threads": threads, "rounds": rounds, "processor": processor(),
        "date": time.strftime("%Y-%m-%d"), "llama.cpp": system,
        "versions": versions, "logits_deviation": deviations, "tokens_per_second": medians,
        "ratios": ratios(results), "measured": results,
    }  # fmt: skip
    print(table(medians))
    for name, row in report["ratios"].items():  # type: ignore[attr-defined]
        print(f"{name:28}" + "".join(f"{value:14.2f}" for value in row.values()))
    for name, value in deviations.items():
        print(f"{name:28} logits differ by {value:.4f}")
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        alone = f"{lines[0][1]}_" if len(lines) == 2 else ""  # one width
        path = Path(out) / f"peers_{shape}_{alone}{file_name()}.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        draw(medians, path.with_suffix(".png"), f"{shape}, {threads} threads")


if __name__ == "__main__":
    fire.Fire(main)
