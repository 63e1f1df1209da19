"""The errors a user can cause. Each message is one line that names the thing and the limit."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from llama.terminal_text import printable

MAX_MESSAGE_LENGTH = 2000  # characters
RANK_PAUSE = 5  # seconds; torchrun looks at its ranks ten times a second
# Upper limits, far above the numbers of any Llama. The product of two whole numbers within their
# limit fits into 64 bits.
MAX_WHOLE_NUMBER = 2**31 - 1
MAX_NUMBER = 10**18


class LlamaError(ValueError):
    """Base class of the errors below. The command line prints the message and exits with code 2."""

    def __init__(self, message: str) -> None:
        # A name from a file may be very long, or hold line breaks and terminal codes.
        is_long = len(message) > MAX_MESSAGE_LENGTH
        shown = f"{message[:MAX_MESSAGE_LENGTH]}…" if is_long else message
        super().__init__(printable(shown))


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Wrap a whole program: a LlamaError ends it with one line on stderr, not with a traceback.

    Output to a pipe or a file is UTF-8, even if the system's encoding lacks characters, as on
    Windows.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        with _interrupts():
            yield
    except LlamaError as error:
        # If every rank fails, only one reports: torchrun ends the others when it leaves. A rank
        # that is still alive after the pause has failed alone, and reports too.
        reporter = error.reporter if isinstance(error, ParallelError) else 0
        if os.environ.get("RANK", "0") != str(reporter):
            time.sleep(RANK_PAUSE)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        sys.exit(141)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {OutOfMemory(f'memory ran out: {error}')}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Raise an error that Ctrl-C has led to as KeyboardInterrupt. Ctrl-C may interrupt another
    library at a point where its cleanup then raises an error of its own."""
    try:
        yield
    except Exception as error:
        origin: BaseException | None = error
        while origin is not None:
            if isinstance(origin, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            hidden = origin.__suppress_context__
            origin = origin.__cause__ or (None if hidden else origin.__context__)
        raise


class ConfigError(LlamaError):
    """A params.json, ModelArgs or build option that does not describe a runnable model."""


class CheckpointError(LlamaError):
    """A checkpoint folder or shard that cannot be read or does not fit the model."""


class TokenizerError(LlamaError):
    """A tokenizer file that cannot be read, or text or ids it cannot handle."""


class DialogError(LlamaError):
    """A dialog with a wrong role, a wrong order of turns or text that contains a tag."""


class GenerationError(LlamaError):
    """Prompts or sampling options that the model cannot serve."""


class ParallelError(LlamaError):
    """A process group that does not fit the model, or a rank that failed.

    reporter: the rank that prints the message, if all ranks have this error.
    """

    def __init__(self, message: str, reporter: int = 0) -> None:
        super().__init__(message)
        self.reporter = reporter


class DataError(LlamaError):
    """Data that cannot be read or written: token files, dialogs, text, batch jobs, tasks."""


class BenchmarkError(LlamaError):
    """A benchmark that did not do its work, or whose result is faster than the hardware allows."""


class TrainingError(LlamaError):
    """Training options that do not fit together, or a run that cannot go on."""


class ExplainError(LlamaError):
    """A tensor name, an edit or a prompt that `llama.explain` cannot serve."""


class OutOfMemory(LlamaError):
    """Memory that is not there, or that ran out."""


# In the messages of PyTorch on a CPU and on a GPU, of C++, and of the system for memory and for
# threads. The types of most of these errors do not tell.
SHORTAGES = ("allocate memory", "out of memory", "bad_alloc", "temporarily unavailable",
             "can't start new thread")  # fmt: skip


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be allocated."""
    is_known = isinstance(error, MemoryError | OutOfMemory)
    return is_known or any(text in str(error) for text in SHORTAGES)


def require_number(name: str, value: Any, whole: bool = False) -> None:
    """Raise ConfigError unless the value is a number above 0 and within its limit; whole: a whole
    number."""
    kinds, largest = ((int,), MAX_WHOLE_NUMBER) if whole else ((int, float), MAX_NUMBER)
    kind = "whole number" if whole else "number"
    if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
        raise ConfigError(f"{name} is {value!r}: it must be a {kind} above 0")
    if value > largest:
        raise ConfigError(f"{name} is {value}: it must be at most {largest}")
