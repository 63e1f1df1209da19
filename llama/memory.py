"""Memory: how much is free, how much this process uses, and in which pages."""

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


def available_memory(device: torch.device, root: Path = Path("/")) -> float:
    """Bytes that can still be allocated on a device; infinite where the system does not say.

    root: where /proc and /sys are.
    """
    if device.type == "cuda":
        unused, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return unused + kept  # PyTorch keeps freed memory for itself
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    meminfo = root / "proc/meminfo"
    if meminfo.exists():
        free = _numbers(meminfo).get("MemAvailable:", math.inf) * 1024
        return min([free, *_left_in_cgroups(root)])
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # macOS: all there is, used or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def used_memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process, as far as the system says: "private", its own memory now, and "peak",
    the largest resident size so far, which includes pages of mapped files."""
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

    A page is made when it is first touched. With small pages that is most of the time of filling.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (tensor.data_ptr() + tensor.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        if length > 0:  # the system may ignore this advice
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


def _numbers(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {words[0]: int(words[1]) for words in map(str.split, path.read_text().splitlines())}


@dataclass(frozen=True)
class ControlGroups:
    """The files of one version of Linux' control groups: limit, usage, and pages of files.

    Pages of files count as used, but are freed when memory is needed.
    """

    mount: str
    limit: str
    used: str
    files: tuple[str, str]

    def left(self, folder: Path) -> float:
        """Bytes left below a group's limit; infinite where no limit can be read."""
        try:
            limit = int((folder / self.limit).read_text())  # "max": no limit
            used = int((folder / self.used).read_text())
            stat = _numbers(folder / "memory.stat")
        except (OSError, ValueError):
            return math.inf
        return limit - used + sum(stat.get(name, 0) for name in self.files)


# By the controller's name in /proc/self/cgroup: 0::/path, or 4:memory:/path.
CONTROL_GROUPS = {
    "": ControlGroups(
        "sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")
    ),
    "memory": ControlGroups(
        "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}  # fmt: skip


def _left_in_cgroups(root: Path) -> Iterator[float]:
    """Bytes left to this process's control group, and to each group around it."""
    mine = root / "proc/self/cgroup"
    for line in mine.read_text().splitlines() if mine.exists() else ():
        _, controller, path = line.split(":", 2)
        if controller in CONTROL_GROUPS:
            groups = CONTROL_GROUPS[controller]
            top = root / groups.mount
            # In a container the path may be the host's, of which only the top is visible.
            group = Path(os.path.normpath(f"{top}/{path}"))
            for folder in (group, *group.parents):
                if folder.is_relative_to(top):
                    yield groups.left(folder)
