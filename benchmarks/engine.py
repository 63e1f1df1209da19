"""Compare the engine with Meta's generation loop on a ragged batch.

Also measure decoding of one and of eight rows, and the time to the first token in the first and the
second turn of a chat.

python benchmarks/engine.py --shape 110m --dtype float32 --out benchmarks/results/engine_110m.json
python benchmarks/engine.py --dtype bfloat16 --mode fast --quantize int8

All measurements use the same random weights. They are interleaved, and the medians are reported.
"""

import copy
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import fire
import torch
from make_checkpoint import DTYPES, SHAPES
from processor import processor
from tqdm import tqdm

from llama import ModelArgs, Transformer
from llama.commands.limits import check_count, count_tokens
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.mode import Mode
from llama.fast.quantize import Width
from llama.sampling import SamplingParams

ROWS = 8
LENGTHS = [10, 66, 121, 177, 233, 289, 344, 400]  # tokens of the prompts of the ragged batch
NEW = 64  # tokens generated for each prompt
MAX_SEQ_LEN = 2048
TURN = 1500  # tokens of the first turn's prompt

Network = Transformer | FastTransformer


def token_ids(n: int, seed: int = 0) -> list[int]:
    """n random token ids."""
    return [random.Random(seed + i).randrange(600) for i in range(n)]


@torch.inference_mode()
def metas_loop(model: Transformer, prompts: list[list[int]]) -> list[list[int]]:
    """Generate greedily as Meta's release does. Returns NEW tokens for each prompt.

    The first forward takes as many tokens as the shortest prompt has. Then all rows advance by one
    position a step. Rows with a longer prompt are fed its tokens meanwhile.
    """
    total = max(map(len, prompts)) + NEW
    tokens = torch.zeros(len(prompts), total, dtype=torch.long)
    given = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
        given[row, : len(prompt)] = True
    before = 0
    for at in range(min(map(len, prompts)), total):
        chosen = model(tokens[:, before:at], before)[:, -1].argmax(-1)
        tokens[:, at] = torch.where(given[:, at], tokens[:, at], chosen)
        before = at
    return [row[len(p) : len(p) + NEW] for row, p in zip(tokens.tolist(), prompts, strict=True)]


def run(engine: Engine, prompts: list[list[int]], n: int) -> list[Request]:
    """Generate n tokens greedily for each prompt."""
    params = SamplingParams(temperature=0, max_gen_len=n)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    count = 0
    while engine.has_work:
        count += count_tokens(engine.step())
    check_count("engine", count, n * len(prompts))
    return requests


def seconds_of_batch(model: Transformer, network: Network) -> dict[str, float]:
    """The seconds of the ragged batch by Meta's loop and by the engine, and in how many rows their
    tokens are equal."""
    prompts = [token_ids(length, seed=length) for length in LENGTHS]
    start = time.perf_counter()
    theirs = metas_loop(model, prompts)
    middle = time.perf_counter()
    requests = run(Engine(network, ROWS, MAX_SEQ_LEN), prompts, NEW)
    end = time.perf_counter()
    same = sum(r.tokens == row for r, row in zip(requests, theirs, strict=True))
    return {"metas_loop": middle - start, "engine": end - middle, "rows_alike": same}


def decoding_rate(network: Network, rows: int) -> float:
    """Tokens a second of all rows together, after their prompts are prefilled."""
    engine = Engine(network, rows, MAX_SEQ_LEN)
    params = SamplingParams(temperature=0, max_gen_len=None)
    for i in range(rows):
        engine.submit(token_ids(16, seed=i), params)
    engine.step()
    start = time.perf_counter()
    count = sum(count_tokens(engine.step()) for _ in range(NEW // 2))
    seconds = time.perf_counter() - start
    check_count(f"decode, {rows} rows", count, rows * (NEW // 2))
    return count / seconds


def first_token(engine: Engine, prompt: list[int]) -> tuple[float, list[int]]:
    """Seconds to the first token, and the tokens of the prompt and the answer."""
    params = SamplingParams(temperature=0, max_gen_len=16)
    request = engine.submit(prompt, params)
    start = time.perf_counter()
    while not request.tokens:
        engine.step()
    seconds = time.perf_counter() - start
    while engine.has_work:
        engine.step()
    return seconds, prompt + request.tokens


def seconds_of_turns(network: Network) -> dict[str, float]:
    """Seconds to the first token in the first and second turn of a chat. The second prompt begins
    with the tokens of the first turn."""
    engine = Engine(network, 1, MAX_SEQ_LEN)
    first, turn = first_token(engine, token_ids(TURN))
    second, _ = first_token(engine, turn + token_ids(24, seed=TURN))
    return {"first_turn": first, "second_turn": second}


def main(
    shape: str = "110m",
    dtype: str = "float32",
    mode: Mode = "reference",
    quantize: Width | None = None,
    rounds: int = 3,
    out: str | None = None,
) -> None:
    """Measure, and print the medians over the rounds.

    Args:
        shape: 110m or 1.5b.
        dtype: float32 or bfloat16.
        mode: mode of the engine: reference or fast.
        quantize: int8 or int4, with mode fast.
        rounds: how often everything is measured.
        out: a file, to which the figures are written as JSON.
    """
    torch.set_default_dtype(DTYPES[dtype])
    params = SHAPES[shape] | {"max_batch_size": ROWS, "max_seq_len": MAX_SEQ_LEN}
    model = Transformer(ModelArgs(**params))
    torch.set_default_dtype(torch.float32)
    network: Network = model
    if mode == "fast":  # a copy is quantized, because Meta's loop needs the original
        network = FastTransformer(copy.deepcopy(model) if quantize else model, quantize)
    rows: list[dict[str, float]] = []
    for _ in tqdm(range(rounds), unit="round"):
        figures = seconds_of_batch(model, network) | seconds_of_turns(network)
        figures |= {f"decode_{n}": decoding_rate(network, n) for n in (1, ROWS)}
        rows.append(figures)

    def median(figure: Any) -> float:
        return statistics.median(figure(row) for row in rows)

    report = {name: median(lambda row, name=name: row[name]) for name in rows[0]}
    ratios = {
        "batch_over_metas_loop": median(lambda row: row["metas_loop"] / row["engine"]),
        "decode_8_over_1": median(lambda row: row[f"decode_{ROWS}"] / row["decode_1"]),
        "first_turn_over_second": median(lambda row: row["first_turn"] / row["second_turn"]),
    }
    for name, value in (report | ratios).items():
        print(f"{name:24} {value:9.3f}")
    if out is not None:
        machine = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        content = machine | {
            "shape": shape,
            "dtype": dtype,
            "mode": mode,
            "quantize": quantize,
            "medians": report,
            "ratios": ratios,
        }
        Path(out).write_text(json.dumps(content | {"rounds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
