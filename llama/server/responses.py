"""Answers in OpenAI's form, made from the engine's requests and events."""

import itertools
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from llama.engine.request import Event, FinishReason, Request
from llama.generation import Llama
from llama.server.requests import ChatBody, CompletionBody
from llama.tokenizer import Tokenizer
from llama.tool_calls import CallReader, read_calls
from llama.tools import Tool, ToolCall

Json = dict[str, Any]


class Answer:
    """The answer to one call: whole, or as chunks.

    kind: "chat.completion" or "text_completion". tools: the tools that a chat's answer may call.
    only_first: if an answer has several calls, only the first is returned.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        tokenizer: Tokenizer,
        tools: Sequence[Tool] = (),
        only_first: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._tools, self._only_first = tools, only_first
        self._readers: dict[int, CallReader] = {}  # one for each sample
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        self.is_chat = kind == "chat.completion"
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: list[Json], requests: Sequence[Request], n: int) -> Json:
        return {**self._head, "choices": choices, "usage": usage(requests, n)}

    def chunk(self, choices: list[Json], **more: Any) -> Json:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **more}

    def opening(self, n: int) -> list[Json]:
        """The choices that open a stream of n samples. In a chat, each names the role. A text
        completion has none."""
        delta = {"role": "assistant", "content": ""}
        return [_delta(index, delta) for index in range(n)] if self.is_chat else []

    def choices_of(self, event: Event, has_logprobs: bool) -> list[Json]:
        """The choices of one event: its text, if there is any, and its end."""
        logprobs = None
        if has_logprobs and event.token is not None:
            assert event.logprob is not None
            build = chat_logprobs if self.is_chat else text_logprobs
            logprobs = build(self._tokenizer, [event.token], [event.logprob], [event.top_logprobs])
        reason = None
        if event.finish_reason is not None:
            reason = _reason(event.finish_reason)
        if not self.is_chat:
            has_text = bool(event.text) or logprobs is not None
            choice = {"text": event.text, "logprobs": logprobs, "finish_reason": reason}
            return [{"index": event.row, **choice}] if has_text or reason else []
        reader = self._readers.setdefault(event.row, CallReader(self._tools))
        text = reader.push(event.text)
        calls: list[Json] = []
        if reason is not None:
            rest, found = reader.finish()
            text += rest
            calls = tool_calls(found, self._only_first)
        choices = []
        if text or logprobs is not None:
            choices.append(_delta(event.row, {"content": text}, logprobs=logprobs))
        for i, call in enumerate(calls):
            choices.append(_delta(event.row, {"tool_calls": [{"index": i, **call}]}))
        if reason is not None:
            choices.append(_delta(event.row, {}, "tool_calls" if calls else reason))
        return choices


def usage(requests: Sequence[Request], n: int) -> Json:
    """The counts of tokens. A prompt counts once, however many samples `n` it has."""
    prompt = sum(len(request.prompt_tokens) for request in requests[::n])
    completion = sum(len(request.tokens) for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.n_reused for r in requests[::n])},
    }


def tool_calls(calls: Sequence[ToolCall], only_first: bool) -> list[Json]:
    """Calls in OpenAI's form, with ids."""
    return [
        {
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in (calls[:1] if only_first else calls)
    ]


def chat_choice(llama: Llama, body: ChatBody, index: int, finished: Request) -> Json:
    """A whole answer to a dialog."""
    message: Json = {**llama.formatter.decode_message(finished.tokens, finished.stop_token)}
    message |= {"content": finished.text, "refusal": None}
    reason = _reason(finished.finish_reason)
    if found := read_calls(finished.text, body.offered()):
        calls = tool_calls(found, body.parallel_tool_calls is False)
        message |= {"content": None, "tool_calls": calls}
        reason = "tool_calls"
    logprobs = None
    if body.logprobs:
        logprobs = chat_logprobs(
            llama.tokenizer, finished.tokens, finished.logprobs, finished.top_logprobs
        )
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": reason,
    }


def text_choice(
    llama: Llama, body: CompletionBody, index: int, finished: Request, prompt: str | Sequence[int]
) -> Json:
    """A whole completion of `prompt`. If the body asks for echo, the prompt comes before it."""
    tokenizer = llama.tokenizer
    echoed = ""
    if body.echo:
        echoed = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
    logprobs = None
    if body.logprobs is not None:
        tokens = list(finished.tokens)
        values: list[float | None] = list(finished.logprobs)
        alternatives: list[Any] = list(finished.top_logprobs)
        start = len(prompt) if isinstance(prompt, str) else 0
        if body.echo:
            tokens = [*finished.prompt_tokens, *tokens]
            values = [None, *finished.prompt_logprobs[1:], *values]
            alternatives = [None, *finished.prompt_top_logprobs[1:], *alternatives]
            # The first token is bos. It may decode to its name, which a text prompt does not
            # contain. A start before 0, by the length of that name, puts the next token at 0.
            start = -len(tokenizer.decode(tokens[:1])) if isinstance(prompt, str) else 0
        logprobs = text_logprobs(tokenizer, tokens, values, alternatives, start)
    return {
        "index": index,
        "text": echoed + finished.text,
        "logprobs": logprobs,
        "finish_reason": _reason(finished.finish_reason),
    }


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], logprobs: Sequence[float], top: Sequence[Any]
) -> Json:
    """The logprobs of a chat answer: each token's own logprob, and those of its alternatives."""

    def entry(token: int, logprob: float) -> Json:
        data = tokenizer.token_bytes(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    return {
        "content": [
            entry(token, logprob) | {"top_logprobs": [entry(*pair) for pair in alternatives]}
            for token, logprob, alternatives in zip(tokens, logprobs, top, strict=True)
        ]
    }


def text_logprobs(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[Any],
    start: int = 0,
) -> Json:
    """The logprobs of a completion. start: the first token's place in the text, in characters."""

    def text_of(token: int) -> str:
        return tokenizer.token_bytes(token).decode("utf-8", "replace")

    texts = tokenizer.token_texts(tokens)
    lengths = [0, *map(len, texts[:-1])]
    offsets = [max(0, start + end) for end in itertools.accumulate(lengths)]
    return {
        "tokens": [text_of(token) for token in tokens],
        "token_logprobs": list(logprobs),
        "top_logprobs": [
            None if pairs is None else {text_of(token): logprob for token, logprob in pairs}
            for pairs in top
        ],
        "text_offset": offsets,
    }


def _reason(finish_reason: FinishReason | None) -> str:
    """The engine's reason in the API's words."""
    return "length" if finish_reason == "length" else "stop"


def _delta(
    index: int, delta: Json, finish_reason: str | None = None, logprobs: Json | None = None
) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def sse(content: Json | str) -> bytes:
    """One server-sent event."""
    data = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {data}\n\n".encode("utf-8", "replace")
