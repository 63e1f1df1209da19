"""Compare `llama convert --quantize int4` with llama.cpp's quantizer to Q4_0: seconds and memory.

python benchmarks/rounding.py --work build/peers --shape 1.5b --out benchmarks/results

Both read a bfloat16 checkpoint that the system has cached, and write a file. Each is a process of
its own, and the two are interleaved. Memory is the peak of the process' own pages, without those of
mapped files. Linux only. Needs the extras [fast] and [bench].
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire
from make_checkpoint import SHAPES
from peers import prepare
from processor import file_name, processor
from tqdm import tqdm

# Arguments: the GGUF file to read, the one to write, the number of threads.
LLAMA_CPP = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, int(sys.argv[3])
paths = sys.argv[1].encode(), sys.argv[2].encode()
sys.exit(llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)))
"""


def own_memory(pid: int) -> int:
    """Bytes of a process that are not pages of a file. 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def run(command: list[str], written: Path) -> dict[str, float]:
    """Run a command that writes a file or folder, and delete that."""
    most, start = 0, time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, own_memory(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode != 0 or not written.exists():
        raise SystemExit(f"error: {' '.join(command[:4])} … failed")
    files = [path for path in (written, *written.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(written) if written.is_dir() else written.unlink()
    return {"seconds": seconds, "own_memory_gb": most / 1e9, "written_gb": size / 1e9}


def main(
    work: str, shape: str = "1.5b", rounds: int = 3, threads: int = 2, out: str | None = None
) -> None:
    """Measure, and print medians.

    Args:
        work: folder for the checkpoints; existing files are used again.
        shape: one of make_checkpoint's.
        rounds: how often both are measured, after one round to warm up.
        threads: number of threads of both.
        out: a folder for the figures as JSON. The processor is part of the name.
    """
    if str(shape) not in SHAPES:
        raise SystemExit(f"error: shape is {shape!r}: {' or '.join(SHAPES)}")
    folder = Path(work) / str(shape)
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, str(shape), [("llama.cpp", "BF16")])
    ours, theirs = folder / "converted", folder / "converted.gguf"
    convert = ["-m", "llama", "convert", str(folder / "meta"), str(ours), "--quantize", "int4"]
    commands: dict[str, tuple[list[str], Path]] = {
        "llama convert": (["env", f"OMP_NUM_THREADS={threads}", sys.executable, *convert], ours),
        "llama.cpp": (
            [sys.executable, "-c", LLAMA_CPP, str(folder / "BF16.gguf"), str(theirs), str(threads)],
            theirs,
        ),
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for i in tqdm(range(rounds + 1), unit="round"):
        for name, (command, written) in commands.items():
            figures = run(command, written)
            if i > 0:
                measured[name].append(figures)
    medians = {
        name: {key: statistics.median(one[key] for one in all_) for key in all_[0]}
        for name, all_ in measured.items()
    }
    for name, row in medians.items():
        print(f"{name:16}" + "".join(f"{key} {value:8.2f}  " for key, value in row.items()))
    if out is not None:
        report: dict[str, Any] = {
            "shape": shape, "processor": processor(), "date": time.strftime("%Y-%m-%d"),
            "threads": threads, "rounds": rounds, "medians": medians,
        }  # fmt: skip
        path = Path(out) / f"rounding_{shape}_{file_name()}.json"
        path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
