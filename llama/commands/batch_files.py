"""The files of a batch job. A job that was stopped continues without losing or repeating a line.

Results are appended to the output, OUT. If there are several groups of ranks, each group appends to
a part of its own, OUT.part-0-of-2 and so on, and the parts are merged into OUT at the end. A line
is done when OUT or a part has its whole result. OUT.job.json records the input and the options.
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

from filelock import FileLock

from llama.errors import DataError
from llama.files import atomic_file, check_can_write, lock, lock_file, read_text, unlock, write_json

# Lines between two calls of fsync. A kill loses no written line, but a power cut loses the lines
# after the last fsync.
SYNC_EVERY = 100
BLOCK = 1 << 16  # bytes

# States of a line
PENDING, DONE, FAILED = 0, 1, 2


class BatchFiles:
    """The files of one job: `input`, `output`, the parts of the output, and `job`, its record."""

    def __init__(self, input: str, output: str) -> None:
        self.input, self.output = Path(input), Path(output)
        self.job = Path(f"{output}.job.json")
        self._lock: FileLock | None = None  # of the output, from `check` to `close`
        self._content: dict[str, Any] = {}  # of the record

    def check(self, options: dict[str, Any], force: bool) -> bool:
        """Check that existing results belong to this job, and lock the output. Nothing is written.
        Returns whether a line has to be computed. One rank calls this, before `begin`.

        Args:
            options: all options that the results depend on, as JSON values.
            force: existing results do not count.

        Raises DataError if the input cannot be read, or if the output cannot be written, belongs to
        another job, or is being written by another run.
        """
        for path in (self.input, self.output):
            if path.exists() and not path.is_file():  # a pipe cannot be read twice
                raise DataError(f"{path} is not a regular file")
        digest, n_lines = self._hash_input()
        check_can_write(self.output, force=True, inputs=[self.input])
        self._lock = lock(self.output)
        job = {"input": f"sha256:{digest}", "lines": n_lines, **options}
        self._content = json.loads(json.dumps(job, default=list))  # as the record is read back
        if force or not any(path.stat().st_size for path in self._parts()):
            return n_lines > 0
        self._check_same(self._content)
        return PENDING in self.states()

    def begin(self, force: bool) -> None:
        """Remove existing results if `force`, and write the record. The rank that called `check`
        calls this, before any rank opens a part."""
        for path in self._parts():
            with self._locked(path), _naming_the_file(path):
                if force:
                    path.unlink()
                    continue
                with path.open("r+b") as file:
                    file.truncate(_end_of_last_line(file))
        write_json(self.job, self._content)

    def close(self) -> None:
        """Release the lock of the output."""
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def _hash_input(self) -> tuple[str, int]:
        """The SHA-256 hash of the input's lines, and their number."""
        digest, n_lines = hashlib.sha256(), 0
        for line in _lines(self.input):
            digest.update(line)
            n_lines += 1
        return digest.hexdigest(), n_lines

    def _check_same(self, job: dict[str, Any]) -> None:
        """Raise DataError if the existing results are of another input or other options."""
        advice = "remove it, or start again with --force"
        if not self.job.exists():
            raise DataError(f"{self.output} exists, but {self.job.name} does not: {advice}")
        before = self._read_job()
        for name in job | before:
            old, new = before.get(name), job.get(name)
            if old != new:
                raise DataError(
                    f"{self.output} was started with {name} {old!r}, not {new!r}: {advice}"
                )

    def _read_job(self) -> dict[str, Any]:
        try:
            return json.loads(read_text(self.job))
        except ValueError as error:
            raise DataError(f"{self.job} is not JSON: {error}") from error

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """A block in which no other process writes to the output or the part."""
        own = None if path == self.output else lock(path)  # the output is locked already
        try:
            yield
        finally:
            if own is not None:
                own.release()

    def _parts(self) -> list[Path]:
        """All files with results. Runs with different numbers of groups may have written them."""
        parts = [Path(name) for name in glob.glob(f"{glob.escape(str(self.output))}.part-*-of-*")]
        return [path for path in (self.output, *sorted(parts)) if path.exists()]

    def open_part(self, group: int, n_groups: int) -> "Part":
        """Open the file to which this group appends its results."""
        if n_groups == 1:
            return Part(self.output, None)
        path = Path(f"{self.output}.part-{group}-of-{n_groups}")
        return Part(path, lock(path))

    def states(self) -> bytearray:
        """The state of each line: PENDING, DONE or FAILED."""
        states = bytearray([PENDING]) * self._read_job()["lines"]
        for path in self._parts():
            for index, _, result in _results(path, len(states)):
                states[index] = DONE if result.get("error") is None else FAILED
        return states

    def pending(self, states: bytearray, group: int, n_groups: int) -> Iterator[tuple[int, bytes]]:
        """The index and the text of each pending line of this group."""
        for index, (state, line) in enumerate(zip(states, _lines(self.input), strict=False)):
            if state == PENDING and index % n_groups == group:
                yield index, line

    def merge(self, n_lines: int) -> None:
        """Merge all parts into the output, in the order of the input. One rank calls this after
        all lines are done."""
        parts = self._parts()
        if parts != [self.output]:
            self._merge(parts, n_lines)

    def _merge(self, parts: list[Path], n_lines: int) -> None:
        with atomic_file(self.output) as file:
            last = -1
            results = (_results(path, n_lines) for path in parts)
            for index, line, _ in heapq.merge(*results, key=itemgetter(0)):
                # After a kill during the removal below, OUT and a part have the same lines.
                if index > last:
                    file.write(line)
                last = index
        for path in parts:
            if path != self.output:
                path.unlink()
                lock_file(path).unlink(missing_ok=True)


class Part:
    """A file of results, one line each, to which only this process appends.

    lock: is released when the file is closed; None: the caller has the lock.
    """

    def __init__(self, path: Path, lock: FileLock | None) -> None:
        self._path = path
        self._n_written = 0
        self._lock = lock
        with _naming_the_file(path):
            self._file = path.open("ab")

    def write(self, result: dict[str, Any]) -> None:
        # JSON can express half a surrogate pair, but UTF-8 cannot. It stays a JSON escape.
        line = (json.dumps(result, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        with _naming_the_file(self._path):
            self._file.write(line)
            self._file.flush()
            self._n_written += 1
            if self._n_written % SYNC_EVERY == 0:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        with _naming_the_file(self._path), self._file:
            os.fsync(self._file.fileno())
        if self._lock is not None:
            self._lock.release()


@contextlib.contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Turn an OSError into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file. Blank lines and a byte-order mark are left out."""
    try:
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            yield from (line for line in file if not line.isspace())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _results(path: Path, n_lines: int) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Yield the index, the line and the parsed result of each line of a file of results.

    Raises DataError for a line that is no result of this job. The indices of a file increase.
    """
    last = -1
    for number, line in enumerate(_lines(path), start=1):
        if not line.endswith(b"\n"):
            return  # the last line, which a kill has cut
        try:
            result = json.loads(line)
            index = result["index"]
            if not last < index < n_lines:
                raise IndexError
        except (ValueError, TypeError, LookupError) as error:
            raise DataError(
                f"{path}, line {number} is no result of this job: remove the file, or start again "
                "with --force"
            ) from error
        yield index, line, result
        last = index


def _end_of_last_line(file: IO[bytes]) -> int:
    """The position after the last complete line. A kill may have left part of a line after it."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - BLOCK)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0
