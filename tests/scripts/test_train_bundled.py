"""The way to the bundled model: trained, stopped, continued, exported and opened.

Run by `make test-slow`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.folders import make_model, write_meta
from helpers.tales import write_corpus

from llama import Llama
from llama.checkpoints.folder import BUNDLED

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "train_bundled.py"


def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_train_stop_continue_export_open(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    out, folder = tmp_path / "run", tmp_path / "model"
    common = ["train", str(tmp_path), str(out), "--ranks=400", "--checkpoint_every=10",
              "--step_tokens=4096"]  # fmt: skip
    run(*common, "--steps=10", "--decay_steps=0")
    assert [path.name for path in out.glob("step_*")] == ["step_00000010"]
    done = run(*common, "--steps=20", "--decay_steps=10", "--device=cpu")
    assert "Continuing after step 10" in done.stdout
    assert (out / "step_00000020").is_dir()

    refined = tmp_path / "refined"
    done = run("refine", str(tmp_path), str(out), str(refined), "--steps=2", "--device=cpu")
    assert "of the tokens of 64 stories end a repeated run" in done.stdout
    assert (refined / "step_00000022").is_dir()

    run("export", str(refined), str(folder))
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model",
    ]  # fmt: skip
    llama = Llama.build(folder, device="cpu")
    (told,) = llama.text_completion(["Once"], max_gen_len=8, logprobs=True)
    assert 0 < len(told["tokens"]) <= 8

    run("texts", str(tmp_path), str(tmp_path / "texts"))
    figures = {"all": {"things": 0.5, "distinct 4-grams": 0.9}}
    (tmp_path / "figures.json").write_text(
        json.dumps({"models": {"a": figures, "b": figures, "c": figures}})
    )
    card_of = [str(tmp_path), str(refined), str(folder), str(tmp_path / "figures.json")]
    run("card", *card_of, "--hours=0.1", "--machine=a computer")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "22 steps" in card
    assert "{" not in card


@pytest.mark.slow
def test_a_run_begins_with_a_folders_weights(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run("train", str(tmp_path), str(tmp_path / "run"), f"--init={BUNDLED}", "--steps=1",
        "--decay_steps=0", "--step_tokens=4096", "--muon=0", "--adam=0")  # fmt: skip
    folder = tmp_path / "run" / "step_00000001"
    assert (folder / "tokenizer.model").read_bytes() == (BUNDLED / "tokenizer.model").read_bytes()
    begun, given = (Llama.build(path, device="cpu", dtype="float32") for path in (folder, BUNDLED))
    for name, weight in given.model.named_parameters():
        assert torch.equal(begun.model.get_parameter(name), weight)


def test_a_wrong_option_is_one_line(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    done = run("train", str(tmp_path), str(tmp_path / "run"), "--step_tokens=100", code=2)
    assert done.stderr.count("\n") == 1
    assert "4096" in done.stderr


def test_a_folder_of_another_shape_is_one_line(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    small, out = write_meta(tmp_path / "small", make_model(), 1), tmp_path / "run"
    done = run("train", str(tmp_path), str(out), f"--init={small}", code=2)
    assert "small is of another model: layers.0" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("train", str(tmp_path), str(out), f"--init={tmp_path}", code=2)
    assert "tokenizer.model" in done.stderr
    assert not out.exists()


def test_a_missing_corpus_is_one_line(tmp_path: Path) -> None:
    done = run("texts", str(tmp_path / "none"), str(tmp_path / "texts"), code=2)
    assert "fairy_tales.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
