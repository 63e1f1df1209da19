"""Read whole files, and write files atomically: a kill or a full disk leaves no partial file."""

import codecs
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
    """The reason why a file cannot be read; None if it can be read.

    Symbolic links are followed, because Hugging Face's cache consists of them.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return error.strerror
    except ValueError as error:  # such as a name with a null byte
        return str(error)
    if stat.S_ISDIR(mode):
        return "Is a directory"
    if not stat.S_ISREG(mode):
        return "Not a regular file"
    return None if os.access(path, os.R_OK) else "Permission denied"


def read_text(path: str | Path) -> str:
    """The text of a file, without a byte-order mark. Raises DataError if it cannot be read or is
    not UTF-8."""
    try:
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from error


def read_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line of a JSONL file, blank lines left out.

    Raises DataError, with the line number, for a line that is not a JSON object.
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
        content = json.loads(path.read_text(encoding="utf-8-sig"))
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


def check_can_write(path: str | Path, force: bool = False) -> None:
    """Raise DataError if a file of this name cannot be written, so that nothing is computed in
    vain. force: a file that exists may be replaced."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise DataError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DataError(f"cannot write {path}: no permission")
    if path.is_file() and not force:
        raise DataError(f"{path} exists: it is replaced only with --force")


def sync_file(path: Path) -> None:
    """Make a file readable for all, and wait until it is on disk."""
    path.chmod(0o644)  # some libraries write files as 0600
    with path.open("r+b") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file to write to. It is renamed to `path` if the block raises no error.

    A link stays a link: the file that it leads to is replaced. A device or a pipe, such as
    /dev/stdout, is written directly.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with path.open("wb") as stream:
            yield stream
        return
    path = path.resolve()
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes it 0600
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):  # torch.save turns OSError into RuntimeError
            raise DataError(f"cannot write {path}: {_reason(error)}") from error
        raise


def _reason(error: BaseException) -> str:
    """The message of the OSError that caused `error`, or else the message of `error` itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error)
