"""A block of memory that the ranks of one machine share."""

import contextlib
import mmap
import os
import secrets
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init

from llama import parallel
from llama.lost_ranks import naming_lost_ranks


class SharedMemory:
    """A block of zeros, at another address in each rank. It is freed when the last rank ends.

    Each rank locks one byte of the mapped file. The system releases the lock when the rank ends or
    crashes, so that the others notice.
    """

    def __init__(self, file: BinaryIO) -> None:
        import fcntl

        self._file = file
        self._map = mmap.mmap(file.fileno(), 0)
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, parallel.mp_rank())

    @classmethod
    def of_all_ranks(cls, n_bytes: int) -> Self | None:
        """Make the block. All model-parallel ranks call this together.

        Returns None if a rank is on another machine, or the system has no shared memory left.
        """
        file, numbers = None, None
        if parallel.mp_rank() == 0:
            key = secrets.randbits(62)
            file = _make(n_bytes, key)
            numbers = [os.getpid(), file.fileno(), key] if file else []
        numbers = parallel.broadcast_numbers(numbers, torch.int64, torch.device("cpu"))
        memory = None
        if numbers:
            with contextlib.suppress(OSError, ImportError):
                memory = cls(file or _open_of_first_rank(*numbers))
        n_found = torch.tensor(int(memory is not None), device="cpu")
        group = fs_init.get_model_parallel_group()
        with naming_lost_ranks(group):
            dist.all_reduce(n_found, group=group)
        return memory if n_found.item() == parallel.mp_size() else None

    def has_ended(self, rank: int) -> bool:
        """Whether the process of another rank has ended."""
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True


def _make(n_bytes: int, key: int) -> BinaryIO | None:
    """A new file in memory, of that size. It has no name in a folder, so a crash leaves nothing.

    Returns None if there is no room, or if the system has no such files, as Windows and macOS.
    """
    if not hasattr(os, "memfd_create"):
        return None
    try:
        file = os.fdopen(os.memfd_create(f"llama-{key}"), "r+b")
    except OSError:
        return None
    try:
        os.posix_fallocate(file.fileno(), 0, n_bytes)  # reserve the room now, not at the first use
        return file
    except OSError:
        file.close()
        return None


def _open_of_first_rank(pid: int, descriptor: int, key: int) -> BinaryIO:
    """Open the file that the first rank has made. Raises OSError on another machine, where the path
    may be another process's file."""
    path = Path(f"/proc/{pid}/fd/{descriptor}")
    if not os.readlink(path).startswith(f"/memfd:llama-{key} "):
        raise FileNotFoundError(path)
    return path.open("r+b")
