"""A server on a real socket of this machine, in a thread."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from llama import Llama
from llama.server.app import Settings
from llama.server.run import Server, bound_socket, make_server, run_server

MODEL = "tales"


@contextlib.contextmanager
def running(llama: Llama, timeout: float = 60.0, **options: Any) -> Iterator[tuple[Server, str]]:
    """Yields the server and its address, http://127.0.0.1:PORT."""
    settings = Settings(MODEL, timeout, max_body=1 << 20, read_timeout=options.pop("read", 5.0))
    server = make_server(llama, settings, **options)
    with bound_socket("127.0.0.1", 0) as bound:
        bound.listen()
        thread = threading.Thread(target=run_server, args=(server, bound))
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.end_now()
            thread.join(timeout=20)
            assert not thread.is_alive()
