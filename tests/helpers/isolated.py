"""Calls in a forked child, because they could kill or block the process. Many cases share a child,
so that PyTorch is imported only once.
"""

import os
import pickle
import resource
import signal
from collections.abc import Callable
from typing import Any

from llama.errors import LlamaError

SECONDS = 5  # time limit of a case
MEMORY = 64 << 30  # address space of a child in bytes, far less than the hostile files declare

Cases = dict[str, Callable[[], object]]


def isolated(cases: Cases) -> dict[str, tuple[Any, ...]]:
    """Run all calls in a child. Returns for each ("ok", value) or ("error", type, message).

    Raises AssertionError if a call exceeds its time, kills the process, or raises anything but a
    LlamaError with a message of one line.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with os.fdopen(write_end, "wb") as pipe:
                _run(cases, pipe)
        finally:
            os._exit(0)
    os.close(write_end)
    outcomes: dict[str, tuple[Any, ...]] = {}
    with os.fdopen(read_end, "rb") as pipe:
        for name in cases:
            try:
                outcomes[name] = pickle.load(pipe)
            except EOFError:
                break
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if len(outcomes) < len(cases):
        raise AssertionError(f"{list(cases)[len(outcomes)]} ended the process: {status}")
    wrong = [
        f"{name}: {outcome[1:]}"
        for name, outcome in outcomes.items()
        if outcome[0] == "crash" or (outcome[0] == "error" and not outcome[2].isprintable())
    ]
    if wrong:
        raise AssertionError("; ".join(wrong))
    return outcomes


def _run(cases: Cases, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the alarm kills a process that hangs
    for call in cases.values():
        signal.alarm(SECONDS)
        try:
            outcome: tuple[Any, ...] = ("ok", call())
        except LlamaError as error:
            outcome = ("error", type(error).__name__, str(error))
        except BaseException as error:  # a Rust panic is a BaseException, but no Exception
            outcome = ("crash", type(error).__name__, str(error))
        signal.alarm(0)
        pickle.dump(outcome, pipe)
        pipe.flush()
