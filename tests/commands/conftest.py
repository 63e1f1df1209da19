"""Fixtures of the command tests: run a command line in this process."""

import sys
from collections.abc import Callable

import pytest

from llama.__main__ import main

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process. Returns its standard output."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["llama", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def exit_code(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run a command line in this process. Returns its exit code."""

    def exit_code(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["llama", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return exit_code


@pytest.fixture
def fail(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line that must end with exit code 2. Returns its error line."""

    def fail(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            run(*arguments)
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("error: ")
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    return fail
