"""Measure how long a GGUF file takes to load, beside reading its bytes, and the memory it takes.

python benchmarks/gguf_open.py --work build/gguf --shape 1.5b --out build/gguf_1.5b.json

Each is measured without the file in the system's page cache, and again with it. Memory is the most
that a fresh process has of its own while it loads. Linux only.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire
from make_checkpoint import SHAPES, make_checkpoint
from processor import processor
from tqdm import tqdm

from llama.checkpoints.convert import convert

CHUNK = 1 << 24  # bytes that are read at a time
# Name, type of the matrices in the file, and the width to which they are rounded.
CASES = [
    ("Q8_0 to bfloat16", "q8_0", None),
    ("Q4_0 to bfloat16", "q4_0", None),
    ("Q4_0 to int4", "q4_0", "int4"),
    ("BF16", "bfloat16", None),
]
# The measured process. It prints the seconds and the memory as JSON.
LOAD = """
import json, sys, threading, time
import torch
from llama import parallel
from llama.checkpoints.folder import open_checkpoint
from llama.checkpoints.load import load_weights
from llama.memory import used_memory
from llama.model import Transformer

cpu, width = torch.device("cpu"), sys.argv[2] or None
parallel.initialize(1, cpu)
before, done, most = used_memory(cpu)["private"], threading.Event(), 0

def watch():
    global most
    while not done.wait(0.01):
        most = max(most, used_memory(cpu)["private"] - before)

watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
opened = open_checkpoint(sys.argv[1])
with torch.device("meta"):
    model = Transformer(opened.args)
load_weights(model, opened, cpu, None, width)
seconds = time.perf_counter() - start
done.set()
watcher.join()
print(json.dumps({"seconds": seconds, "GB": most / 1e9}))
"""


def forget(path: Path) -> None:
    """Drop a file from the system's page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: Path) -> float:
    """Read a file. Returns the seconds."""
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def load(path: Path, width: str | None, threads: int) -> dict[str, float]:
    """The seconds and the memory of a process that loads the weights."""
    command = [sys.executable, "-c", LOAD, str(path), width or ""]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def main(
    work: str, shape: str = "1.5b", rounds: int = 3, threads: int = 2, out: str | None = None
) -> None:
    """Measure, and print medians.

    Args:
        work: folder for the files; existing ones are used again.
        shape: one of make_checkpoint's.
        rounds: how often everything is measured.
        threads: number of threads.
        out: a file, to which the figures are written as JSON.
    """
    folder = Path(work) / str(shape)
    if not (folder / "params.json").exists():
        make_checkpoint(folder, SHAPES[str(shape)])
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in CASES}
    for _ in tqdm(range(rounds), unit="round"):
        for name, dtype, width in CASES:
            path = folder.with_name(f"{shape}_{dtype}.gguf")
            if not path.exists():
                convert(folder, path, "gguf", dtype=dtype)
            figures = {"file_GB": path.stat().st_size / 1e9}
            forget(path)
            figures |= {"read_s": read(path), "read_again_s": read(path)}
            forget(path)
            figures["load_s"] = load(path, width, threads)["seconds"]
            again = load(path, width, threads)
            figures |= {"load_again_s": again["seconds"], "own_memory_GB": again["GB"]}
            found[name].append(figures)
    medians = {
        name: {key: statistics.median(one[key] for one in all_) for key in all_[0]}
        for name, all_ in found.items()
    }
    for name, row in medians.items():
        print(f"{name:18}" + "".join(f"{key} {value:6.2f}  " for key, value in row.items()))
    if out is not None:
        report: dict[str, Any] = {
            "shape": shape, "processor": processor(), "date": time.strftime("%Y-%m-%d"),
            "threads": threads, "rounds": rounds, "medians": medians,
        }  # fmt: skip
        Path(out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
