"""Measure the loading of a checkpoint on one and on two ranks.

Memory is counted above that of a process before loading. The speed is compared with a plain copy
that reads the same pages. All measurements are interleaved in one run.

python benchmarks/load.py --shape 1.5b --folder /tmp/1.5b --out benchmarks/results/load_1.5b.json

Linux only. The file's pages are in the system's page cache.
"""

import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from make_checkpoint import main as make_checkpoint
from processor import processor

from llama import parallel
from llama.checkpoints import shards
from llama.checkpoints.folder import open_checkpoint
from llama.checkpoints.load import load_weights
from llama.checkpoints.setup import Setup
from llama.commands.limits import check_rate, read_rate
from llama.errors import BenchmarkError
from llama.memory import used_memory
from llama.model import Transformer

CPU = torch.device("cpu")
CHUNK = 1 << 24  # bytes copied at a time
GB = 1e9


@contextmanager
def peak_private() -> Iterator[list[int]]:
    """Yields a list with the most private memory of the block, in bytes, read every 5 ms."""
    peak, done = [used_memory(CPU)["private"]], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], used_memory(CPU)["private"])

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], used_memory(CPU)["private"])


def plain_copy(folder: Path, rank: int, ranks: int) -> None:
    """Read this rank's part of all files into one buffer. All ranks have equal parts."""
    buffer = bytearray(CHUNK)
    for path in shards.find_shards(folder):
        share = path.stat().st_size // ranks
        with path.open("rb", buffering=0) as file:
            file.seek(share * rank)
            remaining = share
            while remaining > 0:
                remaining -= file.readinto(memoryview(buffer)[: min(CHUNK, remaining)])


def load(folder: Path) -> tuple[Setup, Transformer]:
    """Load the weights as Llama.build does."""
    opened = open_checkpoint(folder)
    setup = Setup.make(opened, parallel.mp_size(), parallel.mp_size(), 512, 1, CPU, None)
    with torch.device("meta"):
        model = Transformer(opened.args)
    load_weights(model, opened, setup.device, setup.dtype)
    return setup, model


def read_mapped(setup: Setup, model: Transformer) -> None:
    """Copy all weights that are mapped from the file. Other weights were read during loading."""
    buffer = torch.empty(CHUNK, dtype=torch.uint8)
    for name, weight in model.named_parameters():
        if setup.opened.is_mapped(name, setup.mp_size, setup.dtype):
            for piece in weight.detach().flatten().view(torch.uint8).split(CHUNK):
                buffer[: len(piece)] = piece


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds until all ranks have finished, and this rank's result."""
    dist.barrier()
    start = time.perf_counter()
    result = work()
    dist.barrier()
    return time.perf_counter() - start, result


def measure_rank(rank: int, ranks: int, port: int, folder: str, rounds: int, out: str) -> None:
    """Run all measurements on one rank. Rank 0 writes them to `out`, in bytes and seconds."""
    environment = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in environment.items()}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    parallel.initialize()
    load(Path(folder))  # a first load, so that no measurement includes imports and other first uses
    bare = used_memory(CPU)["private"]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident memory
    resident = used_memory(CPU)["peak"]
    with peak_private() as peak:
        model = load(Path(folder))[1]
    memory = {"private_peak": peak[0] - bare, "resident_peak": used_memory(CPU)["peak"] - resident}
    memory["share"] = sum(weight.nbytes for weight in model.parameters())
    memory["largest_tensor"] = max(weight.nbytes for weight in model.parameters())
    del model

    times: dict[str, list[float]] = {"load": [], "load_and_read": [], "plain_copy": []}
    for _ in range(rounds):
        seconds, loaded = timed(lambda: load(Path(folder)))
        times["load"].append(seconds)
        reading, _ = timed(partial(read_mapped, *loaded))
        times["load_and_read"].append(seconds + reading)
        del loaded
        times["plain_copy"].append(timed(lambda: plain_copy(Path(folder), rank, ranks))[0])
    if rank == 0:
        Path(out).write_text(json.dumps({"memory": memory, "seconds": times}))
    dist.barrier()


def main(folder: str, shape: str = "1.5b", out: str | None = None, rounds: int = 7) -> None:
    """Measure loading on one and on two ranks, and print medians.

    Args:
        folder: a checkpoint folder; a random checkpoint is written if it has none.
        shape: shape of the checkpoint that is written: 110m or 1.5b.
        out: a file, to which the figures are written as JSON.
        rounds: how often everything is measured.
    """
    if not Path(folder, "params.json").exists():
        make_checkpoint(folder, shape)
    size = sum(path.stat().st_size for path in shards.find_shards(Path(folder)))
    limit = read_rate(min(size, 1 << 28), CPU)
    report: dict[str, Any] = {
        "file_bytes": size,
        "processor": processor(),
        "torch": torch.__version__,
    }
    for ranks in (1, 2):
        result = Path(folder, f".load.{ranks}.json")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.start_processes(
            measure_rank,
            (ranks, port, folder, rounds, str(result)),
            nprocs=ranks,
            start_method="spawn",
        )
        figures = json.loads(result.read_text())
        result.unlink()
        seconds = {name: statistics.median(taken) for name, taken in figures["seconds"].items()}
        pairs = zip(*(figures["seconds"][n] for n in ("plain_copy", "load_and_read")), strict=True)
        figures["median_seconds"] = seconds
        figures["speed_of_plain_copy"] = statistics.median(copy / ours for copy, ours in pairs)
        report[f"{ranks}_ranks"] = figures
        # The file has little besides the weights, and memory is read no faster than it can be.
        loaded = figures["memory"]["share"] * ranks
        if not 0.9 * size <= loaded <= 1.1 * size:
            raise BenchmarkError(f"{loaded:,} bytes were loaded of files of {size:,} bytes")
        for name in ("load_and_read", "plain_copy"):
            check_rate(name, size / seconds[name], limit, "bytes")
        memory = {name: f"{amount / GB:.3f} GB" for name, amount in figures["memory"].items()}
        rates = {name: f"{size / GB / time:.2f} GB/s" for name, time in seconds.items()}
        print(f"{ranks} rank(s), {size / GB:.3f} GB of files")
        print(f"  a rank's memory: {memory}")
        print(
            f"  all ranks: {rates}, {figures['speed_of_plain_copy']:.2f} x the plain copy's speed"
        )
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
