"""The bodies of requests. pydantic checks them, and their methods convert them for the engine.

A field of OpenAI's API that is not supported is accepted only with its default. An unknown field is
refused. Only `user` and `metadata` are ignored, because they change no result.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from llama.chat_format import Message, StopReason
from llama.sampling import LogitsProcessor, SamplingParams
from llama.server.errors import ApiError
from llama.tools import MAX_TOOLS, NAME, Tool, check_choice, check_tools

MAX_PROMPTS = 128  # of one completion request
MAX_MESSAGES = 2048
MAX_BIASES = 1024
# A temperature below this becomes 0. It would also draw the likeliest token, but the divided logits
# may overflow.
GREEDY_BELOW = 0.001


def _whole(value: Any) -> Any:
    """Convert a float such as 8.0 to an int, because JSON has only one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _never(value: bool) -> bool:
    if value:
        raise ValueError("true is not supported")
    return value


Whole = BeforeValidator(_whole)
Never = AfterValidator(_never)
Number = Annotated[float, Field(allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Stops = Annotated[list[str], Field(max_length=4)]
# One stop string may come without a list.
Stop = Annotated[
    Stops | None,
    BeforeValidator(
        lambda stop: [stop] if isinstance(stop, str) else stop,
        json_schema_input_type=str | Stops | None,
    ),
]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """The fields that chat and text completions share. OpenAI's API does not have the fields after
    `metadata`."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Whole, Field(ge=1, le=8)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    stop: Stop = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_BIASES)] | None = None
    seed: Annotated[int, Whole, Field(ge=0, lt=2**63)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    top_k: Annotated[int, Whole, Field(ge=0)] = 0
    min_p: Annotated[Number, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[Number, Field(ge=0.01, le=100)] = 1.0
    ignore_eos: bool = False

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def params(self, defaults: Mapping[str, float], **options: Any) -> SamplingParams:
        """The options for the engine. defaults: the temperature and top_p that are used if the body
        has none."""
        bias = {}
        for token, value in (self.logit_bias or {}).items():
            if not token.isdecimal():
                raise ApiError(400, f"{token!r} is no token id", "logit_bias")
            bias[int(token)] = value
        given = {
            name: value
            for name in ("temperature", "top_p", "n", "presence_penalty", "frequency_penalty")
            if (value := getattr(self, name)) is not None
        }
        same = {
            name: getattr(self, name)
            for name in ("seed", "top_k", "min_p", "repetition_penalty", "ignore_eos")
        }
        if given.get("temperature", 1.0) < GREEDY_BELOW:
            given["temperature"] = 0.0
        return SamplingParams(
            **{**defaults, **given, **same}, stop=self.stop or (), logit_bias=bias, **options
        )


class TextPart(Body):
    type: Literal["text"]
    text: str


Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]


class CalledFunction(Body):
    name: Name
    arguments: str  # a JSON object


class ToolCallBody(Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    """A message of a dialog. It may have every field that the message of an answer has, so that a
    client can send an answer back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[ToolCallBody], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None
    stop_reason: StopReason | None = None
    name: None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    def message(self) -> Message:
        parts = self.content or ""
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        roles: dict[str, Any] = {"developer": "system", "tool": "ipython"}
        message: Message = {"role": roles.get(self.role, self.role), "content": text}
        if self.stop_reason is not None:
            message["stop_reason"] = self.stop_reason
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": c.function.name,
                                                  "arguments": c.function.arguments}}
                for c in self.tool_calls
            ]  # fmt: skip
        return message


class FunctionBody(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A function, or a built-in tool of Llama 3.1, which has only a type."""

    type: Literal["function", "brave_search", "wolfram_alpha", "code_interpreter"]
    function: FunctionBody | None = None

    def tool(self) -> Tool:
        return self.model_dump(exclude_none=True)  # type: ignore[return-value]


class ChosenFunction(Body):
    name: Name


class ChosenTool(Body):
    type: Literal["function", "brave_search", "wolfram_alpha", "code_interpreter"]
    function: ChosenFunction | None = None


class JsonSchema(Body):
    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(Sampling):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Whole, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Whole, Field(ge=1)] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None  # false: only the first call is returned
    date: Annotated[str, Field(max_length=64)] | None = None  # not OpenAI's
    # OpenAI's fields that are not supported. Only their defaults are accepted.
    store: Annotated[bool, Field(json_schema_extra={"enum": [False]}), Never] | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def choice(self) -> str:
        """tool_choice in the library's form: "none", "auto", "required" or the name of a tool."""
        if not isinstance(self.tool_choice, ChosenTool):
            return self.tool_choice or "auto"
        function = self.tool_choice.function
        return self.tool_choice.type if function is None else function.name

    def offered(self) -> list[Tool]:
        """The tools that the prompt describes. Raises DialogError or ApiError for wrong ones."""
        tools = [tool.tool() for tool in self.tools or ()]
        check_tools(tools)
        check_choice(tools, self.choice)
        is_bound = self.choice not in ("auto", "none")
        for i, tool in enumerate(self.tools or ()):
            if tool.function is not None and tool.function.strict and not is_bound:
                raise ApiError(
                    400, "strict: true needs tool_choice required or a function's name: only then "
                    "are arguments bound to the schema", f"tools.{i}.function.strict",
                )  # fmt: skip
        return [] if self.choice == "none" else tools

    def to_params(
        self, defaults: Mapping[str, float], processor: LogitsProcessor | None = None
    ) -> SamplingParams:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        limits = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return self.params(
            defaults,
            max_gen_len=min(limits, default=None),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            logits_processor=processor,
        )


class CompletionBody(Sampling):
    """A body of /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[list[int]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    suffix: str | None = None
    echo: bool = False
    logprobs: Annotated[int, Whole, Field(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Whole, Field(ge=0)] | None = 16
    best_of: Annotated[int, Whole, Field(ge=1, le=1)] | None = None

    def prompts(self) -> list[Any]:
        """The prompts, each a text or token ids."""
        prompt = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else list(prompt)

    def to_params(self, defaults: Mapping[str, float]) -> SamplingParams:
        return self.params(
            defaults,
            max_gen_len=self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.echo and self.logprobs is not None,
        )


class TokenizeBody(Body):
    """A body of /tokenize: a text, or messages as the prompt of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)] | None = None
    date: Annotated[str, Field(max_length=64)] | None = None
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """A body of /detokenize."""

    model: str | None = None
    tokens: list[int]


Parsed = TypeVar("Parsed", bound=Body)


def parse(kind: type[Parsed], content: Any) -> Parsed:
    """The checked body. Raises ApiError that names the first wrong field."""
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is a {type(content).__name__}, not a JSON object")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not _is_type(part))
        unknown = first["type"] == "extra_forbidden"
        message = "this field is unknown or not supported" if unknown else first["msg"]
        raise ApiError(400, f"{place}: {message}", place or None) from None


def _is_type(part: Any) -> bool:
    """Whether a part of a pydantic error's location is a type of a union. Otherwise it is the name
    of a field or an index."""
    return isinstance(part, str) and (part in ("str", "int") or "[" in part)
