"""Memory that the ranks of one machine have in common."""

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
    """Zeros at first, at another address in each rank; they are gone when the last one ends.

    Each rank locks one byte of the file behind it. The system unlocks it when the rank ends, in
    whatever way, so that the others see it.
    """

    def __init__(self, file: BinaryIO) -> None:
        import fcntl

        self._file = file
        self._map = mmap.mmap(file.fileno(), 0)
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, parallel.mp_rank())

    @classmethod
    def of_all_ranks(cls, n_bytes: int) -> Self | None:
        """All model-parallel ranks call it at the same time; None where one of them is on another
        machine, or the system has no such memory to give."""
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
        n_found = torch.tensor(int(memory is not None))
        try:
            dist.all_reduce(n_found, group=fs_init.get_model_parallel_group())
        finally:
            if file is not None:
                path.unlink()  # who is there has opened it
        return memory if n_found.item() == parallel.mp_size() else None

    def has_left(self, rank: int) -> bool:
        """Whether the process of another rank has ended."""
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True


def _make(n_bytes: int) -> BinaryIO | None:
    """A new file of that size, kept in memory where the system does so; None without room."""
    folder = Path("/dev/shm")
    try:
        descriptor, path = tempfile.mkstemp(
            prefix="llama-", dir=folder if folder.is_dir() else None
        )
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)  # now, not when it is written
        return Path(path).open("r+b")
    except (OSError, AttributeError):
        os.unlink(path)
        return None
    finally:
        os.close(descriptor)
