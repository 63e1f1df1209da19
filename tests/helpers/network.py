"""A network between the hosts of `helpers.hosts`, which can lose packets, delay them and be down.

Each host has a TUN device. What a host sends is read here, and written to the host that it is for.
"""

import fcntl
import heapq
import ipaddress
import os
import random
import select
import struct
import threading
import time
from dataclasses import dataclass, field

SET_INTERFACE, IS_TUN, HAS_NO_HEADER = 0x400454CA, 0x0001, 0x1000  # of linux/if_tun.h
LONGEST = 65536  # bytes of a packet
PAUSE = 0.05  # seconds after which a change of the state below is noticed


@dataclass
class Line:
    """The state of the network, the same for all hosts. It may be changed at any time.

    loss: the share of packets that are lost. delay: seconds from one host to another.
    rate: bytes a second that a host can send; None: as many as it likes.
    down: numbers of the hosts that nothing reaches or leaves.
    """

    loss: float = 0.0
    delay: float = 0.0
    rate: float | None = None
    down: set[int] = field(default_factory=set)


def make_device() -> tuple[int, str]:
    """A TUN device of the system: its file descriptor and its name. It goes when that is closed."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", b"llama%d", IS_TUN | HAS_NO_HEADER)
    name = fcntl.ioctl(device, SET_INTERFACE, request)[:16]
    return device, name.rstrip(b"\0").decode()


class Network:
    """Carries packets between TUN devices, in a thread.

    devices: the file descriptor of each host. addresses: of the hosts.

    Attributes:
        line: what happens to packets.
        n_bytes: of all packets that hosts sent so far.
    """

    def __init__(self, devices: list[int], addresses: list[str]) -> None:
        self.line = Line()
        self.n_bytes = 0
        self._devices = devices
        self._hosts = {ipaddress.ip_address(text).packed: i for i, text in enumerate(addresses)}
        self._waiting: list[tuple[float, int, int, bytes]] = []  # due, number, host, packet
        self._n_packets = 0
        self._free_at = [0.0] * len(devices)  # when a host has sent what it had to send
        self._random = random.Random(1)
        self._is_closed = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._is_closed = True
        self._thread.join()
        for device in self._devices:
            os.close(device)

    def _run(self) -> None:
        while not self._is_closed:
            wait = self._waiting[0][0] - time.monotonic() if self._waiting else PAUSE
            ready, _, _ = select.select(self._devices, [], [], min(max(wait, 0), PAUSE))
            for device in ready:
                try:
                    self._take(self._devices.index(device), os.read(device, LONGEST))
                except OSError:  # the host is gone
                    time.sleep(PAUSE)
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                self._deliver(*heapq.heappop(self._waiting)[2:])

    def _take(self, source: int, packet: bytes) -> None:
        """Take a packet from a host, and note when it must arrive, if it arrives."""
        line, target = self.line, self._hosts.get(packet[16:20])  # the address in an IPv4 header
        if packet[0] >> 4 != 4 or target is None:
            return
        self._n_packets += 1
        self.n_bytes += len(packet)
        if source in line.down or self._random.random() < line.loss:
            return
        sent = time.monotonic()
        if line.rate is not None:
            sent = self._free_at[source] = (
                max(sent, self._free_at[source]) + len(packet) / line.rate
            )
        heapq.heappush(self._waiting, (sent + line.delay, self._n_packets, target, packet))

    def _deliver(self, target: int, packet: bytes) -> None:
        if target not in self.line.down:
            try:
                os.write(self._devices[target], packet)
            except OSError:  # the host is gone, or has no room for more
                return
