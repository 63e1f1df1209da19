"""Measure a model on this machine: loading, prefill, decode, memory, and the read bandwidth."""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llama import parallel
from llama.checkpoints.build import load_model, open_model
from llama.checkpoints.folder import BUNDLED, find_folder, read_args
from llama.commands.limits import check_count, check_rate, count_tokens, product_rate, read_rate
from llama.engine.build import make_engine
from llama.engine.engine import Engine
from llama.engine.runner import Runner
from llama.errors import ConfigError
from llama.memory import used_memory
from llama.model import Transformer
from llama.processor import processor_name
from llama.sampling import SamplingParams

BATCH_SIZES = (1, 4, 8)  # rows decoded together
PROMPT_LENGTH = 16  # tokens of each prompt when decoding is measured
READ_BYTES = 1 << 28  # size of the buffer that is read to measure the bandwidth


def measure(
    ckpt_dir: str | None, prefill: int, decode: int, rounds: int, **build: Any
) -> dict[str, Any] | None:
    """Build the model and measure it. The times are medians of `rounds` rounds. One more round
    comes first, to warm up, and does not count.

    Args:
        ckpt_dir: as in `Llama.build`.
        prefill: tokens of the prompt that is prefilled. The prompt is shortened to fit the context.
        decode: tokens to decode for each row.
        rounds: how often everything is measured.
        build: other arguments of `Llama.build`.

    Returns the figures, in tokens, seconds and bytes, on the first rank, and None on the others.
    Raises ConfigError if a number is below 1 or if `decode` tokens do not fit into the context,
    BenchmarkError if a figure shows that work was not done, and what `Llama.build` raises.
    """
    for name, number in (("prefill", prefill), ("decode", decode), ("rounds", rounds)):
        if not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name} is {number!r}: it must be 1 or above")
    folder = find_folder(ckpt_dir or BUNDLED)
    context = read_args(folder).context
    longest = PROMPT_LENGTH + decode + 2
    if longest > context:
        raise ConfigError(
            f"decode is {decode}, which takes {longest} positions, but the model's context is "
            f"{context}"
        )
    prefill = min(prefill, context - 1)  # one position is for the token after the prompt
    start = time.perf_counter()
    setup, _, _ = open_model(
        ckpt_dir, build.get("tokenizer_path"), max(prefill + 1, longest), max(BATCH_SIZES), None,
        build.get("mode", "fast"), build.get("quantize"), build.get("kv_cache"),
        build.get("device"), build.get("dtype"), adapter=build.get("adapter"),
        needs_tokenizer=False,
    )  # fmt: skip
    with parallel.failing_together(setup.device):
        model = load_model(setup)
        engine = make_engine(
            model, mode=build.get("mode", "fast"), quantize=setup.quantize,
            kv_cache=build.get("kv_cache"),
        )  # fmt: skip
    load_seconds = time.perf_counter() - start
    runner = Runner(engine, seed=1, is_reference=False)
    buffer = torch.ones(READ_BYTES // 4, device=model.device)
    measurements: dict[str, Callable[[], float]] = {
        "read": lambda: _seconds(lambda: buffer.sum().item()),
        "prefill": lambda: _prefill(engine, prefill),
    }
    for rows in BATCH_SIZES:
        measurements[f"decode {rows}"] = lambda rows=rows: _decode(engine, rows, decode)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in measurements}
    with runner.leading() as is_first:
        if not is_first:
            return None
        for number in tqdm(range(rounds + 1), desc="bench", unit="round"):
            for name, measurement in measurements.items():
                seconds = measurement()
                if number > 0:  # the first round warms up
                    times[name].append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    weights = read_bytes(model)
    positions = PROMPT_LENGTH + decode // 2  # average number of cached positions of a row
    bytes_per_position = sum(
        tensor.nbytes // (tensor.shape[1] * tensor.shape[2]) for tensor in engine.cache.tensors()
    )
    figures: dict[str, Any] = {
        "load_s": load_seconds,
        "prefill": {
            "tokens": prefill,
            "first_token_s": medians["prefill"],
            "tokens_per_s": prefill / medians["prefill"],
        },
        "read_bytes_per_s": READ_BYTES / medians["read"],
        "decode": {},
    }
    n_weights = sum(math.prod(shape) for shape in setup.opened.args.whole_shapes().values())
    embedding = setup.opened.args.vocab_size * setup.opened.args.dim
    check_rate(
        "prefill",
        2 * (n_weights - embedding) / parallel.mp_size() * prefill / medians["prefill"],
        product_rate(model.device),
        "operations",
    )
    read_limit = read_rate(weights, model.device)
    for rows in BATCH_SIZES:
        step = medians[f"decode {rows}"] / decode
        read = (weights + rows * positions * bytes_per_position) / step
        check_rate(f"decode, {rows} at a time", weights / step, read_limit, "bytes")
        figures["decode"][rows] = {
            "tokens_per_s": rows / step,
            "bytes_per_s": read,
            "of_read": read / figures["read_bytes_per_s"],
        }
    return figures | {
        "weight_bytes": weights,
        "cache_bytes": sum(tensor.nbytes for tensor in engine.cache.tensors()),
        "memory": used_memory(model.device),
        "ranks": parallel.mp_size(),
        "threads": torch.get_num_threads(),
        "device": _device_name(model.device),
        "torch": torch.__version__,
    }


def report(figures: dict[str, Any]) -> str:
    """The table that `llama bench` prints, from the figures of `measure`."""
    prefill, read = figures["prefill"], figures["read_bytes_per_s"]
    lines = [
        f"{figures['device']}, {figures['ranks']} rank(s) of {figures['threads']} thread(s), "
        f"read bandwidth {read / 1e9:.1f} GB/s per rank",
        f"loading                  {figures['load_s']:8.2f} s",
        f"first token after {prefill['tokens']:6,} {prefill['first_token_s']:8.2f} s",
        "",
        f"{'':22}{'tokens/s':>10}{'GB/s read':>12}{'of bandwidth':>14}",
        f"{'prefill':22}{prefill['tokens_per_s']:10.1f}",
    ]
    for rows, row in figures["decode"].items():
        lines.append(
            f"{f'decode, {rows} at a time':22}{row['tokens_per_s']:10.1f}"
            f"{row['bytes_per_s'] / 1e9:12.1f}{row['of_read']:14.0%}"
        )
    lines += ["", f"weights read per step  {figures['weight_bytes'] / 1e6:10,.1f} MB"]
    lines += [f"KV cache               {figures['cache_bytes'] / 1e6:10,.1f} MB"]
    names = {"private": "private memory", "peak": "peak with mapped files"}
    for name, size in figures["memory"].items():
        lines.append(f"{names[name]:22} {size / 1e6:10,.1f} MB")
    return "\n".join(lines)


def read_bytes(model: Transformer) -> int:
    """Bytes of the weights that this rank reads in one decode step. The embedding does not count,
    because a step reads only single rows of it."""
    total = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if module is not model.tok_embeddings and weight is not None:
            total += sum(tensor.nbytes for tensor in _tensors(weight))
    return total


def _tensors(weight: Any) -> Iterator[Tensor]:
    """The tensors of a weight. A quantized weight is a tuple on a CPU and a module on a GPU."""
    if isinstance(weight, Tensor):
        yield weight
    elif isinstance(weight, nn.Module):
        yield from weight.buffers()
    else:
        yield from weight


def _seconds(work: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _steps(engine: Engine, rows: int, n_tokens: int, n_new: int) -> Iterator[int]:
    """Generate `n_new` tokens after each of `rows` prompts of `n_tokens` random ids. Yields the
    number of tokens that each step of the engine generated."""
    generator = torch.Generator().manual_seed(rows)
    params = SamplingParams(temperature=0, max_gen_len=n_new, ignore_eos=True)
    for row in range(rows):
        ids = torch.randint(0, engine.model.vocab_size, (n_tokens,), generator=generator)
        engine.submit(ids.tolist(), params, row, is_private=True)
    while engine.has_work:
        yield count_tokens(engine.step())


def _prefill(engine: Engine, n_tokens: int) -> float:
    """The time until the first token after a prompt of `n_tokens`, in seconds."""
    start = time.perf_counter()
    count = sum(_steps(engine, 1, n_tokens, 1))
    seconds = time.perf_counter() - start
    check_count("prefill", count, 1)
    return seconds


def _decode(engine: Engine, rows: int, n_tokens: int) -> float:
    """The time in which each of `rows` rows decodes `n_tokens` tokens, in seconds.

    The first step is not timed, because it prefills the prompts. It generates the first two tokens
    of each row.
    """
    steps = _steps(engine, rows, PROMPT_LENGTH, n_tokens + 2)
    first = next(steps)
    start = time.perf_counter()
    count = sum(steps)
    seconds = time.perf_counter() - start
    check_count(f"decode, {rows} at a time", first + count, rows * (n_tokens + 2))
    return seconds * rows * n_tokens / count


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
