"""Compare the speed of reference mode with Meta's llama-models, on the same weights.

The measurements are interleaved in one process.

python benchmarks/speed.py --shape 110m
python benchmarks/speed.py --shape 1.5b --prefill 128 --out benchmarks/results/speed_1.5b.json
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import torch
from llama_models.llama3.args import ModelArgs as MetaModelArgs
from llama_models.llama3.model import Transformer as MetaTransformer
from make_checkpoint import DTYPES, SHAPES
from processor import processor
from tqdm import tqdm

from llama import ModelArgs, Transformer
from llama.commands.limits import check_rate, product_rate
from llama.errors import BenchmarkError


def make_models(shape: str, dtype: torch.dtype, max_seq_len: int) -> dict[str, Any]:
    """Both transformers, which share their weights. So both read the same memory."""
    params = SHAPES[shape] | {"max_batch_size": 1, "max_seq_len": max_seq_len}
    torch.set_default_dtype(dtype)
    ours = Transformer(ModelArgs(**params))
    metas = MetaTransformer(MetaModelArgs(**params))
    torch.set_default_dtype(torch.float32)
    metas.load_state_dict(ours.state_dict(), strict=True, assign=True)
    return {"llama-models": metas, "llama-reference": ours}


def seconds(work: Callable[[], Any]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(
    models: dict[str, Any], vocab_size: int, prefill: int, decode: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens a second, by phase and model, with one figure for each round. Raises BenchmarkError if
    the logits of the models differ."""
    tokens = torch.randint(0, vocab_size, (1, prefill + decode))

    def run_prefill(model: Any) -> None:
        model(tokens[:, :prefill], 0)

    def run_decode(model: Any) -> None:
        for pos in range(prefill, prefill + decode):
            model(tokens[:, pos : pos + 1], pos)

    ours, metas = (model(tokens[:, :prefill], 0) for model in models.values())
    if not ours.isfinite().all() or not torch.equal(ours, metas):
        raise BenchmarkError("the two models' logits are not finite, or not the same")
    phases = {"prefill": (run_prefill, prefill), "decode": (run_decode, decode)}
    rates: dict[str, dict[str, list[float]]] = {
        phase: {name: [] for name in models} for phase in phases
    }
    for i in tqdm(range(rounds + 1), desc="rounds", unit="round"):
        order = list(models) if i % 2 else list(models)[::-1]
        for phase, (work, n_tokens) in phases.items():
            for name in order:
                taken = seconds(lambda work=work, name=name: work(models[name]))  # type: ignore[misc]
                if i > 0:  # the first round warms up
                    rates[phase][name].append(n_tokens / taken)
    return rates


def main(
    shape: str = "110m",
    dtype: str = "bfloat16",
    prefill: int = 512,
    decode: int = 32,
    rounds: int = 7,
    out: str | None = None,
) -> None:
    """Compare prefill and decode of reference mode with Meta's llama-models on this machine.

    Args:
        shape: 110m or 1.5b.
        dtype: bfloat16 or float32.
        prefill: tokens of the prompt.
        decode: tokens decoded after it, one at a time.
        rounds: how often both models are measured in both phases.
        out: a file, to which the figures are written as JSON.
    """
    models = make_models(shape, DTYPES[dtype], prefill + decode)
    parameters = sum(weight.numel() for weight in models["llama-reference"].parameters())
    rates = measure(models, SHAPES[shape]["vocab_size"], prefill, decode, rounds)

    products = parameters - models["llama-reference"].tok_embeddings.weight.numel()
    limit = product_rate(torch.device("cpu"))

    print(f"\n{shape}: {parameters / 1e6:.0f}M parameters, {dtype}, batch 1, median of {rounds}")
    result: dict[str, Any] = {
        "shape": shape, "parameters": parameters, "dtype": dtype, "prefill": prefill,
        "decode": decode, "rounds": rounds, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "processor": processor(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    for phase, by_model in rates.items():
        medians = {name: statistics.median(values) for name, values in by_model.items()}
        for name, rate in medians.items():
            check_rate(f"{name} {phase}", 2 * products * rate, limit, "operations")
        pairs = zip(by_model["llama-reference"], by_model["llama-models"], strict=True)
        ratio = statistics.median(ours / metas for ours, metas in pairs)
        result[phase] = {"tokens_per_second": medians, "ratio": ratio}
        shown = "  ".join(f"{name} {value:8.2f} tok/s" for name, value in medians.items())
        print(f"{phase:8} {shown}  ratio {ratio:.3f}")
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
