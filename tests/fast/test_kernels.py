"""The kernels equal float64 sums and exact integers, and a row does not depend on other rows."""

import subprocess
import sys

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from llama.errors import ConfigError
from llama.fast import quantize
from llama.fast.cpu.kernels import byte_tile, float_tile
from llama.fast.cpu.kernels.isa import ISAS, instruction_sets
from llama.fast.cpu.kernels.product import Product, Weight, linear

FORMATS = {
    "float32": lambda w: w,
    "bfloat16": lambda w: w.bfloat16(),
    "int8": quantize.quantize_int8,
    "int4": quantize.quantize_int4,
}
CASES = [(kind, isa) for kind in FORMATS for isa in instruction_sets()]
# The error of a float32 sum in 16 lanes, relative to the sum of the products' absolute values.
BOUND = 1e-6


def matrix(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def exact(weight: Weight) -> Tensor:
    return (weight if isinstance(weight, Tensor) else quantize.dequantize(weight)).double()


def as_read(x: Tensor, weight: Weight, isa: str) -> Tensor:
    """The activations after the rounding that a product with this weight makes, as float64."""
    if isinstance(weight, Tensor):
        is_rounded = weight.dtype == torch.bfloat16 and ISAS[isa].has_pairs
        return (x.bfloat16() if is_rounded else x).double()
    groups = x.unflatten(1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / step).round().double() * step).flatten(1)


def check(out: Tensor, x: Tensor, weight: Weight, isa: str) -> None:
    assert out.shape == (len(x), weight.shape[0])
    x64, w64 = as_read(x, weight, isa), exact(weight)
    assert ((out - x64 @ w64.T).abs() <= BOUND * (x64.abs() @ w64.abs().T)).all()


@pytest.mark.parametrize(("kind", "isa"), CASES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 11])
def test_product_equals_float64(kind: str, isa: str, n: int) -> None:
    weight = FORMATS[kind](matrix(37, 192))
    x = matrix(n, 192, seed=1)
    check(linear(x, weight, isa=isa), x, weight, isa)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 7, 15, 16, 17, 77])
def test_floats_of_any_width(kind: str, k: int) -> None:
    weight, x = FORMATS[kind](matrix(5, k)), matrix(5, k, seed=1)
    check(linear(x, weight), x, weight, instruction_sets()[0])


@pytest.mark.parametrize("k", [32, 96])
def test_bytes_need_no_more_than_whole_groups(k: int) -> None:
    for kind in ("int8", "int4"):
        weight, x = FORMATS[kind](matrix(5, k)), matrix(5, k, seed=1)
        check(linear(x, weight), x, weight, instruction_sets()[0])


@pytest.mark.parametrize(("kind", "isa"), CASES)
def test_several_matrices_in_one_pass(kind: str, isa: str) -> None:
    weights = [FORMATS[kind](matrix(n, 128, seed=n)) for n in (48, 16, 24)]
    x = matrix(3, 128)
    out = Product(*weights, isa=isa)(x)
    alone = [linear(x, weight, isa=isa) for weight in weights]
    assert torch.equal(out, torch.cat(alone, 1))


@pytest.mark.parametrize(("kind", "isa"), CASES)
def test_swiglu(kind: str, isa: str) -> None:
    w1, w3 = (FORMATS[kind](matrix(104, 128, seed=s)) for s in (1, 2))
    x = matrix(5, 128)
    gate, up = linear(x, w1, isa=isa), linear(x, w3, isa=isa)
    torch.testing.assert_close(Product(w1, w3, swiglu=True, isa=isa)(x), F.silu(gate) * up)


@pytest.mark.parametrize(("kind", "isa"), CASES)
def test_biases(kind: str, isa: str) -> None:
    """Of several matrices, whose rows may be padded to eights in bytes, and of SwiGLU's two."""
    weights = [FORMATS[kind](matrix(n, 128, seed=n)) for n in (37, 16)]
    biases, x = [matrix(1, 37)[0], matrix(1, 16)[0].bfloat16()], matrix(5, 128)
    out = Product(*weights, biases=biases, isa=isa)(x)
    want = [linear(x, weight, isa=isa) for weight in weights]
    for product, bias in zip(want, biases, strict=True):
        product[:, : len(bias)] += bias.float()
    assert torch.equal(out, torch.cat(want, 1))

    w1, w3 = (FORMATS[kind](matrix(104, 128, seed=s)) for s in (1, 2))
    biases = [matrix(1, 104, seed=s)[0] for s in (3, 4)]
    pairs = zip((w1, w3), biases, strict=True)
    gate, up = (linear(x, weight, isa=isa) + bias for weight, bias in pairs)
    got = Product(w1, w3, biases=biases, swiglu=True, isa=isa)(x)
    torch.testing.assert_close(got, F.silu(gate) * up)


@pytest.mark.parametrize(("kind", "isa"), CASES)
def test_a_row_does_not_depend_on_its_company(kind: str, isa: str) -> None:
    product = Product(FORMATS[kind](matrix(37, 320)), isa=isa)
    x = matrix(7, 320)
    together = product(x)
    for row in range(7):
        assert torch.equal(product(x[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("kind", FORMATS)
def test_nor_on_the_number_of_threads(kind: str) -> None:
    product, x = Product(FORMATS[kind](matrix(333, 128))), matrix(2, 128)
    before = torch.get_num_threads()
    results = []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        results.append(product(x))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_are_exact(kind: str, isa: str) -> None:
    rng = np.random.default_rng(0)
    k = 128
    x = rng.integers(-127, 128, (6, k), dtype=np.int32)
    x[:, ::32] = 127  # so that the scale of each group is exactly one
    x[0], x[1] = 127, -127  # with the extreme weights these could overflow
    least, most = (-128, 127) if kind == "int8" else (-8, 7)
    w = rng.integers(least, most + 1, (9, k), dtype=np.int32)
    w[0], w[1] = least, most
    rows = torch.from_numpy(np.pad(w, ((0, 7), (0, 0)))).view(2, 8, k // 32, 2, 4, 4)
    rows = rows.permute(0, 2, 3, 4, 1, 5)  # (eight, group, half, quad, row, 4)
    if kind == "int8":
        weight: Weight = quantize.Int8Weight(
            rows.to(torch.int8).reshape(2, -1, 8, 4).contiguous(), torch.ones(16)
        )
    else:
        low, high = (rows + 8).to(torch.uint8).unbind(2)
        scales = torch.ones(2, k // 32, 8, dtype=torch.bfloat16)
        weight = quantize.Int4Weight((low | high << 4).flatten(2), scales)
    out = linear(torch.from_numpy(x).float(), weight, isa=isa)
    assert np.array_equal(out[:, :9].numpy().astype(np.int32), x @ w.T)


def test_bfloat16_activations() -> None:
    weight, x = matrix(20, 64), matrix(2, 64, seed=1).bfloat16()
    out = linear(x, weight)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, linear(x.float(), weight).bfloat16())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(kind: str, bad: float) -> None:
    x = matrix(2, 64)
    x[1, 40] = bad
    out = linear(x, FORMATS[kind](matrix(5, 64)))
    assert out[0].isfinite().all()
    assert not out[1, :5].isfinite().any()


def test_no_activation_is_no_rows_and_zeros_are_zeros() -> None:
    weight = quantize.quantize_int4(matrix(5, 64))
    assert linear(torch.empty(0, 64), weight).shape == (0, 8)
    assert not linear(torch.zeros(2, 64), weight).any()


def test_refusals() -> None:
    w = matrix(4, 64)
    with pytest.raises(ConfigError, match=r"x must be .* \(n, 64\) on the CPU, not .* \(2, 32\)"):
        linear(matrix(2, 32), w)
    with pytest.raises(ConfigError, match=r"must be float32 or bfloat16 \(N, K\), not .*float64"):
        linear(matrix(2, 64), w.double())
    with pytest.raises(ConfigError, match="contiguous weights on the CPU"):
        linear(matrix(2, 4), w.T)
    with pytest.raises(ConfigError, match="4 matrices at once, but the limit is 3"):
        Product(w, w, w, w)
    with pytest.raises(ConfigError, match=r"must be alike, not .*'bfloat16', 'float32'"):
        Product(w, w.bfloat16())
    with pytest.raises(ConfigError, match="two matrices of one shape"):
        Product(w, w[:2], swiglu=True)
    with pytest.raises(ConfigError, match=r"this processor has no 'amx', only .*plain"):
        linear(matrix(2, 64), w, isa="amx")


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"


@pytest.mark.parametrize(
    ("kind", "isa", "triple", "cpu", "instruction"),
    [
        ("int8", "vnni", X86, "alderlake", "vpdpbusd"),
        ("int4", "vnni", X86, "alderlake", "vpdpbusd"),
        ("int8", "avx512", X86, "icelake-server", "vpdpbusd"),
        ("float32", "avx512", X86, "icelake-server", "vfmadd"),
        ("bfloat16", "avx512bf16", X86, "sapphirerapids", "vdpbf16ps"),
        ("float32", "plain", ARM, "neoverse-n1", "fmla"),
        ("bfloat16", "plain", ARM, "apple-m1", "fmla"),
        ("int8", "plain", ARM, "neoverse-n1", "smull"),
        ("int8", "dotprod", ARM, "neoverse-n1", "sdot"),
        ("int4", "dotprod", ARM, "apple-m1", "sdot"),
    ],
)
def test_the_code_for_other_processors(
    kind: str, isa: str, triple: str, cpu: str, instruction: str
) -> None:
    """A tile is compiled for processors that may not be this one. It calls no function."""
    is_float = kind in ("float32", "bfloat16")
    tile, count = (float_tile, 10) if is_float else (byte_tile, 8)
    rows = ISAS[isa].prefill.rows if is_float else ISAS[isa].lanes
    module = ir.Module()
    kinds = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * count)
    builder = ir.IRBuilder(ir.Function(module, kinds, "f").append_basic_block())
    tile._Tile(builder, kind, isa, rows, 4, list(builder.function.args)).write()
    builder.ret_void()
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    compiled = llvm.parse_assembly(str(module))
    compiled.triple, compiled.data_layout = triple, str(machine.target_data)
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options).getModulePassManager()
    passes.run(compiled, llvm.create_pass_builder(machine, options))
    lines = [line.split() for line in machine.emit_assembly(compiled).splitlines()]
    names = [line[1 if line[0] == "{vex}" else 0] for line in lines if line]
    assert sum(name.startswith(instruction) for name in names) >= 32
    assert not {"call", "callq", "bl"} & set(names)


def test_without_numba_a_hint() -> None:
    script = (
        "import sys, torch; sys.modules['numba'] = sys.modules['llvmlite'] = None\n"
        "from llama.fast.cpu.kernels import product\n"
        "try: product.linear(torch.ones(1, 8), torch.ones(4, 8))\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "the kernels need numba: pip install 'llama-reference[fast]'"
