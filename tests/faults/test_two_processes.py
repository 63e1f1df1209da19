"""Two processes with one batch output, one run folder or one cache of kernels mix nothing."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.fault_plan import Trials
from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer

from llama.checkpoints.folder import run_checkpoints
from llama.checkpoints.verify import verify
from llama.tokenizer import Tokenizer
from llama.training.documents import write_token_files

SECONDS = 120  # limit of a process
REFUSED = "another run is writing"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pieces = demo_pieces()
    params = dict(dim=32, n_layers=2, n_heads=4, vocab_size=len(pieces) + 256, multiple_of=32,
                  norm_eps=1e-5)  # fmt: skip
    make_checkpoint(folder, params, spoken=range(len(pieces)))
    write_tokenizer(folder / "tokenizer.model", pieces)
    return folder


def start(words: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "llama", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def end(process: "subprocess.Popen[str]") -> str:
    """Wait for the end. Returns standard error."""
    return process.communicate(timeout=SECONDS)[1]


@pytest.mark.fault(18)
def test_one_batch_output(trials: Trials, model: Path, tmp_path: Path) -> None:
    """The second job has other options. It is refused, and the first job's results are whole."""
    lines = [{"prompt": f"the word {i}", "max_gen_len": 40} for i in range(200)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def job(output: Path, seed: int) -> list[str]:
        return ["batch", str(tmp_path / "in.jsonl"), str(output), f"--seed={seed}",
                f"--ckpt_dir={model}", "--max_seq_len=64", "--max_batch_size=4"]  # fmt: skip

    whole = {}
    for seed in (1, 2):
        assert start(job(tmp_path / f"whole{seed}", seed)).wait(timeout=SECONDS) == 0
        whole[seed] = (tmp_path / f"whole{seed}").read_bytes()
    for i in range(trials.number(few=1, all=6)):
        with trials.trial(f"{i}"):
            out = tmp_path / f"out{i}"
            both = {seed: start(job(out, seed)) for seed in (1, 2)}
            said = {seed: end(process) for seed, process in both.items()}
            ended_well = [seed for seed, process in both.items() if process.returncode == 0]
            assert len(ended_well) == 1, said
            (winner,) = ended_well
            assert both[3 - winner].returncode == 2
            assert REFUSED in said[3 - winner] or "was started with seed" in said[3 - winner]
            assert out.read_bytes() == whole[winner]
            assert json.loads(Path(f"{out}.job.json").read_text())["seed"] == winner


def digests(folder: Path) -> dict[str, str]:
    """The checksum of each weight file of the run's newest checkpoint."""
    newest = run_checkpoints(folder)[-1]
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.pth")
    }


@pytest.mark.fault(18)
def test_one_run_folder(trials: Trials, model: Path, tmp_path: Path) -> None:
    """One run is refused, or finds the other one finished. The weights are those of a run alone."""
    tokenizer = model / "tokenizer.model"
    rng = random.Random(1)
    texts = [" ".join(rng.choices(["the", "word", "they", "said"], k=400)) for _ in range(20)]
    write_token_files(texts, Tokenizer(tokenizer), str(tmp_path / "data.bin"), 10**7)

    def run(folder: Path) -> list[str]:
        return ["train", f"--data={tmp_path}/data.bin", f"--tokenizer={tokenizer}",
                f"--out_dir={folder}", "--dim=32", "--n_layers=2", "--seq_len=64", "--batch=4",
                "--steps=60", "--checkpoint_every=5", "--device=cpu"]  # fmt: skip

    alone = start(run(tmp_path / "alone"))
    end(alone)
    assert alone.returncode == 0
    expected = digests(tmp_path / "alone")
    for i in range(trials.number(few=1, all=6)):
        with trials.trial(f"{i}"):
            folder = tmp_path / f"run{i}"
            both = [start(run(folder)) for _ in range(2)]
            said = [end(process) for process in both]
            assert any(process.returncode == 0 for process in both), said
            second = [REFUSED if process.returncode == 2 else "is finished" for process in both]
            assert any(map(str.__contains__, said, second)), said
            assert digests(folder) == expected
            assert [path.name for path in folder.iterdir() if "step_" not in path.name] == []
            for checkpoint in run_checkpoints(folder):
                assert verify(checkpoint)[1] == []


@pytest.mark.fault(18)
def test_one_cache_of_kernels(trials: Trials, model: Path, tmp_path: Path) -> None:
    """All processes say the same. In `make faults` they all compile into an empty cache."""
    words = ["complete", "the word", f"--ckpt_dir={model}", "--temperature=0", "--max_gen_len=20"]
    expected = start(words)
    text = expected.communicate(timeout=SECONDS)[0]
    compiles = bool(trials.number(few=0, all=1))
    for i in range(trials.number(few=1, all=3)):
        with trials.trial(f"{i}"):
            cache = {"NUMBA_CACHE_DIR": str(tmp_path / f"cache{i}")} if compiles else {}
            several = [start(words, **cache) for _ in range(2)]
            outputs = [process.communicate(timeout=2 * SECONDS) for process in several]
            assert [process.returncode for process in several] == [0] * 2, outputs
            assert [output for output, _ in outputs] == [text] * 2
            after = start(words, **cache)  # it reads what the others wrote
            assert after.communicate(timeout=SECONDS)[0] == text
