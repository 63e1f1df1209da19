"""The compiled loops of products with int8 and int4 weights, around the register tiles."""

import functools
from collections.abc import Callable

import numpy as np
from numba import carray, njit

from llama.fast.cpu.kernels.byte_tile import byte_tile, offset
from llama.fast.cpu.kernels.compile import VERSION, compile_task
from llama.fast.cpu.kernels.instructions import fetch_add, pointer
from llama.fast.cpu.kernels.isa import ISAS
from llama.fast.cpu.kernels.job import FIRST, K, LENGTH, MATRICES, N, OUT, STEPS, TOTAL, X
from llama.fast.cpu.kernels.matmul import finish_chunk, next_chunk, part_of_matrix
from llama.fast.quantize import GROUP, LANES

GROUPS = 64  # groups of activations that a thread rounds at a time
ROWS = 8  # rows of activations that lie together


@functools.cache
def product(kind: str, isa: str, swiglu: bool) -> Callable[[int], None]:
    """The task that multiplies x (n, K), rounded by `round_to_int8`; see `float_matmul.product`."""
    version = VERSION
    is_int4, lanes = kind == "int4", ISAS[isa].lanes
    unit, most = ISAS[isa].unit, ISAS[isa].byte_inputs

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, k, out_step = job[N], job[K], 4 * job[TOTAL]
        width = k // 2 if is_int4 else k  # bytes of a row of weights, and of its scales
        scale_width = 2 * k // GROUP if is_int4 else 4
        while True:
            begin, end = next_chunk(address, job, unit)
            if begin == end:
                break
            for matrix in range(job[MATRICES]):
                start, stop, out = part_of_matrix(job, matrix, begin, end, swiglu)
                weights, scales = job[FIRST + 3 * matrix + 1], job[FIRST + 3 * matrix + 2]
                row = start
                while row < stop:
                    taken = lanes if row + lanes <= stop else LANES
                    for first in range(0, n, ROWS):
                        rows = min(ROWS, n - first)
                        i = 0
                        while i < rows:
                            count = most
                            while i + count > rows:
                                count //= 2
                            byte_tile(
                                kind, isa, taken, count, k,
                                job[X] + first * k + i * GROUP,
                                job[STEPS] + 8 * (first * (k // GROUP) + i), rows,
                                weights + row * width, scales + row * scale_width,
                                out + 4 * row + (first + i) * out_step, out_step,
                            )  # fmt: skip
                            i += count
                    row += taken
            finish_chunk(job, begin, end, swiglu)

    return compile_task(task)


@njit(error_model="numpy")
def step_of(bits):  # type: ignore[no-untyped-def]
    """The scale of a group: its largest absolute value / 127, from the bits of float32 as int32.

    As integers, NaN and infinity are larger than all other values. If a group has one of them, its
    scale is therefore not finite.
    """
    most = np.int32(0)
    for i in range(len(bits)):
        most = max(most, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    largest = np.int32(most)  # numba reinterprets only a variable that is assigned once
    return largest.view(np.float32) / np.float32(127)


@functools.cache
def round_to_int8(weight_offset: int) -> Callable[[int], None]:
    """The task that rounds activations to int8, in groups of 32 with a scale each.

    Eight rows lie together: their first groups, then their second groups, and so on. The last rows
    may be fewer. After each scale comes -weight_offset times the group's sum, which corrects for the
    offset of the weights.
    """
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, width = job[N], job[K] // GROUP
        shape = (n * width, GROUP)
        x = carray(pointer(job[X], np.float32), shape)
        bits = carray(pointer(job[X], np.int32), shape)
        quantized = carray(pointer(job[OUT], np.int8), shape)
        steps = carray(pointer(job[STEPS], np.float32), (n * width, 2))
        corrections = carray(pointer(job[STEPS], np.int32), (n * width, 2))
        while True:
            begin = fetch_add(address) * GROUPS
            if begin >= n * width:
                break
            for group in range(begin, min(begin + GROUPS, n * width)):
                row, column = group // width, group % width
                first = row // ROWS * ROWS
                place = first * width + column * min(ROWS, n - first) + row - first
                step = step_of(bits[group])
                inverse = np.float32(0)
                if step > np.float32(1e-35):
                    inverse = np.float32(1) / step
                total = np.int32(0)
                for i in range(GROUP):
                    rounded = np.int32(np.rint(x[group, i] * inverse))
                    quantized[place, i] = np.int8(rounded)
                    total += np.int32(quantized[place, i])
                steps[place, 0] = step
                corrections[place, 1] = np.int32(-weight_offset) * total

    return compile_task(task)


def rounding(kind: str, isa: str) -> tuple[Callable[[int], None], int]:
    """The task that rounds the activations, and the bytes of a rounded one."""
    return round_to_int8(offset(kind, isa)), 1
