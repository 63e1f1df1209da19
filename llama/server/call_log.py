"""One line of JSON for each call, on standard error. `llama serve --log_calls` writes them.

A line has no text of a prompt or an answer, no query and no header.
"""

import json
import sys
import time
from datetime import UTC, datetime

from llama.server.security import App, Receive, Scope, Send

MAX_PATH = 200  # characters of a path


class CallLog:
    """An ASGI middleware that logs the time, method, path, status and duration of each call.

    The status is null if the client left before the answer began.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, start, status = datetime.now(UTC), time.perf_counter(), None

        async def noted(message: dict[str, object]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)  # type: ignore[arg-type]
        finally:
            line = {
                "time": began.isoformat(timespec="milliseconds"),
                "method": scope["method"],
                "path": scope["path"][:MAX_PATH],
                "status": status,
                "seconds": round(time.perf_counter() - start, 4),
            }
            print(json.dumps(line), file=sys.stderr, flush=True)
