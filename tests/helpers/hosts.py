"""Several hosts on this machine: namespaces with names, addresses and processes of their own.

The hosts share the file system, as machines do that mount the same folder. Only root can make them.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.network import Network, make_device
from helpers.ranks import run_ranks

IS_POSSIBLE = Path("/dev/net/tun").exists() and os.geteuid() == 0 and shutil.which("ip") is not None
needs_root = pytest.mark.skipif(
    not IS_POSSIBLE, reason="only root may make network namespaces, and needs iproute2"
)

# What the first process of a host does. It ends with this process, because its input ends then, and
# with it all processes of the host end.
START = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2" /etc/hosts
hostname "$1"
ip link set lo up
echo ready
exec cat > /dev/null
"""


class Hosts:
    """Hosts with the names host0, host1 and so on. `network` connects them."""

    def __init__(self, n: int, folder: Path) -> None:
        self.addresses = [f"10.77.0.{i + 1}" for i in range(n)]
        names = folder / "hosts"
        lines = ["127.0.0.1 localhost"]
        lines += [f"{address} host{i}" for i, address in enumerate(self.addresses)]
        names.write_text("\n".join(lines) + "\n")
        self._inits: list[subprocess.Popen[str]] = []
        devices = []
        try:
            for i, address in enumerate(self.addresses):
                self._inits.append(_start(f"host{i}", names))
                device, name = make_device()
                devices.append(device)
                pid = str(self._inits[i].pid)
                _run("ip", "link", "set", name, "netns", pid, "name", "net0")
                _run(*self.on(i, "ip", "address", "add", f"{address}/24", "dev", "net0"))
                _run(*self.on(i, "ip", "link", "set", "net0", "up"))
        except BaseException:
            self._end()
            raise
        self.network = Network(devices, self.addresses)

    def close(self) -> None:
        self._end()
        self.network.close()

    def _end(self) -> None:
        for init in self._inits:
            init.communicate()  # closes its input

    def on(self, host: int, *words: str) -> list[str]:
        """A command that runs the given command on a host, in the present folder."""
        entered = [f"--{kind}={path}" for kind, path in _spaces(self._inits[host].pid).items()]
        return ["nsenter", *entered, "env", f"--chdir={os.getcwd()}", *words]

    def lose(self, host: int) -> None:
        """The power of a host fails: its network is down, and all its processes are killed."""
        self.network.line.down.add(host)
        self._inits[host].communicate()

    def run_ranks(self, folder: Path, function: Any, *args: Any) -> list[Any]:
        """`helpers.ranks.run_ranks` with one rank on each host."""
        pids = [init.pid for init in self._inits]
        return run_ranks(len(pids), folder, _on_its_host, pids, self.addresses[0], function, args)


def _start(name: str, names: Path) -> subprocess.Popen[str]:
    spaces = ("--net", "--mount", "--uts", "--pid", "--fork")
    init = subprocess.Popen(
        ["unshare", *spaces, "sh", "-c", START, "sh", name, str(names)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert init.stdout is not None
    assert init.stdout.readline() == "ready\n", f"{name} did not start"
    return init


def _spaces(pid: int) -> dict[str, str]:
    """The files of a host's namespaces. The process is the parent of the host's first one."""
    files = {"net": "net", "uts": "uts", "pid": "pid_for_children", "mount": "mnt"}
    return {kind: f"/proc/{pid}/ns/{file}" for kind, file in files.items()}


def _run(*words: str) -> None:
    subprocess.run(words, check=True)


def _on_its_host(pids: Sequence[int], first: str, function: Any, args: Any) -> Any:
    """In a rank: enter the host of its number, and call the function there."""
    pid, folder = pids[int(os.environ["RANK"])], os.getcwd()
    libc = ctypes.CDLL(None, use_errno=True)
    for space in [os.open(path, os.O_RDONLY) for path in _spaces(pid).values()]:
        if libc.setns(space, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(space)
    if child := os.fork():  # only children of this process are among the host's processes
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    os.chdir(folder)
    os.environ |= {"MASTER_ADDR": first, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return function(*args)


@contextlib.contextmanager
def running(n: int, folder: Path) -> Iterator[Hosts]:
    """Hosts that exist during the block."""
    hosts = Hosts(n, folder)
    try:
        yield hosts
    finally:
        hosts.close()
