"""Every script of benchmarks/ runs at its smallest size and reports figures.

Run by `make test-slow`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.hosts import IS_POSSIBLE
from make_checkpoint import SHAPES, demo_pieces, make_checkpoint, write_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent

# Flags of the smallest run; {work} is a folder, {model} a checkpoint in it.
SCRIPTS: dict[str, list[str]] = {
    "engine": ["--shape=demo", "--rounds=1"],
    "gpu": [
        "--shapes=demo",
        "--rows=1,2",
        "--prefills=32",
        "--widths=bfloat16",
        "--device=cpu",
        "--compiled=False",
    ],
    "gguf_open": ["--work={work}/gguf", "--shape=demo", "--rounds=1"],
    "hosts": ["--folder={model}", "--prefill=8", "--decode=1", "--rounds=1"],
    "kernel_speed": ["--shape=demo", "--rounds=1"],
    "load": ["--folder={work}/load", "--shape=demo", "--rounds=1"],
    "quality": ["--tales={work}/tales.jsonl"],
    "serve": ["--clients=1,2", "--seconds=1", "--rounds=1", "--slots=2", "--length=8"],
    "serve_faults": ["--requests=100", "--sockets=20"],
    "soak": ["--seconds=8", "--growth=1"],
    "ranks": ["--folder={model}", "--decode=2", "--rounds=1"],
    "speculative": ["--rounds=1"],
    "speed": ["--shape=demo", "--prefill=32", "--decode=4", "--rounds=1"],
    "stories": ["{model}", "--texts={work}/texts", "--pairs=1"],
    "startup": ["--folder={model}", "--work={work}/startup", "--rounds=1"],
    "train_memory": ["--work={work}", "--shape=demo", "--seq_len=32", "--steps=2"],
    "train_speed": ["--shape=bundled", "--batch=1", "--seq_len=32", "--rounds=1"],
}
NOT_TIMED = {"make_checkpoint", "peer", "peers", "processor", "rounding", "tables"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    make_checkpoint(folder / "model", SHAPES["demo"])
    write_tokenizer(folder / "model" / "tokenizer.model", demo_pieces())
    tale = {"text": "Once upon a time there was a king who had three sons. " * 4}
    (folder / "tales.jsonl").write_text(json.dumps(tale) + "\n", encoding="utf-8")
    (folder / "texts").mkdir()
    for name in ("training", "held_out_titles", "held_out_books"):
        (folder / "texts" / f"{name}.jsonl").write_text(json.dumps(tale) + "\n", encoding="utf-8")
    return folder


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *flags]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )


def numbers(figures: Any) -> list[float]:
    if isinstance(figures, dict):
        return [number for value in figures.values() for number in numbers(value)]
    if isinstance(figures, list):
        return [number for value in figures for number in numbers(value)]
    return [figures] if isinstance(figures, int | float) else []


def test_every_script_is_run() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == SCRIPTS.keys() | NOT_TIMED


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_at_its_smallest(script: str, work: Path) -> None:
    if script == "hosts" and not IS_POSSIBLE:
        pytest.skip("needs root, and iproute2")
    out = work / f"{script}.json"
    flags = [flag.format(work=work, model=work / "model") for flag in SCRIPTS[script]]
    done = run(script, *flags, f"--out={out}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()
    found = numbers(json.loads(out.read_text()))
    assert found
    assert all(number == number for number in found), "no figure is NaN"
    assert any(number > 0 for number in found)


def test_peers_names_what_is_missing(work: Path) -> None:
    """llama-cpp-python needs a C++ compiler. Without it the script names the missing package."""
    if importlib.util.find_spec("llama_cpp") is None:
        done = run("peers", f"--work={work / 'peers'}")
        assert done.returncode != 0
        assert "llama" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        done = run("peers", f"--work={work / 'peers'}", "--rounds=1", "--decode=8")
        assert done.returncode == 0, done.stderr[-3000:]


def test_tables_are_those_of_the_results() -> None:
    """benchmarks/tables.py writes the tables of the page from benchmarks/results/."""
    page = ROOT / "docs" / "performance.md"
    before = page.read_text(encoding="utf-8")
    done = run("tables")
    after = page.read_text(encoding="utf-8")
    page.write_text(before, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert after == before
