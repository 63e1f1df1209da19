"""Ranks that a collective waits for in vain: how long it waits, and which rank is lost.

A collective fails after the timeout, or at once if the connection to a rank closes. Its own error
names at most an address. So each rank writes to the store which process it is. When a collective
fails, the ranks of the same machine are looked up in the system, and the others are asked through
the store.
"""

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from llama.errors import ParallelError

DEFAULT_SECONDS = 120
# How long the ranks wait for a sign of life. All that run are in the same collective, and notice
# its failure together.
ANSWER = timedelta(seconds=2)
VERDICT = "llama/verdict"  # the store's key of the message for ranks that were stopped
# In gloo's errors. The second one is that of a connection on which a collective has timed out.
OF_GLOO = ("gloo", "pair closure")
POLL = 0.02  # seconds between two looks at the store


def timeout() -> timedelta:
    """How long a collective waits for a rank that runs but does not join it: the seconds in the
    environment variable LLAMA_TIMEOUT. Raises ParallelError unless that is a number above 0."""
    text = os.environ.get("LLAMA_TIMEOUT", str(DEFAULT_SECONDS))
    try:
        return timedelta(seconds=_positive(float(text)))
    except (ValueError, OverflowError):
        raise ParallelError(
            f"the environment variable LLAMA_TIMEOUT is {text!r}: it must be a number of seconds "
            "above 0"
        ) from None


def _positive(number: float) -> float:
    if not number > 0:
        raise ValueError
    return number


def connect(rank: int, world_size: int, address: str, port: int) -> dist.Store:
    """The store of all ranks, as soon as all ranks have connected to it.

    Raises ParallelError that names the ranks that have not connected within the timeout.
    """
    limit = timeout()
    try:
        server = dist.TCPStore(
            address, port, world_size, is_master=rank == 0 and not _in_torchrun(), timeout=limit,
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except dist.DistError as error:
        text = f"{_place_of_store()} was not found at {address}:{port} within {_limit()}"
        raise ParallelError(text, rank) from error
    _limit_silence(port, limit)
    # Ranks that torchrun has started again do not see what the first ones wrote.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), server)
    try:
        store.set(f"llama/started/{rank}", "")
        _wait_for_all(store, world_size)
    except RuntimeError as error:
        raise _lost_store_error(rank) from error
    return store


def _wait_for_all(store: dist.Store, world_size: int) -> None:
    end = time.monotonic() + timeout().total_seconds()
    missing = list(range(world_size))
    while missing := _absent(store, "started", missing):
        if time.monotonic() > end:
            raise ParallelError(
                f"{_names(missing)} did not start within {_limit()}",
                _reporter(range(world_size), missing),
            )
        time.sleep(POLL)


# The process on this machine that holds the store. None: the store is in torchrun, or elsewhere.
_store_host: "_Process | None" = None


def introduce() -> None:
    """Write to the store which process this rank is. All ranks call it after the group is made."""
    global _store_host
    if dist.get_world_size() == 1:
        return
    store, rank = _get_default_store(), dist.get_rank()
    store.set(f"llama/process/{rank}", f"{_machine()} {os.getpid()}")
    _store_host = None
    if rank > 0 and not _in_torchrun():
        store.wait(["llama/process/0"], timeout())
        _store_host = next(iter(_processes(store, [0])), None)


@contextlib.contextmanager
def naming_lost_ranks(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """A block of collectives of a group, by default of all ranks. If one of them fails, raises
    ParallelError that says which rank is lost."""
    try:
        yield
    except RuntimeError as error:
        is_of_gloo = any(text in str(error) for text in OF_GLOO)
        if not (isinstance(error, dist.DistError) or is_of_gloo):
            raise
        raise lost_ranks_error(group, str(error)) from error


def lost_ranks_error(group: dist.ProcessGroup | None, cause: str) -> ParallelError:
    """The error for a collective of a group that has failed, the same on all ranks.

    cause: what the collective said. It is in the message if no rank is lost.
    """
    if _store_host is not None and _store_host.is_stopped:  # the store would not answer
        ranks = range(dist.get_world_size())
        return _error_of_processes([_store_host], ranks) or _no_answer([0], ranks)
    store = _get_default_store()
    store.set_timeout(ANSWER)  # the store may be lost, too
    _limit_silence(int(os.environ.get("MASTER_PORT", 0)), ANSWER)
    try:
        if store.check([VERDICT]):
            message, reporter = json.loads(store.get(VERDICT))
            return ParallelError(message, reporter)
        store.set(f"llama/failed/{dist.get_rank()}", "")
        return _find_lost(store, dist.get_process_group_ranks(group), cause)
    except RuntimeError:
        return _lost_store_error(dist.get_rank())


def _find_lost(store: dist.Store, ranks: Sequence[int], cause: str) -> ParallelError:
    silent = [rank for rank in ranks if rank != dist.get_rank()]
    processes = _processes(store, silent)
    end = time.monotonic() + ANSWER.total_seconds()
    while silent and time.monotonic() < end:
        if error := _error_of_processes(processes, ranks):
            return error
        silent = _absent(store, "failed", silent)
        time.sleep(POLL)
    if not silent:
        return ParallelError(f"the connection between the ranks failed: {cause}")
    return _no_answer(silent, ranks)


def has_ended(rank: int) -> bool:
    """Whether the process of a rank has ended. False if it is on another machine."""
    return any(each.has_ended for each in _processes(_get_default_store(), [rank]))


def silent_ranks_error(silent: Sequence[int]) -> ParallelError:
    """The error for ranks that have given no sign of life within the timeout."""
    ranks = range(dist.get_world_size())
    processes = _processes(_get_default_store(), silent)
    return _error_of_processes(processes, ranks) or _no_answer(silent, ranks)


def _error_of_processes(
    processes: Sequence["_Process"], ranks: Sequence[int]
) -> ParallelError | None:
    """The error if processes have ended, or are stopped, as by SIGSTOP. Stopped processes are
    continued, so that they notice the failure too. Otherwise torchrun could end them only after 30
    seconds, by SIGKILL."""
    if ended := [each.rank for each in processes if each.has_ended]:
        return ParallelError(f"{_names(ended)} ended before the others")
    stopped = [each for each in processes if each.is_stopped]
    if not stopped:
        return None
    lost = [each.rank for each in stopped]
    verb = "was" if len(lost) == 1 else "were"
    text = f"{_names(lost)} {verb} stopped, and did not answer within {_limit()}"
    error = ParallelError(text, _reporter(ranks, lost))
    if _store_host not in stopped:
        with contextlib.suppress(RuntimeError):
            _get_default_store().set(VERDICT, json.dumps([text, error.reporter]))
    for process in stopped:
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGCONT)
    return error


def _no_answer(silent: Sequence[int], ranks: Sequence[int]) -> ParallelError:
    text = f"{_names(silent)} did not answer within {_limit()}"
    return ParallelError(text, _reporter(ranks, silent))


def _reporter(ranks: Sequence[int], lost: Sequence[int]) -> int:
    """The rank that reports: the first one that runs."""
    return min(set(ranks) - set(lost))


# ---- processes on this machine -------------------------------------------------------------------


class _Process(NamedTuple):
    rank: int
    pid: int

    @property
    def has_ended(self) -> bool:
        return self._state() in ("", "Z")

    @property
    def is_stopped(self) -> bool:
        return self._state() in ("T", "t")

    def _state(self) -> str:
        """The letter for the state in /proc/PID/stat, such as "R" and "T"; "" if there is none."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""


def _machine() -> str:
    """The same text in all processes that see each other in /proc; "" where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _processes(store: dist.Store, ranks: Sequence[int]) -> list[_Process]:
    """The processes of those of the ranks that are on this machine."""
    found = []
    for rank in ranks:
        key = f"llama/process/{rank}"
        with contextlib.suppress(RuntimeError):  # the store is lost
            if store.check([key]):
                machine, _, pid = store.get(key).decode().rpartition(" ")
                if machine and machine == _machine():
                    found.append(_Process(rank, int(pid)))
    return found


# ---- the store -----------------------------------------------------------------------------------


def _in_torchrun() -> bool:
    """Whether the store is in the process of torchrun. Otherwise it is in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _place_of_store() -> str:
    return "torchrun" if _in_torchrun() else "rank 0"


def _lost_store_error(rank: int) -> ParallelError:
    """The error of a rank that the store does not answer. The first rank of its machine reports."""
    text = f"{_place_of_store()} did not answer within {_limit()}"
    return ParallelError(text, rank - int(os.environ.get("LOCAL_RANK", 0)))


def _limit_silence(port: int, limit: timedelta) -> None:
    """Make the system close this process's connections to the store, which has that port, if the
    other machine does not confirm what was sent within the limit.

    The store itself would wait for its answer for ever, because a network that is gone closes no
    connection. Only Linux has this setting.
    """
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        return
    milliseconds = int(limit.total_seconds() * 1000)
    for descriptor in os.listdir("/proc/self/fd"):
        with (
            contextlib.suppress(OSError),  # it is no socket
            socket.fromfd(int(descriptor), socket.AF_INET, socket.SOCK_STREAM) as own,
        ):
            if own.getpeername()[1] == port:
                own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _absent(store: dist.Store, event: str, ranks: Sequence[int]) -> list[int]:
    """Those of the ranks that have not written to the store that they have met the event."""
    return [rank for rank in ranks if not store.check([f"llama/{event}/{rank}"])]


def _names(ranks: Sequence[int]) -> str:
    """Such as "rank 1", "ranks 1, 3"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _limit() -> str:
    return f"{timeout().total_seconds():g} s (LLAMA_TIMEOUT sets this limit)"
