"""How a program ends after an error, and after Ctrl-C."""

import contextlib

import pytest

from llama.errors import ConfigError, one_line


def interrupted_in_a_cleanup() -> None:
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError("trying to pop from empty mode stack")


def interrupted_and_told_as_an_error() -> None:
    try:
        interrupted_in_a_cleanup()
    except Exception as error:
        raise ConfigError("cannot read the file") from error


def wrong_after_an_answer_was_stopped() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise ConfigError("rank 1 is lost") from None


def wrong_later() -> None:
    with contextlib.suppress(KeyboardInterrupt):
        raise KeyboardInterrupt
    raise ConfigError("no such folder")


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (interrupted_in_a_cleanup, 130, "stopped"),
        (interrupted_and_told_as_an_error, 130, "stopped"),
        (wrong_after_an_answer_was_stopped, 2, "error: rank 1 is lost"),
        (wrong_later, 2, "error: no such folder"),
    ],
)
def test_how_a_program_ends(
    program, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, one_line():
        program()
    assert ended.value.code == code
    assert capsys.readouterr().err == f"{said}\n"
