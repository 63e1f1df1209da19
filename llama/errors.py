"""The errors a user can cause. Each message is one line that names the thing and the limit."""

import contextlib
import os
import sys
from collections.abc import Iterator

LONGEST = 2000  # characters of a message


class LlamaError(ValueError):
    """Base of every error below. The command line shows its line and exits with code 2."""

    def __init__(self, message: str) -> None:
        # A name from a file may be very long, or hold line breaks and terminal codes.
        shown = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
        if not shown.isprintable():
            shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
        super().__init__(shown)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Around a whole program: end it with one line, not a traceback, for a mistake of the user."""
    try:
        yield
    except LlamaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has stopped
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        sys.exit(141)


class ConfigError(LlamaError):
    """A params.json, ModelArgs or build option that does not describe a runnable model."""


class CheckpointError(LlamaError):
    """A checkpoint folder or shard that cannot be read or does not fit the model."""


class TokenizerError(LlamaError):
    """A tokenizer file that cannot be read, or text or ids it cannot handle."""


class DialogError(LlamaError):
    """A dialog with a wrong role, a wrong turn order or text that would pose as a tag."""


class GenerationError(LlamaError):
    """Prompts or sampling options that the model cannot serve."""


class ParallelError(LlamaError):
    """A process group that does not fit the model, or a rank that failed."""


class DataError(LlamaError):
    """Data that cannot be read or written: token files, dialogs, text, batch jobs, tasks."""


class BenchmarkError(LlamaError):
    """A benchmark whose work was not done, or whose figure this machine cannot reach."""


class TrainingError(LlamaError):
    """Training options that do not fit together, or a run that cannot go on."""
