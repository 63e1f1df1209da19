"""Compare the speed of training steps with transformers: same shape, batch and optimizer.

The measurements are interleaved.

python benchmarks/train_speed.py
python benchmarks/train_speed.py --shape 110m --batch 2 --seq_len 1024 --device cuda
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fire
import torch
from make_checkpoint import DTYPES
from processor import processor
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama import ModelArgs, Transformer
from llama.commands.limits import check_rate
from llama.errors import BenchmarkError
from llama.parallel import local_device

# dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size
SHAPES = {
    "bundled": (256, 4, 4, 2, 640, 4352),
    "15m": (288, 6, 6, 6, 768, 32000),
    "110m": (768, 12, 12, 12, 2048, 32000),
    "1b": (2048, 16, 32, 8, 8192, 128256),
}


def make_models(shape: str, seq_len: int, device: torch.device) -> dict[str, Any]:
    """Our model and that of transformers, with random weights."""
    dim, n_layers, n_heads, n_kv_heads, hidden_dim, vocab_size = SHAPES[shape]
    args = ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        max_seq_len=seq_len,
    )
    config = LlamaConfig(
        hidden_size=dim,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        intermediate_size=hidden_dim,
        vocab_size=vocab_size,
        max_position_embeddings=seq_len,
        tie_word_embeddings=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    with device:
        return {"llama-reference": Transformer(args), "transformers": LlamaForCausalLM(config)}


def flops_per_token(model: Transformer, seq_len: int) -> int:
    """Floating-point operations of forward and backward for one token: six for each weight of a
    matrix product, and those of attention's two products. A query sees half of the row on average.
    Chowdhery et al. 2022, appendix B, arxiv.org/abs/2204.02311."""
    weights = sum(w.numel() for w in model.parameters()) - model.tok_embeddings.weight.numel()
    return 6 * weights + 6 * model.n_layers * model.params.dim * seq_len


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The time of one call, until the GPU has finished."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large matrix product, in the fastest of several calls."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: a @ b.T, device) for _ in range(6))


def make_steps(
    models: dict[str, Any], dtype: torch.dtype, tokens: Tensor, device: torch.device
) -> dict[str, Callable[[], None]]:
    """One optimizer step of each model on the same tokens."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    def loss_of(model: Any) -> Tensor:
        if isinstance(model, Transformer):
            return model.forward_loss(inputs, targets)
        logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def make(model: Any) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

        def step() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = loss_of(model)
            if not loss.isfinite():
                raise BenchmarkError(f"the loss is {loss.item()}")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {name: make(model) for name, model in models.items()}


def main(
    shape: str = "15m",
    batch: int = 4,
    seq_len: int = 512,
    dtypes: str = "float32,bfloat16",
    rounds: int = 5,
    device: str | None = None,
    threads: int | None = None,
    out: str | None = None,
) -> None:
    """Compare training steps with transformers' LlamaForCausalLM on this machine.

    Args:
        shape: bundled, 15m, 110m or 1b.
        batch: rows of a step.
        seq_len: tokens of a row.
        dtypes: dtypes of the matrix products, separated by commas; the weights are float32.
        rounds: timed steps of each model; the median counts.
        device: cuda, mps or cpu; by default the first of these that is available.
        threads: number of CPU threads; by default PyTorch's choice.
        out: a file, to which the figures are written as JSON.
    """
    if shape not in SHAPES:
        raise SystemExit(f"error: shape is {shape!r}, must be one of {', '.join(SHAPES)}")
    names = list(dtypes) if isinstance(dtypes, tuple) else dtypes.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise SystemExit(f"error: dtype is {unknown[0]!r}, must be one of {', '.join(DTYPES)}")
    if threads is not None:
        torch.set_num_threads(threads)
    target = local_device(device)
    models = make_models(shape, seq_len, target)
    flops = flops_per_token(models["llama-reference"], seq_len)
    vocab_size = models["llama-reference"].vocab_size
    tokens = torch.randint(0, vocab_size, (batch, seq_len + 1), device=target)
    results: dict[str, Any] = {}
    for name in names:
        steps = make_steps(models, DTYPES[name], tokens, target)
        taken: dict[str, list[float]] = {model: [] for model in models}
        peaks = []
        for i in range(rounds + 1):
            peaks.append(matmul_peak(DTYPES[name], target))
            for model in list(steps) if i % 2 else list(steps)[::-1]:
                duration = seconds(steps[model], target)
                if i > 0:  # the first round warms up
                    taken[model].append(duration)
        peak = statistics.median(peaks[1:])
        print(f"{name}: matrix products reach {peak / 1e9:,.0f} GFLOP/s")
        results[name] = {"peak_flops": peak}
        for model, durations in taken.items():
            speed = batch * seq_len / statistics.median(durations)
            share = speed * flops / peak
            check_rate(f"{model} {name}", speed * flops, peak, "operations")
            print(f"  {model:16} {speed:10,.0f} tokens/s, {share:5.1%} of the products' speed")
            results[name][model] = {"tokens_per_second": speed, "share_of_peak": share}
    if out is not None:
        about = {
            "shape": shape,
            "batch": batch,
            "seq_len": seq_len,
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(about | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
