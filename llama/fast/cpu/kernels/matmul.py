"""What the compiled loops of all products share: their chunks, matrices and biases."""

import numpy as np
from numba import carray, njit

from llama.fast.cpu.kernels.exponential import exp
from llama.fast.cpu.kernels.instructions import fetch_add, pointer
from llama.fast.cpu.kernels.job import BIASES, FIRST, OUT, THREADS, TOTAL, N

UNIT = 16  # rows of weights; chunks are multiples of it, except the last one


@njit(error_model="numpy")
def next_chunk(address, job):  # type: ignore[no-untyped-def]
    """The first row of weights of a chunk and the one after its last. They are equal if no chunk is
    left.

    Half of the rows that are left are divided evenly among the threads, then half of the rest, and
    so on. The first chunks are long, because memory delivers long chunks fastest. The last ones are
    short, so that all threads end together.
    """
    number, threads, begin = fetch_add(address), job[THREADS], np.int64(0)
    while True:
        size = max(UNIT, (job[TOTAL] - begin) // (2 * threads) // UNIT * UNIT)
        if number < threads or begin >= job[TOTAL]:
            break
        number -= threads
        begin += threads * size
    begin = min(begin + number * size, job[TOTAL])
    return begin, min(begin + size, job[TOTAL])


@njit(error_model="numpy")
def part_of_matrix(job, matrix, begin, end, swiglu):  # type: ignore[no-untyped-def]
    """A chunk's first row of one matrix, the row after its last one, and the address of the matrix'
    results.

    swiglu: both matrices have the rows of the chunk, and the results of the second one lie after
    all results of the first. Otherwise the matrices' rows follow one another.
    """
    if swiglu:
        return begin, end, job[OUT] + 4 * matrix * job[N] * job[TOTAL]
    before = np.int64(0)
    for earlier in range(matrix):
        before += job[FIRST + 3 * earlier]
    rows = job[FIRST + 3 * matrix]
    start = min(max(begin - before, 0), rows)
    return start, min(max(end - before, start), rows), job[OUT] + 4 * before


@njit(error_model="numpy")
def finish_chunk(job, begin, end, swiglu):  # type: ignore[no-untyped-def]
    """Add the biases. With swiglu: out (n, rows) = silu(x w1^T) * (x w3^T)."""
    n, total, count = job[N], job[TOTAL], end - begin
    second = 4 * n * total  # bytes from a result of the first matrix to the same one of the second
    for r in range(n):
        row = job[OUT] + 4 * (r * total + begin)
        out = carray(pointer(row, np.float32), count)
        more = carray(pointer(row + second, np.float32), count)
        if job[BIASES] != 0:
            address = job[BIASES] + 4 * begin
            out += carray(pointer(address, np.float32), count)
            if swiglu:
                more += carray(pointer(address + 4 * total, np.float32), count)
        if swiglu:
            for i in range(count):
                out[i] = out[i] / (np.float32(1) + exp(-out[i])) * more[i]
