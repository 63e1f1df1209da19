"""Tools that Llama 3.1 and later may call: how a prompt describes them, and how calls are written.

Two ways are published, and they differ in every part; docs/tools.md shows both. "Meta's code" is
the package llama-models with its page of prompt formats. "The template" is the chat_template in
Meta's Hugging Face folders. If a date is given, a dialog is written in the template's way.
Otherwise it is written in the way of Meta's code.

Sources: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1 and
https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct (tokenizer_config.json)
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

from llama.errors import DialogError

PYTHON_TAG = "<|python_tag|>"
# The tools that the models were trained on. Each has one argument, which is named here.
BUILT_IN = {"brave_search": "query", "wolfram_alpha": "query", "code_interpreter": "code"}
MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Function(TypedDict):
    """A function that the model may call. parameters: a JSON schema of type object."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[dict[str, Any]]


class Tool(TypedDict):
    """A function, with type "function", or a built-in tool. A built-in tool has only a type, which
    is its name, as in {"type": "brave_search"}."""

    type: Literal["function", "brave_search", "wolfram_alpha", "code_interpreter"]
    function: NotRequired[Function]


class CalledFunction(TypedDict):
    """arguments: a JSON object, or the text of one."""

    name: str
    arguments: dict[str, Any] | str


class ToolCall(TypedDict):
    """One call of a tool, in the form of OpenAI's API and of transformers. `id` is not used."""

    type: Literal["function"]
    function: CalledFunction
    id: NotRequired[str]


ToolChoice = str  # "auto", "none", "required", or the name of a tool
Messages = Sequence[Mapping[str, Any]]  # the messages of a dialog; see `chat_format.Message`


def check_tools(tools: Sequence[Tool]) -> None:
    """Raise DialogError if this is no list of valid tools, or if two tools have the same name."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise DialogError(f"tools must be a list of tools, not a {type(tools).__name__}")
    if len(tools) > MAX_TOOLS:
        raise DialogError(f"{len(tools)} tools: there may be at most {MAX_TOOLS}")
    for i, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if kind not in ("function", *BUILT_IN):
            raise DialogError(
                f"tool {i} must be a mapping whose type is function, or one of the built-in "
                f"tools: {', '.join(BUILT_IN)}"
            )
        if kind == "function":
            _check_function(tool.get("function"), f"tool {i}")
    names = tool_names(tools)
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise DialogError(f"two tools are named {repeated!r}")


def _check_function(function: Any, owner: str) -> None:
    if not isinstance(function, Mapping):
        raise DialogError(f"{owner} must have a 'function' that is a mapping")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise DialogError(
            f"{owner} is named {name!r:.80}: a name has 1 to 64 letters, digits, _, . and -"
        )
    if not isinstance(function.get("description", ""), str):
        raise DialogError(f"{owner} must have a description that is a string")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise DialogError(f"{owner} must have parameters that are a JSON schema: a mapping")
    try:
        json.dumps(function)
    except (TypeError, ValueError, RecursionError) as error:
        raise DialogError(f"{owner} cannot be written as JSON: {error}") from None


def tool_names(tools: Sequence[Tool]) -> list[str]:
    """The name of each tool."""
    return [t["function"]["name"] if t["type"] == "function" else t["type"] for t in tools]


def functions_of(tools: Sequence[Tool]) -> list[Tool]:
    """The tools that are not built in."""
    return [tool for tool in tools if tool["type"] == "function"]


def built_in_of(tools: Sequence[Tool]) -> list[str]:
    """The names of the built-in tools."""
    return [tool["type"] for tool in tools if tool["type"] != "function"]


def check_choice(tools: Sequence[Tool], choice: ToolChoice) -> None:
    """Raise DialogError if the tool_choice does not fit these tools."""
    if choice in ("auto", "none"):
        return
    if not tools:
        raise DialogError(f"tool_choice is {choice!r:.80}, but there are no tools")
    names = tool_names(tools)
    if choice != "required" and choice not in names:
        raise DialogError(
            f"tool_choice is {choice!r:.80}: it must be auto, none, required or one of "
            f"{', '.join(names)}"
        )


@dataclass(frozen=True)
class Written:
    """A message as it stands in a prompt. Each text is encoded separately."""

    role: Any  # `chat_format.Role`
    texts: Sequence[str]
    awaits_tool: bool = False  # it ends with <|eom_id|>


def calls_of(message: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The name and the arguments of each call in a message of a dialog."""
    return [_called(call) for call in message.get("tool_calls") or ()]


def _called(call: ToolCall) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of one call. Raises DialogError if it is not a `ToolCall`."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DialogError("a message has a tool call that does not name its function")
    name = function["name"]
    arguments: Any = function.get("arguments")
    try:
        # Arguments that are an object are written and read again, so that they are checked too.
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        arguments = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise DialogError(f"a message calls {name!r:.80} with arguments that are no JSON object")
    return name, arguments


# ---- Meta's code --------------------------------------------------------------------------------


def as_meta_writes(dialog: Messages, tools: Sequence[Tool]) -> list[Written]:
    """The messages as Meta's code writes them. Each call becomes a separate text."""
    written = []
    messages = list(dialog)
    if tools:
        system = ""
        if messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"].strip()
        text = _meta_system(tools, system)
        written.append(Written("system", [text]))
        if functions := functions_of(tools):
            text = _meta_request(functions)
            written.append(Written("user", [text]))
    for message in messages:
        calls = calls_of(message)
        is_code = bool(calls) and calls[0][0] == "code_interpreter"
        content = PYTHON_TAG * is_code + message["content"].strip()
        texts = [_meta_call(*call) for call in calls]
        awaits_tool = message.get("stop_reason") == "end_of_message"
        written.append(Written(message["role"], [content, *texts], awaits_tool))
    return written


def _meta_system(tools: Sequence[Tool], system: str) -> str:
    """The text of the system message, if there are tools."""
    lines = ["Environment: ipython"]
    # "Environment: ipython" alone turns on the code interpreter.
    if searches := [name for name in built_in_of(tools) if name != "code_interpreter"]:
        lines.append(f"Tools: {', '.join(searches)}")
    return "\n".join(lines) + (f"\n\n{system}" if system else "")


def _meta_request(functions: Sequence[Tool]) -> str:
    """The text of an added user message that describes the functions. It comes before the dialog's
    first user message."""
    described = "\n".join(json.dumps(_published(tool), indent=4) for tool in functions)
    return (
        "Answer the user's question by making use of the following functions if needed.\n"
        "If none of the function can be used, please say so.\n"
        "Here is a list of functions in JSON format:\n"
        f"{described}\n\nReturn function calls in JSON format."
    )


def _meta_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The text of a call in an assistant's message."""
    if name in BUILT_IN and isinstance(value := arguments.get(BUILT_IN[name]), str):
        return value if name == "code_interpreter" else f'{name}.call(query="{value}")'
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


# ---- the template -------------------------------------------------------------------------------


def as_template_writes(dialog: Messages, tools: Sequence[Tool], date: str) -> list[Written]:
    """The messages as the chat template of Meta's Hugging Face folders writes them. The
    template allows one call in a message. If a message has several calls, they are written one
    directly after the other."""
    messages = list(dialog)
    system = ""
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"].strip()
    text = _template_system(tools, system, date)
    written = [Written("system", [text])]
    if functions := functions_of(tools):
        if not messages:
            raise DialogError("tools need a message from user, which they are put into")
        question = messages.pop(0)["content"].strip()
        text = _template_request(functions, question)
        written.append(Written("user", [text]))
    built_in = built_in_of(tools)
    for message in messages:
        text = message["content"].strip()
        calls = calls_of(message)
        if calls:
            text = "".join(_template_call(*call, built_in) for call in calls)
        elif message["role"] == "ipython":
            text = _template_json(message["content"])
        written.append(Written(message["role"], [text], awaits_tool=bool(calls and built_in)))
    return written


def _template_system(tools: Sequence[Tool], system: str, date: str) -> str:
    """The text of the system message, which every dialog has."""
    text = "Environment: ipython\n" if tools else ""
    if built_in := built_in_of(tools):
        searches = ", ".join(name for name in built_in if name != "code_interpreter")
        text += f"Tools: {searches}\n\n"
    return f"{text}Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{system}"


def _template_request(functions: Sequence[Tool], question: str) -> str:
    """The first user message: the description of the functions, and then the user's own text."""
    described = "".join(
        json.dumps(_published(tool), indent=4, ensure_ascii=False) + "\n\n" for tool in functions
    )
    return (
        "Given the following functions, please respond with a JSON for a function call with its "
        "proper arguments that best answers the given prompt.\n\n"
        'Respond in the format {"name": function name, "parameters": dictionary of argument name '
        "and its value}.Do not use variables.\n\n"
        f"{described}{question}"
    )


def _template_call(name: str, arguments: Mapping[str, Any], built_in: Sequence[str]) -> str:
    """The text of a call in an assistant's message."""
    if name in built_in:
        values = ", ".join(f'{key}="{value}"' for key, value in arguments.items())
        return f"{PYTHON_TAG}{name}.call({values})"
    return f'{{"name": "{name}", "parameters": {_template_json(arguments)}}}'


def _template_json(value: Any) -> str:
    """A value as JSON, in the form in which transformers' `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


def _published(tool: Tool) -> dict[str, Any]:
    """The tool without keys that are not part of the published form, such as OpenAI's `strict`."""
    function = {
        key: value
        for key, value in tool["function"].items()
        if key in ("name", "description", "parameters")
    }
    return {"type": "function", "function": function}


# ---- a call that is forced ----------------------------------------------------------------------


def call_schema(tools: Sequence[Tool], choice: ToolChoice) -> dict[str, Any]:
    """The JSON schema of a tool call. If `choice` is "required", the call may be of any tool.
    Otherwise it must be of the tool that `choice` names."""
    wanted = [
        tool for tool, name in zip(tools, tool_names(tools), strict=True)
        if choice in ("required", name)
    ]  # fmt: skip
    return {"anyOf": [_schema_of(tool, f"#/anyOf/{i}") for i, tool in enumerate(wanted)]}


def _schema_of(tool: Tool, place: str) -> dict[str, Any]:
    if tool["type"] == "function":
        name = tool["function"]["name"]
        parameters = tool["function"].get("parameters") or {"type": "object", "properties": {}}
        parameters = _moved(parameters, f"{place}/properties/parameters")
    else:
        name, argument = tool["type"], BUILT_IN[tool["type"]]
        parameters = {
            "type": "object",
            "properties": {argument: {"type": "string"}},
            "required": [argument],
            "additionalProperties": False,
        }
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """The schema as a part of another schema: its references to its own root are changed, so that
    they point to `place`, where it now stands."""
    if isinstance(schema, Mapping):
        return {
            key: f"{place}{value[1:]}"
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(part, place) for part in schema] if isinstance(schema, list) else schema
