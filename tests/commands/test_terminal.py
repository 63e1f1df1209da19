"""complete and chat as a user runs them: in a real terminal, in a pipe, and on two ranks."""

import contextlib
import fcntl
import io
import os
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks

from llama import Llama, Message
from llama.__main__ import main
from llama.commands import terminal
from llama.commands.chat_session import Chat
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.sampling import SamplingParams
from llama.training.chat_data import load_dialogs, read_dialogs

LLAMA = [sys.executable, "-m", "llama"]
SPEED = r"\d+ tokens, [\d.]+ a second"


def _own_the_terminal() -> None:
    """Runs in the child. Ctrl-C gets its default handler, because nohup makes processes ignore
    it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A program in a terminal of its own. The test types, and reads the screen."""

    def __init__(self, *command: str):
        ours, its = os.openpty()
        self.screen = ""
        self._ours = ours
        self.process = subprocess.Popen(
            command,
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
            preexec_fn=_own_the_terminal,
        )
        os.close(its)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, pattern: str) -> str:
        """Wait until the output has the pattern. Returns the output up to its end."""
        assert self._waited(pattern, 120), f"no {pattern} in {self.screen[-1000:]!r}"
        found = re.search(pattern, self.screen)
        assert found
        seen, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return seen

    def interrupt(self, pattern: str) -> str:
        """Press Ctrl-C until the output has the pattern. Once is not enough: readline misses a
        Ctrl-C between its prompt and the moment when it waits for keys."""
        for _ in range(20):
            self.type("\x03")
            if self._waited(pattern, 2):
                break
        return self.expect(pattern)

    def _waited(self, pattern: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.screen):
            if not self._read(deadline):
                return False
        return True

    def leave(self) -> int:
        """Wait until the program ends. Returns its exit code."""
        while self._read(time.monotonic() + 120):
            pass
        os.close(self._ours)
        return self.process.wait(timeout=60)

    def _read(self, deadline: float) -> bool:
        if not select.select([self._ours], [], [], max(0, deadline - time.monotonic()))[0]:
            return False
        try:
            self.screen += os.read(self._ours, 65536).decode().replace("\r\n", "\n")
        except OSError:  # the program has ended
            return False
        return True


@pytest.fixture
def start() -> Iterator[Callable[..., Terminal]]:
    """A function that starts `python -m llama …` in a terminal."""
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(*LLAMA, *arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()


# ---- complete -----------------------------------------------------------------------------------


def test_complete_in_a_pipe_prints_the_texts_alone() -> None:
    done = subprocess.run(
        [*LLAMA, "complete", "--max_gen_len=12", "--n=2", "--seed=3", "--device=cpu"],
        input="Once upon a time\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    llama = Llama.build(seed=3, device="cpu", mode="fast", max_batch_size=2)
    events = llama.stream("Once upon a time", max_gen_len=12, n=2)
    requests: dict[int, Request] = {event.row: event.request for event in events}
    assert done.stdout == f"{requests[0].text}\n\n{requests[1].text}\n"
    assert re.fullmatch(SPEED, done.stderr.splitlines()[-1])


def test_complete_streams_after_a_dim_prompt_until_ctrl_c(start: Callable[..., Terminal]) -> None:
    program = start("complete", "1.50 # golden", "--ignore_eos")
    program.expect(re.escape("\033[2m1.50 # golden\033[0m") + r"(.|\n)*?\w+ \w+")
    program.type("\x03")
    program.expect(SPEED)
    assert program.leave() == 130


def test_whoever_has_enough_of_it_ends_it() -> None:
    done = subprocess.run(
        f"{sys.executable} -m llama complete hello --ignore_eos | head -c 20",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert len(done.stdout) == 20
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("complete hi --temperature=-1", "temperature is -1: it must be 0 (greedy) or above"),
        ("complete hi --n=0", "n is 0: it must be 1 to 1024"),
        ("complete hi --seed=x", "--seed is 'x': it must be a whole number"),
        (
            "complete hi --tempreature=1",
            "unknown option --tempreature, did you mean --temperature?; see llama complete --help",
        ),
        ("complete hi --ckpt_dir=nowhere", "no such checkpoint folder: nowhere"),
        ("complete two words", "unexpected 'words': put a text in quotes"),
        ("chat --nn=2", "unknown option --nn; see llama chat --help"),
        (
            "chat hello",
            "'hello' is no folder and no id on the Hub: type messages after the chat has started",
        ),
        (
            "chat llama/bundled hello",
            "unexpected 'hello': type messages after the chat has started",
        ),
        ("chat llama/bundled --ckpt_dir x", "two models: llama/bundled and --ckpt_dir x"),
        ("chat --mode=slow", "mode is 'slow': reference or fast"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["llama", *arguments.split()])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


# ---- chat ---------------------------------------------------------------------------------------


def test_a_chat_in_a_terminal(start: Callable[..., Terminal], tmp_path: Path) -> None:
    program = start("chat", "--temperature=0", "--max_gen_len=40")
    program.expect("> ")
    program.type("Who are you?\n")
    assert "fairy tales" in program.expect(SPEED)
    program.type("Tell me a story\\\n")
    program.expect(r"\n\. ")
    program.type("about a fox\n")
    program.expect(SPEED)
    program.type('"""\n/not a command\nand more\n"""\n')
    program.expect(SPEED)
    program.type("/retry\n/system Be brief.\n")
    program.expect(f"(?s){SPEED}.*the system message is set")
    program.type(f"/save {tmp_path}/dialog.jsonl\n" * 2 + "/help\n/nonsense\n")
    program.expect(
        "(?s)saved in.*error: .* exists: choose another name.*/system TEXT.*error: unkno"
    )
    program.type("/clear\n")
    program.expect(r"(?s)a new dialog.*> ")
    program.type("\x04")
    assert program.leave() == 0

    ((_, dialog),) = read_dialogs(tmp_path / "dialog.jsonl")
    assert [message["role"] for message in dialog] == ["system"] + ["user", "assistant"] * 3
    asked = [message["content"] for message in dialog if message["role"] != "assistant"]
    assert asked == [
        "Be brief.", "Who are you?", "Tell me a story\nabout a fox", "/not a command\nand more",
    ]  # fmt: skip
    formatter = Llama.build(device="cpu").formatter
    assert len(load_dialogs(tmp_path / "dialog.jsonl", formatter, 512).examples) == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    program = start("chat", "--ignore_eos", "--max_seq_len=512", "--temperature=0")
    program.expect("> ")
    program.interrupt("> ")  # Ctrl-C at the prompt begins a new line
    program.type("Tell me a story about a king\n")
    shown = program.expect(r"king\n(\w+ ){3}")  # the answer has begun
    program.type("\x03")
    assert shown.split("king\n")[1] in program.expect("; stopped") + shown
    program.type(f"/save {tmp_path}/dialog.jsonl\n")
    program.expect("saved in")
    program.type("Who are you?\n")  # the answer fills the cache
    program.expect("; cut at max_gen_len or max_seq_len")
    program.type("And now?\n")
    program.expect(r"error: the dialog has \d+ tokens, but max_seq_len is 512: /clear begins")
    program.type("/clear\n/quit\n")
    assert program.leave() == 0
    ((_, (question, answer)),) = read_dialogs(tmp_path / "dialog.jsonl")
    assert question["content"] == "Tell me a story about a king"
    assert answer["content"].startswith(shown.split("king\n")[1])


def test_a_turn_begins_with_the_very_tokens_of_the_turns_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a high temperature the sampled ids differ from the ids of the encoded text."""
    llama = Llama.build(device="cpu", mode="fast", max_batch_size=1, max_seq_len=512)
    sent: list[Request] = []
    submit = Engine.submit

    def recording(*args: Any, **kwargs: Any) -> Request:
        sent.append(submit(*args, **kwargs))
        return sent[-1]

    monkeypatch.setattr(Engine, "submit", recording)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me a tale\nGo on\n/retry\nAnd then?\n"))
    chat = Chat(llama, SamplingParams(temperature=2.0, top_p=1.0, max_gen_len=40))
    chat.run()
    first, second, again, last = sent
    assert first.tokens != llama.tokenizer.encode(first.text.strip(), bos=False, eos=False)
    for before, after in ((first, second), (again, last)):
        whole = before.prompt_tokens + before.tokens
        assert after.prompt_tokens[: len(whole)] == whole
    assert again.prompt_tokens == second.prompt_tokens
    assert again.tokens != second.tokens
    assert [m["content"] for m in chat.messages[1::2]] == [first.text, again.text, last.text]


# ---- ranks --------------------------------------------------------------------------------------


def _chat(lines: list[str]) -> str:
    """Run a chat on this rank. Returns its standard output.

    Each line is typed after a pause, in which the first rank sends several keep-alive messages. The
    lines are typed on every rank, but only the first rank reads them.
    """
    terminal.timeout = lambda: timedelta(seconds=0.1)
    sys.argv = ["llama", "chat", "--temperature=0", "--max_gen_len=16", "--device=cpu"]
    typed, keyboard = os.pipe()
    sys.stdin, sys.stdout = os.fdopen(typed), io.StringIO()

    def type_slowly() -> None:
        for line in lines:
            time.sleep(0.2)
            os.write(keyboard, line.encode())

    threading.Thread(target=type_slowly, daemon=True).start()
    with contextlib.suppress(SystemExit):  # code 2, because one of the lines is too long
        main()
    return sys.stdout.getvalue()


def test_two_ranks_chat_as_one_does(tmp_path: Path) -> None:
    lines = ["Who are you?\n", "/retry\n", "What can you do?\n", "long " * 1200 + "\n", "/quit\n"]
    first, second = run_ranks(2, tmp_path, _chat, lines)
    assert second == ""
    llama = Llama.build(device="cpu", mode="fast", max_batch_size=1)
    questions = ("Who are you?", "What can you do?")
    who, _, what = first.splitlines()
    assert first.splitlines()[1] == who
    dialog: list[Message] = []
    for question, answer in zip(questions, (who, what), strict=True):
        dialog.append({"role": "user", "content": question})
        (expected,) = llama.chat_completion([dialog], temperature=0, max_gen_len=16)
        assert answer == expected["generation"]["content"]
        dialog.append(expected["generation"])
