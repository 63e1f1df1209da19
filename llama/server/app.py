"""The routes: OpenAI's API over one `Service`, and the chat page.

Only Starlette's plain ASGI parts are used. A call is checked completely before the first byte of
its answer is sent. If a stream fails later, its last event is the error.
"""

import asyncio
import contextlib
import importlib.resources
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llama.errors import LlamaError
from llama.sampling import SamplingParams
from llama.server.body import read_json
from llama.server.errors import ApiError
from llama.server.openapi import describe
from llama.server.prompts import dialog_of, encode, encode_chat
from llama.server.requests import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse,
)
from llama.server.responses import (
    Answer,
    Json,
    chat_choice,
    sse,
    text_choice,
    usage,
)
from llama.server.service import Call, Service

Endpoint = Callable[[Request], Awaitable[Response]]
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Settings:
    """Settings of the server. model: its name in the API. timeout: the most seconds of one call."""

    model: str
    timeout: float = 600.0
    max_body: int = 4 << 20  # bytes
    read_timeout: float = 30.0  # seconds in which a body must arrive
    date: str | None = None  # for chats whose body has no date; "today": the current date

    def today(self) -> str | None:
        return time.strftime("%d %b %Y") if self.date == "today" else self.date


class Routes:
    """The endpoints over a service."""

    def __init__(self, service: Service, settings: Settings) -> None:
        self.service, self.settings = service, settings
        self.llama = service.llama
        self.tokenizer = service.llama.tokenizer
        self._created = int(time.time())
        self._page = (
            importlib.resources.files("llama.server")
            .joinpath("page.html")
            .read_text(encoding="utf-8")
        )

    def app(self) -> Starlette:
        """The ASGI application."""
        routes: list[tuple[str, str, Endpoint]] = [
            ("/", "GET", self.page),
            ("/health", "GET", self.health),
            ("/openapi.json", "GET", self.openapi),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{id:path}", "GET", self.one_model),
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/completions", "POST", self.completions),
            ("/tokenize", "POST", self.tokenize),
            ("/detokenize", "POST", self.detokenize),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _api_error,
            LlamaError: _llama_error,
            404: _no_such_route,
            405: _wrong_method,
        }
        return Starlette(
            routes=[Route(path, endpoint, methods=[method]) for path, method, endpoint in routes],
            exception_handlers=handlers,
        )

    # ---- page, health and models --------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        return HTMLResponse(
            self._page,
            headers={
                "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
                "style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
                "form-action 'none'; frame-ancestors 'none'",
                "Referrer-Policy": "no-referrer",
            },
        )

    async def health(self, request: Request) -> Response:
        if not self.service.is_alive:
            return JSONResponse({"status": "the engine has failed"}, 503)
        if self.service.is_stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok", "open_requests": self.service.n_open})

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(describe(self.names))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(n) for n in self.names]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["id"]
        self._check_model(name)
        return JSONResponse(self._model(name))

    @property
    def names(self) -> list[str]:
        """What `model` may be: the model's name, and those of its adapters."""
        return [self.settings.model, *self.llama.engine.adapters.names]

    def _model(self, name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "llama-reference",
            "max_model_len": self.llama.engine.max_seq_len,
        }

    def _check_model(self, name: str) -> None:
        if name not in self.names:
            served = " or ".join(map(repr, self.names))
            message = f"the model {name!r} is not served: {served} is"
            raise ApiError(404, message, "model", "model_not_found")

    # ---- tokens -------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        body = parse(TokenizeBody, await self._read(request))
        if body.model is not None:
            self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "the body must have either a prompt or messages", "prompt")
        if body.messages is not None:
            tools = [tool.tool() for tool in body.tools or ()]
            date = body.date or self.settings.today()
            tokens = self.llama.encode_dialog(dialog_of(body.messages), False, tools, date)
        else:
            assert body.prompt is not None
            tokens = self.tokenizer.encode(body.prompt, bos=body.add_special_tokens, eos=False)
        special = {i: name for name, i in self.tokenizer.special_tokens.items()}
        texts = [
            special.get(i) or self.tokenizer.token_bytes(i).decode("utf-8", "replace")
            for i in tokens
        ]
        return JSONResponse(
            {
                "tokens": tokens,
                "texts": texts,
                "special": [i in special for i in tokens],
                "count": len(tokens),
                "max_model_len": self.llama.engine.max_seq_len,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        body = parse(DetokenizeBody, await self._read(request))
        if body.model is not None:
            self._check_model(body.model)
        return JSONResponse({"prompt": self.tokenizer.decode(body.tokens)})

    # ---- chat ---------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        body = parse(ChatBody, await self._read(request))
        self._check_model(body.model)
        date = self.settings.today()
        # In a thread, because compiling a schema may take a second.
        tokens, params = await asyncio.to_thread(encode_chat, self.llama, body, date)
        call = self.service.submit([tokens], params, [body.continue_final_message])
        answer = Answer(
            "chat.completion", body.model, self.tokenizer, body.offered(),
            only_first=body.parallel_tool_calls is False,
        )  # fmt: skip
        if body.stream:
            return self._stream(answer, call, params, body.includes_usage, body.logprobs is True)
        await self._finish(request, call)
        choices = [
            chat_choice(self.llama, body, index, finished)
            for index, finished in enumerate(call.requests)
        ]
        return JSONResponse(answer.whole(choices, call.requests, params.n))

    # ---- text completion ----------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        body = parse(CompletionBody, await self._read(request))
        self._check_model(body.model)
        prompts = body.prompts()
        if body.stream and body.echo:
            raise ApiError(400, "a stream has no echo: ask for one of them", "echo")
        tokens, params = encode(self.llama, body)
        call = self.service.submit(tokens, params, [prompt != "" for prompt in prompts])
        answer = Answer("text_completion", body.model, self.tokenizer)
        if body.stream:
            return self._stream(
                answer, call, params, body.includes_usage, body.logprobs is not None
            )
        await self._finish(request, call)
        choices = [
            text_choice(self.llama, body, index, finished, prompts[index // params.n])
            for index, finished in enumerate(call.requests)
        ]
        return JSONResponse(answer.whole(choices, call.requests, params.n))

    # ---- running a call -----------------------------------------------------------------------

    async def _read(self, request: Request) -> Any:
        return await read_json(request, self.settings.max_body, self.settings.read_timeout)

    async def _finish(self, request: Request, call: Call) -> None:
        """Wait for the end of all requests. Cancel them if the client goes or the time is up."""

        async def run() -> None:
            async for _ in call:
                pass

        async def wait_for_disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(run()), asyncio.create_task(wait_for_disconnect())]
        try:
            done, _ = await asyncio.wait(
                tasks, timeout=self.settings.timeout, return_when=asyncio.FIRST_COMPLETED
            )
            if tasks[0] in done:
                tasks[0].result()  # raises the error if the call failed
            elif done:
                raise ApiError(499, "the client has gone")  # nobody reads this
            else:
                raise ApiError(504, f"no answer after {self.settings.timeout:g} seconds")
        finally:
            for task in tasks:
                task.cancel()
            if call.n_open:
                call.cancel()

    def _stream(
        self, answer: Answer, call: Call, params: SamplingParams, usage_too: bool, logprobs: bool
    ) -> Response:
        async def body() -> AsyncIterator[bytes]:
            try:
                async with asyncio.timeout(self.settings.timeout):
                    async for content in self._chunks(answer, call, params, usage_too, logprobs):
                        yield content
            except (ApiError, TimeoutError) as error:
                if isinstance(error, TimeoutError):
                    error = ApiError(504, f"no end after {self.settings.timeout:g} seconds")
                yield sse(error.body())
            finally:
                if call.n_open:
                    call.cancel()

        return StreamingResponse(body(), media_type="text/event-stream", headers=STREAM_HEADERS)

    async def _chunks(
        self, answer: Answer, call: Call, params: SamplingParams, usage_too: bool, logprobs: bool
    ) -> AsyncIterator[bytes]:
        more = {"usage": None} if usage_too else {}
        for choice in answer.opening(call.n_open):
            yield sse(answer.chunk([choice], **more))
        async for event in call:
            for choice in answer.choices_of(event, logprobs):
                yield sse(answer.chunk([choice], **more))
        if usage_too:
            yield sse(answer.chunk([], usage=usage(call.requests, params.n)))
        yield sse("[DONE]")


def _error_response(error: ApiError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(error.body(), error.status, headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _llama_error(request: Request, error: Exception) -> Response:
    """A mistake that the library found: in the dialog, the prompt or an option."""
    return _error_response(ApiError(400, str(error)))


async def _no_such_route(request: Request, error: Exception) -> Response:
    return _error_response(ApiError(404, f"there is no {request.url.path}"))


async def _wrong_method(request: Request, error: Exception) -> Response:
    with contextlib.suppress(AttributeError):
        allowed = error.headers["Allow"]  # type: ignore[attr-defined]
        message = f"{request.url.path} takes {allowed}, not {request.method}"
        return JSONResponse(ApiError(405, message).body(), 405, {"Allow": allowed})
    return _error_response(ApiError(405, f"{request.url.path} does not take {request.method}"))
