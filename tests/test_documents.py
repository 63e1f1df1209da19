"""Every shell and Python block of README, CONTRIBUTING and docs runs as it is written.

The blocks of a page run in order, in one folder. A command with --nnodes runs on two hosts, where
that is possible. The folder holds small random checkpoints under the names
of Meta's folders, and texts under the names that the page uses. test_guide.py runs the blocks of
docs/llama3_explain.md.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from guide import GUIDE
from helpers.hosts import IS_POSSIBLE, running
from helpers.stand_ins import write_stand_ins
from helpers.tales import made_up_tale
from pages import ROOT, blocks
from test_docs import DOCUMENTS

from llama.__main__ import COMMANDS, main
from llama.checkpoints.folder import BUNDLED
from llama.commands.command_line import checked

# Commands that cannot run in a test, and why. The first words of a command select its line.
NOT_RUN = {
    r"make ": "installs packages, and runs this test among others",
    r"(\.venv/bin/)?pip install ": "needs a network",
    r"hf download ": "needs a network, and Meta's licence",
    r"(\.venv/bin/)?llama \w+ HuggingFaceTB/": "needs a network",
    r"torchrun .* -m llama serve ": "listens on the port of `llama serve`, which runs",
    r"llama train ": "trains for an hour; test_commands.py runs it with few steps",
    r"llama serve run ": "listens on the port of the first `llama serve`, which runs",
    r"python scripts/make_certificates\.py": "rewrites the project's certificates",
}
# Commands that start processes or take long run by `make test-slow`.
IS_SLOW = re.compile(
    r"torchrun|[|>]|127\.0\.0\.1|llama (serve|finetune|parity|bench)|--adapter sailor|compare\("
)
IS_FOLDER = "├──"


class Item(NamedTuple):
    """A Python block, or one command of a shell block."""

    place: str  # page:line
    language: str
    code: str
    output: str | None

    @property
    def reason(self) -> str | None:
        """Why it is not run. None: it runs."""
        found = [reason for start, reason in NOT_RUN.items() if re.match(start, self.code)]
        return found[0] if found and not self.language else None

    @property
    def is_slow(self) -> bool:
        return IS_SLOW.search(self.code) is not None


def items(path: Path) -> Iterator[Item]:
    """What the blocks of a page run, in order. A block that shows a folder has nothing to run."""
    for block in blocks(path.read_text(encoding="utf-8")):
        place = f"{path.name}:{block.line}"
        if block.language == "python":
            yield Item(place, "python", block.code, block.output)
        elif not block.language and IS_FOLDER not in block.code:
            for line in block.code.replace("\\\n", " ").splitlines():
                if command := re.sub(r"\s+# .*", "", line).strip():
                    yield Item(place, "", command, None)


ITEMS = {path: found for path in DOCUMENTS if path != GUIDE and (found := list(items(path)))}
QUICK, SLOW = (
    [
        path
        for path, found in ITEMS.items()
        if any(not item.reason and item.is_slow == is_slow for item in found)
    ]
    for is_slow in (False, True)
)
COMMAND_LINES = [item for found in ITEMS.values() for item in found if not item.language]


# ---- running ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with all that the pages name."""
    write_stand_ins(tmp_path)
    for name in ("example_text_completion.py", "example_chat_completion.py", "docs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_00002000").symlink_to(BUNDLED)
    (tmp_path / "question.txt").write_text("Why is the sea salty?")
    (tmp_path / "other_tales.txt").write_text(made_up_tale(1000))
    question = {"role": "user", "content": "Who lives in the wood?"}
    answer = {"role": "assistant", "content": "A fox."}
    lines = {
        "tales.jsonl": [{"text": page.read_text(encoding="utf-8")} for page in DOCUMENTS],
        "prompts.jsonl": [{"prompt": "Once upon a time"}, {"messages": [question]}],
        "dialogs.jsonl": [{"messages": [question, answer]}] * 20,
    }
    for name, values in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def run_python(item: Item, names: dict[str, Any]) -> None:
    """Run the block. names: those that the page's blocks before it have defined."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(item.code, item.place, "exec"), names)
    assert item.output in (None, shown.getvalue())


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `llama …` or `python FILE …` in this process, with one line as its standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me a tale of a fox.\n"))
    program, *rest = words
    monkeypatch.setattr(sys, "argv", rest if program == "python" else words)
    try:
        if program == "python":
            runpy.run_path(rest[0], run_name="__main__")
        else:
            main()
    except SystemExit as end:
        if end.code:
            raise


def run_shell(command: str) -> None:
    """Run the command in a shell, with one line as its standard input."""
    done = subprocess.run(
        ["bash", "-c", command], input="Tell me a tale of a fox.\n", capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def run_on_hosts(command: str, folder: Path) -> None:
    """Run the command on two hosts."""
    with running(2, folder) as hosts:
        shells = [
            subprocess.Popen(
                hosts.on(i, "bash", "-c", command), stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE, text=True,
            )
            for i in range(2)
        ]  # fmt: skip
        errors = [shell.communicate(timeout=300)[1] for shell in shells]
    assert [shell.returncode for shell in shells] == [0, 0], "\n".join(errors)


@contextlib.contextmanager
def serving(command: str) -> Iterator[None]:
    """Run the server, and wait until it listens."""
    port = ("127.0.0.1", 8000)
    with socket.socket() as probe:
        if probe.connect_ex(port) == 0:
            pytest.skip("another program listens on port 8000")
    with subprocess.Popen(shlex.split(command)) as server:
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if server.poll() is None and probe.connect_ex(port) == 0:
                        break
                time.sleep(0.1)
            assert server.poll() is None
            yield
        finally:
            server.terminate()


def run_page(path: Path, is_slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    failures = []
    with contextlib.ExitStack() as servers:
        for item in ITEMS[path]:
            if item.reason or item.is_slow != is_slow:
                continue
            try:
                if item.language:
                    run_python(item, names)
                elif item.code.startswith("llama serve"):
                    servers.enter_context(serving(item.code))
                elif "--nnodes" in item.code:
                    if IS_POSSIBLE:
                        run_on_hosts(item.code, Path())
                elif item.is_slow and not item.code.startswith("llama "):
                    run_shell(item.code)
                else:
                    run_here(shlex.split(item.code), monkeypatch)
            except (Exception, SystemExit) as error:
                failures.append(f"{item.place}: {item.code}\n{error!r}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("path", QUICK, ids=lambda path: path.name)
def test_the_blocks_of_a_page_run(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(path, False, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("path", SLOW, ids=lambda path: path.name)
def test_the_slow_blocks_of_a_page_run(
    path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(path, True, monkeypatch)


# ---- checks without running ---------------------------------------------------------------------


@pytest.mark.parametrize("item", COMMAND_LINES, ids=lambda item: f"{item.place} {item.code[:40]}")
def test_a_command_is_well_formed(item: Item) -> None:
    """The shell can read it. Commands and flags of `llama`, targets of make, and extras exist."""
    subprocess.run(["bash", "-n", "-c", item.code], check=True)
    words = shlex.split(item.code)
    if "llama" in words[:1] + words[3:5] or words[0].endswith("/llama"):
        start = next(i for i, word in enumerate(words) if word.endswith("llama"))
        _, name, *rest = words[start:]
        if ">" in rest:
            rest = rest[: rest.index(">")]
        module = __import__(f"llama.commands.{COMMANDS[name][0]}", fromlist=[name])
        checked(getattr(module, name), rest, f"llama {name}")
    elif words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif "install" in words:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = re.findall(r"\w+", words[-1].removeprefix("."))
        assert set(extras) <= project["optional-dependencies"].keys()


def test_every_reason_is_needed() -> None:
    for start in NOT_RUN:
        assert any(re.match(start, item.code) for item in COMMAND_LINES), start
