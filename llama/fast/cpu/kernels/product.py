"""Products of fast mode on a CPU: a weight matrix, and the job that describes a product with it.

`F.linear` is made for many rows. A decode step has one to eight rows, so at best it takes as long
as reading every weight once. These kernels reach that speed, on all of PyTorch's threads, with
weights in float32, bfloat16, int8 or int4. They need the extra `[fast]` and weights on the CPU.
"""

import functools
import importlib.util
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.errors import ConfigError
from llama.fast.cpu.kernels import job, pool
from llama.fast.cpu.kernels.buffer import float_buffer, int8_buffer
from llama.fast.quantize import GROUP, Int4Weight, Int8Weight

Weight = Tensor | Int8Weight | Int4Weight

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.bfloat16)


def is_installed() -> bool:
    """Whether numba is installed, which compiles the kernels."""
    return importlib.util.find_spec("numba") is not None


def has_dot() -> bool:
    """Whether one instruction of the processor multiplies and adds four bytes, as in VNNI."""
    return _kernels().isa.ISAS[instruction_sets()[0]].dot is not None


def instruction_sets() -> list[str]:
    """The instruction sets that the kernels may use, the fastest first; see `isa.py`."""
    return _kernels().isa.instruction_sets()


class _Kernels(NamedTuple):
    """The modules that need numba."""

    isa: ModuleType
    floats: ModuleType
    bytes: ModuleType
    TaskList: Any


@functools.cache
def _kernels() -> _Kernels:
    try:
        from llama.fast.cpu.kernels import byte_matmul, float_matmul, isa
        from llama.fast.cpu.kernels.task_list import TaskList
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("numba", "llvmlite"):
            raise
        raise ConfigError("the kernels need numba: pip install 'llama-reference[fast]'") from None
    return _Kernels(isa, float_matmul, byte_matmul, TaskList)


class Product:
    """Multiplies x with one to three transposed matrices in one pass. One object serves many x.

    weights: matrices (N, K) of the same kind and K: float32, bfloat16, int8 or int4, contiguous, on
        the CPU. They are not copied.
    biases: for each matrix a vector (N,) of any float dtype, added to its result; None: no bias.
    swiglu: compute silu(x w1^T) * (x w3^T) for two matrices w1 and w3.
    isa: one of `instruction_sets()`; None: the first.
    Raises ConfigError for other weights, an isa that the processor lacks, or without numba.
    """

    def __init__(
        self,
        *weights: Weight,
        biases: Sequence[Tensor] | None = None,
        swiglu: bool = False,
        isa: str | None = None,
    ) -> None:
        kernels = _kernels()
        self.kind = _check(weights)
        self.swiglu = swiglu
        rows = [weight.shape[0] for weight in weights]
        if swiglu and (len(weights) != 2 or rows[0] != rows[1]):
            raise ConfigError(f"SwiGLU needs two matrices of one shape, not of {rows} rows")
        self.features = weights[0].shape[1]
        self.rows = rows[0] if swiglu else sum(rows)
        self.weights = weights  # kept alive, because the job holds their addresses
        self.job = [0] * job.LENGTH
        self.job[job.K], self.job[job.TOTAL] = self.features, self.rows
        self.job[job.MATRICES] = len(weights)
        for i, weight in enumerate(weights):
            tensors = weight if isinstance(weight, tuple) else (weight,)
            addresses = [tensor.data_ptr() for tensor in tensors]  # of the weights, and the scales
            place = job.FIRST + 3 * i
            self.job[place : place + 1 + len(addresses)] = [rows[i], *addresses]
        self.biases = biases
        if biases is not None:  # the rows of quantized weights may be padded
            padded = [F.pad(b.float(), (0, n - len(b))) for b, n in zip(biases, rows, strict=True)]
            self._all_biases = torch.cat(padded)  # kept alive too
            self.job[job.BIASES] = self._all_biases.data_ptr()
        available = instruction_sets()
        if isa is not None and isa not in available:
            raise ConfigError(f"this processor has no {isa!r}, only {', '.join(available)}")
        isa = isa or available[0]
        is_float = self.kind in ("float32", "bfloat16")
        loops = kernels.floats if is_float else kernels.bytes
        self.task = loops.product(self.kind, isa, swiglu)
        self.preparing, x_bytes = loops.preparing(self.kind, isa)
        self.prepared_bytes = self.features * x_bytes  # of a row of activations
        tasks = [self.task] if self.preparing is None else [self.preparing, self.task]
        self._list = kernels.TaskList(tasks, [self.job] * len(tasks))
        self._lock = threading.Lock()  # one call at a time

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, K) -> (n, sum of all N), or (n, N) with swiglu, in the dtype of x.

        x is float32 or bfloat16. Sums are in float32. For int8 and int4 weights, x is rounded to
        int8 in groups of 32; for bfloat16 weights to bfloat16, if the instruction set has pairs. To
        the last bit, row r of the result depends only on row r of x.
        """
        if x.dim() != 2 or x.shape[1] != self.features or x.dtype not in FLOATS or x.device != CPU:
            raise ConfigError(
                f"x must be float32 or bfloat16 (n, {self.features}) on the CPU, not {x.dtype} "
                f"{tuple(x.shape)} on {x.device}"
            )
        n = x.shape[0]
        x32 = x.float().contiguous()
        out = float_buffer(2 * n if self.swiglu else n, self.rows)
        prepared = int8_buffer(n, self.prepared_bytes)
        steps = float_buffer(n, self.prepared_bytes // GROUP, 2)
        with self._lock:
            jobs = self._list.jobs
            jobs[:, job.N], jobs[:, job.THREADS] = n, pool.threads()
            jobs[:, job.STEPS] = steps.data_ptr()
            jobs[0, job.X], jobs[-1, job.OUT] = x32.data_ptr(), out.data_ptr()
            if self.preparing is not None:
                jobs[0, job.OUT] = jobs[-1, job.X] = prepared.data_ptr()
            self._list.run(0, len(jobs))
        if self.swiglu:
            out = out[:n]
        return out if x.dtype == out.dtype else out.to(x.dtype)


def linear(x: Tensor, weight: Weight, isa: str | None = None) -> Tensor:
    """x (n, K) times weight (N, K) transposed -> (n, N); see `Product`."""
    return Product(weight, isa=isa)(x)


def _check(weights: tuple[Weight, ...]) -> str:
    """The kind of the weights. Raises ConfigError for weights that one product cannot take."""
    if not 1 <= len(weights) <= job.MAX_MATRICES:
        raise ConfigError(f"{len(weights)} matrices at once, but the limit is {job.MAX_MATRICES}")
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
