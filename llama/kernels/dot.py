"""Dot products of one row of weights with rows of activations, as LLVM instructions.

Every format sums in float32 over two chains of eight lanes, whatever the number of rows, so that a
row's result does not depend, to the last bit, on the rows beside it. Integers are exact within a
group of 32. Numba turns Python loops into such code only by luck: integer products become 64 bits
wide there.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 8
GROUP = 32
AHEAD = 2048  # bytes

i8, i32, i64, f32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
bytes32 = ir.VectorType(i8, 32)
shorts16 = ir.VectorType(ir.IntType(16), 16)
ints8, floats8 = ir.VectorType(i32, LANES), ir.VectorType(f32, LANES)


def _splat(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _instruction(b: Builder, name: str, returns: ir.Type, *operands: Value) -> Value:
    function = b.module.globals.get(name) or ir.Function(
        b.module, ir.FunctionType(returns, [operand.type for operand in operands]), name
    )
    return b.call(function, operands)


def _load(b: Builder, kind: ir.Type, base: Value, offset: Value) -> Value:
    address = b.bitcast(b.gep(base, [offset]), kind.as_pointer())
    return b.load(address, align=1)


def _prefetch(b: Builder, base: Value, offset: Value) -> None:
    """Ask for memory early: the processor by itself looks ahead to the end of a page at most."""
    address = b.gep(base, [offset])
    read, keep, data = (ir.Constant(i32, number) for number in (0, 3, 1))
    _instruction(b, "llvm.prefetch.p0", ir.VoidType(), address, read, keep, data)


def _times(b: Builder, number: Value, factor: int) -> Value:
    return b.mul(number, ir.Constant(i64, factor))


def _plus(b: Builder, number: Value, term: int) -> Value:
    return b.add(number, ir.Constant(i64, term))


def _fill(b: Builder, scalar: Value) -> Value:
    """Eight lanes of one number."""
    lanes = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    one = b.insert_element(lanes, scalar, ir.Constant(i32, 0))
    return b.shuffle_vector(one, one, _splat(ints8, 0))


def _widen(b: Builder, halves: Value) -> Value:
    """bfloat16 is the upper half of a float32: eight of them, or one."""
    wide = ints8 if isinstance(halves.type, ir.VectorType) else i32
    shift = _splat(wide, 16) if wide is ints8 else ir.Constant(i32, 16)
    return b.bitcast(b.shl(b.zext(halves, wide), shift), floats8 if wide is ints8 else f32)


def _sum(b: Builder, lanes: Value) -> Value:
    """The sum of eight lanes, always in the same order."""
    half = LANES // 2
    while half:
        order = ir.Constant(ints8, [*range(half, 2 * half), *[0] * (LANES - half)])
        lanes = b.fadd(lanes, b.shuffle_vector(lanes, lanes, order))
        half //= 2
    return b.extract_element(lanes, ir.Constant(i32, 0))


def _multiply_add(b: Builder, a: Value, c: Value, total: Value) -> Value:
    """total += a * c, for an alloca; one rounding where the processor can."""
    kind = a.type
    name = "llvm.fmuladd.v8f32" if kind == floats8 else "llvm.fmuladd.f32"
    b.store(_instruction(b, name, kind, a, c, b.load(total)), total)


def dot_bytes(b: Builder, isa: str, w: Value, x: Value) -> Value:
    """32 products of int8, exact, added up in eight int32; x is never -128.

    The instructions take unsigned times signed bytes: the weights give their signs to x. A pair of
    products is then at most 2 * 128 * 127 = 32512, and pmaddubsw, which adds pairs in 16 bits,
    cannot saturate.
    """
    if isa == "plain":
        wide = ir.VectorType(i32, GROUP)
        products = b.mul(b.sext(w, wide), b.sext(x, wide))
        quarters = [
            b.shuffle_vector(products, products, ir.Constant(ints8, [*range(first, first + LANES)]))
            for first in range(0, GROUP, LANES)
        ]
        return functools.reduce(b.add, quarters)
    x = _instruction(b, "llvm.x86.avx2.psign.b", bytes32, x, w)
    w = _instruction(b, "llvm.x86.avx2.psign.b", bytes32, w, w)
    if isa == "vnni":
        return _instruction(b, "llvm.x86.avx512.vpdpbusd.256", ints8, _splat(ints8, 0), w, x)
    pairs = _instruction(b, "llvm.x86.avx2.pmadd.ub.sw", shorts16, w, x)
    return _instruction(b, "llvm.x86.avx2.pmadd.wd", ints8, pairs, _splat(shorts16, 1))


class _Rows:
    """Code for `n` rows of activations at addresses that the job gives."""

    def __init__(self, b: Builder, isa: str, n: int, operands: list[Value]) -> None:
        first, self.k, x, steps, w, scales, out, out_step = operands
        pointer = i8.as_pointer()
        self.b, self.isa, self.n = b, isa, n
        self.w, self.scales = b.inttoptr(w, pointer), b.inttoptr(scales, pointer)
        self.x, self.steps = b.inttoptr(x, pointer), b.inttoptr(steps, pointer)
        self.rows = [_plus(b, first, i) for i in range(n)]
        self.chains = [
            [cgutils.alloca_once_value(b, _splat(floats8, 0.0)) for _ in range(2)] for _ in range(n)
        ]
        self.rest = [cgutils.alloca_once_value(b, ir.Constant(f32, 0.0)) for _ in range(n)]
        self.out = b.inttoptr(out, pointer)
        self.out_step = out_step

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        with cgutils.for_range(self.b, count) as loop:
            yield loop.index

    def floats(self, width: int) -> None:
        """x float32; w float32 or bfloat16, by its width in bytes. Any K."""
        b = self.b
        half = ir.VectorType(ir.IntType(16), LANES)

        def weights(kind: ir.Type, half: ir.Type, i: Value) -> Value:
            if width == 4:
                return _load(b, kind, self.w, _times(b, i, 4))
            return _widen(b, _load(b, half, self.w, _times(b, i, 2)))

        starts = [b.mul(_times(b, row, 4), self.k) for row in self.rows]
        with self.loop(b.udiv(self.k, ir.Constant(i64, 2 * LANES))) as index:
            _prefetch(b, self.w, _plus(b, _times(b, index, 2 * LANES * width), AHEAD))
            for chain in range(2):
                i = _plus(b, _times(b, index, 2 * LANES), chain * LANES)
                w = weights(floats8, half, i)
                for row, start in enumerate(starts):
                    x = _load(b, floats8, self.x, b.add(start, _times(b, i, 4)))
                    _multiply_add(b, w, x, self.chains[row][chain])
        left = b.urem(self.k, ir.Constant(i64, 2 * LANES))
        with self.loop(left) as index:
            i = b.add(b.sub(self.k, left), index)
            w = weights(f32, ir.IntType(16), i)
            for row, start in enumerate(starts):
                x = _load(b, f32, self.x, b.add(start, _times(b, i, 4)))
                _multiply_add(b, w, x, self.rest[row])
        self._store(None)

    def int8(self) -> None:
        """x in groups of int8; w int8 with a scale a row. K in 32s."""
        b = self.b
        with self.loop(b.udiv(self.k, ir.Constant(i64, GROUP))) as group:
            _prefetch(b, self.w, _plus(b, _times(b, group, GROUP), AHEAD))
            w = _load(b, bytes32, self.w, _times(b, group, GROUP))
            for row in range(self.n):
                x, step = self._activations(row, group)
                products = b.sitofp(dot_bytes(b, self.isa, w, x), floats8)
                _multiply_add(b, products, _fill(b, step), self.chains[row][0])
        self._store(_load(b, f32, self.scales, ir.Constant(i64, 0)))

    def int4(self) -> None:
        """x in groups of int8; w two groups of 4 bits in 32 bytes, a scale each. K in 64s."""
        b = self.b
        with self.loop(b.udiv(self.k, ir.Constant(i64, 2 * GROUP))) as pair:
            _prefetch(b, self.w, _plus(b, _times(b, pair, GROUP), AHEAD))
            packed = _load(b, bytes32, self.w, _times(b, pair, GROUP))
            scales = _fill(b, _load(b, i32, self.scales, _times(b, pair, 4)))  # two bfloat16
            low = b.and_(packed, _splat(bytes32, 15)), b.shl(scales, _splat(ints8, 16))
            high = b.lshr(packed, _splat(bytes32, 4)), b.and_(scales, _splat(ints8, 0xFFFF0000))
            for chain, (nibbles, scale) in enumerate((low, high)):
                w = b.sub(nibbles, _splat(bytes32, 8))
                group = _plus(b, _times(b, pair, 2), chain)
                for row in range(self.n):
                    x, step = self._activations(row, group)
                    factor = b.fmul(b.bitcast(scale, floats8), _fill(b, step))
                    products = b.sitofp(dot_bytes(b, self.isa, w, x), floats8)
                    _multiply_add(b, products, factor, self.chains[row][chain])
        self._store(None)

    def _activations(self, row: int, group: Value) -> tuple[Value, Value]:
        """A group's 32 bytes, and the size of their step."""
        b = self.b
        groups = b.udiv(self.k, ir.Constant(i64, GROUP))
        number = b.add(b.mul(self.rows[row], groups), group)
        x = _load(b, bytes32, self.x, _times(b, number, GROUP))
        return x, _load(b, f32, self.steps, _times(b, number, 4))

    def _store(self, scale: Value | None) -> None:
        b = self.b
        for row, (chains, rest) in enumerate(zip(self.chains, self.rest, strict=True)):
            total = b.fadd(_sum(b, b.fadd(*map(b.load, chains))), b.load(rest))
            if scale is not None:
                total = b.fmul(total, scale)
            address = b.gep(self.out, [b.mul(self.rows[row], self.out_step)])
            b.store(total, b.bitcast(address, f32.as_pointer()), align=4)


@intrinsic(prefer_literal=True)
def dot(
    context: Any, kind: Any, isa: Any, n: Any, first: Any, k: Any, x: Any, steps: Any, w: Any,
    scales: Any, out: Any, out_step: Any,
) -> tuple[Any, Callable[..., Value]]:  # fmt: skip
    """out[r] = the row of weights times row r of x, for the n rows from `first` on.

    kind: "float32", "bfloat16", "int8" or "int4"; isa: see `instruction_sets`; all others int64,
    mostly addresses. out_step: bytes from one row's result to the next's.
    """
    numbers = (first, k, x, steps, w, scales, out, out_step)
    signature = types.void(kind, isa, n, *[types.int64] * len(numbers))

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        rows = _Rows(b, isa.literal_value, n.literal_value, operands[3:])
        match kind.literal_value:
            case "float32":
                rows.floats(4)
            case "bfloat16":
                rows.floats(2)
            case "int8":
                rows.int8()
            case "int4":
                rows.int4()
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def take(context: Any, counter: Any) -> tuple[Any, Callable[..., Value]]:
    """What an int64 behind a pointer was; it is now one more, also between threads."""

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        return b.atomic_rmw("add", operands[0], ir.Constant(i64, 1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def pointer(context: Any, address: Any, number: Any) -> tuple[Any, Callable[..., Value]]:
    """An address as a pointer to numbers of a type, as np.float32."""
    kind = types.CPointer(number.dtype)

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        return b.inttoptr(operands[0], context.get_value_type(kind))

    return kind(types.int64, number), generate
