"""Every instruction set gives exactly the bits of a plain statement of its order of sums."""

import llvmlite.binding
import numpy as np
import pytest
import torch
from numpy import float32, ndarray

from llama.fast import quantize
from llama.fast.cpu.kernels.isa import ISAS, instruction_sets
from llama.fast.cpu.kernels.product import Product
from llama.fast.quantizers import QUANTIZERS

ROWS, COLUMNS = 37, 352  # several tiles of every size, and single rows
FEATURES = llvmlite.binding.get_host_cpu_features()
HAS_FMA = FEATURES.get("fma", False) or "aarch64" in llvmlite.binding.get_process_triple()


def multiply_add(x: ndarray, y: ndarray, total: ndarray) -> ndarray:
    """x * y + total in float32, rounded once where the processor has FMA."""
    product = x.astype(np.float64) * y  # exact
    if not HAS_FMA:
        return product.astype(float32) + total
    # The sum in float64 and its exact error. An inexact sum is made odd in its last bit, so that
    # rounding it again gives what one rounding would give.
    other = total.astype(np.float64)
    rounded = product + other
    part = rounded - product
    error = (product - (rounded - part)) + (other - part)
    is_even = (rounded.view(np.int64) & 1) == 0
    neighbour = np.nextafter(rounded, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & is_even, neighbour, rounded).astype(float32)


def sum_lanes(lanes: ndarray) -> ndarray:
    """Add the upper half of the last dimension to the lower half, until one number is left."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def floats_in_lanes(w: ndarray, x: ndarray, lanes: int) -> ndarray:
    """Lane l of a sum gets columns l, l + lanes, and so on."""
    padding = [(0, 0), (0, -w.shape[1] % lanes)]
    w, x = (np.pad(a, padding).reshape(len(a), -1, lanes) for a in (w, x))
    total = np.zeros((len(x), len(w), lanes), float32)
    for i in range(w.shape[1]):
        total = multiply_add(x[:, None, i], w[None, :, i], total)
    return sum_lanes(total)


def pairs_in_lanes(w: ndarray, x: ndarray, lanes: int) -> ndarray:
    """Lane l of a sum gets columns 2 * l + 1 and 2 * l, and so on with 2 * lanes more. Both are
    bfloat16."""
    padding = [(0, 0), (0, -w.shape[1] % (2 * lanes))]
    w, x = (np.pad(a, padding).reshape(len(a), -1, lanes, 2) for a in (w, x))
    total = np.zeros((len(x), len(w), lanes), float32)
    for i in range(w.shape[1]):
        for side in (1, 0):
            total = multiply_add(x[:, None, i, :, side], w[None, :, i, :, side], total)
    return sum_lanes(total)


def bytes_in_groups(weight: quantize.Quantized, x: ndarray) -> ndarray:
    """The exact integer sum of each group times its scales, added group by group."""
    groups = x.reshape(len(x), -1, quantize.GROUP)
    step = np.abs(groups).max(-1) / float32(127)
    rounded = np.rint(groups * (float32(1) / step)[..., None]).astype(np.int64)
    ones = weight._replace(**{weight._fields[1]: torch.ones_like(weight[1])})
    steps = quantize.dequantize(ones).numpy().astype(np.int64)  # the weights as integers
    steps = steps.reshape(len(steps), -1, quantize.GROUP)
    total = np.zeros((len(x), len(steps)), float32)
    for g in range(groups.shape[1]):
        integers = (rounded[:, g] @ steps[:, g].T).astype(float32)
        factor = np.broadcast_to(step[:, g, None], total.shape)
        if isinstance(weight, quantize.Int4Weight):
            factor = factor * weight.scales[:, g].flatten().float().numpy()
        total = multiply_add(integers, factor, total)
    if isinstance(weight, quantize.Int8Weight):
        total = total * weight.scale.numpy()
    return total


def matrix(n: int, k: int, seed: int) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("n", [1, 8, 15])  # decode, and prefill
@pytest.mark.parametrize("columns", [COLUMNS, 77])
def test_float32(isa: str, n: int, columns: int) -> None:
    w, x = matrix(ROWS, columns, 0), matrix(n, columns, 1)
    want = floats_in_lanes(w.numpy(), x.numpy(), ISAS[isa].lanes)
    assert np.array_equal(Product(w, isa=isa)(x).numpy(), want)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("n", [1, 8, 15])
@pytest.mark.parametrize("columns", [COLUMNS, 77])
def test_bfloat16(isa: str, n: int, columns: int) -> None:
    w, x = matrix(ROWS, columns, 0).bfloat16(), matrix(n, columns, 1)
    if ISAS[isa].has_pairs:
        in_lanes, read = pairs_in_lanes, x.bfloat16().float()
    else:
        in_lanes, read = floats_in_lanes, x
    want = in_lanes(w.float().numpy(), read.numpy(), ISAS[isa].lanes)
    assert np.array_equal(Product(w, isa=isa)(x).numpy(), want)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("n", [1, 8, 15])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_bytes(isa: str, n: int, kind: str) -> None:
    """The same on every instruction set."""
    weight, x = QUANTIZERS[kind](matrix(ROWS, COLUMNS, 0)), matrix(n, COLUMNS, 1)
    want = bytes_in_groups(weight, x.numpy())
    assert np.array_equal(Product(weight, isa=isa)(x).numpy(), want)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_prefill_in_parts_of_a_row(isa: str, kind: str) -> None:
    """Rows that a prefill reads in parts give the bits of a decode step."""
    w, x = matrix(50, 5000, 0), matrix(9, 5000, 1)
    product = Product(w if kind == "float32" else w.bfloat16(), isa=isa)
    assert torch.equal(product(x)[8:], product(x[8:]))


def test_a_switch_narrows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = instruction_sets()
    monkeypatch.setenv("LLAMA_ISA", found[-1])
    assert instruction_sets() == found[-1:] == ["plain"]
    monkeypatch.setenv("LLAMA_ISA", "sse9")
    with pytest.raises(ValueError, match=r"^LLAMA_ISA is 'sse9', but this processor has .*plain$"):
        instruction_sets()
