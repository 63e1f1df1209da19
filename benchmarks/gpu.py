"""Fast mode on a GPU beside what the device can do and beside transformers, on random weights.

python benchmarks/gpu.py --out benchmarks/results/gpu.json
python benchmarks/gpu.py --shapes demo --rows 1,2 --prefills 64    # shows on a CPU that it runs

A decode step reads every matrix, and each row's keys and values up to its own position. Its floor
is the time of a copy of as many bytes, read and written. The floor of a prefill is the time of its
operations at the speed of a large product. Each line is printed as soon as it is measured.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
import torch
import transformers
from make_checkpoint import SHAPES

from llama import ModelArgs, Transformer
from llama.checkpoints.hugging_face import make_config
from llama.commands.limits import check_count, check_rate, count_tokens
from llama.config import PRESETS
from llama.engine.engine import Engine
from llama.fast.gpu.device_weights import narrow
from llama.fast.gpu.transformer import GpuTransformer
from llama.fast.mode import has_fp8
from llama.fast.quantize import BYTES, is_quantized
from llama.parallel import local_device
from llama.sampling import SamplingParams

PROMPT = 128  # tokens of each row before it decodes
STEPS = 32  # that are measured together
ROUNDS = 5
WARM_UPS = 3
CHUNK = 2048  # tokens of a prompt that one forward takes
DTYPE = torch.bfloat16
WIDTHS = ("bfloat16", "int8", "fp8", "int4", "invariant")
FIRST = """
import time
start = time.perf_counter()
from llama import Llama
llama = Llama.build(device={device!r}, mode="fast")
built = time.perf_counter()
events = llama.stream("Once upon a time", temperature=0, max_gen_len=8)
times = [time.perf_counter() for _ in events]
print(built - start, times[0] - built, times[1] - built)
"""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """The median of the rounds, each waited for, after some that warm up."""
    taken = []
    for _ in range(WARM_UPS + rounds):
        start = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[WARM_UPS:])


def limits(device: torch.device) -> dict[str, float]:
    """Bytes and floating-point operations a second."""
    n, side = (1 << 29, 8192) if device.type == "cuda" else (1 << 24, 512)
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=DTYPE, device=device) for _ in range(2))
    return {
        "bytes_per_second": 8 * n / seconds(lambda: target.copy_(source), device),
        "flops": 2 * side**3 / seconds(lambda: a @ b, device),
    }


def read_bytes(args: ModelArgs, width: str, rows: int) -> float:
    """What a decode step must read, in the middle of those that are measured."""
    of_weight = BYTES.get(width, DTYPE.itemsize)
    shapes = args.whole_shapes().items()
    matrices = sum(shape[0] * shape[1] for name, shape in shapes if is_quantized(name))
    of_token = 2 * args.n_layers * args.local_kv_heads(1) * args.head_dim * DTYPE.itemsize
    length = PROMPT + STEPS * (ROUNDS + WARM_UPS) / 2
    return matrices * of_weight + rows * length * of_token


def prefill_flops(args: ModelArgs, n: int) -> float:
    """Of n tokens with the logits of the last: products of the weights and causal attention."""
    total = 0.0
    for name, shape in args.whole_shapes().items():
        if is_quantized(name):
            total += 2 * shape[0] * shape[1] * (1 if name == "output.weight" else n)
    return total + 2 * n * n * args.n_heads * args.head_dim * args.n_layers


def prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    return torch.randint(0, vocab_size, (rows, length)).tolist()


def our_network(args: ModelArgs, width: str, device: torch.device) -> GpuTransformer:
    torch.set_default_dtype(DTYPE)
    with device:
        model = Transformer(args)
    torch.set_default_dtype(torch.float32)
    if width in BYTES:
        narrow(model, width, device)
    return GpuTransformer(model, invariant=width == "invariant")


def our_decode(network: GpuTransformer, rows: int) -> float:
    """Seconds of a step of the engine, with all that it does between two of them."""
    length = PROMPT + STEPS * (ROUNDS + WARM_UPS) + 2
    engine = Engine(network, rows, length, static=True, prefill_chunk=CHUNK)
    requests = [
        engine.submit(prompt, SamplingParams(temperature=0))
        for prompt in prompts(rows, PROMPT, network.vocab_size)
    ]
    while not all(request.tokens for request in requests):
        engine.step()
    n_before = sum(len(request.tokens) for request in requests)
    events = []

    def steps() -> None:
        for _ in range(STEPS):
            events.extend(engine.step())

    taken = seconds(steps, network.device) / STEPS
    check_count("decode", count_tokens(events), rows * STEPS * (ROUNDS + WARM_UPS))
    assert sum(len(request.tokens) for request in requests) == n_before + len(events)
    return taken


def our_prefill(network: GpuTransformer, n: int) -> float:
    """Seconds to the first token of a prompt that nobody has seen."""
    engine = Engine(network, 1, n + 1, static=True, prefill_chunk=CHUNK)
    params = SamplingParams(temperature=0, max_gen_len=1)
    prompt = prompts(1, n, network.vocab_size)[0]
    events = []

    def work() -> None:
        engine.submit(prompt, params, is_private=True)
        while engine.has_work:
            events.extend(engine.step())

    taken = seconds(work, network.device)
    check_count("prefill", count_tokens(events), ROUNDS + WARM_UPS)
    return taken


def their_model(args: ModelArgs, device: torch.device) -> Any:
    torch.set_default_dtype(DTYPE)
    config = transformers.LlamaConfig(**make_config(args, DTYPE))
    with device:
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def their_decode(model: Any, rows: int) -> float:
    ids = torch.tensor(prompts(rows, PROMPT, model.config.vocab_size), device=model.device)
    cache = transformers.DynamicCache(config=model.config)

    def work() -> None:
        nonlocal ids
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        ids.tolist()  # as a caller wants them

    return seconds(work, model.device, STEPS)


def their_compiled_decode(model: Any, rows: int) -> float:
    """With a static cache, and the forward in one compiled CUDA graph: gpt-fast's way too."""
    size = PROMPT + STEPS + WARM_UPS + 2
    cache = transformers.StaticCache(config=model.config, max_cache_len=size)
    ids = torch.tensor(prompts(rows, PROMPT, model.config.vocab_size), device=model.device)
    position = torch.arange(PROMPT, device=model.device)
    model(ids, past_key_values=cache, cache_position=position, logits_to_keep=1)
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    ids, position = ids[:, -1:].clone(), position[-1:] + 1

    def work() -> None:
        logits = forward(ids, past_key_values=cache, cache_position=position).logits
        ids.copy_(logits[:, -1:].argmax(-1))
        position.add_(1)
        ids.tolist()

    return seconds(work, model.device, STEPS)


def their_prefill(model: Any, n: int) -> float:
    ids = torch.tensor(prompts(1, n, model.config.vocab_size), device=model.device)
    return seconds(lambda: model(ids, logits_to_keep=1), model.device)


def first_tokens(device: torch.device) -> dict[str, Any]:
    """Seconds of two fresh processes, the first with empty caches: to build the bundled model, then
    to its first and second token."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", FIRST.format(device=str(device))]
        for name in ("empty caches", "second process"):
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            if run.returncode != 0:
                raise SystemExit(f"the fresh process failed: {run.stderr[-500:]}")
            build, first, second = map(float, run.stdout.split())
            found[name] = {"build": build, "first": first, "second": second}
            print(f"{name:16} {found[name]}", flush=True)
    return found


class Report:
    """Figures of one device, printed and written as they come."""

    def __init__(self, device: torch.device, out: str | None) -> None:
        on_gpu = device.type == "cuda"
        self._out = out
        self.content: dict[str, Any] = {
            "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
            "prompt": PROMPT,
            "limits": limits(device),
            "figures": [],
        }
        most = self.content["limits"]
        print(
            f"{self.content['device']}: copy {most['bytes_per_second'] / 1e12:.2f} TB/s, "
            f"product {most['flops'] / 1e12:.0f} TFLOP/s",
            flush=True,
        )

    def add(self, args: ModelArgs, shape: str, who: str, phase: str, n: int, taken: float) -> None:
        """Phase "decode": seconds of a step of n rows; "prefill": of a prompt of n tokens."""
        most = self.content["limits"]
        if phase == "decode":
            floor = read_bytes(args, who, n) / most["bytes_per_second"]
        else:
            floor = prefill_flops(args, n) / most["flops"]
        check_rate(f"{who} {phase} {n}", floor / taken, 1, "of the limit")
        row = dict(shape=shape, who=who, phase=phase, n=n, seconds=taken, of_limit=floor / taken)
        self.content["figures"].append(row)
        print(f"{shape:14} {who:22} {phase} {n:5} {taken * 1e3:9.3f} ms {floor / taken:6.1%}",
              flush=True)  # fmt: skip
        self.write()

    def write(self) -> None:
        if self._out is not None:
            Path(self._out).parent.mkdir(parents=True, exist_ok=True)
            Path(self._out).write_text(json.dumps(self.content, indent=2) + "\n")


def listed(value: Any) -> list[Any]:
    """What fire made of a list: one item, a tuple, or text with commas."""
    if isinstance(value, str):
        return value.split(",")
    return list(value) if isinstance(value, Sequence) else [value]


@torch.inference_mode()
def main(
    shapes: Sequence[str] | str = ("llama-3-8b", "llama-3.2-1b"),
    rows: Sequence[int] | int = (1, 8, 64),
    prefills: Sequence[int] | int = (512, 2048, 8192),
    widths: Sequence[str] | str = WIDTHS,
    compiled: bool = True,
    device: str | None = None,
    out: str | None = None,
) -> None:
    """Measure and print; medians.

    Args:
        shapes: published models' names, or demo, 110m or 1.5b. The first in all widths, the others
            in bfloat16 alone.
        rows: numbers of rows that decode together.
        prefills: tokens of the prompts whose prefill is measured.
        widths: of the weights, and "invariant"; fp8 only where the device has it.
        compiled: measure transformers compiled too, which takes a minute to compile.
        device: cuda or cpu; by default the GPU, if there is one.
        out: file for the figures as JSON.
    """
    target = local_device(device)
    on_gpu = target.type == "cuda"
    report = Report(target, out)
    report.content["first_token_seconds"] = first_tokens(target)
    names = listed(shapes)
    longest = max(listed(prefills))

    def args_of(shape: str) -> ModelArgs:
        args = ModelArgs(**SHAPES[shape]) if shape in SHAPES else replace(PRESETS[shape])
        length = max(longest, PROMPT + STEPS * (ROUNDS + WARM_UPS)) + 2
        args.context_length = max(args.context, length)  # a prompt of the context and its answer
        args.set_limits(length, max(listed(rows)))
        return args

    def clean() -> None:
        gc.collect()
        if on_gpu:
            report.content["peak_bytes"] = torch.cuda.max_memory_allocated(target)
            torch.cuda.empty_cache()

    for shape in names:
        for width in listed(widths) if shape == names[0] else ["bfloat16"]:
            if width == "fp8" and on_gpu and not has_fp8(target):
                continue
            if width == "invariant" and not on_gpu:
                continue
            args = args_of(shape)
            network = our_network(args, width, target)
            for n in listed(rows):
                report.add(args, shape, width, "decode", n, our_decode(network, n))
            for n in listed(prefills) if width in ("bfloat16", "invariant") else ():
                report.add(args, shape, width, "prefill", n, our_prefill(network, n))
            del network
            clean()
    args = args_of(names[0])
    model = their_model(args, target)
    for n in listed(rows):
        report.add(args, names[0], "transformers", "decode", n, their_decode(model, n))
    for n in listed(prefills):
        report.add(args, names[0], "transformers", "prefill", n, their_prefill(model, n))
    if compiled:
        taken = their_compiled_decode(model, 1)
        report.add(args, names[0], "transformers, compiled", "decode", 1, taken)
    report.write()


if __name__ == "__main__":
    fire.Fire(main)
