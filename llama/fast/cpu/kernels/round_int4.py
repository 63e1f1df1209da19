"""The compiled loop that rounds a matrix to int4. It does what `quantize.quantize_int4` does."""

import ctypes
import functools
from collections.abc import Callable

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from llama.fast.cpu.kernels import pool
from llama.fast.cpu.kernels.activations import bfloat16_of
from llama.fast.cpu.kernels.compile import VERSION, compile_task
from llama.fast.cpu.kernels.instructions import fetch_add, pointer
from llama.fast.quantize import GROUP, LANES, OFFSET, QUAD, Int4Weight, check_finite, check_matrix

# Fields of the job. N: rows of the matrix. EIGHTS: rows of the result / 8.
CURSOR, N, EIGHTS, K, W, PACKED, SCALES = range(7)
LENGTH = 7
SUMS = {"reassoc", "contract"}  # the compiler may reorder sums
HALF = GROUP // 2


@njit(error_model="numpy")
def steps_of(weight, scale):  # type: ignore[no-untyped-def]
    """The weight as a multiple of the scale, -8 to 7. With a scale of 0 it is nearly 0."""
    divisor = np.float32(1) if scale == np.float32(0) else scale
    return min(max(np.rint(weight / divisor), np.float32(-8)), np.float32(7))


@njit(error_model="numpy", fastmath=SUMS)
def loss_of(x, scale):  # type: ignore[no-untyped-def]
    """The squared error of a group that is rounded with a scale."""
    total = np.float32(0)
    for i in range(GROUP):
        error = steps_of(x[i], scale) * scale - x[i]
        total += error * error
    return total


@njit(error_model="numpy")
def scale_bits(largest, steps):  # type: ignore[no-untyped-def]
    """The bits of the scale largest / steps, rounded to bfloat16."""
    scale = np.float32(largest / np.float32(steps))
    return bfloat16_of(np.float32(scale).view(np.uint32))


@njit(error_model="numpy")
def widened(bits):  # type: ignore[no-untyped-def]
    """The float32 with the bits of a bfloat16."""
    wide = np.uint32(np.uint32(bits) << np.uint32(16))
    return wide.view(np.float32)


@njit(error_model="numpy")
def best_scale(x, bits):  # type: ignore[no-untyped-def]
    """The bits of the better of two scales of a group x, or of NaN if a weight is not finite; see
    `quantize.quantize_int4`. bits: the bits of x."""
    least = most = np.float32(0)
    magnitude = np.uint32(0)
    for i in range(GROUP):
        least, most = min(least, x[i]), max(most, x[i])
        magnitude = max(magnitude, bits[i] & np.uint32(0x7FFFFFFF))
    if magnitude >= np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    largest = least if -least > most else most
    clipped, whole = scale_bits(largest, -8), scale_bits(largest, -7)
    return whole if loss_of(x, widened(whole)) < loss_of(x, widened(clipped)) else clipped


@functools.cache
def _task(is_bfloat16: bool) -> Callable[[int], None]:
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, k = job[N], job[K]
        groups, size = k // GROUP, LANES * GROUP // 2
        bits = np.empty(GROUP, np.uint32)
        x, steps = bits.view(np.float32), np.empty(GROUP, np.uint8)
        while True:
            eight = fetch_add(address)
            if eight >= job[EIGHTS]:
                break
            for r in range(LANES):
                row = eight * LANES + r
                narrow = carray(pointer(job[W] + 2 * min(row, n - 1) * k, np.uint16), k)
                wide = carray(pointer(job[W] + 4 * min(row, n - 1) * k, np.uint32), k)
                for group in range(groups):
                    place = eight * groups + group
                    packed = carray(pointer(job[PACKED] + place * size, np.uint8), size)
                    scales = carray(pointer(job[SCALES] + place * 2 * LANES, np.uint16), LANES)
                    for i in range(GROUP):
                        if row >= n:
                            bits[i] = np.uint32(0)
                        elif is_bfloat16:
                            bits[i] = np.uint32(narrow[group * GROUP + i]) << np.uint32(16)
                        else:
                            bits[i] = wide[group * GROUP + i]
                    scales[r] = best_scale(x, bits)
                    scale = widened(scales[r])
                    for i in range(GROUP):
                        steps[i] = np.uint8(np.int32(steps_of(x[i], scale)) + OFFSET)
                    for i in range(HALF):
                        both = steps[i] | np.uint8(steps[i + HALF] << np.uint8(4))
                        packed[LANES * QUAD * (i // QUAD) + QUAD * r + i % QUAD] = both

    return compile_task(task)


def round_int4(w: Tensor) -> Int4Weight:
    """Round w (N, K), on the CPU; see `quantize.quantize_int4`."""
    check_matrix(w)
    if w.dtype not in (torch.float32, torch.bfloat16):
        w = w.float()
    w = w.contiguous()
    packed, scales = weight = Int4Weight.empty(w.shape, w.device)
    job = (ctypes.c_int64 * LENGTH)()
    job[N], job[EIGHTS], job[K] = len(w), len(packed), w.shape[1]
    job[W], job[PACKED], job[SCALES] = w.data_ptr(), packed.data_ptr(), scales.data_ptr()
    pool.run(_task(w.dtype == torch.bfloat16), ctypes.addressof(job))
    check_finite(scales)
    return weight
