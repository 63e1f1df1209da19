"""The two products of attention over a block of the cache, as LLVM instructions.

Keys and values are float32, or int8 that the caller scales. head_dim is a constant of the compiled
code, so that a key, or the sum of the values, stays in registers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value
from numba.core import cgutils, types
from numba.extending import intrinsic

MAX_LANES = 16
PREFETCH = 8  # positions ahead; the processor does not prefetch over such distances itself

i8, i32, i64, f32 = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
ANY_ORDER = ("reassoc", "contract", "nsz")


class _HeadVectors:
    """A head's features, as vectors of at most 16 lanes. The number of lanes divides head_dim."""

    def __init__(self, b: Builder, kind: str, head_dim: int) -> None:
        self.b = b
        self.lanes = math.gcd(head_dim, MAX_LANES)
        self.count = head_dim // self.lanes
        self.floats = ir.VectorType(f32, self.lanes)
        self.cached = self.floats if kind == "float32" else ir.VectorType(i8, self.lanes)

    def at(self, address: Value, kind: ir.VectorType) -> list[Value]:
        """Pointers to the vectors of the head at an address."""
        first = self.b.inttoptr(address, kind.as_pointer())
        return [self.b.gep(first, [ir.Constant(i32, i)]) for i in range(self.count)]

    def load(self, address: Value) -> list[Value]:
        return [self.b.load(place, align=4) for place in self.at(address, self.floats)]

    def load_cached(self, address: Value) -> list[Value]:
        """Keys or values, as float32."""
        vectors = [self.b.load(place, align=1) for place in self.at(address, self.cached)]
        if self.cached is self.floats:
            return vectors
        return [self.b.sitofp(vector, self.floats) for vector in vectors]

    def prefetch(self, address: Value) -> None:
        bits = 32 if self.cached is self.floats else 8
        bytes_ = self.count * self.lanes * bits // 8
        read, keep, data = (ir.Constant(i32, number) for number in (0, 3, 1))
        for offset in range(0, bytes_, 64):
            line = self.b.inttoptr(self.b.add(address, ir.Constant(i64, offset)), i8.as_pointer())
            self.call("llvm.prefetch.p0", ir.VoidType(), line, read, keep, data)

    def call(self, name: str, returns: ir.Type, *operands: Value, **options: Any) -> Value:
        kind = ir.FunctionType(returns, [operand.type for operand in operands])
        function = self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name)
        return self.b.call(function, operands, **options)

    def multiply_add(self, x: Value, y: Value, total: Value) -> Value:
        return self.call(f"llvm.fmuladd.v{self.lanes}f32", self.floats, x, y, total)

    def sum(self, lanes: Value) -> Value:
        name = f"llvm.vector.reduce.fadd.v{self.lanes}f32"
        return self.call(name, f32, ir.Constant(f32, 0.0), lanes, fastmath=ANY_ORDER)

    def fill(self, scalar: Value) -> Value:
        one = self.b.insert_element(
            ir.Constant(self.floats, ir.Undefined), scalar, ir.Constant(i32, 0)
        )
        lanes = ir.VectorType(i32, self.lanes)
        return self.b.shuffle_vector(one, one, ir.Constant(lanes, [0] * self.lanes))

    @contextmanager
    def loop(self, count: Value, address: Value, step: Value) -> Iterator[tuple[Value, Value]]:
        """Loop over positions, with their index and address. Later positions are prefetched."""
        with cgutils.for_range(self.b, count) as loop:
            here = self.b.add(address, self.b.mul(loop.index, step))
            self.prefetch(self.b.add(here, self.b.mul(step, ir.Constant(i64, PREFETCH))))
            yield loop.index, here


def _float(b: Builder, address: Value, index: Value) -> Value:
    """The address of the float32 at an index."""
    return b.gep(b.inttoptr(address, f32.as_pointer()), [index])


@intrinsic(prefer_literal=True)
def score_keys(
    context: Any, kind: Any, head_dim: Any, group: Any, queries: Any, count: Any, keys: Any,
    step: Any, scores: Any, scores_step: Any,
) -> tuple[Any, Callable[..., Value]]:  # fmt: skip
    """scores[h, i] = query h times key i, for the `group` queries and the `count` keys.

    All but kind ("float32" or "int8") and head_dim are int64. step: bytes from key to key;
    scores_step: from one query's scores to the next's.
    """
    signature = types.void(kind, head_dim, *[types.int64] * 7)

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        group, queries, count, keys, step, scores, scores_step = operands[2:]
        vectors = _HeadVectors(b, kind.literal_value, head_dim.literal_value)
        query_bytes = ir.Constant(i64, 4 * head_dim.literal_value)
        with vectors.loop(count, keys, step) as (i, address):
            key = vectors.load_cached(address)
            with cgutils.for_range(b, group) as loop:
                query = vectors.load(b.add(queries, b.mul(loop.index, query_bytes)))
                total = b.fmul(query[0], key[0])
                for x, y in zip(query[1:], key[1:], strict=True):
                    total = vectors.multiply_add(x, y, total)
                row = b.add(scores, b.mul(loop.index, scores_step))
                b.store(vectors.sum(total), _float(b, row, i))
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def add_values(
    context: Any, kind: Any, head_dim: Any, weights: Any, count: Any, values: Any, step: Any,
    out: Any,
) -> tuple[Any, Callable[..., Value]]:  # fmt: skip
    """out += the sum of weights[i] * value i, over the `count` values; see `score_keys`."""
    signature = types.void(kind, head_dim, *[types.int64] * 5)

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        weights, count, values, step, out = operands[2:]
        vectors = _HeadVectors(b, kind.literal_value, head_dim.literal_value)
        totals = [cgutils.alloca_once_value(b, vector) for vector in vectors.load(out)]
        with vectors.loop(count, values, step) as (i, address):
            weight = vectors.fill(b.load(_float(b, weights, i)))
            for total, value in zip(totals, vectors.load_cached(address), strict=True):
                b.store(vectors.multiply_add(weight, value, b.load(total)), total)
        for total, place in zip(totals, vectors.at(out, vectors.floats), strict=True):
            b.store(b.load(total), place, align=4)
        return context.get_dummy_value()

    return signature, generate
