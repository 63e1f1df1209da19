"""Commands that work on files, the files, and how a rank runs a command."""

import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer

from llama import errors
from llama.__main__ import main
from llama.checkpoints.folder import run_checkpoints
from llama.tokenizer import Tokenizer
from llama.training.documents import write_token_files

N_LINES = 40
Words = list[str]


def write_inputs(folder: Path) -> None:
    """A model, a token file and a file of prompts."""
    (folder / "model").mkdir()
    pieces = demo_pieces()
    params = dict(dim=64, n_layers=4, n_heads=4, vocab_size=len(pieces) + 256, multiple_of=32,
                  norm_eps=1e-5)  # fmt: skip
    make_checkpoint(folder / "model", params, spoken=range(len(pieces)))
    write_tokenizer(folder / "model" / "tokenizer.model", pieces)
    tokenizer = Tokenizer(folder / "model" / "tokenizer.model")
    write_token_files(["the word they said " * 400], tokenizer, str(folder / "data.bin"), 10**7)
    lines = [{"prompt": f"the word {i}", "max_gen_len": 24} for i in range(N_LINES)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def complete_words(inputs: Path, mode: str, n_tokens: int) -> Words:
    return ["complete", "the word they said", f"--ckpt_dir={inputs}/model", f"--mode={mode}",
            f"--max_gen_len={n_tokens}", "--temperature=0", "--device=cpu"]  # fmt: skip


def train_words(inputs: Path, out: Path, steps: int, checkpoint_every: int) -> Words:
    return ["train", f"--data={inputs}/data.bin", f"--tokenizer={inputs}/model/tokenizer.model",
            f"--out_dir={out}", "--dim=64", "--n_layers=2", "--seq_len=32", "--batch=2",
            f"--steps={steps}", f"--checkpoint_every={checkpoint_every}",
            "--device=cpu"]  # fmt: skip


def batch_words(inputs: Path, out: Path) -> Words:
    return ["batch", str(inputs / "in.jsonl"), str(out), f"--ckpt_dir={inputs}/model",
            "--max_seq_len=64", "--max_batch_size=2", "--device=cpu"]  # fmt: skip


def trained_weights(out: Path) -> dict[str, bytes]:
    """The files of weights in the newest checkpoint of a run."""
    return {path.name: path.read_bytes() for path in run_checkpoints(out)[-1].glob("*.pth")}


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    output: str
    errors: str


def run_command(words: Words) -> Ended:
    """In a rank: run a command of `llama`."""
    errors.RANK_PAUSE = 0  # the test sees the messages of all ranks
    output, said = io.StringIO(), io.StringIO()
    sys.stdout, sys.stderr, sys.argv = output, said, ["llama", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    return Ended(code, output.getvalue(), said.getvalue())
