"""Read whole files, and write files atomically: a kill or a full disk leaves no partial file."""

import codecs
import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from llama.errors import CheckpointError, ConfigError, DataError

# How much of a file `sample_digest` reads.
SAMPLES = 16
SAMPLE_BYTES = 4096


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
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number} is not an object with keys")
        yield number, record


def parse_json(text: str | bytes) -> Any:
    """The content of JSON text; bytes are UTF-8 with or without a byte-order mark.

    Raises ValueError for other text, and for an object that has a key twice: of its two values,
    different programs take different ones.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r:.40} is there twice")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError for anything else."""
    if reason := why_unreadable(path):
        raise ConfigError(f"cannot read {path}: {reason}")
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
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


def sample_digest(path: Path) -> str:
    """A checksum of a file's size and of a sample of its bytes."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(size * i // SAMPLES)
            found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()


class MappedFiles:
    """Files that are mapped into memory, as they are when this object is made.

    A mapped file may be deleted, or replaced by another file that is renamed to its name: the old
    file stays mapped. But if the mapped file itself is cut, the system ends a process that reads
    behind its new end, by the signal SIGBUS. If it is overwritten, the process reads the new bytes.
    """

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._states = {path: path.stat() for path in paths}

    def fingerprint(self) -> str:
        """A checksum of the files' names and sizes and of a sample of their bytes. Other weights of
        the same shape have another one."""
        digests = [f"{path.name} {sample_digest(path)}" for path in sorted(self._states)]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]

    def check(self) -> None:
        """Raise CheckpointError if a file was cut or overwritten."""
        for path, before in self._states.items():
            try:
                now = path.stat()
            except OSError:  # it was deleted
                continue
            is_same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
            if is_same and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise CheckpointError(
                    f"{path} was changed while its weights are in use: it had {before.st_size} "
                    f"bytes and has {now.st_size}. Load the model again"
                )


def lock_file(path: Path) -> Path:
    """The file that `lock` makes."""
    return path.with_name(f".{path.name}.lock")


def lock(path: Path) -> FileLock:
    """Lock the name of a file or folder, until `unlock` or the end of the process.

    Raises DataError if another process has locked it, or if the lock's file cannot be written.
    """
    file = FileLock(lock_file(path))
    try:
        file.acquire(blocking=False)
    except Timeout as error:
        raise DataError(f"another run is writing {path}: wait until it ends, or stop it") from error
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    return file


def unlock(file: FileLock) -> None:
    """Release the lock, and remove its file."""
    file.release()
    Path(file.lock_file).unlink(missing_ok=True)


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
