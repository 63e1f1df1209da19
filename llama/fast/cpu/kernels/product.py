"""Products of fast mode on a CPU: a weight matrix, and the job that describes a product with it.

`F.linear` is made for many rows. A decode step has one to eight rows, so it can be as fast as
reading every weight once. These kernels reach that speed, on all of PyTorch's threads, with weights
in float32, bfloat16, int8 or int4. They need the extra `[fast]` and weights on the CPU.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.errors import ConfigError
from llama.fast.cpu.kernels import pool
from llama.fast.cpu.kernels.buffer import float_buffer, int8_buffer
from llama.fast.quantize import GROUP, Int4Weight, Int8Weight

Weight = Tensor | Int8Weight | Int4Weight

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16)
MAX_MATRICES = 3
UNIT = 24  # rows of weights; a chunk is a multiple of it, and it is a multiple of every tile's rows
MAX_CHUNK = 48  # rows of weights; a chunk stays in the cache while all activations use it
CHUNKS = 8  # approximate chunks per thread; a thread that is done early takes more


def is_installed() -> bool:
    """Whether numba is installed, which compiles the kernels."""
    return importlib.util.find_spec("numba") is not None


def has_vnni() -> bool:
    """Whether the processor has VNNI, which multiplies and adds four bytes in one instruction."""
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
    """Multiplies x with one to three transposed matrices in one pass. One object serves many x.

    weights: matrices (N, K) of the same kind and K: float32, bfloat16, int8 or int4, contiguous, on
        the CPU. They are not copied.
    biases: for each matrix what is added to its result, of any float type (N,); None: nothing.
    swiglu: compute silu(x w1^T) * (x w3^T) for two matrices w1 and w3.
    isa: "vnni", "avx2" or "plain", for products of bytes; None: the best that the processor has.
    Raises ConfigError for other weights, an isa that the processor lacks, or without numba.
    """

    def __init__(
        self,
        *weights: Weight,
        biases: Sequence[Tensor] | None = None,
        swiglu: bool = False,
        isa: str | None = None,
    ) -> None:
        matmul = _matmul()
        self.kind = _check(weights)
        self.is_quantized = self.kind in ("int8", "int4")
        self.swiglu = swiglu
        rows = [weight.shape[0] for weight in weights]
        if swiglu and (len(weights) != 2 or rows[0] != rows[1]):
            raise ConfigError(f"SwiGLU needs two matrices of one shape, not of {rows} rows")
        self.features = weights[0].shape[1]
        self.rows = rows[0] if swiglu else sum(rows)
        self.weights = weights  # kept alive, because the job holds their addresses
        self.job = (ctypes.c_int64 * matmul.LENGTH)()
        self.job[matmul.K], self.job[matmul.TOTAL] = self.features, self.rows
        self.job[matmul.MATRICES] = len(weights)
        for i, weight in enumerate(weights):
            data, scales = weight if isinstance(weight, tuple) else (weight, weight)
            place = matmul.FIRST + 3 * i
            self.job[place : place + 3] = rows[i], data.data_ptr(), scales.data_ptr()
        self.biases = biases
        if biases is not None:  # the rows of quantized weights may be padded
            padded = [F.pad(b.float(), (0, n - len(b))) for b, n in zip(biases, rows, strict=True)]
            self._all_biases = torch.cat(padded)  # kept alive too
            self.job[matmul.BIASES] = self._all_biases.data_ptr()
        available = matmul.instruction_sets()
        if isa is not None and isa not in available:
            raise ConfigError(f"this processor has no {isa!r}, only {', '.join(available)}")
        self.task = matmul.product(self.kind, isa or available[0], swiglu)
        self.round_to_int8 = matmul.round_to_int8() if self.is_quantized else None

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, K) -> (n, sum of all N), or (n, N) with swiglu, in the dtype of x.

        x is float32 or bfloat16. Sums are in float32. For int8 and int4 weights, x is rounded to
        int8 in groups of 32. To the last bit, row r of the result depends only on row r of x.
        """
        if x.dim() != 2 or x.shape[1] != self.features or x.dtype not in FLOATS or x.device != CPU:
            raise ConfigError(
                f"x must be float32 or bfloat16 (n, {self.features}) on the CPU, not {x.dtype} "
                f"{tuple(x.shape)} on {x.device}"
            )
        matmul = _matmul()
        n = x.shape[0]
        x32 = x.float().contiguous()
        out = float_buffer(2 * n if self.swiglu else n, self.rows)
        job = type(self.job).from_buffer_copy(self.job)
        job[matmul.N], job[matmul.X] = n, x32.data_ptr()
        if self.round_to_int8 is not None:
            values = int8_buffer(n, self.features)
            steps = float_buffer(n, self.features // GROUP, 2)
            job[matmul.STEPS], job[matmul.OUT] = steps.data_ptr(), values.data_ptr()
            pool.run(self.round_to_int8, ctypes.addressof(job))
            job[matmul.CURSOR], job[matmul.X] = 0, values.data_ptr()
        job[matmul.OUT] = out.data_ptr()
        job[matmul.CHUNK] = self.chunk()
        pool.run(self.task, ctypes.addressof(job))
        if self.swiglu:
            out = out[:n]
        return out if x.dtype == out.dtype else out.to(x.dtype)

    def by_onednn(self, x: Tensor, out: Tensor) -> None:
        """Compute the same with PyTorch's bfloat16 products, into out (n, rows).

        Results are rounded to bfloat16."""
        weights = [weight for weight in self.weights if isinstance(weight, Tensor)]
        biases: Sequence[Tensor | None] = self.biases or [None] * len(weights)
        pairs = zip(weights, biases, strict=True)
        parts = [F.linear(x.bfloat16(), weight, bias) for weight, bias in pairs]
        out.copy_(F.silu(parts[0]) * parts[1] if self.swiglu else torch.cat(parts, 1))

    def chunk(self) -> int:
        """Rows of weights in a chunk, which a thread takes at a time."""
        share = -(-self.rows // (CHUNKS * pool.threads()))
        return min(-(-share // UNIT) * UNIT, MAX_CHUNK)


def linear(x: Tensor, weight: Weight, isa: str | None = None) -> Tensor:
    """x (n, K) times weight (N, K) transposed -> (n, N); see `Product`."""
    return Product(weight, isa=isa)(x)


def _check(weights: tuple[Weight, ...]) -> str:
    """The kind of the weights. Raises ConfigError for weights that one product cannot take."""
    if not 1 <= len(weights) <= MAX_MATRICES:
        raise ConfigError(f"{len(weights)} matrices at once, but the limit is {MAX_MATRICES}")
    kinds = sorted({_kind(weight) for weight in weights})
    widths = sorted({weight.shape[1] for weight in weights})
    if len(kinds) > 1 or len(widths) > 1:
        raise ConfigError(
            f"the matrices of one product must be alike, not {kinds} with {widths} features"
        )
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
