"""The compiled loops of products with float32 and bfloat16 weights, around the register tiles."""

import functools
from collections.abc import Callable

import numpy as np
from numba import carray, njit

from llama.fast.cpu.kernels.activations import to_bfloat16
from llama.fast.cpu.kernels.compile import VERSION, compile_task
from llama.fast.cpu.kernels.float_tile import float_tile, x_bytes
from llama.fast.cpu.kernels.isa import ISAS
from llama.fast.cpu.kernels.job import FIRST, LENGTH, MATRICES, TOTAL, K, N, X
from llama.fast.cpu.kernels.matmul import finish_chunk, next_chunk, part_of_matrix

PREFETCH = 1024  # bytes ahead
FEW_ROWS = 8  # the most rows of x that a decode step has
IN_CACHE = 1 << 15  # bytes of activations that stay in a core's cache
SHARE = 96  # rows of weights that a prefill multiplies at a time
DEPTH = 1024  # columns that a prefill multiplies at a time


@njit(error_model="numpy")
def tile_place(number, tiles, high, step):  # type: ignore[no-untyped-def]
    """The number of rows in a tile, the number in all tiles before it, and its first row.

    The first `tiles` tiles have `high` rows each. The rows of a tile lie `step` rows apart; step is
    1 or `tiles`. Each row after these tiles is a tile of its own.
    """
    if number >= tiles:
        done = number + tiles * (high - 1)
        return 1, done, done
    return high, number * high, number * high if step == 1 else number


@functools.cache
def product(kind: str, isa: str, swiglu: bool) -> Callable[[int], None]:
    """The task that multiplies x (n, K) with each transposed matrix, to out (n, all rows), and adds
    the biases.

    swiglu: out (n, rows) is silu(x w1^T) * (x w3^T) for the two matrices. The product with w3 is
    stored after it, so out needs 2 * n rows.
    """
    version = VERSION
    width, x_width = 2 if kind == "bfloat16" else 4, x_bytes(kind, isa)
    lanes, decode, prefill = ISAS[isa].lanes, ISAS[isa].decode, ISAS[isa].prefill

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, k, out_step = job[N], job[K], 4 * job[TOTAL]
        # A decode step reads each row of weights whole. A prefill reads part of a row at a time, as
        # much as stays in a core's caches.
        is_decode = n <= FEW_ROWS
        high, most = decode if is_decode else prefill
        ahead = PREFETCH if is_decode else 0
        depth = k if is_decode else min(k, DEPTH)
        block = max(most, IN_CACHE // (x_width * depth) // most * most)
        # All rows of activations are multiplied with a band of tiles before the next band.
        band = 1 if is_decode else SHARE
        sums = np.empty(SHARE * block * lanes if depth < k else 0, np.float32)
        while True:
            begin, end = next_chunk(address, job)
            if begin == end:
                break
            for matrix in range(job[MATRICES]):
                start, stop, out = part_of_matrix(job, matrix, begin, end, swiglu)
                weights = job[FIRST + 3 * matrix + 1]
                share = max(1, stop - start) if is_decode else SHARE
                for first_row in range(start, stop, share):
                    some = min(share, stop - first_row)
                    tiles = some // high
                    # The rows of a decode step's tiles lie far apart. Consecutive tiles then read
                    # `high` sequential streams, which the processor prefetches.
                    step = tiles if is_decode else 1
                    all_tiles = some - tiles * (high - 1)  # including those of one row
                    for first in range(0, n, block):
                        last = min(first + block, n)
                        for column in range(0, k, depth):
                            column_end = min(column + depth, k)
                            for first_tile in range(0, all_tiles, band):
                                last_tile = min(first_tile + band, all_tiles)
                                i = first
                                while i < last:
                                    count = most
                                    while i + count > last:
                                        count //= 2
                                    x = job[X] + i * k * x_width
                                    for number in range(first_tile, last_tile):
                                        taken, done, row = tile_place(number, tiles, high, step)
                                        row += first_row
                                        part = done * (last - first) + taken * (i - first)
                                        float_tile(
                                            kind, isa, taken, count, k, column, column_end,
                                            x, weights + row * k * width, step, ahead,
                                            out + 4 * row + i * out_step, out_step,
                                            sums.ctypes.data + 4 * lanes * part,
                                        )  # fmt: skip
                                    i += count
            finish_chunk(job, begin, end, swiglu)

    return compile_task(task)


def preparing(kind: str, isa: str) -> tuple[Callable[[int], None] | None, int]:
    """The task that prepares the activations, and the bytes of a prepared one. None and 0: they are
    used as they are."""
    return (to_bfloat16(), 2) if x_bytes(kind, isa) == 2 else (None, 0)
