"""Compile a task, a function that all threads run, to machine code."""

import ctypes
import functools
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

from numba import cfunc, types

from llama import parallel
from llama.fast import quantize

log = logging.getLogger("llama")

# Numba recompiles a task when the task's own file has changed. Each task reads VERSION, a hash of
# all kernel files, so that it is recompiled when any of them has changed.
SOURCES = [*sorted(Path(__file__).parent.glob("*.py")), Path(quantize.__file__)]
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
PATIENCE = 0.5  # seconds of compiling before a log line says so


def compile_task(
    function: Callable[..., None], fastmath: Set[str] = frozenset()
) -> Callable[[int], None]:
    """Compile a task to a C function, or read it from numba's cache. The cache is NUMBA_CACHE_DIR,
    else the folder of this file or, if that is read-only, the user's cache folder."""
    compile_cached = functools.partial(
        cfunc,
        types.void(types.CPointer(types.int64)),
        error_model="numpy",
        boundscheck=False,
        fastmath=set(fastmath),
    )
    with _announced():
        try:
            compiled = compile_cached(cache=True)(function)
        except RuntimeError:  # no cache folder can be written
            compiled = compile_cached()(function)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    call.compiled = compiled  # type: ignore[attr-defined]  # keeps the code from being freed
    return call


@contextmanager
def _announced() -> Iterator[None]:
    """Say that kernels are compiled, if that takes long. Reading the cache does not."""
    timer = threading.Timer(PATIENCE, _announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@functools.cache
def _announce() -> None:
    if parallel.is_main_rank():
        log.info("compiling kernels for this processor, which takes some seconds once")
