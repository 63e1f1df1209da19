"""Register tiles of floats: rows of weights times rows of activations, as LLVM instructions.

The lanes of a vector are columns. Each sum lies in the lanes of one register until its row ends,
and then the lanes are added. Every size of tile adds in the same order. So each result has the same
bits, whatever the other rows of the tile are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value
from numba.core import cgutils, types
from numba.extending import intrinsic

from llama.fast.cpu.kernels.instructions import (
    LINE,
    add_const,
    call_instruction,
    f32,
    for_size,
    i8,
    i16,
    i32,
    i64,
    load_at,
    load_first,
    mul_const,
    multiply_add,
    prefetch,
    splat,
    sum_each,
    vector,
    widen,
)
from llama.fast.cpu.kernels.isa import ISAS


class Numbers(NamedTuple):
    """How a vector of weights is multiplied with a vector of activations.

    weight, activation: what is loaded. is_pairs: both are bfloat16, and one instruction adds the
    products of columns 2 i + 1 and 2 i, in this order, to lane i of the sum. Without is_pairs, a
    bfloat16 weight is widened to float32.
    """

    weight: ir.VectorType
    activation: ir.VectorType
    is_pairs: bool

    def ready(self, b: Builder, w: Value) -> Value:
        """The loaded weights in the type in which they are multiplied."""
        return w if self.is_pairs or self.weight.element == f32 else widen(b, w)

    def multiply_add(self, b: Builder, w: Value, x: Value, total: Value) -> Value:
        """The total plus the products. `dpbf16ps` adds two to a lane and rounds after each."""
        if not self.is_pairs:
            return multiply_add(b, w, x, total)
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return call_instruction(b, name, total.type, total, w, x)


def x_bytes(kind: str, isa: str) -> int:
    """Bytes of an activation: two where it is rounded to bfloat16, else four."""
    return 2 if kind == "bfloat16" and ISAS[isa].has_pairs else 4


def _numbers(kind: str, isa: str) -> Numbers:
    lanes = ISAS[isa].lanes
    if x_bytes(kind, isa) == 2:
        return Numbers(vector(i16, 2 * lanes), vector(i16, 2 * lanes), is_pairs=True)
    weight = vector(f32 if kind == "float32" else i16, lanes)
    return Numbers(weight, vector(f32, lanes), is_pairs=False)


class _Tile:
    """Writes the code of a tile with `rows` rows of weights and `n` rows of activations."""

    def __init__(
        self, b: Builder, kind: str, isa: str, rows: int, n: int, operands: list[Value]
    ) -> None:
        (
            self.k, self.begin, self.end, x, w, row_step, self.ahead, out, self.out_step, partial,
        ) = operands  # fmt: skip
        pointer = i8.as_pointer()
        self.b, self.numbers = b, _numbers(kind, isa)
        self.x, self.w = b.inttoptr(x, pointer), b.inttoptr(w, pointer)
        self.out, self.partial = b.inttoptr(out, pointer), b.inttoptr(partial, pointer)
        self.width, self.x_width = 2 if kind == "bfloat16" else 4, x_bytes(kind, isa)
        self.row_step = row_step
        self.rows = [mul_const(b, row_step, row) for row in range(rows)]
        self.w_starts = [b.mul(mul_const(b, row, self.width), self.k) for row in self.rows]
        self.n = n
        self.x_starts = [mul_const(b, self.k, self.x_width * i) for i in range(n)]
        self.lanes = vector(f32, ISAS[isa].lanes)
        self.columns = self.numbers.weight.count  # of one multiply-add
        zero = splat(self.lanes, 0)
        self.sums = [[cgutils.alloca_once_value(b, zero) for _ in range(n)] for _ in range(rows)]

    def write(self) -> None:
        b = self.b
        with b.if_then(b.icmp_signed("!=", self.begin, ir.Constant(i64, 0))):
            for total, place in self._places():
                b.store(b.load(place, align=4), total)
        done = self._add_lines()
        with b.if_else(b.icmp_signed("==", self.end, self.k)) as (is_all, is_part):
            with is_all:
                self._add_rest(done)
                self._store()
            with is_part:
                for total, place in self._places():
                    b.store(b.load(total), place, align=4)

    def _places(self) -> list[tuple[Value, Value]]:
        """Each sum and its place at `partial`."""
        b, size = self.b, 4 * self.lanes.count
        totals = [total for row in self.sums for total in row]
        places = [b.gep(self.partial, [ir.Constant(i64, size * i)]) for i in range(len(totals))]
        return [
            (total, b.bitcast(place, self.lanes.as_pointer()))
            for total, place in zip(totals, places, strict=True)
        ]

    def _add_lines(self) -> Value:
        """Add the columns of whole cache lines. Returns the first column after them."""
        b = self.b
        line = max(LINE // self.width, self.columns)
        lines = b.udiv(b.sub(self.end, self.begin), ir.Constant(i64, line))
        with cgutils.for_range(b, lines) as loop:
            column = b.add(self.begin, mul_const(b, loop.index, line))
            with b.if_then(b.icmp_signed("!=", self.ahead, ir.Constant(i64, 0))):
                for start in self.w_starts:
                    place = b.add(start, mul_const(b, column, self.width))
                    prefetch(b, self.w, b.add(place, self.ahead))
            for j in range(0, line, self.columns):
                self._add(add_const(b, column, j), load_at)
        return b.add(self.begin, mul_const(b, lines, line))

    def _add_rest(self, done: Value) -> None:
        """Add the columns from `done` to the row's end. Vectors are filled up with zeros."""
        b = self.b
        columns = ir.Constant(i64, self.columns)
        with cgutils.for_range_slice(b, done, self.k, columns) as (column, _):
            left = b.sub(self.k, column)
            self._add(column, functools.partial(load_first, count=left))

    def _add(self, column: Value, load: Callable[..., Value]) -> None:
        """Add the products of some columns, from `column` on, to all sums."""
        b = self.b
        weights = []  # stay in registers for all rows of x
        for start in self.w_starts:
            place = b.add(start, mul_const(b, column, self.width))
            weights.append(self.numbers.ready(b, load(b, self.numbers.weight, self.w, place)))
        for i, start in enumerate(self.x_starts):
            place = b.add(start, mul_const(b, column, self.x_width))
            x = load(b, self.numbers.activation, self.x, place)
            for w, row in zip(weights, self.sums, strict=True):
                b.store(self.numbers.multiply_add(b, w, x, b.load(row[i])), row[i])

    def _store(self) -> None:
        """Store the sums. Those of neighbouring rows of weights are stored together."""
        b, rows = self.b, len(self.rows)
        together = max(i for i in (1, 2, 4, 8) if i * rows <= self.lanes.count)
        for first in range(0, self.n, together):
            inputs = range(first, min(first + together, self.n))
            sums = sum_each(b, [b.load(row[i]) for i in inputs for row in self.sums])
            for place, i in enumerate(inputs):
                numbers = [ir.Constant(i32, place * rows + row) for row in range(rows)]
                start = mul_const(b, self.out_step, i)
                with b.if_else(b.icmp_signed("==", self.row_step, ir.Constant(i64, 1))) as (
                    near,
                    far,
                ):
                    with near:
                        some = b.shuffle_vector(sums, sums, ir.Constant(vector(i32, rows), numbers))
                        to = b.bitcast(b.gep(self.out, [start]), some.type.as_pointer())
                        b.store(some, to, align=4)
                    with far:
                        for number, offset in zip(numbers, self.rows, strict=True):
                            to = b.gep(self.out, [b.add(start, mul_const(b, offset, 4))])
                            to = b.bitcast(to, f32.as_pointer())
                            b.store(b.extract_element(sums, number), to, align=4)


@intrinsic(prefer_literal=True)
def float_tile(
    context: Any, kind: Any, isa: Any, rows: Any, n: Any, k: Any, begin: Any, end: Any, x: Any,
    w: Any, row_step: Any, ahead: Any, out: Any, out_step: Any, partial: Any,
) -> tuple[Any, Callable[..., Value]]:  # fmt: skip
    """out[i, r] = row r of the weights times row i of x.

    kind: "float32" or "bfloat16". isa: see `ISAS`. All others are int64. x, w, out and partial are
    addresses. rows: as `decode` or `prefill` of the instruction set, or 1. n: 1, 2, 4 or 8, at most
    the tile's `inputs`. k: a row's length. row_step: the distance between two rows of weights of
    the tile, in rows. ahead: bytes from a weight to the one that is prefetched, or 0. out_step:
    bytes from one row of results to the next.

    The tile adds columns `begin` to `end - 1`. Unless end equals k, end - begin is a multiple of
    32. The sums of the columns so far are stored at `partial`.
    """
    numbers = (rows, n, k, begin, end, x, w, row_step, ahead, out, out_step, partial)
    signature = types.void(kind, isa, *[types.int64] * len(numbers))
    names = kind.literal_value, isa.literal_value

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        rows, n, *others = operands[2:]
        tiles = [ISAS[names[1]].decode, ISAS[names[1]].prefill]
        sizes = {
            (high, count)
            for tile in tiles
            for high in (1, tile.rows)
            for count in (1, 2, 4, 8)
            if count <= tile.inputs
        }

        def write(rows: int, n: int) -> None:
            _Tile(b, *names, rows, n, others).write()

        for_size(b, rows, n, sizes, write)
        return context.get_dummy_value()

    return signature, generate
