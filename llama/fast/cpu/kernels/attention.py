"""The two products of attention over a block of the cache, as LLVM instructions.

Keys and values are float32, or int8 that the caller scales. head_dim is a constant of the compiled
code, so that a key, or the sum of the values, stays in registers.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value
from numba.core import cgutils, types
from numba.extending import intrinsic

from llama.fast.cpu.kernels.instructions import (
    broadcast,
    f32,
    i8,
    i32,
    i64,
    multiply_add,
    prefetch,
    splat,
    sum_each,
    vector,
)

CHAINS = 8  # sums that hide the latency of a multiply-add


class _HeadVectors:
    """A head's features, as vectors of at most `most` lanes. The number of lanes divides
    head_dim."""

    def __init__(self, b: Builder, kind: str, head_dim: int, most: int) -> None:
        self.b = b
        self.lanes = math.gcd(head_dim, most)
        self.count = head_dim // self.lanes
        self.floats = vector(f32, self.lanes)
        self.cached = self.floats if kind == "float32" else vector(i8, self.lanes)

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

    def prefetch(self, address: Value, ahead: Value) -> None:
        """Prefetch the head `ahead` bytes after an address; 0: none."""
        with self.b.if_then(self.b.icmp_signed("!=", ahead, ir.Constant(i64, 0))):
            self._prefetch(self.b.add(address, ahead))

    def _prefetch(self, address: Value) -> None:
        size = self.count * self.lanes * (4 if self.cached is self.floats else 1)
        base = self.b.inttoptr(address, i8.as_pointer())
        for offset in range(0, size, 64):
            prefetch(self.b, base, ir.Constant(i64, offset))


def _float(b: Builder, address: Value, index: Value) -> Value:
    """The address of the float32 at an index."""
    return b.gep(b.inttoptr(address, f32.as_pointer()), [index])


@intrinsic(prefer_literal=True)
def score_keys(
    context: Any, kind: Any, head_dim: Any, lanes: Any, group: Any, queries: Any, count: Any,
    keys: Any, step: Any, ahead: Any, scores: Any, scores_step: Any,
) -> tuple[Any, Callable[..., Value]]:  # fmt: skip
    """scores[h, i] = query h times key i, for the `group` queries and the `count` keys.

    All but kind ("float32" or "int8"), head_dim and lanes are int64. step: bytes from key to key;
    ahead: from a key to the one that is prefetched, or 0; scores_step: from one query's scores to
    the next's. Keys are taken in blocks of as many as a vector has lanes, so that the scores of a
    block form one vector. Scores beyond `count`, up to the next multiple of the lanes, are
    overwritten.
    """
    signature = types.void(kind, head_dim, lanes, *[types.int64] * 8)
    names = kind.literal_value, head_dim.literal_value, lanes.literal_value

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        group, queries, count, keys, step, ahead, scores, scores_step = operands[3:]
        vectors = _HeadVectors(b, *names)
        lanes = ir.Constant(i64, vectors.lanes)
        last = b.sub(count, ir.Constant(i64, 1))
        with cgutils.for_range_slice(b, ir.Constant(i64, 0), count, lanes) as (first, _):
            places = []
            for i in range(vectors.lanes):
                place = b.add(first, ir.Constant(i64, i))
                place = b.select(b.icmp_signed("<", place, last), place, last)
                places.append(b.add(keys, b.mul(place, step)))
                vectors.prefetch(places[-1], ahead)
            with cgutils.for_range(b, group) as loop:
                query = vectors.load(
                    b.add(queries, b.mul(loop.index, ir.Constant(i64, 4 * names[1])))
                )
                sums = []
                for place in places:
                    key = vectors.load_cached(place)
                    total = b.fmul(query[0], key[0])
                    for x, y in zip(query[1:], key[1:], strict=True):
                        total = multiply_add(b, x, y, total)
                    sums.append(total)
                row = b.add(scores, b.mul(loop.index, scores_step))
                to = b.bitcast(_float(b, row, first), vectors.floats.as_pointer())
                b.store(sum_each(b, sums), to, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def add_values(
    context: Any, kind: Any, head_dim: Any, lanes: Any, weights: Any, count: Any, values: Any,
    step: Any, ahead: Any, out: Any,
) -> tuple[Any, Callable[..., Value]]:  # fmt: skip
    """out += the sum of weights[i] * value i, over the `count` values; see `score_keys`.

    If a head has few vectors, the values go in turn to several separate sums (two, four or eight),
    so that their additions overlap. These sums are added in the end.
    """
    signature = types.void(kind, head_dim, lanes, *[types.int64] * 6)
    names = kind.literal_value, head_dim.literal_value, lanes.literal_value

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        weights, count, values, step, ahead, out = operands[3:]
        vectors = _HeadVectors(b, *names)
        parts = max(1, CHAINS // vectors.count)
        zeros = [splat(vectors.floats, 0)] * vectors.count
        starts = [vectors.load(out)] + [zeros] * (parts - 1)
        sums = [[cgutils.alloca_once_value(b, start) for start in part] for part in starts]

        def add(i: Value, part: list[Value]) -> None:
            address = b.add(values, b.mul(i, step))
            vectors.prefetch(address, ahead)
            weight = broadcast(b, b.load(_float(b, weights, i)), vectors.lanes)
            for total, value in zip(part, vectors.load_cached(address), strict=True):
                b.store(multiply_add(b, weight, value, b.load(total)), total)

        whole = b.sub(count, b.srem(count, ir.Constant(i64, parts)))
        with cgutils.for_range_slice(b, ir.Constant(i64, 0), whole, ir.Constant(i64, parts)) as (
            i,
            _,
        ):
            for number, part in enumerate(sums):
                add(b.add(i, ir.Constant(i64, number)), part)
        for number, part in enumerate(sums[:-1]):
            i = b.add(whole, ir.Constant(i64, number))
            with b.if_then(b.icmp_signed("<", i, count)):
                add(i, part)
        for place, *totals in zip(vectors.at(out, vectors.floats), *sums, strict=True):
            b.store(functools.reduce(b.fadd, map(b.load, totals)), place, align=4)
        return context.get_dummy_value()

    return signature, generate
