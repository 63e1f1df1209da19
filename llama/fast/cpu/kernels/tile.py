"""Register tiles: some rows of weights times some rows of activations, as LLVM instructions.

A tile keeps all its sums in registers. Each sum is added up in eight lanes, in the same order for
every size of tile. So each result has the same bits, whatever the other rows of the tile are.
Integer sums are exact within a group of 32. Numba does not compile Python loops to such code
reliably: it makes integer products 64 bits wide.
"""

import functools
from collections.abc import Callable
from itertools import chain, product
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value
from numba.core import cgutils, types
from numba.extending import intrinsic

from llama.fast.cpu.kernels.instructions import (
    add_const,
    broadcast,
    bytes32,
    call_instruction,
    f32,
    floats8,
    i8,
    i16,
    i32,
    i64,
    ints8,
    load_at,
    mul_const,
    multiply_add,
    prefetch,
    shorts16,
    splat,
    sum_lanes,
    widen,
)
from llama.fast.quantize import GROUP, LANES, QUAD

PREFETCH = 2048  # bytes ahead


class Integers:
    """Exact sums of byte products, in eight lanes. Each call of `add` adds four neighbouring
    products to each lane.

    is_signed: weights are -127 to 127. Otherwise they are 0 to 15, and `add` is called at most
    eight times for a sum. Activations are -127 to 127. The instructions multiply unsigned by signed
    bytes, so the sign of a signed weight is moved to x. No 16-bit sum overflows. It has two
    products if weights are signed, at most 2 * 127 * 127 = 32258. Otherwise it has sixteen, two for
    each call, at most 16 * 15 * 127 = 30480.
    """

    def __init__(self, b: Builder, isa: str, is_signed: bool) -> None:
        self.b, self.isa, self.is_signed = b, isa, is_signed
        self.psign = functools.partial(call_instruction, b, "llvm.x86.avx2.psign.b", bytes32)

    def add(self, total: Value | None, w: Value, x: Value) -> Value:
        """Add the products of 32 weights and 32 activations to `total`, which is None at first."""
        b = self.b
        if self.isa == "plain":
            wide = ir.VectorType(i16, 32)
            products = b.mul((b.sext if self.is_signed else b.zext)(w, wide), b.sext(x, wide))
            more = _add_quads(b, products)
            return more if total is None else b.add(total, more)
        if self.is_signed:
            w, x = self.psign(w, w), self.psign(x, w)
        if self.isa == "vnni":
            total = splat(ints8, 0) if total is None else total
            return call_instruction(b, "llvm.x86.avx512.vpdpbusd.256", ints8, total, w, x)
        more = call_instruction(b, "llvm.x86.avx2.pmadd.ub.sw", shorts16, w, x)
        if self.is_signed:
            more = self._add_pairs(more)
        return more if total is None else b.add(total, more)

    def result(self, total: Value) -> Value:
        """The sums as eight int32."""
        return self._add_pairs(total) if total.type == shorts16 else total

    def _add_pairs(self, pairs: Value) -> Value:
        ones = splat(shorts16, 1)
        return call_instruction(self.b, "llvm.x86.avx2.pmadd.wd", ints8, pairs, ones)


def _add_quads(b: Builder, products: Value) -> Value:
    """32 int16 -> the sums of four neighbours, eight int32."""
    wide = b.sext(products, ir.VectorType(i32, 32))
    every_fourth = [
        b.shuffle_vector(wide, wide, ir.Constant(ints8, [*range(first, 32, 4)]))
        for first in range(4)
    ]
    return functools.reduce(b.add, every_fourth)


class _Tile:
    """Writes the code that multiplies `rows` rows of weights with `n` rows of activations."""

    def __init__(self, b: Builder, isa: str, rows: int, n: int, operands: list[Value]) -> None:
        (
            first, self.k, self.begin, self.end, x, steps, w, row_step, scales, out, self.out_step,
            partial,
        ) = operands  # fmt: skip
        pointer = i8.as_pointer()
        self.b, self.isa, self.n = b, isa, n
        self.w, self.scales = b.inttoptr(w, pointer), b.inttoptr(scales, pointer)
        self.x, self.steps = b.inttoptr(x, pointer), b.inttoptr(steps, pointer)
        self.out, self.partial = b.inttoptr(out, pointer), b.inttoptr(partial, pointer)
        self.inputs = [add_const(b, first, i) for i in range(n)]
        self.rows = [mul_const(b, row_step, row) for row in range(rows)]

    def floats(self, width: int) -> None:
        """x is float32. w is float32 (width 4) or bfloat16 (width 2). K may have any value."""
        b = self.b
        half = ir.VectorType(i16, LANES)
        x_starts = [b.mul(mul_const(b, number, 4), self.k) for number in self.inputs]
        w_starts = [b.mul(mul_const(b, row, width), self.k) for row in self.rows]

        def zeros(zero: ir.Constant) -> list[list[Value]]:
            return [[cgutils.alloca_once_value(b, zero) for _ in x_starts] for _ in w_starts]

        sums, rest = zeros(splat(floats8, 0)), zeros(ir.Constant(f32, 0))

        def multiply(i: Value, kind: ir.Type, half: ir.Type, totals: list[list[Value]]) -> None:
            weights = []  # stay in registers for all rows of x
            for start in w_starts:
                offset = b.add(start, mul_const(b, i, width))
                if width == 4:
                    weights.append(load_at(b, kind, self.w, offset))
                else:
                    weights.append(widen(b, load_at(b, half, self.w, offset)))
            for number, start in enumerate(x_starts):
                x = load_at(b, kind, self.x, b.add(start, mul_const(b, i, 4)))
                for w, row in zip(weights, totals, strict=True):
                    multiply_add(b, w, x, row[number])

        places = [
            (total, b.gep(self.partial, [ir.Constant(i64, 32 * number)]))
            for number, total in enumerate(chain.from_iterable(sums))
        ]
        with b.if_then(b.icmp_signed("!=", self.begin, ir.Constant(i64, 0))):
            for total, place in places:
                b.store(load_at(b, floats8, place, ir.Constant(i64, 0)), total)

        line = 64 // width  # weights of a cache line
        lines = b.udiv(b.sub(self.end, self.begin), ir.Constant(i64, line))
        with cgutils.for_range(b, lines) as loop:
            i = b.add(self.begin, mul_const(b, loop.index, line))
            for start in w_starts:
                prefetch(b, self.w, b.add(start, add_const(b, mul_const(b, i, width), PREFETCH)))
            for j in range(0, line, LANES):
                multiply(add_const(b, i, j), floats8, half, sums)
        done = b.add(self.begin, mul_const(b, lines, line))

        with b.if_else(b.icmp_signed("==", self.end, self.k)) as (is_all, is_part):
            with is_all:
                with cgutils.for_range(b, b.sub(self.k, done)) as loop:
                    multiply(b.add(done, loop.index), f32, i16, rest)
                for row, (lanes, scalars) in enumerate(zip(sums, rest, strict=True)):
                    for i, (vector, scalar) in enumerate(zip(lanes, scalars, strict=True)):
                        total = b.fadd(sum_lanes(b, b.load(vector)), b.load(scalar))
                        self._store(total, i, mul_const(b, self.rows[row], 4))
            with is_part:
                for total, place in places:
                    b.store(b.load(total), b.bitcast(place, floats8.as_pointer()), align=4)

    def int8(self) -> None:
        """x: int8 in groups, each with a scale. w: int8, with a scale for each row."""
        b = self.b
        integers = Integers(b, self.isa, is_signed=True)
        scale = load_at(b, floats8, self.scales, ir.Constant(i64, 0))

        def products(group: Value, inputs: list[Value]) -> list[Value]:
            start = self._weights(group, LANES * GROUP)
            sums: list[Any] = [None] * self.n
            for quad in range(GROUP // QUAD):
                w = load_at(b, bytes32, self.w, add_const(b, start, 32 * quad))
                sums = [
                    integers.add(total, w, self._quad(x, quad))
                    for total, x in zip(sums, inputs, strict=True)
                ]
            return [integers.result(total) for total in sums]

        for i, total in enumerate(self._groups(products, None)):
            self._store(b.fmul(total, scale), i)

    def int4(self) -> None:
        """x: int8 in groups, each with a scale. w: int4 in groups, each with a bfloat16 scale."""
        b = self.b
        integers = Integers(b, self.isa, is_signed=False)

        def products(group: Value, inputs: list[Value]) -> list[Value]:
            start = self._weights(group, LANES * GROUP // 2)
            sums: list[Any] = [None] * self.n
            for quad in range(GROUP // QUAD // 2):
                packed = load_at(b, bytes32, self.w, add_const(b, start, 32 * quad))
                low = b.and_(packed, splat(bytes32, 15))
                high = b.lshr(packed, splat(bytes32, 4))
                for w, place in ((low, quad), (high, quad + GROUP // QUAD // 2)):
                    sums = [
                        integers.add(total, w, self._quad(x, place))
                        for total, x in zip(sums, inputs, strict=True)
                    ]
            return [integers.result(total) for total in sums]

        def scales(group: Value) -> Value:
            place = mul_const(b, group, 2 * LANES)
            return widen(b, load_at(b, ir.VectorType(i16, LANES), self.scales, place))

        for i, total in enumerate(self._groups(products, scales)):
            self._store(total, i)

    def _weights(self, group: Value, size: int) -> Value:
        """The offset of a group's weights, in bytes. Later groups are prefetched."""
        start = mul_const(self.b, group, size)
        for line in range(0, size, 64):
            prefetch(self.b, self.w, add_const(self.b, start, PREFETCH + line))
        return start

    def _quad(self, x: Value, quad: int) -> Value:
        """Four neighbouring activations of a group, repeated in eight lanes."""
        four = load_at(self.b, i32, x, ir.Constant(i64, QUAD * quad))
        return self.b.bitcast(broadcast(self.b, four), bytes32)

    def _groups(
        self,
        products: Callable[[Value, list[Value]], list[Value]],
        scales: Callable[[Value], Value] | None,
    ) -> list[Value]:
        """Sum the integer products of all groups, each times the scale of its activations.

        For int4, the offset of the weights is subtracted first, and the scale of the weights is a
        factor too.
        """
        b = self.b
        totals = [cgutils.alloca_once_value(b, splat(floats8, 0)) for _ in self.inputs]
        groups = b.udiv(self.k, ir.Constant(i64, GROUP))
        with cgutils.for_range(b, groups) as loop:
            places = [b.add(b.mul(number, groups), loop.index) for number in self.inputs]
            inputs = [b.gep(self.x, [mul_const(b, place, GROUP)]) for place in places]
            sums = products(loop.index, inputs)
            scale = scales(loop.index) if scales else None
            for place, total, integers in zip(places, totals, sums, strict=True):
                factor = broadcast(b, load_at(b, f32, self.steps, mul_const(b, place, 8)))
                if scale is not None:
                    after = add_const(b, mul_const(b, place, 8), 4)
                    offset = broadcast(b, load_at(b, i32, self.steps, after))
                    integers = b.sub(integers, offset)
                    factor = b.fmul(factor, scale)
                multiply_add(b, b.sitofp(integers, floats8), factor, total)
        return [b.load(total) for total in totals]

    def _store(self, result: Value, i: int, offset: Value | None = None) -> None:
        b = self.b
        start = b.mul(self.inputs[i], self.out_step)
        start = start if offset is None else b.add(start, offset)
        b.store(result, b.bitcast(b.gep(self.out, [start]), result.type.as_pointer()), align=4)


@intrinsic(prefer_literal=True)
def tile(
    context: Any, kind: Any, isa: Any, rows: Any, n: Any, first: Any, k: Any, begin: Any, end: Any,
    x: Any, steps: Any, w: Any, row_step: Any, scales: Any, out: Any, out_step: Any, partial: Any,
) -> tuple[Any, Callable[..., Value]]:  # fmt: skip
    """out[i, r] = row r of the weights times row i of x, for the n rows of x from `first` on.

    kind: "float32", "bfloat16", "int8" or "int4". isa: see `instruction_sets`. All others are
    int64. x, steps, w, scales, out and partial are addresses. rows: `tile_rows(kind)` or, for
    floats, 1. n: 1, 2 or 4. k: a row's length. out_step: bytes from one row of results to the next.

    For floats only: the tile has every `row_step`-th row of w, and sums columns `begin` to `end -
    1`. Unless end equals k, end - begin is a multiple of 32. The sums of the parts so far are
    stored at `partial`.
    """
    numbers = (
        rows, n, first, k, begin, end, x, steps, w, row_step, scales, out, out_step, partial,
    )  # fmt: skip
    signature = types.void(kind, isa, *[types.int64] * len(numbers))
    name = kind.literal_value
    sizes = {tile_rows(name)} if name in ("int8", "int4") else {tile_rows(name), 1}

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        rows, n, *others = operands[2:]
        for high, count in product(sorted(sizes), (1, 2, 4)):
            is_high = b.icmp_signed("==", rows, ir.Constant(i64, high))
            is_count = b.icmp_signed("==", n, ir.Constant(i64, count))
            with b.if_then(b.and_(is_high, is_count)):
                made = _Tile(b, isa.literal_value, high, count, others)
                match name:
                    case "float32":
                        made.floats(4)
                    case "bfloat16":
                        made.floats(2)
                    case "int8":
                        made.int8()
                    case "int4":
                        made.int4()
        return context.get_dummy_value()

    return signature, generate


def tile_rows(kind: str) -> int:
    """Rows of weights in a tile. For floats, three rows of weights and four of x need twelve sums,
    three weights and one x: AVX2 has sixteen registers."""
    return LANES if kind in ("int8", "int4") else 3
