"""A full disk, kill -9 and Ctrl-C during convert, train and batch: whole files only, and a rerun
gives what an undisturbed run gives."""

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.fault_plan import Trials
from helpers.jobs import Words, batch_words, train_words
from helpers.ranks import context

from llama.__main__ import main
from llama.checkpoints.folder import run_checkpoints
from llama.checkpoints.verify import verify

SECONDS = 120  # limit of a job
N_POINTS = 20


def convert_words(inputs: Path, out: Path) -> Words:
    return ["convert", str(inputs / "model"), str(out), "--to=hf", "--force"]


JOBS: dict[str, Callable[[Path, Path], Words]] = {
    "convert": convert_words,
    "train": functools.partial(train_words, steps=12, checkpoint_every=2),
    "batch": batch_words,
}


def run(words: Words, errors: Path) -> None:
    """In a child: the command, which writes its errors to a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    sys.stderr = errors.open("w", buffering=1)
    sys.stdout = io.StringIO()
    sys.argv = ["llama", *words]
    try:
        main()
    finally:  # the end of the child is multiprocessing's, not the command's
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Job:
    """A command in a child."""

    def __init__(self, words: Words, errors: Path) -> None:
        self._errors = errors
        self._process = context.Process(target=run, args=(words, errors))
        self._process.start()

    def wait_for_start(self) -> None:
        """Wait until the child has begun the command."""
        while not self._errors.exists() and self._process.is_alive():
            time.sleep(0.001)

    def send_after(self, seconds: float, number: signal.Signals) -> None:
        """Send a signal so long after the command's start, unless the job ends before."""
        self.wait_for_start()
        self._process.join(seconds)
        if self._process.is_alive() and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def end(self) -> tuple[int | None, str]:
        """Wait for the end. Returns the exit code and standard error."""
        self._process.join(SECONDS)
        assert self._process.exitcode is not None, "the job hangs"
        return self._process.exitcode, self._errors.read_text() if self._errors.exists() else ""


def content(name: str, out: Path) -> dict[str, bytes]:
    """The results of a job that has ended well: each file of weights, or the lines of answers."""
    if name == "batch":
        return {"": out.read_bytes()}
    folder = out if name == "convert" else run_checkpoints(out)[-1]
    suffixes = {".pth", ".safetensors"}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in suffixes}


def check_what_is_left(name: str, out: Path, expected: dict[str, bytes]) -> None:
    """No final file, or a whole one."""
    if name == "convert":
        assert not out.exists() or (content(name, out) == expected and not verify(out, False)[1])
    elif name == "train":
        for checkpoint in run_checkpoints(out):
            assert verify(checkpoint, False)[1] == []
    else:
        assert not out.exists() or expected[""].startswith(out.read_bytes())


def undisturbed(name: str, inputs: Path, folder: Path) -> tuple[dict[str, bytes], float]:
    """The results of a job, and its seconds from the command's start."""
    out = folder / "whole"
    job = Job(JOBS[name](inputs, out), folder / "errors")
    job.wait_for_start()
    start = time.perf_counter()
    code, errors = job.end()
    seconds = time.perf_counter() - start
    assert code == 0, errors
    return content(name, out), seconds


@pytest.mark.fault(12)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("name", JOBS)
def test_a_signal_at_any_moment(
    name: str, number: signal.Signals, trials: Trials, inputs: Path, tmp_path: Path
) -> None:
    expected, seconds = undisturbed(name, inputs, tmp_path)
    n = trials.number(few=2, all=N_POINTS)
    for point in range(n):
        out, errors = tmp_path / f"out{point}", tmp_path / f"errors{point}"
        with trials.trial(f"{number.name} at {point + 1} of {n + 1} points of {name}"):
            job = Job(JOBS[name](inputs, out), errors)
            job.send_after(seconds * (point + 1) / (n + 1), number)
            code, said = job.end()
            assert code in ({0, 130} if number == signal.SIGINT else {0, -number}), said
            assert "Traceback" not in said
            assert (said.splitlines()[-1:] == ["stopped"]) == (code == 130), said
            check_what_is_left(name, out, expected)
            code, said = Job(JOBS[name](inputs, out), errors).end()
            assert code == 0, said
            assert content(name, out) == expected
            hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]
            assert name != "convert" or hidden == []
            if name == "train":  # nothing is left of the checkpoints that were being written
                assert {path.name for path in out.iterdir()} == {
                    path.name for path in run_checkpoints(out)
                }


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own in memory, with this size."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)


@pytest.mark.fault(12)
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("name", JOBS)
def test_a_full_disk(name: str, trials: Trials, inputs: Path, tmp_path: Path) -> None:
    """The disk has room for a part of the results. When there is more room, the job goes on."""
    expected, _ = undisturbed(name, inputs, tmp_path)
    whole = tmp_path / "whole"
    files = [whole] if whole.is_file() else [path for path in whole.rglob("*") if path.is_file()]
    kilobytes = sum(path.stat().st_size for path in files) // 1024
    n = trials.number(few=2, all=N_POINTS)
    for point in range(n):
        size = max(4, kilobytes * (point + 1) // (n + 1))
        with (
            trials.trial(f"{size} of {kilobytes} KB for {name}"),
            small_disk(tmp_path / f"disk{point}", size) as disk,
        ):
            out, errors = disk / "out", tmp_path / f"errors{point}"
            code, said = Job(JOBS[name](inputs, out), errors).end()
            assert code in {0, 2}
            if code == 2:
                assert "No space left on device" in said.splitlines()[-1]
                assert "Traceback" not in said
                check_what_is_left(name, out, expected)
            enlarge(disk)
            code, said = Job(JOBS[name](inputs, out), errors).end()
            assert code == 0, said
            assert content(name, out) == expected
