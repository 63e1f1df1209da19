"""Run `llama` commands and example scripts as on Windows, as far as Linux can imitate it.

    python tests/helpers/as_on_windows.py '[["doctor"], ["example_text_completion.py"]]'

The argument is a JSON list: the words of each command line. They run one after the other, up to the
first that fails.

What Windows lacks is taken away: POSIX modules and functions, /proc, /dev/shm, the C library by
`CDLL(None)`, GNU OpenMP. A file that is open or mapped cannot be replaced, renamed or deleted. Text
files without an encoding are cp1252, and have CRLF line ends.
"""

import builtins
import ctypes
import importlib
import importlib.abc
import importlib.machinery
import io
import json
import mmap
import os
import pathlib
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import filelock  # noqa: F401  # these libraries have ways of their own on Windows
import numba  # noqa: F401
import torch
import torch.distributed
import torch.utils.data

MODULES = {"fcntl", "resource", "termios", "tty", "readline", "grp", "pwd", "syslog"}
FUNCTIONS = (
    "fork",
    "posix_fallocate",
    "memfd_create",
    "sysconf",
    "sysconf_names",
    "sched_getaffinity",
    "getuid",
    "mkfifo",
    "killpg",
)
SIGNALS = ("SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCONT")
HIDDEN = ("/proc", "/sys", "/dev/shm")


class NoModule(importlib.abc.MetaPathFinder):
    """Refuses the modules that Windows lacks to the package and to what it imports from now on."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def caller_is_llama() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("llama")


def take_away() -> None:
    """Remove modules, functions, signals and parts of the C library."""
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, NoModule())
    for name in FUNCTIONS:
        vars(os).pop(name, None)
    for name in SIGNALS:
        vars(signal).pop(name, None)
    vars(mmap).pop("MADV_HUGEPAGE", None)
    usual = ctypes.CDLL

    def library(name: str | None, *args: Any, **options: Any) -> Any:
        if caller_is_llama():
            if name is None:
                raise TypeError("argument of type 'NoneType' is not iterable")
            return object()  # has none of the functions of GNU OpenMP
        return usual(name, *args, **options)

    vars(ctypes)["CDLL"] = library
    real_stat = os.stat

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if isinstance(path, str | pathlib.PurePath) and str(path).startswith(HIDDEN):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real_stat(path, *args, **options)

    vars(os)["stat"] = stat  # pathlib asks it


def in_use(path: Any) -> bool:
    """Whether this process has the file open or mapped, or a file in that folder."""
    target = os.path.realpath(path)
    fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    opened = {os.readlink(fd) for fd in fds if os.path.lexists(fd)}
    with REAL_OPEN("/proc/self/maps") as maps:
        opened |= {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/") > 0}
    return any(name == target or name.startswith(target + "/") for name in opened)


def hold_files_that_are_in_use() -> None:
    def guarded(function: Callable[..., Any], n_paths: int) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            for path in args[:n_paths]:
                if os.path.lexists(path) and in_use(path):
                    raise PermissionError(13, "The file is in use by a process", str(path))
            return function(*args, **options)

        return call

    for name, n_paths in (
        ("replace", 2),
        ("rename", 2),
        ("unlink", 1),
        ("remove", 1),
        ("rmdir", 1),
    ):
        vars(os)[name] = guarded(getattr(os, name), n_paths)
    vars(shutil)["_use_fd_functions"] = False  # rmtree by paths, as on Windows


REAL_OPEN = io.open


def write_text_as_windows() -> None:
    def windows_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
        errors: str | None = None, newline: str | None = None, *rest: Any, **options: Any,
    ) -> Any:  # fmt: skip
        if "b" not in mode:
            encoding = "cp1252" if encoding in (None, "locale") else encoding
            newline = "\r\n" if newline is None and "r" not in mode else newline
        return REAL_OPEN(file, mode, buffering, encoding, errors, newline, *rest, **options)

    vars(builtins)["open"] = vars(io)["open"] = windows_open


def run(words: list[str]) -> None:
    if words[0].endswith(".py"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    else:
        from llama.__main__ import main

        sys.argv = ["llama", *words]
        main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    commands = json.loads(sys.argv[1])
    if any(words[0] == "evaluate" for words in commands):
        for name in ("datasets", "huggingface_hub.hf_file_system", "lm_eval.evaluator"):
            importlib.import_module(name)
    take_away()
    hold_files_that_are_in_use()
    write_text_as_windows()
    for words in commands:
        run(words)
