"""Compare the CPU kernels with F.linear and with the read bandwidth, on a model's matrices.

python benchmarks/kernel_speed.py --shape 1.5b --out benchmarks/results/kernels_1.5b.json

One pass reads every matrix of several layers once, as a decode step does. The matrices are larger
than the caches. All measurements are interleaved in one run, and medians are reported. The tokens a
second are those of a model in which only the matrix products take time.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fire
import torch
import torch.nn.functional as F
from make_checkpoint import SHAPES
from processor import processor
from torch import Tensor
from tqdm import tqdm

from llama import ModelArgs
from llama.commands.limits import check_rate
from llama.fast.cpu.kernels.product import Product, Weight, instruction_sets
from llama.fast.quantize import quantize_int4, quantize_int8

ROWS = (1, 2, 4, 8)
FORMATS: dict[str, Callable[[Tensor], Weight]] = {
    "float32": lambda w: w,
    "bfloat16": lambda w: w.bfloat16(),
    "int8": quantize_int8,
    "int4": quantize_int4,
}
READ_BYTES = 256 << 20  # the buffer that measures the read bandwidth
PASS_BYTES = 200 << 20  # a pass in bfloat16 reads at least this much


def size(weight: Weight) -> int:
    """Bytes of a weight."""
    tensors = weight if isinstance(weight, tuple) else (weight,)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Matrices:
    """The matrices of several layers in one format. A layer has four products: with wq, wk and wv;
    with wo; with w1 and w3; with w2."""

    def __init__(self, params: ModelArgs, layers: int, make: Callable[[Tensor], Weight]) -> None:
        d, f, kv = params.dim, params.ffn_dim, params.local_kv_heads(1) * params.head_dim
        groups = [([d, kv, kv], d), ([d], d), ([f, f], d), ([d], f)] * layers
        self.groups = [[make(torch.randn(n, k) * 0.02) for n in rows] for rows, k in groups]
        self.products = [Product(*g, swiglu=i % 4 == 2) for i, g in enumerate(self.groups)]
        self.bytes = sum(size(weight) for group in self.groups for weight in group)

    def kernels(self, n: int) -> None:
        """All products of n rows, by our kernels."""
        for product in self.products:
            product(torch.ones(n, product.features))

    def linear(self, n: int) -> None:
        """All products of n rows, by PyTorch, in the dtype of the weights."""
        for group in self.groups:
            for weight in group:
                assert isinstance(weight, Tensor)
                F.linear(torch.ones(n, weight.shape[1], dtype=weight.dtype), weight)


def seconds(work: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def main(
    shape: str = "110m", rounds: int = 5, threads: int | None = None, out: str | None = None
) -> None:
    """Measure and print.

    Args:
        shape: 110m or 1.5b.
        rounds: how often everything is measured.
        threads: number of threads; by default PyTorch's choice.
        out: a file, to which the figures are written as JSON.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    params = ModelArgs(**SHAPES[shape])
    d, f, kv = params.dim, params.ffn_dim, params.local_kv_heads(1) * params.head_dim
    layer = 2 * d * d + 2 * kv * d + 3 * d * f
    layers = -(-PASS_BYTES // (2 * layer))
    passes = (params.n_layers * layer + params.vocab_size * d) / (layers * layer)  # a whole model
    read = torch.ones(READ_BYTES // 4)
    models = {name: Matrices(params, layers, make) for name, make in FORMATS.items()}

    measurements: dict[str, Callable[[], object]] = {"read": read.sum}
    for name, model in models.items():
        for n in ROWS:
            measurements[f"{name} {n}"] = partial(model.kernels, n)
            if name in ("float32", "bfloat16"):
                measurements[f"{name} {n} F.linear"] = partial(model.linear, n)
    for measurement in measurements.values():  # warm up
        measurement()
    times: dict[str, list[float]] = {name: [] for name in measurements}
    for _ in tqdm(range(rounds), unit="round"):
        for name, measurement in measurements.items():
            times[name].append(seconds(measurement))

    speed = READ_BYTES / statistics.median(times["read"]) / 1e9
    print(f"\n{shape}, {torch.get_num_threads()} threads, {instruction_sets()[0]}")
    print(f"{'':26}{'GB/s':>8}{'of read':>9}{'tok/s':>9}   read: {speed:.1f} GB/s")
    figures: dict[str, dict[str, float]] = {}
    for name, durations in times.items():
        if name == "read":
            continue
        kind, rows = name.split()[:2]
        median = statistics.median(durations)
        rate = models[kind].bytes / median / 1e9
        check_rate(name, rate, speed, "GB")
        tokens = int(rows) / (median * passes)
        figures[name] = {"gb_per_s": rate, "of_read": rate / speed, "tokens_per_s": tokens}
        print(f"{name:26}{rate:8.1f}{rate / speed:9.0%}{tokens:9.1f}")
    if out is not None:
        content = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "shape": shape,
            "read_gb_per_s": speed,
            "medians": figures,
        }
        Path(out).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
