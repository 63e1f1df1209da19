"""Measure the memory and the time of a training step: of all weights, and of LoRA.

python benchmarks/train_memory.py --work build/train --shape 110m --out build/train.json

Each way is a process of its own. Memory is the growth of the process' peak size, from its start
until after some steps. So that it counts what the tensors need, glibc returns freed blocks to the
system at once; time is measured in other processes, without that. The time is that of the
processor, because it depends little on other programs. Linux with glibc only.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fire
import torch
from make_checkpoint import SHAPES, make_checkpoint
from processor import processor
from tqdm import tqdm

from llama import parallel
from llama.checkpoints.build import load_model, open_model
from llama.config import PRESETS
from llama.fast.gpu.device_weights import narrow
from llama.memory import used_memory
from llama.training.loop import Trainer, TrainingOptions, checkpoint_activations
from llama.training.lora import LoraOptions, add_lora, lora_optimizer
from llama.training.memory import training_memory

PUBLISHED = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b")
CPU = torch.device("cpu")
LORA = LoraOptions(r=16, alpha=32)
# For each way: whether LoRA trains, the width of the frozen base, and whether layers keep only
# their inputs.
WAYS: dict[str, tuple[bool, Any, bool]] = {
    "all weights": (False, None, False),
    "all weights, checkpointed": (False, None, True),
    "LoRA": (True, None, False),
    "LoRA, checkpointed": (True, None, True),
    "LoRA on int8, checkpointed": (True, "int8", True),
    "LoRA on int4, checkpointed": (True, "int4", True),
}


class RandomRows:
    """A loader of one row of random tokens."""

    def __init__(self, seq_len: int, vocab_size: int) -> None:
        self.row = torch.randint(1, vocab_size, (1, seq_len + 1))

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.row[:, :-1], self.row[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def measure(folder: str, way: str, seq_len: int, steps: int, threads: int) -> dict[str, float]:
    """Train some steps in this process. Returns bytes and seconds."""
    torch.set_num_threads(threads)
    is_lora, width, is_checkpointed = WAYS[way]
    start = used_memory(CPU)["peak"]
    parallel.initialize()
    setup, _, _ = open_model(
        folder, None, seq_len, 1, None, "fast" if width else "reference", width, None, CPU,
        torch.float32, needs_tokenizer=False,
    )  # fmt: skip
    model = load_model(setup)
    if width is not None:
        narrow(model, width, CPU)
    if is_lora:
        add_lora(model, LORA, seed=1)
        optimizer = lora_optimizer(model, 1e-4, 0.0, (0.9, 0.95), "cpu")
    else:
        optimizer = model.configure_optimizers(1e-4)
    if is_checkpointed:
        checkpoint_activations(model)
    options = TrainingOptions(steps=steps, warmup_steps=0)
    loader = RandomRows(seq_len, model.vocab_size)
    trainer = Trainer(model, [optimizer], loader, 0, options, "unused")
    seconds = []
    for _ in range(steps):
        before = time.process_time()
        trainer.train_step()
        seconds.append(time.process_time() - before)
    peak = used_memory(CPU)["peak"] - start
    frozen = (w.nbytes for w in (*model.parameters(), *model.buffers()) if not w.requires_grad)
    trained = sum(w.nbytes for w in model.parameters() if w.requires_grad)
    state = (v.nbytes for values in optimizer.state.values() for v in values.values())
    return {
        "frozen": sum(frozen),
        "trained": trained,
        "optimizer": sum(state),
        "peak": peak,
        "cpu_seconds": statistics.median(seconds[1:]),  # the first step warms up
    }


def child(*arguments: object, **environment: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", json.dumps(arguments)]
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"error: {arguments[1]} failed")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def published(seq_len: int) -> dict[str, dict[str, int]]:
    """The peak in bytes by formula, for published models whose frozen weights are bfloat16."""
    return {
        name: {
            way: training_memory(
                PRESETS[name], 1, seq_len, LORA if is_lora else None, torch.bfloat16, width,
                is_checkpointed,
            ).peak
            for way, (is_lora, width, is_checkpointed) in WAYS.items()
        }
        for name in PUBLISHED
    }  # fmt: skip


def main(
    work: str = "",
    shape: str = "110m",
    seq_len: int = 2048,
    steps: int = 4,
    threads: int = 1,
    out: str | None = None,
    one: list[Any] | None = None,
) -> None:
    """Measure every way, and compare the memory with `llama.training.memory`.

    Args:
        work: folder for the checkpoint, which is used again if it exists.
        shape: one of make_checkpoint's.
        seq_len: tokens of the row of a step.
        steps: steps of a process; the first one is not timed.
        threads: number of threads.
        out: a file, to which the figures are written as JSON.
        one: for the processes that this one starts.
    """
    if one is not None:
        print(json.dumps(measure(*one)))
        return
    if shape not in SHAPES:
        raise SystemExit(f"error: shape is {shape!r}: {' or '.join(SHAPES)}")
    folder = Path(work) / f"train-{shape}"
    if not folder.exists():
        make_checkpoint(folder, SHAPES[shape], 1, torch.float32)
    setup, _, _ = open_model(folder, None, seq_len, 1, None, "reference", None, None, CPU, None,
                             needs_tokenizer=False)  # fmt: skip
    args = setup.opened.args
    results: dict[str, dict[str, Any]] = {}
    for way in tqdm(WAYS, unit="way"):
        is_lora, width, is_checkpointed = WAYS[way]
        arguments = str(folder), way, seq_len, steps, threads
        figures = child(*arguments, MALLOC_MMAP_THRESHOLD_=str(1 << 20))
        figures["cpu_seconds"] = child(*arguments)["cpu_seconds"]
        needed = training_memory(args, 1, seq_len, LORA if is_lora else None, torch.float32, width,
                                 is_checkpointed)  # fmt: skip
        results[way] = figures | {"formula": asdict(needed) | {"peak": needed.peak}}
    print(f"{'':28}{'peak MB':>9}{'formula':>9}{'of all':>8}{'CPU s':>8}{'of all':>8}")
    first = results["all weights"]
    for way, row in results.items():
        formula: Any = row["formula"]
        print(
            f"{way:28}{row['peak'] / 1e6:9,.0f}{formula['peak'] / 1e6:9,.0f}"
            f"{row['peak'] / first['peak']:8.0%}{row['cpu_seconds']:8.1f}"
            f"{row['cpu_seconds'] / first['cpu_seconds']:8.0%}"
        )
    if out is not None:
        report = {
            "shape": shape, "seq_len": seq_len, "rank": LORA.r, "processor": processor(),
            "date": time.strftime("%Y-%m-%d"), "threads": threads, "torch": torch.__version__,
            "ways": results, "published": published(seq_len),
        }  # fmt: skip
        Path(out).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
