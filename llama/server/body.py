"""Read the JSON body of a request within limits of size, time and depth."""

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from llama.server.errors import ApiError

MAX_DEPTH = 64


async def read_json(request: Request, max_bytes: int, timeout: float) -> Any:
    """The content of the body.

    Raises ApiError: 415 for another content type, 413 for a body above max_bytes, 408 for a body
    that has not arrived after `timeout` seconds, 400 for a body that is not JSON or is nested too
    deeply.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind or 'missing'}, not application/json")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and len(length) < 20 and int(length) > max_bytes:
        raise ApiError(413, f"the body has {length} bytes, but at most {max_bytes} are read")
    data = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                data += part
                if len(data) > max_bytes:
                    raise ApiError(413, f"the body has more than {max_bytes} bytes")
    except ClientDisconnect:
        raise ApiError(499, "the client has gone") from None  # nobody reads this
    except TimeoutError:
        raise ApiError(408, f"the body has not arrived in {timeout:g} seconds") from None
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:  # wrong UTF-8, wrong JSON, or a number with too many digits
        raise ApiError(400, f"the body is no JSON: {str(error).splitlines()[0]}") from None
    _check(content, MAX_DEPTH)
    return content


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _check(content: Any, depth: int) -> None:
    """Raise ApiError if the content is nested deeper than `depth`."""
    if depth == 0:
        raise ApiError(400, f"the body is nested deeper than {MAX_DEPTH} levels")
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            _check(value, depth - 1)
