"""LLVM instructions that the kernels are made of: vectors, addresses, and counters.

The functions without a decorator write instructions into a builder. The intrinsics are called from
code that numba compiles.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from llvmlite.ir import Value
from numba.core import types
from numba.extending import intrinsic

i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
f32 = ir.FloatType()
LINE = 64  # bytes of a cache line
LETTERS = {f32: "f32", i16: "i16"}  # of types in the names of LLVM's instructions


def vector(kind: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(kind, lanes)


def splat(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def call_instruction(b: Builder, name: str, returns: ir.Type, *operands: Value) -> Value:
    function = b.module.globals.get(name) or ir.Function(
        b.module, ir.FunctionType(returns, [operand.type for operand in operands]), name
    )
    return b.call(function, operands)


def load_at(b: Builder, kind: ir.Type, base: Value, offset: Value) -> Value:
    address = b.bitcast(b.gep(base, [offset]), kind.as_pointer())
    return b.load(address, align=1)


def load_first(b: Builder, kind: ir.VectorType, base: Value, offset: Value, count: Value) -> Value:
    """Load the first `count` numbers of a vector. The others are zero, and are not read."""
    lanes = vector(i64, kind.count)
    numbers = ir.Constant(lanes, list(range(kind.count)))
    mask = b.icmp_unsigned("<", numbers, broadcast(b, count, kind.count))
    address = b.bitcast(b.gep(base, [offset]), kind.as_pointer())
    name = f"llvm.masked.load.v{kind.count}{LETTERS[kind.element]}.p0"
    align = ir.Constant(i32, 1)
    return call_instruction(b, name, kind, address, align, mask, splat(kind, 0))


def prefetch(b: Builder, base: Value, offset: Value) -> None:
    """Prefetch a cache line. The processor itself prefetches only to the end of a page."""
    address = b.gep(base, [offset])
    read, keep, data = (ir.Constant(i32, number) for number in (0, 3, 1))
    call_instruction(b, "llvm.prefetch.p0", ir.VoidType(), address, read, keep, data)


def mul_const(b: Builder, number: Value, factor: int) -> Value:
    return b.mul(number, ir.Constant(i64, factor))


def add_const(b: Builder, number: Value, term: int) -> Value:
    return b.add(number, ir.Constant(i64, term))


def broadcast(b: Builder, scalar: Value, lanes: int) -> Value:
    """A vector whose lanes all hold the number."""
    undefined = ir.Constant(vector(scalar.type, lanes), ir.Undefined)
    one = b.insert_element(undefined, scalar, ir.Constant(i32, 0))
    return b.shuffle_vector(one, one, splat(vector(i32, lanes), 0))


def join(b: Builder, vectors: list[Value]) -> Value:
    """One vector, or the lanes of two vectors one after the other."""
    if len(vectors) == 1:
        return vectors[0]
    lanes = 2 * vectors[0].type.count
    return b.shuffle_vector(*vectors, ir.Constant(vector(i32, lanes), list(range(lanes))))


def part(b: Builder, whole: Value, parts: int, number: int) -> Value:
    """One of several equal parts of a vector."""
    lanes = whole.type.count // parts
    numbers = list(range(lanes * number, lanes * (number + 1)))
    return b.shuffle_vector(whole, whole, ir.Constant(vector(i32, lanes), numbers))


def widen(b: Builder, halves: Value) -> Value:
    """A vector of bfloat16 -> float32. A bfloat16 is the upper half of a float32."""
    lanes = halves.type.count
    wide = vector(i32, lanes)
    return b.bitcast(b.shl(b.zext(halves, wide), splat(wide, 16)), vector(f32, lanes))


def sum_each(b: Builder, vectors: list[Value]) -> Value:
    """A vector whose first lanes are the sums of the lanes of each vector. There are at most as
    many vectors as lanes.

    Each sum is added in the same order, whatever the other vectors are: the upper half of the lanes
    to the lower half, until one lane is left.
    """
    lanes = width = vectors[0].type.count
    if len(vectors) > 1:  # fill up to a power of two
        vectors = vectors + vectors[-1:] * ((1 << (len(vectors) - 1).bit_length()) - len(vectors))
    while width > 1:
        # A vector has parts of `width` lanes, each of which belongs to one sum. The halves of the
        # parts of two vectors are added. A single vector is added to itself.
        half = width // 2
        pairs = list(zip(vectors[::2], vectors[1::2] or vectors, strict=True))
        lower = [part + i for part in range(0, 2 * lanes, width) for i in range(half)]
        sides = [ir.Constant(vector(i32, lanes), [i + by for i in lower]) for by in (0, half)]
        vectors = [b.fadd(*[b.shuffle_vector(*pair, side) for side in sides]) for pair in pairs]
        width = half
    return vectors[0]


def multiply_add(b: Builder, x: Value, y: Value, total: Value) -> Value:
    """x * y + total, rounded once if the processor has FMA."""
    name = f"llvm.fmuladd.v{x.type.count}f32"
    return call_instruction(b, name, x.type, x, y, total)


def for_size(
    b: Builder,
    rows: Value,
    n: Value,
    sizes: set[tuple[int, int]],
    write: Callable[[int, int], None],
) -> None:
    """Call write(rows, n) for each size, and run the code that it writes for the actual one."""
    for size in sorted(sizes):
        is_rows, is_n = (
            b.icmp_signed("==", actual, ir.Constant(i64, number))
            for actual, number in zip((rows, n), size, strict=True)
        )
        with b.if_then(b.and_(is_rows, is_n)):
            write(*size)


@intrinsic
def fetch_add(context: Any, counter: Any) -> tuple[Any, Callable[..., Value]]:
    """Add one to the int64 at a pointer, atomically. Returns the old value."""

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        return b.atomic_rmw("add", operands[0], ir.Constant(i64, 1), "monotonic")

    return types.int64(counter), generate


@intrinsic
def pointer(context: Any, address: Any, number: Any) -> tuple[Any, Callable[..., Value]]:
    """An address as a pointer to numbers of a type such as np.float32."""
    kind = types.CPointer(number.dtype)

    def generate(context: Any, b: Builder, signature: Any, operands: list[Value]) -> Value:
        return b.inttoptr(operands[0], context.get_value_type(kind))

    return kind(types.int64, number), generate
