"""Measure the time from the start of a process to the first token, with weights in the page cache.

python benchmarks/startup.py FOLDER --work build/startup --out benchmarks/results/startup_1.5b.json

FOLDER holds bfloat16 weights. `convert` writes them in int8 and int4 to the work folder, once.
Memory is given as a multiple of the size of weights and KV cache: the private memory, and the peak
of the resident memory, which includes the pages of mapped files. Linux only.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import fire
from tqdm import tqdm

from llama.checkpoints.convert import convert

# The measured process. It prints the seconds and the memory as JSON.
FIRST_TOKEN = """
import time; start = time.perf_counter()
import json, sys
from llama import Llama
from llama.commands.limits import check_count, count_tokens
from llama.commands.measure import read_bytes
from llama.memory import used_memory
from llama.sampling import SamplingParams
imported = time.perf_counter()
llama = Llama.build(sys.argv[1], sys.argv[2], max_seq_len=512, max_batch_size=1, mode="fast")
engine = llama.engine
engine.tokenizer = None  # the ids of random weights need not be text
engine.submit(list(range(8)), SamplingParams(temperature=0, max_gen_len=1))
events = []
while engine.has_work:
    events += engine.step()
done = time.perf_counter()
held = read_bytes(llama.model) + llama.model.tok_embeddings.weight.nbytes
held += sum(tensor.nbytes for tensor in engine.cache.tensors())
check_count("first token", count_tokens(events), 1)
memory = used_memory(llama.model.device)
print(json.dumps({
    "import_s": imported - start, "build_to_first_token_s": done - imported,
    "private": memory["private"] / held, "resident_peak": memory["peak"] / held,
}))
"""


def run(folder: Path, tokenizer: Path) -> dict[str, float]:
    """The figures of one process."""
    command = [sys.executable, "-c", FIRST_TOKEN, str(folder), str(tokenizer)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(folder: str, work: str, rounds: int = 3, out: str | None = None) -> None:
    """Measure, and print medians.

    Args:
        folder: a checkpoint in bfloat16, with its tokenizer.model.
        work: folder for the quantized checkpoints; existing ones are used again.
        rounds: how often everything is measured, after a first round that is not counted.
        out: a file, to which the figures are written as JSON.
    """
    folders = {"bfloat16": Path(folder)}
    for width in ("int8", "int4"):
        folders[width] = Path(work) / width
        if not folders[width].exists():
            Path(work).mkdir(parents=True, exist_ok=True)
            convert(folder, folders[width], quantize=width)
    tokenizer = Path(folder) / "tokenizer.model"
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for number in tqdm(range(rounds + 1), unit="round"):
        for name, path in folders.items():
            figures_of_run = run(path, tokenizer)
            if number > 0:  # the first round warms up
                runs[name].append(figures_of_run)
    figures: dict[str, Any] = {
        name: {key: statistics.median(run[key] for run in of_name) for key in of_name[0]}
        for name, of_name in runs.items()
    }
    for name, row in figures.items():
        print(name, "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
    if out is not None:
        Path(out).write_text(json.dumps({"rounds": rounds, "medians": figures}, indent=2) + "\n")


if __name__ == "__main__":
    fire.Fire(main)
