"""A batch job on disk, which resumes after a stop without losing or repeating a line.

The output OUT grows line by line. Several groups of ranks write one part each, OUT.part-0-of-2 and
so on, which are joined to OUT at the end. A line of the input is done when one of these files has
its whole result. OUT.job.json names the input and options of the job. While a run writes a file, it
holds the lock .FILE.lock.
"""

import codecs
import contextlib
import glob
import hashlib
import heapq
import json
import os
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from llama.errors import DataError
from llama.files import atomic_file, read_text, write_json

SYNC_EVERY = (
    100  # lines between two syncs to disk; a power cut may lose the lines after the last one
)
BLOCK = 1 << 16  # bytes


class BatchFiles:
    """The files of one job: `input`, `output`, and the files beside the output."""

    def __init__(self, input: str, output: str) -> None:
        self.input, self.output = Path(input), Path(output)
        self.job = Path(f"{output}.job.json")

    def prepare(self, options: dict[str, Any], force: bool) -> None:
        """Check that the files belong to this job, and remove a half-written line at their end. One
        rank calls this before the others open their parts.

        Args:
            options: the options that the results depend on, as JSON values.
            force: remove the files.

        Raises DataError where the input cannot be read, the output cannot be written, is another
        job's or is being written by another run.
        """
        for path in (self.input, self.output):
            if path.exists() and not path.is_file():  # a pipe cannot be read twice
                raise DataError(f"{path} is not a regular file")
        digest, n_lines = self._survey()
        if self.output.exists() and self.output.samefile(self.input):
            raise DataError(f"cannot write {self.output}: it is the input")
        job = {"input": f"sha256:{digest}", "lines": n_lines, **options}
        job = json.loads(json.dumps(job, default=list))  # with the types that reading it back gives
        if force:
            for path in self._parts():
                with _locked(path), _named(path):
                    path.unlink()
        if any(path.stat().st_size for path in self._parts()):
            self._check_same(job)
        for path in self._parts():
            with _locked(path), _named(path), path.open("r+b") as file:
                file.truncate(_end_of_last_line(file))
        write_json(self.job, job)

    def _survey(self) -> tuple[str, int]:
        """The input's hash and number of lines."""
        digest, n_lines = hashlib.sha256(), 0
        for line in _lines(self.input):
            digest.update(line)
            n_lines += 1
        return digest.hexdigest(), n_lines

    def _check_same(self, job: dict[str, Any]) -> None:
        advice = "remove it, or start anew with --force"
        if not self.job.exists():
            raise DataError(f"{self.output} is there already, without {self.job.name}: {advice}")
        before = self._read_job()
        for name in job | before:
            old, new = before.get(name), job.get(name)
            if old != new:
                raise DataError(
                    f"{self.output} was begun with {name} {old!r}, not {new!r}: {advice}"
                )

    def _read_job(self) -> dict[str, Any]:
        try:
            return json.loads(read_text(self.job))
        except ValueError as error:
            raise DataError(f"{self.job} is not JSON: {error}") from error

    def _parts(self) -> list[Path]:
        """All files with results. The number of groups may have been another one."""
        parts = [Path(name) for name in glob.glob(f"{glob.escape(str(self.output))}.part-*-of-*")]
        return [path for path in (self.output, *sorted(parts)) if path.exists()]

    def open_part(self, group: int, n_groups: int) -> "Part":
        """The file that this group adds its results to."""
        only = n_groups == 1
        return Part(self.output if only else Path(f"{self.output}.part-{group}-of-{n_groups}"))

    def done(self) -> bytearray:
        """For each line 0: not done, 1: done, 2: its result is an error."""
        done = bytearray(self._read_job()["lines"])
        for path in self._parts():
            for index, _, result in _results(path, len(done)):
                done[index] = 2 if "error" in result else 1
        return done

    def todo(self, done: bytearray, group: int, n_groups: int) -> Iterator[tuple[int, bytes]]:
        """This group's lines that are not done, each with its index."""
        for index, (state, line) in enumerate(zip(done, _lines(self.input), strict=False)):
            if not state and index % n_groups == group:
                yield index, line

    def merge(self, n_lines: int) -> None:
        """Join all parts to the output after the last line is done. One rank calls this."""
        parts = self._parts()
        for path in parts:
            _lock_file(path).unlink(missing_ok=True)
        if parts == [self.output]:
            return
        with atomic_file(self.output) as file:
            last = -1
            results = (_results(path, n_lines) for path in parts)
            for index, line, _ in heapq.merge(*results, key=itemgetter(0)):
                if index > last:  # else a kill came after the join, and the line is in OUT already
                    file.write(line)
                last = index
        for path in parts:
            if path != self.output:
                path.unlink()


class Part:
    """A file that this process alone appends results to, one line each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._n_written = 0
        self._lock = _lock(path)
        with _named(path):
            self._file = path.open("ab")

    def write(self, result: dict[str, Any]) -> None:
        # Half a surrogate pair, which JSON can say and UTF-8 cannot, becomes its JSON escape.
        line = (json.dumps(result, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        with _named(self._path):
            self._file.write(line)
            self._file.flush()
            self._n_written += 1
            if self._n_written % SYNC_EVERY == 0:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        with _named(self._path), self._file:
            os.fsync(self._file.fileno())
        self._lock.release()


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _lock(path: Path) -> FileLock:
    """The lock of a file with results, acquired. The system releases it when the process ends.

    Raises DataError where another run holds it.
    """
    lock = FileLock(_lock_file(path))
    with _named(path):
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise DataError(
                f"another run is writing {path}: wait for its end or stop it"
            ) from error
    return lock


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = _lock(path)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def _lines(path: Path) -> Iterator[bytes]:
    """The lines that are not blank, without a byte-order mark."""
    try:
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            yield from (line for line in file if not line.isspace())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _results(path: Path, n_lines: int) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """The results in a file: index, line and content of each. The indices ascend."""
    last = -1
    for number, line in enumerate(_lines(path), start=1):
        try:
            result = json.loads(line)
            index = result["index"]
            if not last < index < n_lines:
                raise IndexError
        except (ValueError, TypeError, LookupError) as error:
            raise DataError(
                f"{path}, line {number} is no result of this job: remove the file, or start anew "
                "with --force"
            ) from error
        yield index, line, result
        last = index


def _end_of_last_line(file: IO[bytes]) -> int:
    """The end of the last complete line. A kill may leave part of a line after it."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - BLOCK)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0
