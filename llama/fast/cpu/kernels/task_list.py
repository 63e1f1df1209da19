"""The compiled loop that runs any list of tasks on all threads, with a barrier after each task."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from llama.fast.cpu.kernels import pool
from llama.fast.cpu.kernels.compile import VERSION, compile_task
from llama.fast.cpu.kernels.instructions import pointer

Task = Callable[[int], None]

# Each task has a row of int64. INSIDE counts the threads that run the task, TASK is the address of
# its function, and its own job starts at JOB, in a new cache line.
INSIDE, TASK = 0, 1
JOB = 8
# The job of `_run`: the range of rows to run, the address and size of rows, `pool.yield_address()`.
FIRST, LAST, ROWS, ROW_BYTES, YIELD = range(5)
SPINS = 4000  # polls before a thread yields its core, which another thread may need

i64 = ir.IntType(64)


@intrinsic
def call(context: Any, function: Any, job: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Call the C function, `void task(int64 *job)`, at an address."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, operands: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [i64])
        b.call(b.inttoptr(operands[0], kind.as_pointer()), [operands[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def atomic_add(context: Any, address: Any, by: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Add to the int64 at an address, atomically and with sequential consistency."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, operands: Any) -> ir.Value:
        counter = b.inttoptr(operands[0], i64.as_pointer())
        b.atomic_rmw("add", counter, operands[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def atomic_load(context: Any, address: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Load the int64 at an address that other threads change. On x86, run PAUSE first."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, operands: Any) -> ir.Value:
        if llvmlite.binding.get_process_triple().startswith("x86"):
            rest = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            b.call(b.module.globals.get(name) or ir.Function(b.module, rest, name), [])
        return b.load_atomic(b.inttoptr(operands[0], i64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), generate


@functools.cache
def _run() -> Task:
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, YIELD + 1)
        for i in range(job[FIRST], job[LAST]):
            row = job[ROWS] + i * job[ROW_BYTES]
            fields = carray(pointer(row, np.int64), JOB)
            atomic_add(row, 1)
            call(fields[TASK], row + 8 * JOB)
            atomic_add(row, -1)
            # The barrier. No chunk of this task is left, but other threads may still compute one.
            # Those are inside the task. A thread that enters later finds no chunk.
            spins = 0
            while atomic_load(row) != 0:
                spins += 1
                if spins > SPINS and job[YIELD] != 0:
                    call(job[YIELD], 0)  # sched_yield ignores the argument

    return compile_task(task)


class TaskList:
    """Tasks with their jobs, in the order in which they run.

    Each is a C function `void task(int64 *job)`. The first number of its job is a cursor, which
    each thread increments to take a chunk, until none is left. All threads enter all tasks. No
    thread enters a task before all chunks of the previous one are done.

    jobs: int64 (tasks, numbers), which the caller may change between runs.
    """

    def __init__(self, tasks: Sequence[Task], jobs: Sequence[Sequence[int]]) -> None:
        width = JOB * (1 + -(-max(map(len, jobs)) // JOB))
        # Rows are whole cache lines.
        self._memory = torch.zeros(len(tasks), width, dtype=torch.int64, device="cpu")
        rows = self._memory.numpy()
        self.jobs = rows[:, JOB:]
        for row, task, job in zip(rows, tasks, jobs, strict=True):
            row[TASK] = pool.address(task)
            row[JOB : JOB + len(job)] = job
        self._call = (ctypes.c_int64 * (YIELD + 1))()
        self._call[ROWS], self._call[ROW_BYTES] = rows.ctypes.data, rows.strides[0]
        self._call[YIELD] = pool.yield_address()
        self._task = _run()

    def run(self, first: int, last: int) -> None:
        """Run the tasks from `first` up to, not including, `last`."""
        self.jobs[first:last, 0] = 0
        self._call[FIRST], self._call[LAST] = first, last
        pool.run(self._task, ctypes.addressof(self._call))
