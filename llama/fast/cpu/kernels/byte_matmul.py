"""The compiled loops of products with int8 and int4 weights, around the register tiles."""

import functools
from collections.abc import Callable

from numba import carray

from llama.fast.cpu.kernels.activations import ROWS, to_int8
from llama.fast.cpu.kernels.byte_tile import byte_tile, offset
from llama.fast.cpu.kernels.compile import VERSION, compile_task
from llama.fast.cpu.kernels.isa import ISAS
from llama.fast.cpu.kernels.job import FIRST, LENGTH, MATRICES, STEPS, TOTAL, K, N, X
from llama.fast.cpu.kernels.matmul import finish_chunk, next_chunk, part_of_matrix
from llama.fast.quantize import GROUP, LANES

FEW_ROWS = 4  # of activations, whose products wait for memory


@functools.cache
def product(kind: str, isa: str, swiglu: bool) -> Callable[[int], None]:
    """The task that multiplies x (n, K), prepared by `to_int8`; see `float_matmul.product`."""
    version = VERSION
    is_int4, lanes, most = kind == "int4", ISAS[isa].lanes, ISAS[isa].byte_inputs

    def task(address):  # type: ignore[no-untyped-def]
        version  # noqa: B018
        job = carray(address, LENGTH)
        n, k, out_step = job[N], job[K], 4 * job[TOTAL]
        width = k // 2 if is_int4 else k  # bytes of a row of weights, and of its scales
        scale_width = 2 * k // GROUP if is_int4 else 4
        # A tile of eight rows of weights is one stream, which memory delivers faster than the two
        # streams of a tile of sixteen.
        high = LANES if n <= FEW_ROWS else lanes
        while True:
            begin, end = next_chunk(address, job)
            if begin == end:
                break
            for matrix in range(job[MATRICES]):
                start, stop, out = part_of_matrix(job, matrix, begin, end, swiglu)
                weights, scales = job[FIRST + 3 * matrix + 1], job[FIRST + 3 * matrix + 2]
                row = start
                while row < stop:
                    taken = high if row + high <= stop else LANES
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


def preparing(kind: str, isa: str) -> tuple[Callable[[int], None], int]:
    """The task that prepares the activations, and the bytes of a prepared one."""
    return to_int8(offset(kind, isa)), 1
