"""Files are written whole or not at all, and what is no file keeps its kind."""

import os
from pathlib import Path

import pytest

from llama.errors import DataError
from llama.files import atomic_file, check_can_write


def test_a_failed_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.write("text, not bytes")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_link_leads_to_the_new_content(tmp_path: Path) -> None:
    (tmp_path / "target.txt").write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to("target.txt")
    with atomic_file(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert (tmp_path / "target.txt").read_text() == "new"


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with atomic_file(pipe) as file:
        file.write(b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_what_cannot_be_written_is_known_before(tmp_path: Path) -> None:
    check_can_write(tmp_path / "new.txt")
    assert not (tmp_path / "new.txt").exists()
    with pytest.raises(DataError, match="it is a folder"):
        check_can_write(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        check_can_write(tmp_path / "missing" / "new.txt")
