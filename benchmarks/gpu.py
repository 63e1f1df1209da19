"""Fast mode on a GPU, beside what the device can do and beside transformers, on random weights.

python benchmarks/gpu.py --out benchmarks/results/gpu.json
python benchmarks/gpu.py --shape demo --rows 1,2 --prefill 64    # shows on a CPU that it runs

Bandwidth is that of a large copy, which reads and writes; the peak that of a product of large
bfloat16 matrices. A decode step reads every matrix, and each row's keys and values up to its own.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fire
import torch
import transformers
from make_checkpoint import SHAPES
from tqdm import tqdm

from llama import ModelArgs, Transformer
from llama.checkpoints.hugging_face import make_config
from llama.config import PRESETS
from llama.engine.engine import Engine
from llama.fast.gpu.device_weights import narrow
from llama.fast.mode import has_fp8
from llama.fast.quantize import BYTES, is_quantized
from llama.parallel import local_device
from llama.sampling import SamplingParams

PROMPT = 128  # tokens of each row before it decodes
NEW = 32  # steps that are measured
ROUNDS = 5
WARM_UPS = 3
DTYPE = torch.bfloat16

Figures = dict[str, float]


def seconds(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The median of the rounds, each waited for, after some that warm up."""
    taken = []
    for _ in range(WARM_UPS + rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[WARM_UPS:])


def limits(device: torch.device) -> Figures:
    """Bytes and floating-point operations a second."""
    on_gpu = device.type == "cuda"
    n_bytes, side = (1 << 31, 8192) if on_gpu else (1 << 26, 512)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    a, b = (torch.randn(side, side, dtype=DTYPE, device=device) for _ in range(2))
    return {
        "bytes_per_second": 2 * n_bytes / seconds(lambda: target.copy_(source), device, ROUNDS),
        "flops": 2 * side**3 / seconds(lambda: a @ b, device, ROUNDS),
    }


def read_bytes(args: ModelArgs, quantize: str | None, rows: int) -> float:
    """What a decode step must read, in the middle of those that are measured."""
    of_weight = DTYPE.itemsize if quantize is None else BYTES[quantize]
    shapes = args.whole_shapes().items()
    matrices = sum(shape[0] * shape[1] for name, shape in shapes if is_quantized(name))
    of_token = 2 * args.n_layers * args.local_kv_heads(1) * args.head_dim * DTYPE.itemsize
    return matrices * of_weight + rows * (PROMPT + WARM_UPS + NEW / 2) * of_token


def prefill_flops(args: ModelArgs, n: int) -> float:
    """Of n tokens with the logits of the last: products of the weights and causal attention."""
    total = 0.0
    for name, shape in args.whole_shapes().items():
        if is_quantized(name):
            total += 2 * shape[0] * shape[1] * (1 if name == "output.weight" else n)
    return total + 2 * n * n * args.dim * args.n_layers


def prompts(rows: int, length: int, vocab_size: int) -> list[list[int]]:
    return torch.randint(0, vocab_size, (rows, length)).tolist()


def our_model(args: ModelArgs, quantize: str | None, device: torch.device) -> Transformer:
    torch.set_default_dtype(DTYPE)
    with device:
        model = Transformer(args)
    torch.set_default_dtype(torch.float32)
    if quantize is not None:
        narrow(model, quantize, device)
    return model


def our_decode(model: Transformer, rows: int) -> float:
    """Seconds of a step of the engine, with all that it does between two of them."""
    engine = Engine(model, rows, model.params.max_seq_len, static=True)
    params = SamplingParams(temperature=0)
    requests = [engine.submit(p, params) for p in prompts(rows, PROMPT, model.vocab_size)]
    while not all(request.tokens for request in requests):
        engine.step()
    return seconds(engine.step, model.device, NEW)


def our_prefill(model: Transformer, n: int) -> float:
    """Seconds to the first token of a prompt that nobody has seen."""
    engine = Engine(model, 1, model.params.max_seq_len, static=True)
    params = SamplingParams(temperature=0, max_gen_len=1)
    prompt = prompts(1, n, model.vocab_size)[0]

    def work() -> None:
        engine.submit(prompt, params, is_private=True)
        while engine.has_work:
            engine.step()

    return seconds(work, model.device, ROUNDS)


def their_model(args: ModelArgs, device: torch.device) -> Any:
    torch.set_default_dtype(DTYPE)
    with device:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**make_config(args, DTYPE))
        ).eval()
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

    return seconds(work, model.device, NEW)


def their_prefill(model: Any, n: int) -> float:
    ids = torch.tensor(prompts(1, n, model.config.vocab_size), device=model.device)
    return seconds(lambda: model(ids, logits_to_keep=1), model.device, ROUNDS)


@torch.inference_mode()
def main(
    shape: str = "llama-3-8b",
    rows: Sequence[int] | int = (1, 8, 64),
    prefill: int = 2048,
    widths: Sequence[str] | str = ("bfloat16", "int8", "int4", "fp8"),
    device: str | None = None,
    out: str | None = None,
) -> None:
    """Measure and print; medians.

    Args:
        shape: a published model's name, or demo, 110m or 1.5b.
        rows: numbers of rows that decode together.
        prefill: tokens of the prompt whose prefill is measured.
        widths: of the weights; fp8 only where the device has it.
        device: cuda or cpu; by default the GPU, if there is one.
        out: file for the figures as JSON.
    """
    target = local_device(device)
    each_rows = (rows,) if isinstance(rows, int) else tuple(rows)
    each_width = widths.split(",") if isinstance(widths, str) else list(widths)
    args = ModelArgs(**SHAPES[shape]) if shape in SHAPES else replace(PRESETS[shape])
    args.set_limits(max(prefill, PROMPT + WARM_UPS + NEW) + 1, max(each_rows))
    on_gpu = target.type == "cuda"
    if "fp8" in each_width and on_gpu and not has_fp8(target):
        each_width.remove("fp8")
    name = torch.cuda.get_device_name(target) if on_gpu else "CPU"
    if not on_gpu:
        print("No GPU: these figures show that the benchmark runs, and nothing else.")

    most = limits(target)
    print(f"{name}: {most['bytes_per_second'] / 1e9:.0f} GB/s, {most['flops'] / 1e12:.1f} TFLOP/s")
    figures: list[dict[str, Any]] = []

    def measure(who: str, model: Any, width: str, decode: Any, prefill_of: Any) -> None:
        quantize = None if width == "bfloat16" else width
        of_all: dict[str, Any] = {"who": who, "width": width}
        for n in tqdm(each_rows, desc=f"{who} {width}", unit="decode", leave=False):
            taken = decode(model, n)
            rate = read_bytes(args, quantize, n) / taken / most["bytes_per_second"]
            of_all[f"decode_{n}"] = {"tokens_per_second": n / taken, "of_bandwidth": rate}
        taken = prefill_of(model, prefill)
        rate = prefill_flops(args, prefill) / taken / most["flops"]
        of_all["prefill"] = {"tokens_per_second": prefill / taken, "of_peak": rate}
        figures.append(of_all)
        for phase, found in list(of_all.items())[2:]:
            speed, share = found.values()
            print(f"{who:16} {width:9} {phase:10} {speed:10.1f} tok/s {share:7.1%}")

    measure("transformers", their_model(args, target), "bfloat16", their_decode, their_prefill)
    for width in each_width:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        model = our_model(args, None if width == "bfloat16" else width, target)
        measure("llama-reference", model, width, our_decode, our_prefill)
        del model
    if out is not None:
        content = {
            "device": name,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
            "shape": shape,
            "prompt": PROMPT,
            "prefill": prefill,
            "limits": most,
            "figures": figures,
        }
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
