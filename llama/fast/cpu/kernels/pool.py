"""The thread pool: kernels run on the OpenMP threads of PyTorch.

PyTorch's threads spin while they wait for work. A second pool, such as numba's, would compete with
them for the cores. So kernels call GOMP_parallel in the OpenMP runtime that PyTorch has loaded.
Compilers call the same function for `#pragma omp parallel`.
"""

import ctypes
import functools
from collections.abc import Callable

import torch


@functools.cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    try:
        call = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # found in a library that it links to
    except (AttributeError, OSError):
        return None  # another OpenMP runtime, as on a Mac: kernels then run on one thread
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    call.restype = None
    return call


def threads() -> int:
    """The number of threads of `run`: `torch.get_num_threads()`, or one without PyTorch's pool."""
    return torch.get_num_threads() if _parallel() else 1


@functools.cache
def yield_address() -> int:
    """The address of sched_yield; 0 if there is no pool."""
    if _parallel() is None:
        return 0
    return address(ctypes.CDLL(None).sched_yield)


def address(function: Callable[..., object]) -> int:
    """The address of a C function."""
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore


def run(task: Callable[[int], None], job: int) -> None:
    """Call a C function, `void task(void *job)`, on every thread at once, and wait for all."""
    parallel, n_threads = _parallel(), threads()
    if parallel is None or n_threads == 1:
        task(job)
    else:
        parallel(address(task), job, n_threads, 0)
