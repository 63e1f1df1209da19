"""Register tiles of int8 and int4 weights: rows of weights times rows of activations in int8.

The lanes of a vector are rows of weights. So nothing is added across lanes. The sum of a group of
32 products is an exact integer. Then it is multiplied with its scales and added to a float32. Every
size of tile does that in the same order. So each result has the same bits, whatever the other rows
of the tile are, and on every processor with FMA.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value
from numba.core import cgutils, types
from numba.extending import intrinsic

from llama.fast.cpu.kernels.instructions import (
    LINE,
    add_const,
    broadcast,
    call_instruction,
    f32,
    for_size,
    i8,
    i16,
    i32,
    i64,
    join,
    load_at,
    mul_const,
    multiply_add,
    part,
    prefetch,
    splat,
    vector,
    widen,
)
from llama.fast.cpu.kernels.isa import ISAS
from llama.fast.quantize import GROUP, LANES, OFFSET, QUAD

PREFETCH = 4096  # bytes ahead
QUADS = GROUP // QUAD
EIGHT_QUADS = LANES * QUAD  # bytes: one quad of each of eight rows


def offset(kind: str, isa: str) -> int:
    """What is added to each weight before it is multiplied, so that it is not negative. The result
    is corrected by the sum of the activations."""
    if kind == "int4":
        return OFFSET
    return 128 if ISAS[isa].dot == "vpdpbusd" else 0


class Integers:
    """Exact sums of byte products, in int32 lanes. Each call of `add` adds four neighbouring
    products to each lane.

    Weights are int8 or, after `offset` was added, uint8. Activations are -127 to 127. x86
    multiplies unsigned by signed bytes. Without an instruction for four products, AVX2 moves an
    int8 weight's sign to its activation and adds products in int16. These sums do not overflow:
    with int8 weights, one has two products, at most 2 * 127 * 127 = 32258; with int4, two products
    for each of the eight calls, at most 16 * 15 * 127 = 30480.
    """

    def __init__(self, b: Builder, isa: str, lanes: int, is_int4: bool) -> None:
        self.b, self.isa, self.is_int4 = b, isa, is_int4
        self.ints = vector(i32, lanes)
        self.bytes, self.pairs = vector(i8, 4 * lanes), vector(i16, 2 * lanes)

    def add(self, total: Value | None, w: Value, x: Value) -> Value:
        """Add products to `total`, which is None at first. `add` is called at most eight times."""
        b = self.b
        if self.isa == "plain":
            wide = vector(i16, self.bytes.count)
            products = b.mul((b.zext if self.is_int4 else b.sext)(w, wide), b.sext(x, wide))
            more = self._add_quads(products)
        elif ISAS[self.isa].dot == "vpdpbusd":
            name = f"llvm.x86.avx512.vpdpbusd.{8 * self.bytes.count}"
            total = splat(self.ints, 0) if total is None else total
            return call_instruction(b, name, self.ints, total, w, x)
        elif ISAS[self.isa].dot == "sdot":
            total = splat(self.ints, 0) if total is None else total
            return self._signed_dot(total, w, x)
        elif self.is_int4:
            more = self._call("pmadd.ub.sw", self.pairs, w, x)
        else:
            w, x = self._call("psign.b", self.bytes, w, w), self._call("psign.b", self.bytes, x, w)
            more = self._add_pairs(self._call("pmadd.ub.sw", self.pairs, w, x))
        return more if total is None else b.add(total, more)

    def result(self, total: Value) -> Value:
        """The sums as int32."""
        return self._add_pairs(total) if total.type == self.pairs else total

    def _signed_dot(self, total: Value, w: Value, x: Value) -> Value:
        """ARM's instruction, whose vectors have four lanes."""
        b, name = self.b, "llvm.aarch64.neon.sdot.v4i32.v16i8"
        sums = [
            call_instruction(
                b,
                name,
                vector(i32, 4),
                *[part(b, v, self.ints.count // 4, i) for v in (total, w, x)],
            )
            for i in range(self.ints.count // 4)
        ]
        return join(b, sums)

    def _call(self, name: str, returns: ir.Type, *operands: Value) -> Value:
        return call_instruction(self.b, f"llvm.x86.avx2.{name}", returns, *operands)

    def _add_pairs(self, pairs: Value) -> Value:
        return self._call("pmadd.wd", self.ints, pairs, splat(self.pairs, 1))

    def _add_quads(self, products: Value) -> Value:
        """int16 products -> the sums of four neighbours."""
        b, count = self.b, products.type.count
        wide = b.sext(products, vector(i32, count))
        every_fourth = [
            b.shuffle_vector(wide, wide, ir.Constant(self.ints, list(range(first, count, 4))))
            for first in range(4)
        ]
        return functools.reduce(b.add, every_fourth)


class _Tile:
    """Writes the code of a tile with `rows` rows of weights and `n` rows of activations."""

    def __init__(
        self, b: Builder, kind: str, isa: str, rows: int, n: int, operands: list[Value]
    ) -> None:
        k, x, steps, self.group_rows, w, scales, out, self.out_step = operands
        pointer = i8.as_pointer()
        self.b, self.n, self.is_int4, self.lanes = b, n, kind == "int4", rows
        self.offset = offset(kind, isa)
        self.x, self.steps = b.inttoptr(x, pointer), b.inttoptr(steps, pointer)
        self.w, self.scales = b.inttoptr(w, pointer), b.inttoptr(scales, pointer)
        self.out = b.inttoptr(out, pointer)
        self.groups = b.udiv(k, ir.Constant(i64, GROUP))
        self.integers = Integers(b, isa, rows, self.is_int4)
        self.group_bytes = LANES * GROUP // (2 if self.is_int4 else 1)  # of eight rows
        self.eights = [mul_const(b, self.groups, i) for i in range(rows // LANES)]  # in groups

    def write(self) -> None:
        b = self.b
        floats = vector(f32, self.lanes)
        totals = [cgutils.alloca_once_value(b, splat(floats, 0)) for _ in range(self.n)]
        with cgutils.for_range(b, self.groups) as loop:
            sums = self._sums(loop.index)
            scale = self._scales(loop.index) if self.is_int4 else None
            step_place = mul_const(b, b.mul(loop.index, self.group_rows), 8)
            for i, (total, integers) in enumerate(zip(totals, sums, strict=True)):
                place = add_const(b, step_place, 8 * i)
                if self.offset:
                    correction = load_at(b, i32, self.steps, add_const(b, place, 4))
                    integers = b.add(integers, broadcast(b, correction, self.lanes))
                factor = broadcast(b, load_at(b, f32, self.steps, place), self.lanes)
                if scale is not None:
                    factor = b.fmul(factor, scale)
                more = multiply_add(b, b.sitofp(integers, floats), factor, b.load(total))
                b.store(more, total)
        scale = None if self.is_int4 else load_at(b, floats, self.scales, ir.Constant(i64, 0))
        for i, total in enumerate(totals):
            result = b.load(total) if scale is None else b.fmul(b.load(total), scale)
            to = b.gep(self.out, [mul_const(b, self.out_step, i)])
            b.store(result, b.bitcast(to, floats.as_pointer()), align=4)

    def _sums(self, group: Value) -> list[Value]:
        """The integer sums of a group, for each row of x."""
        b = self.b
        for eight in self.eights:
            start = mul_const(b, b.add(eight, group), self.group_bytes)
            for line in range(0, self.group_bytes, LINE):
                prefetch(b, self.w, add_const(b, start, PREFETCH + line))
        x = b.gep(self.x, [mul_const(b, b.mul(group, self.group_rows), GROUP)])
        sums: list[Any] = [None] * self.n
        for quad, w in self._weights(group):
            for i in range(self.n):
                four = load_at(b, i32, x, ir.Constant(i64, GROUP * i + QUAD * quad))
                quads = b.bitcast(broadcast(b, four, self.lanes), self.integers.bytes)
                sums[i] = self.integers.add(sums[i], w, quads)
        return [self.integers.result(total) for total in sums]

    def _weights(self, group: Value) -> Iterator[tuple[int, Value]]:
        """The index of each quad of a group, and its vector: four weights of each row."""
        b = self.b
        bytes_ = self.integers.bytes
        for place in range(self.group_bytes // EIGHT_QUADS):
            w = self._load(
                self.w, group, self.group_bytes, EIGHT_QUADS * place, vector(i8, EIGHT_QUADS)
            )
            if self.is_int4:
                yield place, b.and_(w, splat(bytes_, 15))
                yield place + QUADS // 2, b.lshr(w, splat(bytes_, 4))
            else:
                yield place, b.xor(w, splat(bytes_, 128)) if self.offset else w

    def _scales(self, group: Value) -> Value:
        halves = self._load(self.scales, group, 2 * LANES, 0, vector(i16, LANES))
        return widen(self.b, halves)

    def _load(self, base: Value, group: Value, size: int, place: int, kind: ir.VectorType) -> Value:
        """The vectors of all eights of rows, joined. size: bytes of a group of eight rows."""
        b = self.b
        offsets = [mul_const(b, b.add(eight, group), size) for eight in self.eights]
        return join(b, [load_at(b, kind, base, add_const(b, at, place)) for at in offsets])


@intrinsic(prefer_literal=True)
def byte_tile(
    context: Any, kind: Any, isa: Any, rows: Any, n: Any, k: Any, x: Any, steps: Any,
    group_rows: Any, w: Any, scales: Any, out: Any, out_step: Any,
) -> tuple[Any, Callable[..., Value]]:  # fmt: skip
    """out[i, r] = row r of the weights times row i of x.

    kind: "int8" or "int4". isa: see `ISAS`. All others are int64. x, steps, w, scales and out are
    addresses. rows: 8 or the instruction set's lanes. n: 1, 2, 4 or 8. k: a row's length.
    group_rows: rows of x that lie together; see `activations.py`. out_step: bytes from one row of
    results to the next.
    """
    numbers = (rows, n, k, x, steps, group_rows, w, scales, out, out_step)
    signature = types.void(kind, isa, *[types.int64] * len(numbers))
    names = kind.literal_value, isa.literal_value

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        rows, n, *others = operands[2:]
        made_for = ISAS[names[1]]
        counts = [count for count in (1, 2, 4, 8) if count <= made_for.byte_inputs]
        sizes = set(product((LANES, made_for.lanes), counts))

        def write(rows: int, n: int) -> None:
            _Tile(b, *names, rows, n, others).write()

        for_size(b, rows, n, sizes, write)
        return context.get_dummy_value()

    return signature, generate
