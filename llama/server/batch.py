"""Run lines of OpenAI's Batch API. They use the classes that the server uses for its calls.

A line is {"custom_id": …, "method": "POST", "url": "/v1/chat/completions", "body": {…}}. Its result
has `custom_id`, `response` with status and body, and `error`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llama.engine.request import Request
from llama.errors import DataError
from llama.generation import Llama
from llama.sampling import SamplingParams
from llama.server.errors import ApiError
from llama.server.prompts import encode, encode_chat
from llama.server.requests import ChatBody, CompletionBody, parse
from llama.server.responses import Answer, Json, chat_choice, text_choice

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class BatchCall:
    """One line: its requests to the engine, and their result.

    seed: seed of the random numbers, if the body has none.
    Raises ApiError for a body that the server would refuse, and DataError for a line with unknown
    keys, another method or another url.
    """

    def __init__(self, llama: Llama, line: Mapping[str, Any], seed: int) -> None:
        if unknown := sorted(line.keys() - {"method", "url", "body"}):
            raise DataError(f"the line has unknown keys: {', '.join(unknown)}")
        if line.get("method", "POST") != "POST" or line["url"] not in (CHAT, TEXT):
            raise DataError(f"the line asks for {line.get('method')} {line['url']!r:.40}, but only "
                            f"POST {CHAT} and {TEXT} are run")  # fmt: skip
        self._llama = llama
        self._body: ChatBody | CompletionBody
        self._prompts: list[Any] = []
        params: SamplingParams
        if line["url"] == CHAT:
            self._body = chat = parse(ChatBody, line.get("body"))
            tokens, params = encode_chat(llama, chat)
            self._tokens = [tokens]
            self._is_continued = [chat.continue_final_message]
        else:
            self._body = text = parse(CompletionBody, line.get("body"))
            self._prompts = text.prompts()
            self._tokens, params = encode(llama, text)
            self._is_continued = [prompt != "" for prompt in self._prompts]
        if self._body.stream:
            raise ApiError(400, "a line of a batch cannot be streamed", "stream")
        self._params = replace(params, seed=seed) if params.seed is None else params

    def submit(self, row: int) -> list[Request]:
        """Submit the requests to the engine. Raises GenerationError if they do not fit."""
        return [
            self._llama.engine.submit(tokens, sample, row, is_continued=continued)
            for tokens, continued in zip(self._tokens, self._is_continued, strict=True)
            for sample in self._params.samples()
        ]

    def result(self, requests: list[Request]) -> Json:
        """The result of the finished requests."""
        llama, body, n = self._llama, self._body, self._params.n
        if isinstance(body, ChatBody):
            answer = Answer("chat.completion", body.model, llama.tokenizer)
            choices = [chat_choice(llama, body, i, r) for i, r in enumerate(requests)]
        else:
            answer = Answer("text_completion", body.model, llama.tokenizer)
            choices = [
                text_choice(llama, body, i, request, self._prompts[i // n])
                for i, request in enumerate(requests)
            ]
        return response_line(200, answer.whole(choices, requests, n))


def failure(error: Exception) -> Json:
    """The result of a line that could not be run."""
    refused = error if isinstance(error, ApiError) else ApiError(400, str(error))
    content = {"code": refused.code or "invalid_request", "message": refused.message}
    return response_line(refused.status, refused.body()) | {"error": content}


def response_line(status: int, body: Json) -> Json:
    return {"response": {"status_code": status, "body": body}, "error": None}
