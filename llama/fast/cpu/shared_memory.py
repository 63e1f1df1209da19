"""A block of memory that the ranks of one machine share."""

import mmap
import os
import tempfile
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init

from llama import parallel


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
        file, name = None, None
        if parallel.mp_rank() == 0:
            file = _make(n_bytes)
            name = list(os.fsencode(file.name)) if file else []
        name = parallel.broadcast_numbers(name, torch.int64, torch.device("cpu"))
        path = Path(os.fsdecode(bytes(name)))
        try:
            memory = cls(file or path.open("r+b")) if name else None
        except (OSError, ImportError):
            memory = None
        n_found = torch.tensor(int(memory is not None), device="cpu")
        try:
            dist.all_reduce(n_found, group=fs_init.get_model_parallel_group())
        finally:
            if file is not None:
                path.unlink()  # all ranks have opened it
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


def _make(n_bytes: int) -> BinaryIO | None:
    """A new file of that size, in memory if the system has /dev/shm. Returns None if there is no
    room, or if the system cannot reserve space for a file, as on Windows and macOS."""
    if not hasattr(os, "posix_fallocate"):
        return None
    folder = Path("/dev/shm")
    try:
        descriptor, path = tempfile.mkstemp(
            prefix="llama-", dir=folder if folder.is_dir() else None
        )
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)  # reserve the space now, not at the first write
        return Path(path).open("r+b")
    except OSError:
        os.unlink(path)
        return None
    finally:
        os.close(descriptor)
