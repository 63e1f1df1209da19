"""Compare fast mode on a GPU with the device's limits and with transformers, on random weights.

python benchmarks/gpu.py --out benchmarks/results/gpu.json
python benchmarks/gpu.py --shapes demo --rows 1,2 --prefills 64    # a trial on a CPU

A decode step reads every matrix, and each row's keys and values up to its position. The lower bound
of a step is the time in which a copy moves as many bytes, read and written. The lower bound of a
prefill is the time of its operations at the speed of a large matrix product. Each line is printed
as soon as it is measured.
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
STEPS = 32  # decode steps of one round
ROUNDS = 5
WARM_UPS = 3  # rounds that are not counted
CHUNK = 2048  # most tokens of a prompt in one forward
DTYPE = torch.bfloat16
WIDTHS = ("bfloat16", "int8", "fp8", "int4", "invariant")
# Prints the seconds until the model is built, until the first token and until the second.
FIRST_TOKENS = """
import time
start = time.perf_counter()
from llama import Llama
llama = Llama.build(device={device!r}, mode="fast")
built = time.perf_counter()
events = llama.stream("Once upon a time", temperature=0, max_gen_len=8)
times = [time.perf_counter() for _ in events]
print(built - start, times[0] - built, times[1] - built)
"""


def seconds(work: Callable[[], Any], device: torch.device, rounds: int = ROUNDS) -> float:
    """The median time of a call, in seconds, after WARM_UPS calls that are not counted."""
    durations = []
    for _ in range(WARM_UPS + rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[WARM_UPS:])


def limits(device: torch.device) -> dict[str, float]:
    """The bytes a second of a large copy and the operations a second of a large product."""
    n, side = (1 << 29, 8192) if device.type == "cuda" else (1 << 24, 512)
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=DTYPE, device=device) for _ in range(2))
    return {
        "bytes_per_second": 8 * n / seconds(lambda: target.copy_(source), device),
        "flops": 2 * side**3 / seconds(lambda: a @ b, device),
    }


def read_bytes(args: ModelArgs, width: str, rows: int) -> float:
    """The bytes that a decode step must read, for the average length of the measured steps."""
    bytes_per_weight = BYTES.get(width, DTYPE.itemsize)
    shapes = args.whole_shapes().items()
    matrices = sum(shape[0] * shape[1] for name, shape in shapes if is_quantized(name))
    bytes_per_token = 2 * args.n_layers * args.local_kv_heads(1) * args.head_dim * DTYPE.itemsize
    length = PROMPT + STEPS * (ROUNDS + WARM_UPS) / 2
    return matrices * bytes_per_weight + rows * length * bytes_per_token


def prefill_flops(args: ModelArgs, n: int) -> float:
    """The operations of a prefill of n tokens, with logits for the last token only."""
    total = 0.0
    for name, shape in args.whole_shapes().items():
        if is_quantized(name):
            total += 2 * shape[0] * shape[1] * (1 if name == "output.weight" else n)
    return total + 2 * n * n * args.n_heads * args.head_dim * args.n_layers


def prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random token ids."""
    return torch.randint(0, vocab_size, (rows, length)).tolist()


def our_network(args: ModelArgs, width: str, device: torch.device) -> GpuTransformer:
    """Fast mode's network with random weights. width: one of WIDTHS."""
    torch.set_default_dtype(DTYPE)
    with device:
        model = Transformer(args)
    torch.set_default_dtype(torch.float32)
    if width in BYTES:
        narrow(model, width, device)
    return GpuTransformer(model, invariant=width == "invariant")


def our_decode(network: GpuTransformer, rows: int) -> float:
    """Seconds of a decode step of the engine, including its work between two forwards."""
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

    duration = seconds(steps, network.device) / STEPS
    check_count("decode", count_tokens(events), rows * STEPS * (ROUNDS + WARM_UPS))
    assert sum(len(request.tokens) for request in requests) == n_before + len(events)
    return duration


def our_prefill(network: GpuTransformer, n: int) -> float:
    """Seconds to the first token of a prompt, none of which is in the cache."""
    engine = Engine(network, 1, n + 1, static=True, prefill_chunk=CHUNK)
    params = SamplingParams(temperature=0, max_gen_len=1)
    prompt = prompts(1, n, network.vocab_size)[0]
    events = []

    def work() -> None:
        engine.submit(prompt, params, is_private=True)
        while engine.has_work:
            events.extend(engine.step())

    duration = seconds(work, network.device)
    check_count("prefill", count_tokens(events), ROUNDS + WARM_UPS)
    return duration


def their_model(args: ModelArgs, device: torch.device) -> Any:
    """transformers' LlamaForCausalLM with random weights."""
    torch.set_default_dtype(DTYPE)
    config = transformers.LlamaConfig(**make_config(args, DTYPE))
    with device:
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def their_decode(model: Any, rows: int) -> float:
    """Seconds of a decode step of transformers."""
    ids = torch.tensor(prompts(rows, PROMPT, model.config.vocab_size), device=model.device)
    cache = transformers.DynamicCache(config=model.config)

    def work() -> None:
        nonlocal ids
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)
        ids.tolist()  # waits for the GPU, as a caller that needs the ids does

    return seconds(work, model.device, STEPS)


def their_compiled_decode(model: Any, rows: int) -> float:
    """Seconds of a decode step of transformers, compiled into one CUDA graph as in gpt-fast."""
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
    """Seconds of a prefill of n tokens by transformers."""
    ids = torch.tensor(prompts(1, n, model.config.vocab_size), device=model.device)
    return seconds(lambda: model(ids, logits_to_keep=1), model.device)


def first_tokens(device: torch.device) -> dict[str, Any]:
    """The seconds of FIRST_TOKENS in two processes. Only the first has an empty Triton cache."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", FIRST_TOKENS.format(device=str(device))]
        for name in ("empty caches", "second process"):
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            if run.returncode != 0:
                raise SystemExit(f"the fresh process failed: {run.stderr[-500:]}")
            build, first, second = map(float, run.stdout.split())
            found[name] = {"build": build, "first": first, "second": second}
            print(f"{name:16} {found[name]}", flush=True)
    return found


class Report:
    """The figures of one device. Each is printed and written to `out` when it is added."""

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
        device_limits = self.content["limits"]
        print(
            f"{self.content['device']}: copy {device_limits['bytes_per_second'] / 1e12:.2f} TB/s, "
            f"product {device_limits['flops'] / 1e12:.0f} TFLOP/s",
            flush=True,
        )

    def add(
        self, args: ModelArgs, shape: str, who: str, phase: str, n: int, duration: float
    ) -> None:
        """Add a duration in seconds. phase: "decode" of n rows, or "prefill" of n tokens. who: one
        of WIDTHS, or "transformers". Raises BenchmarkError if it is below the lower bound."""
        device_limits = self.content["limits"]
        if phase == "decode":
            bound = read_bytes(args, who, n) / device_limits["bytes_per_second"]
        else:
            bound = prefill_flops(args, n) / device_limits["flops"]
        of_limit = bound / duration
        check_rate(f"{who} {phase} {n}", of_limit, 1, "of the limit")
        row = dict(shape=shape, who=who, phase=phase, n=n, seconds=duration, of_limit=of_limit)
        self.content["figures"].append(row)
        print(f"{shape:14} {who:22} {phase} {n:5} {duration * 1e3:9.3f} ms {of_limit:6.1%}",
              flush=True)  # fmt: skip
        self.write()

    def write(self) -> None:
        if self._out is not None:
            Path(self._out).parent.mkdir(parents=True, exist_ok=True)
            Path(self._out).write_text(json.dumps(self.content, indent=2) + "\n")


def as_list(value: Any) -> list[Any]:
    """A flag's values as a list. fire gives one item, a tuple, or text with commas."""
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
    """Measure, and print medians.

    Args:
        shapes: names of published models, or demo, 110m or 1.5b. The first is measured in all
            widths, the others in bfloat16 only.
        rows: numbers of rows that are decoded together.
        prefills: lengths in tokens of the prompts whose prefill is measured.
        widths: widths of the weights, and "invariant". fp8 is skipped if the device has no fp8.
        compiled: also measure compiled transformers; compiling takes a minute.
        device: cuda or cpu; by default the GPU, if there is one.
        out: a file, to which the figures are written as JSON.
    """
    target = local_device(device)
    on_gpu = target.type == "cuda"
    report = Report(target, out)
    report.content["first_token_seconds"] = first_tokens(target)
    names = as_list(shapes)
    longest = max(as_list(prefills))

    def args_of(shape: str) -> ModelArgs:
        args = ModelArgs(**SHAPES[shape]) if shape in SHAPES else replace(PRESETS[shape])
        length = max(longest, PROMPT + STEPS * (ROUNDS + WARM_UPS)) + 2
        args.context_length = max(
            args.context, length
        )  # the longest prompt and its answer must fit
        args.set_limits(length, max(as_list(rows)))
        return args

    def clean() -> None:
        gc.collect()
        if on_gpu:
            report.content["peak_bytes"] = torch.cuda.max_memory_allocated(target)
            torch.cuda.empty_cache()

    for shape in names:
        for width in as_list(widths) if shape == names[0] else ["bfloat16"]:
            if width == "fp8" and on_gpu and not has_fp8(target):
                continue
            if width == "invariant" and not on_gpu:
                continue
            args = args_of(shape)
            network = our_network(args, width, target)
            for n in as_list(rows):
                report.add(args, shape, width, "decode", n, our_decode(network, n))
            for n in as_list(prefills) if width in ("bfloat16", "invariant") else ():
                report.add(args, shape, width, "prefill", n, our_prefill(network, n))
            del network
            clean()
    args = args_of(names[0])
    model = their_model(args, target)
    for n in as_list(rows):
        report.add(args, names[0], "transformers", "decode", n, their_decode(model, n))
    for n in as_list(prefills):
        report.add(args, names[0], "transformers", "prefill", n, their_prefill(model, n))
    if compiled:
        duration = their_compiled_decode(model, 1)
        report.add(args, names[0], "transformers, compiled", "decode", 1, duration)
    report.write()


if __name__ == "__main__":
    fire.Fire(main)
