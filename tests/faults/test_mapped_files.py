"""A weight file that is cut, overwritten, replaced or deleted while it is mapped.

Between two steps of the model, and between two tensors while it loads, a change is an error of one
line. Within a step nothing can be caught: the system ends the process by SIGBUS.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from helpers.damaged import ONE_FILE, WIDER, write_folder
from helpers.fault_plan import Trials
from helpers.isolated import Cases, isolated

from llama import Llama
from llama.checkpoints.build import load_model, open_model
from llama.checkpoints.convert import convert

FILES = {
    ".pth": "consolidated.00.pth",
    "sharded .pth": "consolidated.01.pth",
    ".safetensors": ONE_FILE,
    ".gguf": "model.gguf",
}


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in a folder for each key of FILES."""
    root = tmp_path_factory.mktemp("mapped")
    write_folder(root / ".pth", WIDER)
    convert(root / ".pth", root / "sharded .pth", mp=2)
    convert(root / ".pth", root / ".safetensors", "hf")
    (root / ".gguf").mkdir()
    convert(root / ".pth", root / ".gguf" / "model.gguf", "gguf")
    return root


@pytest.fixture
def folders(mapped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mapped, tmp_path / "copies"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    """As `cp` does: the file is emptied, and other bytes of the same length are written."""
    size = path.stat().st_size
    path.write_bytes(bytes(size))


def replace(path: Path) -> None:
    """As `mv` and rsync do: another file gets the name."""
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


HARMFUL = (cut, empty, overwrite)
HARMLESS = (replace, Path.unlink)

Change = Callable[[Path], object]


def generate_around(path: Path, change: Change) -> tuple[object, object]:
    """The tokens that a model generates before and after a change of its file, which are the same
    where the weights were copied while loading: those of a safetensors file are seldom aligned."""
    llama = Llama.build(path.parent, device="cpu", max_seq_len=32)
    before = llama.generate([[1, 2, 3]], 8, temperature=0)[0]
    change(path)
    return before, llama.generate([[1, 2, 3]], 8, temperature=0)[0]


def load_after(path: Path, change: Change) -> object:
    """Load a model whose file is changed after it was opened."""
    setup, _, _ = open_model(
        path.parent, None, 32, 1, None, "reference", None, None, "cpu", None, needs_tokenizer=False
    )
    change(path)
    return load_model(setup).params.dim


def copy_for(change: Change, folders: Path, layout: str) -> Path:
    """A copy of the layout's folder, for one change."""
    return Path(shutil.copytree(folders / layout, folders / f"{layout} {change.__name__}"))


def cases_of(call: Callable[[Path, Change], object], folders: Path) -> Cases:
    """The call with each harmful change of each layout's file, by the change and the file."""
    cases: Cases = {}
    for layout, file in FILES.items():
        for change in HARMFUL:
            path = copy_for(change, folders, layout) / file
            cases[f"{change.__name__}: {path}"] = partial(call, path, change)
    return cases


@pytest.mark.fault(16)
def test_a_change_after_loading(folders: Path, trials: Trials) -> None:
    cases = cases_of(generate_around, folders)
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            path = name.split(": ")[1]
            if kind == "ok":
                before, after = found[0]
                assert before == after
                assert not path.endswith(".pth")
            else:
                assert f"{path} was changed while its weights are in use" in found[1]


@pytest.mark.fault(16)
def test_a_file_that_gets_another_one_in_its_place(folders: Path, trials: Trials) -> None:
    """The mapped file stays what it was."""
    for layout, file in FILES.items():
        for change in HARMLESS:
            folder = copy_for(change, folders, layout)
            name = f"{change.__name__}: {layout}"
            outcome = isolated({name: partial(generate_around, folder / file, change)})[name]
            with trials.trial(name):
                assert outcome[0] == "ok"
                before, after = outcome[1]
                assert before == after


@pytest.mark.fault(16)
def test_a_change_before_the_weights_are_read(folders: Path, trials: Trials) -> None:
    cases = cases_of(load_after, folders)
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            assert kind == "error"
            assert f"{name.split(': ')[1]} was changed while" in found[1]


@pytest.mark.fault(16)
def test_a_chat_says_it_in_one_line(folders: Path, trials: Trials) -> None:
    """A real process: its file is emptied between two messages."""
    path = folders / ".pth" / FILES[".pth"]
    content = path.read_bytes()
    for mode in ("reference", "fast")[: trials.number(few=1, all=2)]:
        path.write_bytes(content)
        flags = ["--ckpt_dir", str(path.parent), "--max_gen_len", "4", "--mode", mode]
        with subprocess.Popen(
            [sys.executable, "-m", "llama", "chat", *flags, "--device", "cpu"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as chat:
            assert chat.stdin is not None
            assert chat.stdout is not None
            chat.stdin.write(b"hello\n")
            chat.stdin.flush()
            chat.stdout.read(1)  # the answer has begun, and may be going on
            time.sleep(1)
            empty(path)
            _, errors = chat.communicate(b"hello again\n", timeout=120)
        with trials.trial(mode):
            assert chat.returncode == 2  # at the end of its input
            found = [line for line in errors.decode().splitlines() if "was changed" in line]
            assert len(found) == 1
            assert str(path) in found[0]


@pytest.mark.fault(16)
def test_a_cut_within_a_step_is_not_silent(folders: Path, trials: Trials) -> None:
    """A real process is cut off while it generates, at any place. If that is between two steps, it
    ends with an error."""
    path = folders / ".pth" / FILES[".pth"]
    content = path.read_bytes()
    for i in range(trials.number(few=1, all=4)):
        path.write_bytes(content)
        flags = ["--ckpt_dir", str(path.parent), "--mode", "reference"]
        flags += ["--max_gen_len", "4000", "--max_seq_len", "4096", "--ignore_eos", "true"]
        with subprocess.Popen(
            [sys.executable, "-m", "llama", "complete", "a", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)  # it generates
            time.sleep(0.1 * i)
            empty(path)
            _, errors = process.communicate(timeout=120)
        with trials.trial(f"after {i} tenths of a second"):
            said = "was changed while" if process.returncode == 2 else "Bus error"
            assert process.returncode in (2, -signal.SIGBUS)
            assert said in errors.decode()
