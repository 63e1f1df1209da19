"""The compiled tasks that prepare the activations of a product: they round them."""

import functools
from collections.abc import Callable

import numpy as np
from numba import carray, njit

from llama.fast.cpu.kernels.compile import VERSION, compile_task
from llama.fast.cpu.kernels.instructions import fetch_add, pointer
from llama.fast.cpu.kernels.job import LENGTH, OUT, STEPS, K, N, X
from llama.fast.quantize import GROUP

PART = 2048  # activations that a thread rounds at a time
ROWS = 8  # of int8 activations that lie together


@njit(error_model="numpy")
def bfloat16_of(bits):  # type: ignore[no-untyped-def]
    """The bits of a float32 -> the bits of the nearest bfloat16, ties to even. NaN stays NaN."""
    even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + even)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    nan = np.uint32(bits | np.uint32(0x400000))
    return np.uint16((nan if is_nan else rounded) >> np.uint32(16))


@functools.cache
def to_bfloat16() -> Callable[[int], None]:
    """The task that rounds activations to bfloat16."""
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        total = job[N] * job[K]
        while True:
            begin = fetch_add(address) * PART
            if begin >= total:
                break
            count = min(PART, total - begin)
            bits = carray(pointer(job[X] + 4 * begin, np.uint32), count)
            rounded = carray(pointer(job[OUT] + 2 * begin, np.uint16), count)
            for i in range(count):
                rounded[i] = bfloat16_of(bits[i])

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
def to_int8(weight_offset: int) -> Callable[[int], None]:
    """The task that rounds activations to int8, in groups of 32 with a scale each.

    Eight rows lie together, which a tile reads as one stream: their first groups, then their second
    groups, and so on. The last rows may be fewer than eight. After each scale comes -weight_offset
    times the group's sum, which corrects for the offset of the weights.
    """
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, width = job[N], job[K] // GROUP
        groups = n * width
        x = carray(pointer(job[X], np.float32), (groups, GROUP))
        bits = carray(pointer(job[X], np.int32), (groups, GROUP))
        out = carray(pointer(job[OUT], np.int8), (groups, GROUP))
        steps = carray(pointer(job[STEPS], np.float32), (groups, 2))
        corrections = carray(pointer(job[STEPS], np.int32), (groups, 2))
        while True:
            begin = fetch_add(address) * (PART // GROUP)
            if begin >= groups:
                break
            for group in range(begin, min(begin + PART // GROUP, groups)):
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
                    out[place, i] = np.int8(rounded)
                    total += np.int32(out[place, i])
                steps[place, 0] = step
                corrections[place, 1] = np.int32(-weight_offset) * total

    return compile_task(task)
