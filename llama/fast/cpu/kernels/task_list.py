"""Tasks one after the other in a single call, each on all threads, with no Python in between."""

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
from llama.fast.cpu.kernels.instructions import pointer
from llama.fast.cpu.kernels.matmul import VERSION, compile_task

Task = Callable[[int], None]

# A task's row of int64: how many threads are inside, its address, and, in cache lines of its own,
# its job. The whole list's job names the rows to run.
INSIDE, TASK = 0, 1
JOB = 8
FIRST, LAST, ROWS, ROW_BYTES, YIELD = range(5)
SPINS = 4000  # then the one who is waited for may need this thread's processor

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
def change(context: Any, address: Any, by: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """Add to the int64 at an address, before all that follows and after all that was before."""

    def generate(context: Any, b: ir.IRBuilder, signature: Any, operands: Any) -> ir.Value:
        counter = b.inttoptr(operands[0], i64.as_pointer())
        b.atomic_rmw("add", counter, operands[1], "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def look(context: Any, address: Any) -> tuple[Any, Callable[..., ir.Value]]:
    """The int64 at an address that other threads change; on x86 after a short rest."""

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
            change(row, 1)
            call(fields[TASK], row + 8 * JOB)
            change(row, -1)
            # Back here, no chunk of it is left to take. Who took one is still inside, or done: a
            # thread that comes late, or is not there at all, is not waited for.
            spins = 0
            while look(row) != 0:
                spins += 1
                if spins > SPINS and job[YIELD] != 0:
                    call(job[YIELD], 0)  # it takes no argument, and is none the worse for one

    return compile_task(task)


class TaskList:
    """Tasks with their jobs, in the order in which they run.

    Each is a C function `void task(int64 *job)` that takes chunks of its work by counting up the
    job's first number, until none is left. All threads enter all tasks; none enters the next
    before the chunks of this one are done.

    jobs: int64 (tasks, numbers), to be written between runs; the first number is for the threads.
    """

    def __init__(self, tasks: Sequence[Task], jobs: Sequence[Sequence[int]]) -> None:
        width = JOB * (1 + -(-max(map(len, jobs)) // JOB))
        self._memory = torch.zeros(len(tasks), width, dtype=torch.int64)  # in whole cache lines
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
        """The tasks from `first` to before `last`."""
        self.jobs[first:last, 0] = 0
        self._call[FIRST], self._call[LAST] = first, last
        pool.run(self._task, ctypes.addressof(self._call))
