"""Two cores have room for one pool of threads: the kernels run on PyTorch's own.

A second pool, numba's say, would fight for the cores with PyTorch's threads, which wait for their
next work spinning. So the entry to the OpenMP runtime is looked up in the one that PyTorch has
loaded; compilers call the same function for a `#pragma omp parallel`.
"""

import ctypes
import functools
from collections.abc import Callable

import torch


@functools.cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    try:
        call = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # the library and what it depends on
    except (AttributeError, OSError):
        return None  # another runtime, as on a Mac: one thread then
    call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    call.restype = None
    return call


def threads() -> int:
    """How many threads `run` takes: `torch.get_num_threads()`, or one without PyTorch's pool."""
    return torch.get_num_threads() if _parallel() else 1


@functools.cache
def yield_address() -> int:
    """Of the C function that gives the processor to another thread; 0 where there is no pool."""
    if _parallel() is None:
        return 0
    return address(ctypes.CDLL(None).sched_yield)


def address(function: Callable[..., object]) -> int:
    """Of a C function's code."""
    return ctypes.cast(function, ctypes.c_void_p).value  # type: ignore


def run(task: Callable[[int], None], job: int) -> None:
    """Call a C function, `void task(void *job)`, on every thread at once, and wait for all."""
    parallel, n_threads = _parallel(), threads()
    if parallel is None or n_threads == 1:
        task(job)
    else:
        parallel(address(task), job, n_threads, 0)
