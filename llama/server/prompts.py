"""Convert the body of a request to prompts (token ids) and options for the engine."""

from collections.abc import Sequence
from dataclasses import replace

from llama.chat_format import Message
from llama.engine.grammar import call_processor, json_grammar
from llama.generation import Llama
from llama.infilling import InfillingFormat
from llama.sampling import SamplingParams
from llama.server.errors import ApiError
from llama.server.requests import ChatBody, ChatMessage, CompletionBody


def encode_chat(
    llama: Llama, body: ChatBody, date: str | None = None
) -> tuple[list[int], SamplingParams]:
    """The ids of the dialog, and the options. If the answer must be JSON or a call, the options
    have a grammar. date: the date in the system message, if the body has none."""
    tools = body.offered()
    date = date if body.date is None else body.date
    tokens = llama.encode_dialog(dialog_of(body.messages), body.continue_final_message, tools, date)
    wanted = body.response_format
    if tools and body.continue_final_message:
        raise ApiError(400, "an answer that is continued calls no tools", "tools")
    processor = call_processor(llama.tokenizer, tools, body.choice, [tokens])
    if wanted is not None and wanted.type != "text":
        if tools:
            raise ApiError(400, "an answer that may call a tool has no response_format: give "
                           "tools or a format", "response_format")  # fmt: skip
        if (wanted.type == "json_schema") != (wanted.json_schema is not None):
            raise ApiError(400, "type json_schema has a json_schema, and no other type has one",
                           "response_format")  # fmt: skip
        if body.continue_final_message:
            raise ApiError(400, "an answer that is continued has no response_format",
                           "response_format")  # fmt: skip
        wanted_schema = None if wanted.json_schema is None else wanted.json_schema.schema_
        processor = json_grammar(llama.tokenizer).processor(wanted_schema, [tokens])
    params = body.to_params(llama.suggested_sampling, processor)
    return tokens, replace(params, adapter=_adapter(llama, body.model))


def encode(llama: Llama, body: CompletionBody) -> tuple[list[list[int]], SamplingParams]:
    """The ids of each prompt, and the options. If the body has a suffix, the prompts and the stop
    tokens are for infilling."""
    params = body.to_params(llama.suggested_sampling)
    params = replace(params, adapter=_adapter(llama, body.model))
    if body.suffix is None:
        return [llama.encode_prompt(prompt) for prompt in body.prompts()], params
    infilling = InfillingFormat(llama.tokenizer)
    tokens = []
    for prompt in body.prompts():
        if not isinstance(prompt, str):
            raise ApiError(400, "a suffix needs prompts that are texts", "suffix")
        tokens.append(infilling.encode_prompt(prompt, body.suffix))
    return tokens, replace(params, stop_tokens=infilling.stop_tokens)


def _adapter(llama: Llama, model: str) -> str | None:
    """The adapter that a body names as its model."""
    return model if model in llama.engine.adapters.names else None


def dialog_of(messages: Sequence[ChatMessage]) -> list[Message]:
    """The dialog. Raises ApiError for a message without content, and for a tool's answer to a call
    that no earlier message has."""
    called: set[str] = set()
    for i, message in enumerate(messages):
        place = f"messages.{i}"
        if message.content is None and not message.tool_calls:
            raise ApiError(400, f"{place}: the message has no content", f"{place}.content")
        if message.tool_calls and message.role != "assistant":
            raise ApiError(400, f"{place}: only an assistant calls tools", f"{place}.tool_calls")
        if message.role == "tool" and message.tool_call_id is None:
            raise ApiError(400, f"{place}: a tool's answer needs the tool_call_id that it answers",
                           f"{place}.tool_call_id")  # fmt: skip
        if message.tool_call_id is not None and message.tool_call_id not in called:
            raise ApiError(400, f"{place}: no earlier message has this call",
                           f"{place}.tool_call_id")  # fmt: skip
        called |= {call.id for call in message.tool_calls or ()}
    return [message.message() for message in messages]
