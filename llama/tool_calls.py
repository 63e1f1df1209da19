"""Calls of tools, read from the text of an answer: whole, or while it grows.

All published forms of a call are read:
    {"name": "f", "parameters": {"a": 1}}           also with "type": "function"; also several
    <|python_tag|>{"name": "f", "parameters": {…}}
    <function=f>{"a": 1}</function>
    brave_search.call(query="…")                    the built-in tools; also after <|python_tag|>
    <|python_tag|>print(1)                          the code interpreter
    [f(a=1), g(b=[1, 2])]                           Llama 3.2's list; it is parsed and never run

An answer is read as calls only if all of it consists of calls, and only if every called tool was
offered. Any other answer is text.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama.tools import BUILT_IN, PYTHON_TAG, Tool, ToolCall, built_in_of, tool_names

KEYS = ("type", "name", "parameters", "arguments")  # the keys of a call that is a JSON object
MAX_LENGTH = 1 << 16  # characters; a longer answer is not searched for calls
FUNCTION_TAG = re.compile(r"\s*<function=([^>]+)>(.*?)</function>", re.DOTALL)
BUILT_IN_CALL = re.compile(r'\s*(\w+)\.call\(query="(.*)"\)\s*', re.DOTALL)
BETWEEN = re.compile(r"[\s;,]*")  # between the objects of several calls


def read_calls(text: str, tools: Sequence[Tool]) -> list[ToolCall]:
    """The calls of which an answer consists. The list is empty if the answer is text."""
    if len(text) > MAX_LENGTH:
        return []
    names = tool_names(tools)
    body = text.strip()
    is_tagged = body.startswith(PYTHON_TAG)
    body = body.removeprefix(PYTHON_TAG).strip()
    for read in (_read_json, _read_tags, _read_built_in, _read_list):
        if calls := _tried(read, body):
            is_offered = all(call["function"]["name"] in names for call in calls)
            return calls if is_offered else []
    is_code = is_tagged and body != "" and "code_interpreter" in names
    return [_call("code_interpreter", {"code": body})] if is_code else []


class CallReader:
    """Reads an answer piece by piece, and separates text from calls of tools.

    Text that may be the beginning of a call is held back until the answer ends.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = tools
        self._openings = _openings(tools)
        self._held = ""
        self._is_text: bool | None = None if tools else True  # None: not known yet

    def push(self, text: str) -> str:
        """Add a piece. Returns the text that can be shown now."""
        if self._is_text:
            return text
        self._held += text
        if self._is_text is None:
            begun = "".join(self._held.split())
            if any(begun.startswith(opening) for opening in self._openings):
                self._is_text = False
            elif not any(opening.startswith(begun) for opening in self._openings):
                self._is_text = True
                text, self._held = self._held, ""
                return text
        return ""

    def finish(self) -> tuple[str, list[ToolCall]]:
        """Call this after the last piece. Returns the text that was held back, or, if that text
        consists of calls, the calls."""
        text, self._held = self._held, ""
        calls = read_calls(text, self._tools)
        return ("" if calls else text), calls


def _openings(tools: Sequence[Tool]) -> list[str]:
    """The beginnings that a call may have, with all blanks removed."""
    names = tool_names(tools)
    objects = [f'{{"{key}"' for key in KEYS]
    return [
        PYTHON_TAG, *objects, *(f"[{opening}" for opening in objects),
        *(f"<function={name}>" for name in names), *(f"[{name}(" for name in names),
        *(f"{name}.call(" for name in built_in_of(tools)),
    ]  # fmt: skip


# ---- the readers: each yields names and arguments, or nothing if the text has another form -------

Found = Iterator[tuple[str, Any]]
# The errors that parsing raises for text that is no call. The text may have another form, contain
# values of another type, or be nested too deeply.
NO_CALL = (ValueError, TypeError, LookupError, AttributeError, SyntaxError, RecursionError,
           MemoryError)  # fmt: skip


def _tried(read: Callable[[str], Found], text: str) -> list[ToolCall]:
    """The calls that `read` finds. The list is empty if the text turns out to be no call."""
    try:
        return [_call(name, arguments) for name, arguments in read(text)]
    except NO_CALL:
        return []


def _read_json(text: str) -> Found:
    """Read one object, several objects in a row, or a list of objects."""
    if text[:1] not in ("{", "["):
        return
    decoder = json.JSONDecoder(parse_constant=_refuse)
    at, objects = 0, []
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        objects += value if isinstance(value, list) else [value]
        between = BETWEEN.match(text, at)
        at = between.end() if between else at
    for value in objects:
        if value.get("type", "function") != "function" or not value.keys() <= set(KEYS):
            raise ValueError("another object")
        yield value["name"], value["parameters"] if "parameters" in value else value["arguments"]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _read_tags(text: str) -> Found:
    at, calls = 0, []
    while match := FUNCTION_TAG.match(text, at):
        calls.append((match[1], json.loads(match[2], parse_constant=_refuse)))
        at = match.end()
    if at == len(text):
        yield from calls


def _read_built_in(text: str) -> Found:
    match = BUILT_IN_CALL.fullmatch(text)
    if match and BUILT_IN.get(match[1]) == "query":
        yield match[1], {"query": match[2]}


def _read_list(text: str) -> Found:
    """A Python list of calls whose arguments are literals with names."""
    if not text.startswith("["):
        return
    parsed = ast.parse(text, mode="eval").body
    if not isinstance(parsed, ast.List):
        return
    for call in parsed.elts:
        if not isinstance(call, ast.Call) or call.args or None in (k.arg for k in call.keywords):
            raise ValueError("not a call with named arguments")
        yield ast.unparse(call.func), {k.arg: ast.literal_eval(k.value) for k in call.keywords}


def _call(name: str, arguments: Any) -> ToolCall:
    """Raises ValueError or TypeError for arguments that are no JSON object."""
    arguments = json.loads(json.dumps(arguments, allow_nan=False))
    if not isinstance(arguments, dict):
        raise TypeError("arguments are an object")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
