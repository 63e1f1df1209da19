"""How much memory loading a checkpoint takes over the bare process, beside the size of its shards.

python benchmarks/load_memory.py --shape 1.5b --folder /tmp/1.5b --out load.json

Linux only: the figures are those of /proc/self/status.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fire
from make_checkpoint import main as make_checkpoint

GB = 1e9


def status(field: str) -> int:
    """Bytes of one line of /proc/self/status: VmHWM (most resident so far), RssAnon (private)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def measure_here(folder: str) -> None:
    """Load the folder in this process and print the figures; run in a process of its own."""
    import torch

    from llama import checkpoint, parallel
    from llama.model import Transformer

    parallel.initialize()
    Path("/proc/self/clear_refs").write_text("5")  # start counting the peak from here
    bare = {"resident": status("VmHWM"), "private": status("RssAnon")}
    start = time.perf_counter()
    opened = checkpoint.open_checkpoint(folder)
    opened.args.max_batch_size, opened.args.max_seq_len = 1, 512
    with torch.device("meta"):
        model = Transformer(opened.args)
    checkpoint.load(model, opened, torch.device("cpu"), dtype=None)
    taken = time.perf_counter() - start
    loaded = {"resident": status("VmHWM"), "private": status("RssAnon")}
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long), 0)
    used = {"resident": status("VmHWM"), "private": status("RssAnon")}
    cache = model.cache
    assert cache is not None
    print(
        json.dumps(
            {
                "file_bytes": sum(path.stat().st_size for path in Path(folder).glob("*.pth")),
                "seconds": taken,
                "loaded_over_bare": {name: loaded[name] - bare[name] for name in bare},
                "used_over_bare": {name: used[name] - bare[name] for name in bare},
                "kv_cache_bytes": cache.k.nbytes + cache.v.nbytes,
            }
        )
    )


def main(folder: str, shape: str = "1.5b", out: str | None = None) -> None:
    """Make a checkpoint where there is none, load it in a fresh process, report its memory.

    Args:
        folder: where the checkpoint is or goes.
        shape: 110m or 1.5b, of a checkpoint that has to be made.
        out: file for the figures as JSON.
    """
    if not Path(folder, "params.json").exists():
        make_checkpoint(folder, shape)
    code = f"import load_memory; load_memory.measure_here({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=True
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    size = figures["file_bytes"]
    print(f"file {size / GB:.3f} GB, loaded in {figures['seconds']:.2f} s")
    for phase in ("loaded_over_bare", "used_over_bare"):
        for kind, amount in figures[phase].items():
            print(f"{phase:16} {kind:8} {amount / GB:.3f} GB = {amount / size:.3f} of the file")
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
