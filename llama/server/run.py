"""Run the server: sockets, signals, and the ranks of the model."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama.errors import MAX_WHOLE_NUMBER, ConfigError, require_number
from llama.generation import Llama
from llama.memory import size, used_memory

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from llama.server.app import Routes, Settings
    from llama.server.call_log import CallLog
    from llama.server.metrics import Metrics
    from llama.server.security import LOOPBACK, App, Security
    from llama.server.service import Service
except ImportError as error:
    raise ConfigError(
        f"the server needs {error.name}: pip install 'llama-reference[serve]'"
    ) from error

log = logging.getLogger("llama")

GRACE = 25.0  # seconds that running calls have after a signal
REQUEST_TIMEOUT = 30.0  # seconds in which the head of a connection's first request must arrive
DEATH_EXIT_CODE = 3
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s,]+")


class _Protocol(H11Protocol):
    """Close a connection that sends no whole request head in time. uvicorn has no such limit."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT, self._close_if_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """A server that lets running calls finish after the first signal, and ends at the second."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.service.is_stopping:
            self.end_now()
            return
        self.begin_stopping()

    def end_now(self) -> None:
        """Drop all connections and exit."""
        self.force_exit = self.should_exit = True

    def begin_stopping(self) -> None:
        """Take no new calls, and exit when the running ones have ended."""
        self.service.is_stopping = True
        log.info("Stopping: running calls may finish within %.0f seconds", GRACE)
        threading.Thread(target=self._end_when_idle, daemon=True).start()

    def _end_when_idle(self) -> None:
        waited = threading.Event()
        for _ in range(int(GRACE * 20)):
            if self.service.is_idle or self.force_exit:
                break
            waited.wait(0.05)
        self.should_exit = True


def check_access(host: str, api_key: str | None) -> None:
    """Raise ConfigError if other machines can reach the address and there is no API key."""
    if not is_loopback(host) and not api_key:
        raise ConfigError(
            f"host {host} can be reached from other machines: give an --api_key, or serve on "
            "127.0.0.1"
        )


def check_limits(port: int, max_waiting: int, timeout: float, origins: tuple[str, ...]) -> None:
    """Raise ConfigError for a number out of its range, and for an origin that no browser sends."""
    if not 0 <= port < 65536:
        raise ConfigError(f"port is {port}: it must be 0 to 65535")
    if not 0 <= max_waiting <= MAX_WHOLE_NUMBER:
        raise ConfigError(f"max_waiting is {max_waiting}: it must be 0 or above")
    require_number("timeout", timeout)
    for origin in origins:
        if not ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"allow_origin has {origin!r}: an origin is such as https://example.org:8443"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def serve(
    llama: Llama,
    name: str,
    host: str,
    bound: socket.socket | None,
    api_key: str | None = None,
    max_waiting: int = 64,
    timeout: float = 600.0,
    origins: tuple[str, ...] = (),
    has_metrics: bool = False,
    has_log: bool = False,
    date: str | None = None,
) -> int:
    """Serve a model until a signal comes or the engine fails. The first rank serves, and the other
    ranks follow its engine. Returns the exit code.

    name: the model's name in the API. bound: the first rank's socket, from `bound_socket`. See
        `llama serve --help` for the other arguments.
    """
    if bound is None:
        with llama.runner.leading():
            return 0
    hosts = LOOPBACK if is_loopback(host) else None
    settings = Settings(name, timeout, date=date)
    server = make_server(
        llama, settings, max_waiting, api_key, hosts, origins, has_metrics, has_log
    )
    try:
        bound.listen()  # a client that connects from now on waits, and is not refused
    except OSError as error:  # another program listens since the socket was bound
        raise ConfigError(f"cannot serve on {host}: {error.strerror}") from error
    log.info(start_line(llama, name, bound))
    run_server(server, bound)
    return 0 if server.service.is_alive else DEATH_EXIT_CODE


def make_server(
    llama: Llama,
    settings: Settings,
    max_waiting: int = 64,
    api_key: str | None = None,
    hosts: tuple[str, ...] | None = LOOPBACK,
    origins: tuple[str, ...] = (),
    has_metrics: bool = False,
    has_log: bool = False,
) -> Server:
    """A server that is not running yet; see `serve` and `Security` for the arguments."""
    service = Service(llama, max_waiting)
    routes: App = Routes(service, settings).app()
    if has_metrics:
        routes = Metrics(routes, service)
    app: App = Security(routes, api_key, hosts, origins)
    if has_log:
        app = CallLog(app)
    config = uvicorn.Config(
        app, http=_Protocol, ws="none", lifespan="off", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    return Server(config, service)


def run_server(server: Server, bound: socket.socket) -> None:
    """Run until the server is told to exit, then end the engine's thread."""
    server.service.start(server.end_now)
    asyncio.run(server.serve(sockets=[bound]))
    server.service.stop()


def start_line(llama: Llama, name: str, bound: socket.socket) -> str:
    """What is served, where, and in how much memory."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    engine = llama.engine
    memory = used_memory(llama.model.device).get("peak")
    used = "" if memory is None else f", {size(memory)} of memory"
    return (
        f"Serving {name} and a chat page on http://{shown}:{port}: context "
        f"{engine.max_seq_len:,} tokens, {engine.cache.max_batch_size} slots{used}. Ctrl-C stops."
    )


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that does not listen yet. Raises ConfigError if the address cannot be used."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host}: {error.strerror}") from error
    with bound:
        try:
            if os.name == "posix":  # on Windows this option would let two servers share a port
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            raise ConfigError(f"cannot serve on {host}:{port}: {error.strerror}") from error
        yield bound


def model_name(ckpt_dir: str | None) -> str:
    """The name of a folder or an id, for the API."""
    if ckpt_dir is None:
        return "bundled"
    return ckpt_dir if "/" in ckpt_dir and not Path(ckpt_dir).exists() else Path(ckpt_dir).name


def exit_with(code: int) -> None:
    """End the process. If the engine has failed, do not wait for its thread, which may hang."""
    if code == DEATH_EXIT_CODE:
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
