"""All-reduce and all-gather between the ranks of one machine, through shared memory.

gloo passes numbers through threads and sockets. Waking these up takes longer than half a layer of a
decode step. Here each rank writes its numbers to shared memory, increments its flag, and polls the
flags of the other ranks.
"""

import ctypes
import functools
import time

import numpy as np
from fairscale.nn.model_parallel import initialize as fs_init
from fairscale.nn.model_parallel.mappings import (
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from numba import carray
from torch import Tensor

from llama import parallel
from llama.fast.cpu.kernels import pool
from llama.fast.cpu.kernels.buffer import float_buffer
from llama.fast.cpu.kernels.compile import VERSION, compile_task
from llama.fast.cpu.kernels.instructions import pointer
from llama.fast.cpu.kernels.task_list import SPINS, Task, atomic_add, atomic_load, call
from llama.fast.cpu.shared_memory import SharedMemory
from llama.lost_ranks import lost_ranks_error, timeout

RANK, RANKS, FLAGS, BUFFERS, BUFFER_BYTES = range(5)
COUNT, ROWS, WIDTH, X, OUT, YIELD, IS_WRITTEN, IS_DONE = range(5, 13)
LENGTH = 13
LINE = 64  # bytes of a cache line; each flag has one of its own
MIN_SIZE = 1 << 18  # the least size of a buffer, in numbers
POLLS = 100_000  # of a flag, before Python checks whether its rank still runs


@functools.cache
def _exchange_task() -> Task:
    """The task: write x (rows, width) to shared memory, wait for all ranks, and read their x.

    If OUT is not 0, all x are written side by side to out. Otherwise their sum replaces x. The x
    are added in the order of the ranks, so that all ranks get the same sum. If a rank is late, the
    task returns before IS_DONE is set, and the caller must call it again.
    """
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        rows, width, ranks = job[ROWS], job[WIDTH], job[RANKS]
        n = rows * width
        x = carray(pointer(job[X], np.float32), n)
        if job[IS_WRITTEN] == 0:
            mine = carray(pointer(job[BUFFERS] + job[RANK] * job[BUFFER_BYTES], np.float32), n)
            for i in range(n):
                mine[i] = x[i]
            atomic_add(job[FLAGS] + LINE * job[RANK], 1)
            job[IS_WRITTEN] = 1
        for rank in range(ranks):
            looks = 0
            while atomic_load(job[FLAGS] + LINE * rank) < job[COUNT]:
                looks += 1
                if looks > POLLS:
                    return
                if looks > SPINS and job[YIELD] != 0:
                    call(job[YIELD], 0)
        for rank in range(ranks):
            buffer = job[BUFFERS] + rank * job[BUFFER_BYTES]
            part = carray(pointer(buffer, np.float32), (rows, width))
            for row in range(rows):
                if job[OUT] != 0:
                    start = job[OUT] + 4 * (row * ranks + rank) * width
                    out = carray(pointer(start, np.float32), width)
                    for i in range(width):
                        out[i] = part[row, i]
                elif rank == 0:
                    for i in range(width):
                        x[row * width + i] = part[row, i]
                else:
                    for i in range(width):
                        x[row * width + i] += part[row, i]
        job[IS_DONE] = 1

    return compile_task(task)


class Exchange:
    """All-reduce and all-gather of float32 tensors. All model-parallel ranks make it together and
    call its methods in the same order. Without shared memory, as on several machines, it uses gloo.

    widest: the most numbers that a row of `join`'s argument may have.
    """

    def __init__(self, widest: int) -> None:
        self._ranks = parallel.mp_size()
        self._size = max(MIN_SIZE, widest)
        # Each rank has a flag and two buffers. It writes one while others may still read the other.
        self._all_flags = LINE * self._ranks
        self._all_buffers = 4 * self._size * self._ranks
        self._memory: SharedMemory | None = None
        if self._ranks > 1:
            n_bytes = self._all_flags + 2 * self._all_buffers
            self._memory = SharedMemory.of_all_ranks(n_bytes)
        self._task = _exchange_task()
        self._job = (ctypes.c_int64 * LENGTH)()
        self._job[RANK], self._job[RANKS] = parallel.mp_rank(), self._ranks
        self._job[BUFFER_BYTES], self._job[YIELD] = 4 * self._size, pool.yield_address()

    @property
    def is_alone(self) -> bool:
        """Whether this is the only rank."""
        return self._ranks == 1

    def sum(self, x: Tensor) -> None:
        """All-reduce: replace x, contiguous, by the sum of all ranks' x."""
        if self._memory is None:
            reduce_from_model_parallel_region(x)  # in place
            return
        for part in x.view(1, -1).split(self._size, 1):
            self._exchange(part)

    def join(self, x: Tensor) -> Tensor:
        """All-gather: (N, D) of each rank -> (N, ranks D), columns in the order of the ranks."""
        if self.is_alone:
            return x
        if self._memory is None:
            return gather_from_model_parallel_region(x)
        out = float_buffer(len(x), self._ranks * x.shape[1])
        rows = self._size // x.shape[1]
        for part, joined in zip(x.contiguous().split(rows), out.split(rows), strict=True):
            self._exchange(part, joined)
        return out

    def _exchange(self, x: Tensor, out: Tensor | None = None) -> None:
        memory, job = self._memory, self._job
        assert memory is not None
        job[COUNT] += 1
        job[FLAGS] = memory.address
        job[BUFFERS] = memory.address + self._all_flags + job[COUNT] % 2 * self._all_buffers
        job[ROWS], job[WIDTH] = x.shape
        job[X], job[OUT] = x.data_ptr(), 0 if out is None else out.data_ptr()
        job[IS_WRITTEN] = job[IS_DONE] = 0
        end = time.monotonic() + timeout().total_seconds()
        ended: list[int] = []
        while True:
            self._task(ctypes.addressof(job))
            if job[IS_DONE]:
                return
            # `ended` was found before the call above. A rank may set its flag and then end without
            # an error, so that call polled its flag once more.
            if ended or time.monotonic() > end:
                cause = "a rank did not write to the shared memory"
                raise lost_ranks_error(fs_init.get_model_parallel_group(), cause)
            others = [rank for rank in range(self._ranks) if rank != job[RANK]]
            ended = [rank for rank in others if memory.has_ended(rank)]
