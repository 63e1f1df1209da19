"""Compare speculative with plain decoding, on texts that repeat their prompt and on ordinary tales.

python benchmarks/speculative.py --out benchmarks/results/speculative_bundled.json
python benchmarks/speculative.py --shape 1.5b --dtype bfloat16 --quantize int8

Both decode the same texts, which the bundled model has generated. A random model of another shape
is forced to generate them too. The measurements are interleaved, and medians are reported.
"""

import copy
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from make_checkpoint import DTYPES, SHAPES
from processor import processor
from torch import Tensor
from tqdm import tqdm

from llama import Llama, ModelArgs, Transformer
from llama.commands.limits import check_count, check_rate, read_rate
from llama.commands.measure import read_bytes
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.errors import BenchmarkError
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.quantize import Width
from llama.sampling import SamplingParams

MAX_SEQ_LEN = 512
TALE = 180  # tokens of a generated tale
OPENINGS = [
    "Once upon a time there was a king who had three sons.",
    "In a dark wood there lived a witch.",
    "A poor miller had nothing left but his cat.",
    "The youngest sister went to the well and found a frog.",
]


def forced(prompt: list[int], text: list[int]) -> SamplingParams:
    """Sampling options with which a model generates exactly the text after the prompt."""

    def only(tokens: Sequence[int], logits: Tensor) -> Tensor:
        return torch.full_like(logits, -1e9).index_fill(
            0, torch.tensor(text[len(tokens) - len(prompt)]), 0.0
        )

    return SamplingParams(temperature=0, max_gen_len=len(text), logits_processor=only)


def seconds_of(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[float, Request]:
    """Run a request. Returns the seconds from its first token to its last, and the request."""
    request = engine.submit(prompt, params, is_private=True)
    while not request.tokens:
        engine.step()
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start, request


def compare(
    plain: Engine,
    other: Engine,
    jobs: list[tuple[list[int], SamplingParams]],
    rounds: int,
    limit: float,
) -> dict[str, float]:
    """Run all jobs on both engines. Returns the speed of `plain`, the speedup of `other`, how many
    tokens it proposes for each generated token, and its acceptance rate ("right")."""
    for engine in (plain, other):  # warm up
        seconds_of(engine, *jobs[0])
    ratios: list[list[float]] = [[] for _ in jobs]
    rates = []
    proposed = accepted = 0
    for _ in range(rounds):
        for job, taken in zip(jobs, ratios, strict=True):
            (slow, one), (fast, two) = seconds_of(plain, *job), seconds_of(other, *job)
            if one.tokens != two.tokens and job[1].temperature == 0:
                raise BenchmarkError("speculative decoding changed a greedy text")
            for request in (one, two):
                check_count("a text", len(request.tokens), job[1].max_gen_len or 0)
            taken.append(slow / fast)
            rates.append((len(one.tokens) - 1) / slow)
            check_rate("plain decoding", rates[-1], limit, "tokens")
            proposed += two.proposed
            accepted += two.accepted
    return {
        "plain_tokens_a_second": statistics.median(rates),
        "speedup": statistics.median(ratio for taken in ratios for ratio in taken),
        "speedup_of_the_worst_text": min(map(statistics.median, ratios)),
        "proposed_a_token": proposed / (rounds * sum(p.max_gen_len or 0 for _, p in jobs)),
        "right": accepted / max(1, proposed),
    }


def main(
    shape: str = "bundled",
    dtype: str = "float32",
    quantize: Width | None = None,
    rounds: int = 5,
    out: str | None = None,
) -> None:
    """Measure and print.

    Args:
        shape: bundled, 110m or 1.5b.
        dtype: dtype of the weights: float32 or bfloat16.
        quantize: int8 or int4.
        rounds: how often every text is measured.
        out: a file, to which the figures are written as JSON.
    """
    bundled = Llama.build(max_seq_len=MAX_SEQ_LEN, dtype=dtype)
    model = bundled.model
    if shape != "bundled":
        torch.set_default_dtype(DTYPES[dtype])
        model = Transformer(ModelArgs(**SHAPES[shape], max_seq_len=MAX_SEQ_LEN))
        torch.set_default_dtype(torch.float32)
    prompts = [bundled.encode_prompt(text) for text in OPENINGS]
    options: dict[str, Any] = dict(max_gen_len=TALE, seed=1, ignore_eos=True)
    tales, _ = bundled.generate(prompts, temperature=0.8, **options)
    kinds = {
        "tale": [(p, forced(p, tale)) for p, tale in zip(prompts, tales, strict=True)],
        "repetition": [(p + t, forced(p + t, t)) for p, t in zip(prompts, tales, strict=True)],
    }
    draft = FastTransformer(copy.deepcopy(model), "int4") if shape == "bundled" else None
    network = FastTransformer(model, quantize)
    plain, lookup = (Engine(network, 1, MAX_SEQ_LEN, lookup=flag) for flag in (False, True))
    n_bytes = read_bytes(model)
    limit = read_rate(n_bytes, model.device) / n_bytes
    report = {f"lookup, {kind}": compare(plain, lookup, jobs, rounds, limit)
              for kind, jobs in tqdm(kinds.items())}  # fmt: skip
    if draft is not None:
        # The draft is the model itself in int4, and hardly faster than the model. Drafting is then
        # not worth its time, and this measures how much the trials cost.
        for temperature in (0.0, 0.8):
            params = SamplingParams(temperature=temperature, max_gen_len=TALE, ignore_eos=True)
            drafted = Engine(network, 1, MAX_SEQ_LEN, draft=draft)
            jobs = [(prompt, params) for prompt in prompts]
            report[f"draft int4, temperature {temperature}"] = compare(
                plain, drafted, jobs, rounds, limit
            )
    for name, figures in report.items():
        print(name, *(f"{figure} {value:.2f}" for figure, value in figures.items()), sep="  ")
    if out is not None:
        machine = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        content = machine | {"shape": shape, "dtype": dtype, "quantize": quantize} | report
        Path(out).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
