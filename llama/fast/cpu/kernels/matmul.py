"""The compiled loops of a matrix product, around the register tiles. They take a product's job.

A job is an array of int64, numbers and addresses, in the order of the names below. The threads take
chunks of its rows of weights from a cursor until none is left. A slow thread takes fewer.
"""

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding
import numpy as np
from numba import carray, cfunc, njit, types

from llama.fast import quantize
from llama.fast.cpu.kernels.exponential import exp
from llama.fast.cpu.kernels.instructions import fetch_add, pointer
from llama.fast.cpu.kernels.tile import tile, tile_rows
from llama.fast.quantize import GROUP, LANES, OFFSET

# BIASES: the address of the biases of all rows, float32; 0: there are none.
CURSOR, N, K, X, STEPS, OUT, TOTAL, CHUNK, MATRICES, BIASES = range(10)
FIRST = 10  # from here, for each matrix: its rows, the addresses of its weights and of its scales
LENGTH = FIRST + 3 * 3
GROUPS = 64  # groups of activations that a thread rounds at a time

FEW_ROWS = 8  # the most rows of x that a decode step has
BAND = 3  # tiles that up to four activation rows are multiplied with before the next four
IN_CACHE = 1 << 15  # activations that stay in a core's cache
DEPTH = 1024  # columns that a prefill with float weights multiplies at a time

# Numba recompiles a task when the task's own file has changed. Each task reads VERSION, a hash of
# all kernel files, so that it is recompiled when any of them has changed.
SOURCES = [*sorted(Path(__file__).parent.glob("*.py")), Path(quantize.__file__)]
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()


@functools.cache
def instruction_sets() -> list[str]:
    """The instruction sets of this processor that multiply bytes, the fastest first. "plain" code
    runs on every processor."""
    has = llvmlite.binding.get_host_cpu_features().get
    vnni = has("avxvnni") or (has("avx512vnni") and has("avx512vl"))
    found = {"vnni": has("avx2") and vnni, "avx2": has("avx2"), "plain": True}
    return [name for name, is_there in found.items() if is_there]


@functools.cache
def has_bfloat16() -> bool:
    """Whether the processor has instructions that multiply bfloat16."""
    has = llvmlite.binding.get_host_cpu_features().get
    return bool(has("avx512bf16") or has("amx-bf16"))


def may_use_onednn() -> bool:
    """Whether products of more than FEW_ROWS rows of x may run in PyTorch's oneDNN, in bfloat16.

    LLAMA_ONEDNN must be 1, and the processor must multiply bfloat16. Prompts are faster then, but a
    token's last bits depend on how many rows are computed with it.
    """
    return os.environ.get("LLAMA_ONEDNN") == "1" and has_bfloat16()


def compile_task(
    function: Callable[..., None], fastmath: frozenset[str] = frozenset()
) -> Callable[[int], None]:
    """Compile a task to a C function, or read it from numba's cache. The cache is NUMBA_CACHE_DIR,
    else the folder of this file or, if that is read-only, the user's cache folder."""
    compile_cached = functools.partial(
        cfunc,
        types.void(types.CPointer(types.int64)),
        error_model="numpy",
        boundscheck=False,
        fastmath=set(fastmath),
    )
    try:
        compiled = compile_cached(cache=True)(function)
    except RuntimeError:  # no cache folder can be written
        compiled = compile_cached()(function)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    call.compiled = compiled  # type: ignore[attr-defined]  # keeps the code from being freed
    return call


@njit(error_model="numpy")
def tile_place(number, tiles, high, is_strided):  # type: ignore[no-untyped-def]
    """The number of rows in a tile, the number in all tiles before it, and its first row.

    The first `tiles` tiles have `high` rows. Each row after them is a tile of its own. is_strided:
    the rows of a tile lie `tiles` rows apart. Consecutive tiles then read `high` sequential
    streams, which the processor prefetches, so that short rows are read 1.5 times as fast.
    """
    if number >= tiles:
        done = number + tiles * (high - 1)
        return 1, done, done
    return high, number * high, number if is_strided else number * high


@functools.cache
def product(kind: str, isa: str, swiglu: bool) -> Callable[[int], None]:
    """The task that multiplies x (n, K) with each transposed matrix, to out (n, all rows), and adds
    the biases.

    swiglu: out (n, rows) is silu(x w1^T) * (x w3^T) for the two matrices. The product with w3 is
    stored after it, so out needs 2 * n rows.
    """
    version = VERSION
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}[kind]
    high = tile_rows(kind)

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, k, total, chunk = job[N], job[K], job[TOTAL], job[CHUNK]
        x, steps, out_step = job[X], job[STEPS], 4 * total
        width = k * bits // 8  # bytes of a row of weights, and of its scales
        scale_width = 2 * k // GROUP if kind == "int4" else 4
        # A decode step reads each row of weights whole. A prefill of floats reads part of a row
        # at a time, as much as stays in a core's caches.
        depth = k if bits <= 8 or n <= FEW_ROWS else min(k, DEPTH)
        block = max(4, IN_CACHE // depth & ~3)
        # Four activation rows are multiplied with all tiles of a band before the next four.
        band = 1 if bits <= 8 else chunk if depth < k else BAND
        sums = np.empty(chunk * block * LANES if depth < k else 0, np.float32)
        while True:
            begin = fetch_add(address) * chunk
            end = min(begin + chunk, total)
            if begin >= total:
                break
            before = 0  # rows of the matrices before this one
            for matrix in range(job[MATRICES]):
                place = FIRST + 3 * matrix
                rows, weights, scales = job[place], job[place + 1], job[place + 2]
                out = job[OUT] + 4 * before
                if swiglu:
                    out = job[OUT] + 4 * matrix * n * total
                start, stop = max(begin - before, 0), min(end - before, rows)
                tiles = max(stop - start, 0) // high
                all_tiles = max(stop - start, 0) - tiles * (high - 1)  # including those of one row
                for first in range(0, n, block):
                    last = min(first + block, n)
                    for column in range(0, k, depth):
                        column_end = min(column + depth, k)
                        for first_tile in range(0, all_tiles, band):
                            i = first
                            while i < last:
                                count = 4 if i + 4 <= last else 2 if i + 2 <= last else 1
                                for number in range(first_tile, min(first_tile + band, all_tiles)):
                                    taken, done, row = tile_place(number, tiles, high, bits > 8)
                                    row += start
                                    part = done * (last - first) + taken * (i - first)
                                    tile(
                                        kind, isa, taken, count, i, k, column, column_end, x, steps,
                                        weights + row * width, tiles, scales + row * scale_width,
                                        out + 4 * row, out_step, sums.ctypes.data + 32 * part,
                                    )  # fmt: skip
                                i += count
                if not swiglu:
                    before += rows
            if job[BIASES] != 0:
                parts = 2 if swiglu else 1
                biases = carray(pointer(job[BIASES], np.float32), (parts, total))
                added = carray(pointer(job[OUT], np.float32), (parts, n, total))
                for part in range(parts):
                    for r in range(n):
                        for i in range(begin, end):
                            added[part, r, i] += biases[part, i]
            if swiglu:
                both = carray(pointer(job[OUT], np.float32), (2, n, total))
                for r in range(n):
                    for i in range(begin, end):
                        gate = both[0, r, i]
                        both[0, r, i] = gate / (np.float32(1) + exp(-gate)) * both[1, r, i]

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
def round_to_int8() -> Callable[[int], None]:
    """The task that rounds activations to int8, in groups of 32 with a scale each.

    After each scale comes OFFSET times the group's sum, which corrects for the offset of int4
    weights.
    """
    version = VERSION

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        groups = job[N] * job[K] // GROUP
        shape = (groups, GROUP)
        x = carray(pointer(job[X], np.float32), shape)
        bits = carray(pointer(job[X], np.int32), shape)
        quantized = carray(pointer(job[OUT], np.int8), shape)
        steps = carray(pointer(job[STEPS], np.float32), (groups, 2))
        offsets = carray(pointer(job[STEPS], np.int32), (groups, 2))
        while True:
            begin = fetch_add(address) * GROUPS
            if begin >= groups:
                break
            for group in range(begin, min(begin + GROUPS, groups)):
                step = step_of(bits[group])
                inverse = np.float32(0)
                if step > np.float32(1e-35):
                    inverse = np.float32(1) / step
                total = np.int32(0)
                for i in range(GROUP):
                    rounded = np.int32(np.rint(x[group, i] * inverse))
                    quantized[group, i] = np.int8(rounded)
                    total += np.int32(quantized[group, i])
                steps[group, 0] = step
                offsets[group, 1] = np.int32(OFFSET) * total

    return compile_task(task)
