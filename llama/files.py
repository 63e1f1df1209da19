"""Read whole files, and write files atomically: a kill or a full disk leaves no partial file."""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llama.errors import ConfigError, DataError


def why_unreadable(path: Path) -> str | None:
    """The reason why a file cannot be read, such as that it is missing or a pipe. None: it can.

    Links are followed, because Hugging Face's cache consists of them.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return error.strerror
    except ValueError as error:  # a name that no file can have
        return str(error)
    if stat.S_ISDIR(mode):
        return "Is a directory"
    if not stat.S_ISREG(mode):
        return "Not a regular file"
    return None if os.access(path, os.R_OK) else "Permission denied"


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises DataError for another file."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from error


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file, one a line, each with the number of its line.

    Raises DataError that names the line which is no object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number} is not an object with keys")
        yield number, record


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError for anything else."""
    if reason := why_unreadable(path):
        raise ConfigError(f"cannot read {path}: {reason}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not an object with keys")
    return content


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write an object as JSON, atomically."""
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file under another name, and rename it when the block ends without an error."""
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes them private
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):  # torch.save hides the first in the second
            raise DataError(f"cannot write {path}: {_reason(error)}") from error
        raise


def _reason(error: BaseException) -> str:
    """The message of the operating system, where it caused the error."""
    behind: BaseException | None = error
    while behind is not None:
        if isinstance(behind, OSError) and behind.strerror:
            return behind.strerror
        behind = behind.__context__
    return str(error)
