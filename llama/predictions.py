"""What `Llama` returns for a text and for a dialog, made from a finished request."""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from llama.chat_format import Message
from llama.chat_forms import AnyFormat
from llama.engine.request import Request
from llama.tokenizer import Tokenizer
from llama.tool_calls import read_calls
from llama.tools import Tool


class CompletionPrediction(TypedDict):
    """A completion.

    Keys:
        generation: the generated text; with echo the prompt comes before it.
        tokens: with logprobs=True: the text that each token completes.
        logprobs: with logprobs=True: the natural logarithm of each token's probability.
    """

    generation: str
    tokens: NotRequired[list[str]]
    logprobs: NotRequired[list[float]]


class ChatPrediction(TypedDict):
    """The answer to a dialog.

    Keys:
        generation: the assistant's message.
        tokens: with logprobs=True: the text that each generated token completes.
        logprobs: with logprobs=True: the natural logarithm of each token's probability.
    """

    generation: Message
    tokens: NotRequired[list[str]]
    logprobs: NotRequired[list[float]]


def completion(
    request: Request, tokenizer: Tokenizer, echo: bool, logprobs: bool
) -> CompletionPrediction:
    """The generated text; with echo the prompt comes before it."""
    tokens = echoed(echo, request.prompt_tokens, request.tokens)
    # Prompt and answer are decoded together, because a character may begin in the prompt and end in
    # the answer. If a stop string was found, the last n_cut characters are cut off.
    text = tokenizer.decode(tokens)
    n_cut = len(tokenizer.decode(request.tokens)) - len(request.text)
    prediction = CompletionPrediction(generation=text[: len(text) - n_cut])
    if logprobs:
        prediction["tokens"] = tokenizer.token_texts(tokens)
        prediction["logprobs"] = echoed(echo, request.prompt_logprobs, request.logprobs)
    return prediction


def answer(
    request: Request,
    formatter: AnyFormat,
    beginning: str,
    logprobs: bool,
    tools: Sequence[Tool] = (),
) -> ChatPrediction:
    """The assistant's message. Its content is the beginning of the answer, if the dialog ended with
    one, followed by the generated text. If the generated text consists of calls of tools, the
    message holds these calls, and its content is empty."""
    message = formatter.decode_message(request.tokens, request.stop_token)
    message["content"] = beginning + request.text  # the text may be cut at a stop string
    if calls := read_calls(request.text, tools):
        message |= {"content": "", "tool_calls": calls}
    prediction = ChatPrediction(generation=message)
    if logprobs:
        prediction["tokens"] = formatter.tokenizer.token_texts(request.tokens)
        prediction["logprobs"] = request.logprobs
    return prediction


def echoed(echo: bool, prompt: list[Any], generated: list[Any]) -> list[Any]:
    return prompt + generated if echo else generated
