"""Texts that a terminal shows: names from files and generated texts cannot control the terminal."""

import logging
import sys

_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def printable(text: str, keep: str = "") -> str:
    """The text with an escape for each character that is not printable and not in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def without_controls(text: str) -> str:
    """A generated text without its control characters. Tabs and newlines stay."""
    return text.translate(_CONTROLS)


def say(text: str, to_stderr: bool = False) -> None:
    """Print lines that may hold names from files, as they are or with escapes."""
    print(printable(text, keep="\n\t"), file=sys.stderr if to_stderr else sys.stdout)


class PrintableFormatter(logging.Formatter):
    """Log lines in which names from files are printable."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")
