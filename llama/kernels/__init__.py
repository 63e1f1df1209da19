"""Products of few rows with large matrices, next to the speed at which memory can be read.

`F.linear` is made for many rows. A decode step has one to eight, and its time is that of reading
every weight once: these kernels do that, on all of PyTorch's threads, from float32, bfloat16, int8
or int4 weights. They need the extra `[fast]` and weights on the CPU.
"""

import functools
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from llama.errors import ConfigError
from llama.kernels import pool
from llama.quantize import GROUP, PAIR, Int4Weight, Int8Weight

Weight = Tensor | Int8Weight | Int4Weight

MOST_MATRICES = 3
CHUNKS = 8  # a thread's share in pieces: who is done early takes more


@functools.cache
def _loops() -> ModuleType:
    try:
        from llama.kernels import loops
    except ModuleNotFoundError as error:
        if error.name not in ("numba", "llvmlite"):
            raise
        raise ConfigError("the kernels need numba: pip install 'llama-reference[fast]'") from None
    return loops


def linear(x: Tensor, *weights: Weight, isa: str | None = None) -> list[Tensor]:
    """x times each matrix transposed, in one pass: x (n, K), each weight (N, K) -> each (n, N).

    x is float32 or bfloat16, and so are the results; sums are in float32. Against int8 and int4
    weights x is rounded to int8 in groups of 32. Row r of a result depends on row r of x alone.

    weights: one to three, of one kind and one K: float32, bfloat16, int8 (K a multiple of 32) or
        int4 (of 64), contiguous, on the CPU.
    isa: "vnni", "avx2" or "plain" instead of the best that the processor has.
    Raises ConfigError where that does not hold, or numba is not installed.
    """
    out = _run(x, weights, isa, swiglu=False)
    return list(out.split([weight.shape[0] for weight in weights], 1))


def swiglu(x: Tensor, w1: Weight, w3: Weight, isa: str | None = None) -> Tensor:
    """silu(x w1^T) * (x w3^T), in one pass: x (n, K), weights (F, K) -> (n, F); see `linear`."""
    if w1.shape != w3.shape:
        raise ConfigError(f"w1 is {tuple(w1.shape)}, but w3 {tuple(w3.shape)}")
    return _run(x, (w1, w3), isa, swiglu=True)


def warm_up(kind: str, isa: str | None = None) -> None:
    """Compile, or load from disk, what products with "float32", "bfloat16", "int8" or "int4"
    weights need; else the first one does it."""
    loops = _loops()
    isa = isa or loops.instruction_set()
    for fused in (False, True):
        loops.product(kind, isa if kind in ("int8", "int4") else "plain", fused)
    if kind in ("int8", "int4"):
        loops.to_bytes()


def _run(x: Tensor, weights: tuple[Weight, ...], isa: str | None, swiglu: bool) -> Tensor:
    loops = _loops()
    kind = _check(x, weights)
    quantized = kind in ("int8", "int4")
    (n, k), rows = x.shape, [weight.shape[0] for weight in weights]
    total = rows[0] if swiglu else sum(rows)
    x32 = x.float().contiguous()
    out = torch.empty(2 * n if swiglu else n, total)
    counter = np.zeros(1, np.int64)
    chunk = -(-total // (CHUNKS * pool.threads()))
    job = np.zeros(32, np.int64)
    job[: loops.FIRST] = (
        counter.ctypes.data, n, k, x32.data_ptr(), 0, out.data_ptr(), total, chunk, len(weights)
    )  # fmt: skip
    for i, weight in enumerate(weights):
        data, scales = weight if isinstance(weight, tuple) else (weight, weight)
        place = loops.FIRST + 3 * i
        job[place : place + 3] = rows[i], data.data_ptr(), scales.data_ptr()
    if quantized:
        steps = torch.empty(n, k // GROUP)
        values = torch.empty(n, k, dtype=torch.int8)
        job[[loops.STEPS, loops.OUT]] = steps.data_ptr(), values.data_ptr()
        loops.to_bytes()(job.ctypes.data)
        job[[loops.X, loops.OUT]] = values.data_ptr(), out.data_ptr()
    isa = (isa or loops.instruction_set()) if quantized else "plain"
    pool.run(loops.product(kind, isa, swiglu), job.ctypes.data)
    return out[:n].to(x.dtype)


def _check(x: Tensor, weights: tuple[Weight, ...]) -> str:
    """The kind of the weights, where they and x can be multiplied."""
    if not 1 <= len(weights) <= MOST_MATRICES:
        raise ConfigError(f"{len(weights)} matrices at once, but the limit is {MOST_MATRICES}")
    kinds = {_kind(weight) for weight in weights}
    if len(kinds) > 1:
        raise ConfigError(f"matrices of several kinds at once: {', '.join(sorted(kinds))}")
    (kind,) = kinds
    if x.dim() != 2 or x.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"x must be float32 or bfloat16 (n, K), not {x.dtype} {tuple(x.shape)}")
    for weight in weights:
        if weight.shape[1] != x.shape[1]:
            raise ConfigError(f"x has {x.shape[1]} features, but the weights {weight.shape[1]}")
    multiple = {"int8": GROUP, "int4": PAIR}.get(kind, 1)
    if x.shape[1] % multiple:
        raise ConfigError(f"{x.shape[1]} features, but {kind} weights need a multiple of {multiple}")
    tensors = [x, *(t for w in weights for t in (w if isinstance(w, tuple) else (w,)))]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        raise ConfigError("the kernels run on the CPU, but a tensor is elsewhere")
    if not all(tensor.is_contiguous() for tensor in tensors[1:]):
        raise ConfigError("the kernels read weights row by row: they must be contiguous")
    return kind


def _kind(weight: Weight) -> str:
    if isinstance(weight, Int8Weight):
        return "int8"
    if isinstance(weight, Int4Weight):
        return "int4"
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.dim() != 2:
        raise ConfigError(
            f"a float weight must be float32 or bfloat16 (N, K), not {weight.dtype} "
            f"{tuple(weight.shape)}"
        )
    return "float32" if weight.dtype == torch.float32 else "bfloat16"
