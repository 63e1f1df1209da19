"""Products with large matrices, next to the speed at which memory can be read.

`F.linear` is made for many rows. A decode step has one to eight, and its time is that of reading
every weight once: these kernels do that, on all of PyTorch's threads, from float32, bfloat16, int8
or int4 weights; with more rows they compute next to the speed of the processor's arithmetic. They
need the extra `[fast]` and weights on the CPU.
"""

import ctypes
import functools
import importlib.util
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.errors import ConfigError
from llama.fast.cpu.kernels import pool
from llama.fast.quantize import GROUP, Int4Weight, Int8Weight

Weight = Tensor | Int8Weight | Int4Weight

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16)
MOST_MATRICES = 3
UNIT = 24  # rows of weights: whole tiles of every kind
MOST_AT_ONCE = 48  # rows of weights: they stay in the cache while activations pass by
CHUNKS = 8  # a thread's share in pieces: who is done early takes more


def is_installed() -> bool:
    """Whether numba is there to compile them."""
    return importlib.util.find_spec("numba") is not None


def has_vnni() -> bool:
    """Whether the processor adds up products of bytes in one instruction."""
    return _matmul().instruction_sets()[0] == "vnni"


@functools.cache
def _matmul() -> ModuleType:
    try:
        from llama.fast.cpu.kernels import matmul
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("numba", "llvmlite"):
            raise
        raise ConfigError("the kernels need numba: pip install 'llama-reference[fast]'") from None
    return matmul


class Product:
    """x times one to three matrices transposed, in one pass, made once for many x.

    weights: each (N, K), of one kind and one K: float32, bfloat16, int8 or
        int4, contiguous, on the CPU. They are neither copied nor joined.
    swiglu: of two matrices w1 and w3, silu(x w1^T) * (x w3^T) instead.
    isa: "vnni", "avx2" or "plain" in place of the best that the processor has, for bytes.
    Raises ConfigError where that does not hold, or numba is not installed.
    """

    def __init__(self, *weights: Weight, swiglu: bool = False, isa: str | None = None) -> None:
        matmul = _matmul()
        self.kind = _check(weights)
        self.is_quantized = self.kind in ("int8", "int4")
        self.swiglu = swiglu
        rows = [weight.shape[0] for weight in weights]
        if swiglu and (len(weights) != 2 or rows[0] != rows[1]):
            raise ConfigError(f"SwiGLU needs two matrices of one shape, not of {rows} rows")
        self.features = weights[0].shape[1]
        self.rows = rows[0] if swiglu else sum(rows)
        self.weights = weights  # the job holds bare addresses
        self.job = (ctypes.c_int64 * matmul.LENGTH)()
        self.job[matmul.K], self.job[matmul.TOTAL] = self.features, self.rows
        self.job[matmul.MATRICES] = len(weights)
        for i, weight in enumerate(weights):
            data, scales = weight if isinstance(weight, tuple) else (weight, weight)
            place = matmul.FIRST + 3 * i
            self.job[place : place + 3] = rows[i], data.data_ptr(), scales.data_ptr()
        available = matmul.instruction_sets()
        if isa is not None and isa not in available:
            raise ConfigError(f"this processor has no {isa!r}, only {', '.join(available)}")
        self.task = matmul.product(self.kind, isa or available[0], swiglu)
        self.to_bytes = matmul.to_bytes() if self.is_quantized else None

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, K) -> (n, all matrices' N), or (n, N) with swiglu; float32 or bfloat16, as x is.

        Sums are in float32. For int8 and int4 weights, x is rounded to int8 in groups of 32. Row r
        of the result depends on row r of x alone, to the last bit.
        """
        if x.dim() != 2 or x.shape[1] != self.features or x.dtype not in FLOATS or x.device != CPU:
            raise ConfigError(
                f"x must be float32 or bfloat16 (n, {self.features}) on the CPU, not {x.dtype} "
                f"{tuple(x.shape)} on {x.device}"
            )
        matmul = _matmul()
        n = x.shape[0]
        x32 = x.float().contiguous()
        out = torch.empty(2 * n if self.swiglu else n, self.rows)
        job = type(self.job).from_buffer_copy(self.job)
        job[matmul.N], job[matmul.X] = n, x32.data_ptr()
        if self.to_bytes is not None:
            values = torch.empty(n, self.features, dtype=torch.int8)
            steps = torch.empty(n, self.features // GROUP, 2)
            job[matmul.STEPS], job[matmul.OUT] = steps.data_ptr(), values.data_ptr()
            pool.run(self.to_bytes, ctypes.addressof(job))
            job[matmul.TAKEN], job[matmul.X] = 0, values.data_ptr()
        job[matmul.OUT] = out.data_ptr()
        job[matmul.CHUNK] = self.chunk()
        pool.run(self.task, ctypes.addressof(job))
        if self.swiglu:
            out = out[:n]
        return out if x.dtype == out.dtype else out.to(x.dtype)

    def by_library(self, x: Tensor, out: Tensor) -> None:
        """The same from bfloat16 weights, into out (n, rows), by PyTorch: for many x on a processor
        that multiplies bfloat16. All results are rounded to bfloat16."""
        weights = [weight for weight in self.weights if isinstance(weight, Tensor)]
        parts = [F.linear(x.bfloat16(), weight) for weight in weights]
        out.copy_(F.silu(parts[0]) * parts[1] if self.swiglu else torch.cat(parts, 1))

    def chunk(self) -> int:
        """Rows of weights that a thread takes at a time."""
        share = -(-self.rows // (CHUNKS * pool.threads()))
        return min(-(-share // UNIT) * UNIT, MOST_AT_ONCE)


def linear(x: Tensor, weight: Weight, isa: str | None = None) -> Tensor:
    """x (n, K) times weight (N, K) transposed -> (n, N); see `Product`."""
    return Product(weight, isa=isa)(x)


def _check(weights: tuple[Weight, ...]) -> str:
    """The kind of the weights, where they can be read in one pass."""
    if not 1 <= len(weights) <= MOST_MATRICES:
        raise ConfigError(f"{len(weights)} matrices at once, but the limit is {MOST_MATRICES}")
    kinds = sorted({_kind(weight) for weight in weights})
    widths = sorted({weight.shape[1] for weight in weights})
    if len(kinds) > 1 or len(widths) > 1:
        raise ConfigError(f"matrices at once must be alike, not {kinds} with {widths} features")
    for weight in weights:
        for tensor in weight if isinstance(weight, tuple) else (weight,):
            if tensor.device != CPU or not tensor.is_contiguous():
                raise ConfigError("the kernels read contiguous weights on the CPU")
    return kinds[0]


def _kind(weight: Weight) -> str:
    if isinstance(weight, Int8Weight):
        return "int8"
    if isinstance(weight, Int4Weight):
        return "int4"
    if weight.dtype not in FLOATS or weight.dim() != 2:
        raise ConfigError(
            f"a weight must be float32 or bfloat16 (N, K), not {weight.dtype} {tuple(weight.shape)}"
        )
    return "float32" if weight.dtype == torch.float32 else "bfloat16"
