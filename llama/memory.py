"""Memory: how much is free, how much this process uses, and huge pages."""

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(n_bytes: float) -> str:
    """A number of bytes as text: 1536 -> 1.50 KiB."""
    for unit in UNITS:
        if n_bytes < 1024 or unit == UNITS[-1]:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1024
    raise AssertionError


def available_memory(device: torch.device, root: Path = Path("/")) -> float:
    """Bytes that can still be allocated on a device; infinite if the system does not report it.

    root: where /proc and /sys are.
    """
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unused + cached  # PyTorch's allocator reuses its cached memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        free = _read_numbers(meminfo).get("MemAvailable:", math.inf) * 1024
        return min([free, *_free_in_cgroups(root), *_free_in_limits(root)])
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # macOS: total memory, used or free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def used_memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process uses. A key is missing if the system does not report the number.

    On a GPU "peak" is the most that PyTorch allocated. Elsewhere "private" is the anonymous memory
    now, and "peak" the largest resident size so far, pages of mapped files included."""
    if device.type == "cuda":
        return {"peak": torch.cuda.max_memory_allocated(device)}
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    numbers = dict(line.split(":", 1) for line in status.read_text().splitlines())
    found = {"private": numbers["RssAnon"], "peak": numbers["VmHWM"]}
    return {name: int(text.split()[0]) * 1024 for name, text in found.items()}


def with_huge_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to use pages of 2 MiB for a tensor. Call it before the tensor is filled.

    Linux allocates a page when it is first written to. With small pages these page faults take most
    of the time of filling a tensor.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        if length > 0:  # the system may ignore this advice
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


def _read_numbers(path: Path) -> dict[str, int]:
    """Read a file whose lines are a name and a number."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}


def _free_in_limits(root: Path) -> Iterator[float]:
    """Free bytes below this process's limits of its address space and of its data (`ulimit`)."""
    status = root / "proc/self/status"
    with contextlib.suppress(ImportError, OSError):
        import resource  # not on Windows

        lines = (line.split() for line in status.read_text().splitlines())
        used = {words[0]: int(words[1]) * 1024 for words in lines if words[0].startswith("Vm")}
        for name, kind in (("VmSize:", resource.RLIMIT_AS), ("VmData:", resource.RLIMIT_DATA)):
            limit, _ = resource.getrlimit(kind)
            if limit != resource.RLIM_INFINITY:
                yield limit - used[name]


@dataclass(frozen=True)
class ControlGroups:
    """The file names of one version of Linux control groups, and memory.stat's keys for page cache.

    The page cache counts as used, but Linux frees it when memory is needed.
    """

    mount: str
    limit_file: str
    usage_file: str
    page_cache_keys: tuple[str, str]

    def free(self, folder: Path) -> float:
        """Free bytes below a group's limit; infinite if no limit can be read."""
        try:
            limit = int((folder / self.limit_file).read_text())  # "max": no limit
            used = int((folder / self.usage_file).read_text())
            stat = _read_numbers(folder / "memory.stat")
        except (OSError, ValueError):
            return math.inf
        return limit - used + sum(stat.get(name, 0) for name in self.page_cache_keys)


# Each key is the controller's name in a line of /proc/self/cgroup. The name is empty in version 2
# (0::/path) and "memory" in version 1 (4:memory:/path).
CONTROL_GROUPS = {
    "": ControlGroups(
        "sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")
    ),
    "memory": ControlGroups(
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}  # fmt: skip


def _free_in_cgroups(root: Path) -> Iterator[float]:
    """Free bytes of this process's control group, and of each group that contains it."""
    mine = root / "proc/self/cgroup"
    for line in mine.read_text().splitlines() if mine.exists() else ():
        _, controller, path = line.split(":", 2)
        if controller in CONTROL_GROUPS:
            groups = CONTROL_GROUPS[controller]
            top = root / groups.mount
            # In a container the path may be a path of the host. Then only the mount point exists.
            group = Path(os.path.normpath(f"{top}/{path}"))
            for folder in (group, *group.parents):
                if folder.is_relative_to(top):
                    yield groups.free(folder)
