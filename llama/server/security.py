"""Checks of Host, Origin and API key before any route. A call that fails a check is refused."""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from llama.server.errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
OPEN_PATHS = ("/", "/health")  # these need no API key
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY")]


class Security:
    """An ASGI middleware.

    Args:
        api_key: the key that every path but OPEN_PATHS needs; None: no key.
        hosts: the names that the Host header may have; None: any. A server on the loopback device
            must accept only the names in LOOPBACK. A call with another name comes from a web page
            that made its own name resolve to this machine (DNS rebinding).
        origins: origins of pages that may call, besides pages of this server.
    """

    def __init__(
        self, app: App, api_key: str | None, hosts: tuple[str, ...] | None, origins: tuple[str, ...]
    ) -> None:
        self._app, self._hosts, self._origins = app, hosts, origins
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        origin = headers.get(b"origin", b"").decode("latin-1")
        allowed = origin if origin in self._origins else None

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
                if allowed is not None:
                    message["headers"] += [
                        (b"access-control-allow-origin", allowed.encode("latin-1")),
                        (b"vary", b"Origin"),
                    ]
            await send(message)

        try:
            self._check(scope, headers, origin)
        except ApiError as error:
            await _refuse(error, send_with_headers)
            return
        if scope["method"] == "OPTIONS" and allowed is not None:
            await _preflight(send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check(self, scope: Scope, headers: dict[bytes, bytes], origin: str) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is not None and name not in self._hosts:
            raise ApiError(403, f"the Host {host!r} is not a name of this server")
        is_own = origin in (f"http://{host}", f"https://{host}")
        if origin and not is_own and origin not in self._origins:
            raise ApiError(403, f"pages of {origin} may not call this server")
        if self._key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")


async def _refuse(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", b"authorization, content-type"),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
