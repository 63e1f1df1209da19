"""Chat, batch and server run for minutes: memory and open files stay, and the texts are those of
calls alone.

Each runs for some seconds in `make test`, and for ten minutes in `make faults`.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest
from helpers.fault_plan import RESULTS, Trials
from soak import PROMPTS, WARM_UP, open_files, resident_kib

from llama import Llama

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's /proc"
)
ROOT = Path(__file__).parent.parent.parent
LLAMA = [sys.executable, "-m", "llama"]
SECONDS = 600.0 if RESULTS else 4.0
GROWTH = 0.02 if RESULTS else 0.1  # allocators still fill their pools after a second of warm-up
ANSWERED = re.compile(rb"\d+ tokens, [\d.]+ a second")
LENGTH = 24  # tokens of a text


@pytest.fixture(scope="module")
def alone() -> Llama:
    return Llama.build(max_batch_size=1, mode="fast")


def samples(process_id: int, work: Callable[[], None]) -> Iterator[tuple[int, int]]:
    """Memory in KiB and open files after each piece of work, from the end of the warm-up on."""
    start = time.monotonic()
    while (now := time.monotonic() - start) < SECONDS:
        work()
        if now > WARM_UP * SECONDS:
            yield resident_kib(process_id), open_files(process_id)


def check_stay(found: Iterator[tuple[int, int]]) -> None:
    """Compare the first and the last tenth of the samples."""
    memory, files = zip(*found, strict=True)
    n = max(1, len(memory) // 10)
    assert median(memory[-n:]) <= median(memory[:n]) * (1 + GROWTH), (memory[:n], memory[-n:])
    assert max(files[-n:]) <= max(files[:n]), (files[:n], files[-n:])


@pytest.mark.fault(20)
def test_a_long_chat(trials: Trials, alone: Llama) -> None:
    questions = ["Tell me about the fox.", "And the king?"]
    expected = []
    dialog = []
    for question in questions:
        dialog.append({"role": "user", "content": question})
        prediction = alone.chat_completion([dialog], temperature=0, max_gen_len=LENGTH)[0]
        dialog.append(prediction["generation"])
        expected.append(prediction["generation"]["content"])
    process = subprocess.Popen(
        [*LLAMA, "chat", "--temperature", "0", "--max_gen_len", str(LENGTH)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    typed, shown, notes = process.stdin, process.stdout, process.stderr
    assert None not in (typed, shown, notes)

    def say(line: str, until: re.Pattern[bytes]) -> str:
        """Type a line, and wait for the note that ends the answer. Returns the answer."""
        typed.write(f"{line}\n".encode())
        typed.flush()
        while note := notes.readline():
            if until.search(note):
                # The chat wrote the whole answer before the note.
                return shown.read1().decode() if until is ANSWERED else ""
        raise AssertionError("the chat has ended")

    def one_dialog() -> None:
        said = [say(question, ANSWERED).removesuffix("\n") for question in questions]
        assert said == expected
        say("/clear", re.compile(rb"a new dialog"))

    with trials.trial("chat"), process:
        try:
            one_dialog()  # waits until the model is loaded
            check_stay(samples(process.pid, one_dialog))
        finally:
            process.kill()


@pytest.mark.fault(20)
def test_a_long_batch(trials: Trials, alone: Llama, tmp_path: Path) -> None:
    expected = [
        alone.text_completion([prompt], temperature=0, max_gen_len=LENGTH)[0]["generation"]
        for prompt in PROMPTS
    ]
    source, target = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS]
    with source.open("w") as file:  # more than it can do until it is stopped
        file.writelines(itertools.islice(itertools.cycle(lines), int(2000 * (SECONDS + 10))))
    command = [*LLAMA, "batch", str(source), str(target), "--temperature", "0"]
    # A background job ignores Ctrl-C, and its children inherit that.
    process = subprocess.Popen(
        [*command, "--max_gen_len", str(LENGTH)],
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def wait_for_lines() -> None:
        time.sleep(0.2)
        assert process.poll() is None, "the batch has ended"

    with trials.trial("batch"), process:
        try:
            while not (target.exists() and target.stat().st_size):
                wait_for_lines()
            check_stay(samples(process.pid, wait_for_lines))
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(timeout=60) == 130
            results = [json.loads(line) for line in target.read_text().splitlines()]
            assert len(results) > len(PROMPTS)
            for index, result in enumerate(results):
                assert result["index"] == index
                assert result["text"] == expected[index % len(PROMPTS)]
        finally:
            process.kill()


@pytest.mark.fault(20)
def test_a_long_server(trials: Trials, tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--out", str(out)]
    command += ["--seconds", str(SECONDS), "--clients", "4", "--growth", str(GROWTH)]
    with trials.trial("server"):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS + 600
        )
        assert done.returncode == 0, done.stderr[-2000:]
        figures = json.loads(out.read_text())
        assert figures["calls"] > 2 * SECONDS
