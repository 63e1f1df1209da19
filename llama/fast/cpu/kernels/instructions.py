"""LLVM instructions that the kernels are made of: vectors of eight lanes, addresses, and counters.

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

from llama.fast.quantize import LANES

i8, i16, i32, i64, f32 = *(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType()
bytes32, shorts16 = ir.VectorType(i8, 32), ir.VectorType(i16, 16)
ints8, floats8 = ir.VectorType(i32, LANES), ir.VectorType(f32, LANES)


def splat(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def call_instruction(b: Builder, name: str, returns: ir.Type, *operands: Value) -> Value:
    function = b.module.globals.get(name) or ir.Function(
        b.module, ir.FunctionType(returns, [operand.type for operand in operands]), name
    )
    return b.call(function, operands)


def load_at(b: Builder, kind: ir.Type, base: Value, offset: Value) -> Value:
    address = b.bitcast(b.gep(base, [offset]), kind.as_pointer())
    return b.load(address, align=1)


def prefetch(b: Builder, base: Value, offset: Value) -> None:
    """Prefetch a cache line. The processor itself prefetches only to the end of a page."""
    address = b.gep(base, [offset])
    read, keep, data = (ir.Constant(i32, number) for number in (0, 3, 1))
    call_instruction(b, "llvm.prefetch.p0", ir.VoidType(), address, read, keep, data)


def mul_const(b: Builder, number: Value, factor: int) -> Value:
    return b.mul(number, ir.Constant(i64, factor))


def add_const(b: Builder, number: Value, term: int) -> Value:
    return b.add(number, ir.Constant(i64, term))


def broadcast(b: Builder, scalar: Value) -> Value:
    """A vector whose eight lanes all hold the number."""
    lanes = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    one = b.insert_element(lanes, scalar, ir.Constant(i32, 0))
    return b.shuffle_vector(one, one, splat(ints8, 0))


def widen(b: Builder, halves: Value) -> Value:
    """One or eight bfloat16 -> float32. A bfloat16 is the upper half of a float32."""
    wide = ints8 if isinstance(halves.type, ir.VectorType) else i32
    shift = splat(wide, 16) if wide is ints8 else ir.Constant(i32, 16)
    return b.bitcast(b.shl(b.zext(halves, wide), shift), floats8 if wide is ints8 else f32)


def sum_lanes(b: Builder, lanes: Value) -> Value:
    """The sum of eight lanes, always in the same order."""
    half = LANES // 2
    while half:
        order = ir.Constant(ints8, [*range(half, 2 * half), *[0] * (LANES - half)])
        lanes = b.fadd(lanes, b.shuffle_vector(lanes, lanes, order))
        half //= 2
    return b.extract_element(lanes, ir.Constant(i32, 0))


def multiply_add(b: Builder, a: Value, c: Value, total: Value) -> Value:
    """total += a * c, where `total` is an alloca; rounded once if the processor has FMA."""
    kind = a.type
    name = "llvm.fmuladd.v8f32" if kind == floats8 else "llvm.fmuladd.f32"
    b.store(call_instruction(b, name, kind, a, c, b.load(total)), total)


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
