"""Tools in prompts, as Meta's code and the published chat template write them, and calls read from
answers."""

import json
import random
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from helpers.talker import make_talker
from hypothesis import given, settings
from hypothesis import strategies as st

from llama import Llama
from llama.chat_format import ChatFormat
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import BUNDLED
from llama.errors import DialogError, GenerationError
from llama.tokenizer import Tokenizer
from llama.tool_calls import MAX_LENGTH, CallReader, read_calls
from llama.tools import BUILT_IN, check_choice, check_tools

SONGS: Any = {
    "type": "function",
    "function": {
        "name": "trending_songs",
        "description": "Returns the trending songs on a Music site",
        "parameters": {
            "type": "object",
            "properties": [
                {"n": {"type": "object", "description": "The number of songs to return"}},
                {"genre": {"type": "object", "description": "The genre of the songs to return"}},
            ],
            "required": ["n"],
        },
    },
}
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
SEARCH: Any = [{"type": "brave_search"}, {"type": "wolfram_alpha"}]
CODE: Any = {"type": "code_interpreter"}
OFFERED = [SONGS, ADD, *SEARCH, CODE]
DATE = "26 Jul 2024"


def user(text: str) -> Any:
    return {"role": "user", "content": text}


def call(name: str, **arguments: Any) -> Any:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: Any, **more: Any) -> Any:
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **more}


# ---- prompts as Meta's code writes them ----------------------------------------------------------


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_path: Path) -> ChatFormat:
    return ChatFormat(Tokenizer(llama3_tokenizer_path))


@pytest.fixture(scope="module")
def meta(oracle: Any) -> Any:
    return oracle.chat_format.ChatFormat(oracle.tokenizer.Tokenizer.get_instance())


def published_request() -> str:
    """The user message with the functions, from Meta's page of prompt formats."""
    page = (files("llama_models") / "llama3_1" / "prompt_format.md").read_text(encoding="utf-8")
    match = re.search(r"Answer the user's question by.*?Return function calls in JSON format\.",
                      page, re.DOTALL)  # fmt: skip
    assert match is not None
    return match[0]


def test_functions_are_described_as_on_metas_page(llama3: ChatFormat, oracle: Any, meta: Any):
    prompt = llama3.encode_dialog_prompt([user("Use tools to get songs")], tools=[SONGS])
    message = oracle.datatypes.RawMessage
    want = [
        message(role="system", content="Environment: ipython"),
        message(role="user", content=published_request()),
        message(role="user", content="Use tools to get songs"),
    ]
    # The page writes its short lists in one line, and Python's json.dumps in several.
    ours = re.sub(r"\[\s+\"n\"\s+\]", '["n"]', llama3.tokenizer.decode(prompt))
    assert ours == llama3.tokenizer.decode(meta.encode_dialog_prompt(want).tokens)


@pytest.mark.parametrize(
    ("tools", "system", "want"),
    [
        ([CODE], "", "Environment: ipython"),
        (SEARCH, "", "Environment: ipython\nTools: brave_search, wolfram_alpha"),
        ([CODE, SEARCH[0]], "Be brief.", "Environment: ipython\nTools: brave_search\n\nBe brief."),
    ],
)
def test_built_in_tools_are_turned_on(llama3: ChatFormat, tools: Any, system: str, want: str):
    dialog = [{"role": "system", "content": system}] * (system != "") + [user("Hi")]
    plain = [{"role": "system", "content": want}, user("Hi")]
    assert llama3.encode_dialog_prompt(dialog, tools=tools) == llama3.encode_dialog_prompt(plain)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
ARGUMENTS = st.dictionaries(st.text("abcxyz_", min_size=1, max_size=5), VALUES, max_size=3)
CALLS = (
    st.builds(lambda a: ("trending_songs", a), ARGUMENTS)
    | st.builds(lambda q: ("brave_search", {"query": q}), st.text(max_size=12))
    | st.builds(lambda c: ("code_interpreter", {"code": c}), st.text(max_size=12))
)


@settings(max_examples=80, deadline=None)
@given(
    calls=st.lists(CALLS, min_size=1, max_size=3),
    said=st.sampled_from(["", "Let me see."]),
    result=st.text(max_size=12),
    awaits=st.booleans(),
    as_text=st.booleans(),
)
def test_calls_are_written_as_by_meta(
    llama3: ChatFormat, oracle: Any, meta: Any, calls, said, result, awaits, as_text
):
    stop = "end_of_message" if awaits else "end_of_turn"
    message = calling(
        *({"type": "function", "function": {
            "name": name, "arguments": json.dumps(arguments) if as_text else arguments}}
          for name, arguments in calls),
        stop_reason=stop,
    )  # fmt: skip
    message["content"] = said
    dialog = [user("Hi"), message, {"role": "ipython", "content": result}]
    raw, tool_call = oracle.datatypes.RawMessage, oracle.datatypes.ToolCall.model_construct
    builtin = oracle.datatypes.BuiltinTool
    theirs = [
        tool_call(call_id="1", arguments=arguments,
                  tool_name=builtin(name) if name in BUILT_IN else name)
        for name, arguments in calls
    ]  # fmt: skip
    answer = raw(role="assistant", content=said, stop_reason=stop)
    answer.tool_calls = theirs
    want = [raw(role="user", content="Hi"), answer, raw(role="tool", content=result.strip())]
    assert llama3.encode_dialog_prompt(dialog) == meta.encode_dialog_prompt(want).tokens


# ---- prompts as the published template writes them -----------------------------------------------

# What Meta's template in Hugging Face's folders of Llama 3.1 and 3.3 does, in our own words.
TEMPLATE = r"""
{%- macro turn(role, text, end) -%}
{{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\n\n' ~ text ~ end }}
{%- endmacro -%}
{%- set rest = namespace(messages=messages, system='') -%}
{%- if messages[0].role == 'system' -%}
{%- set rest.system = messages[0].content | trim -%}{%- set rest.messages = messages[1:] -%}
{%- endif -%}
{%- set head = 'Environment: ipython\n' if builtin_tools is defined or tools else '' -%}
{%- set searches = builtin_tools | default([]) | reject('equalto', 'code_interpreter') | list -%}
{%- set listed = 'Tools: ' ~ searches | join(', ') ~ '\n\n' if builtin_tools is defined else '' -%}
{%- set dates = 'Cutting Knowledge Date: December 2023\nToday Date: ' ~ date_string ~ '\n\n' -%}
{{- bos_token ~ turn('system', head ~ listed ~ dates ~ rest.system, '<|eot_id|>') -}}
{%- if tools -%}
{%- set text = namespace(of='Given the following functions, please respond with a JSON for a ' ~
'function call with its proper arguments that best answers the given prompt.\n\nRespond in the ' ~
'format {"name": function name, "parameters": dictionary of argument name and its value}.' ~
'Do not use variables.\n\n') -%}
{%- for tool in tools -%}
{%- set text.of = text.of ~ tool | tojson(indent=4) ~ '\n\n' -%}
{%- endfor -%}
{{- turn('user', text.of ~ rest.messages[0].content | trim, '<|eot_id|>') -}}
{%- set rest.messages = rest.messages[1:] -%}
{%- endif -%}
{%- for message in rest.messages -%}
{%- if 'tool_calls' in message -%}
{%- set call = message.tool_calls[0].function -%}
{%- set end = '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' -%}
{%- if call.name in builtin_tools | default([]) -%}
{%- set text = namespace(of=[]) -%}
{%- for name, value in call.arguments | items -%}
{%- set text.of = text.of + [name ~ '="' ~ value ~ '"'] -%}
{%- endfor -%}
{{- turn('assistant', '<|python_tag|>' ~ call.name ~ '.call(' ~ text.of | join(', ') ~ ')', end) -}}
{%- else -%}
{%- set arguments = call.arguments | tojson -%}
{{- turn('assistant', '{"name": "' ~ call.name ~ '", "parameters": ' ~ arguments ~ '}', end) -}}
{%- endif -%}
{%- elif message.role == 'ipython' -%}
{{- turn('ipython', message.content | tojson, '<|eot_id|>') -}}
{%- else -%}
{{- turn(message.role, message.content | trim, '<|eot_id|>') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- turn('assistant', '', '') -}}
{%- endif -%}
"""


@pytest.fixture(scope="module")
def bundled() -> ChatFormat:
    return ChatFormat(Tokenizer(BUNDLED / "tokenizer.model"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = convert(BUNDLED, tmp_path_factory.mktemp("hf") / "out", "hf")
    return AutoTokenizer.from_pretrained(folder)


WORDS = st.text(st.sampled_from("ab \n\"'{}é日<&"), max_size=8)
WITHIN = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "ipython", "add", "brave_search"]), WORDS)
)


@settings(max_examples=120, deadline=None)
@given(
    opening=st.lists(WORDS, max_size=1),
    first=WORDS,
    within=WITHIN,
    functions=st.sampled_from([[], [SONGS], [SONGS, ADD]]),
    built_in=st.sampled_from([[], SEARCH, [CODE], [*SEARCH, CODE]]),
)
def test_dialogs_with_a_date_are_the_templates(
    bundled: ChatFormat, theirs: Any, opening, first, within, functions, built_in
):
    dialog = [{"role": "system", "content": text} for text in opening] + [user(first)]
    for who, text in within:
        if who in ("add", "brave_search"):
            dialog.append(
                calling(call(who, **({"query": text} if who != "add" else {"a": [text]})))
            )
        else:
            dialog.append({"role": who, "content": text})
    dialog.append(user("So?"))
    names = {"builtin_tools": [tool["type"] for tool in built_in]} if built_in else {}
    want = theirs.apply_chat_template(
        dialog, chat_template=TEMPLATE, tools=functions or None, date_string=DATE,
        add_generation_prompt=True, **names,
    )  # fmt: skip
    prompt = bundled.encode_dialog_prompt(dialog, tools=[*functions, *built_in], date=DATE)
    assert prompt == want.input_ids


def test_the_page_shows_both_ways(bundled: ChatFormat) -> None:
    page = (Path(__file__).parent.parent / "docs" / "tools.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    }
    add: Any = {
        "type": "function",
        "function": {"name": "add", "description": "Add two numbers", "parameters": parameters},
    }
    dialog: Any = [
        {"role": "system", "content": "Be brief."}, user("What is 1 + 2?"),
        calling(call("add", a=1, b=2)), {"role": "ipython", "content": "3"},
    ]  # fmt: skip
    for text, date in zip(shown, (None, DATE), strict=True):
        ids = bundled.encode_dialog_prompt(dialog, tools=[add, SEARCH[0]], date=date)
        assert bundled.tokenizer.decode(ids).rstrip() == text.rstrip()


def test_a_date_changes_nothing_else(bundled: ChatFormat) -> None:
    """Without tools and calls the two ways differ in the system message alone."""
    dialog = [user("Hi"), {"role": "assistant", "content": "Hello."}, user("So?")]
    text = bundled.tokenizer.decode(bundled.encode_dialog_prompt(dialog, date=DATE))
    header = "<|start_header_id|>system<|end_header_id|>\n\n"
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {DATE}\n\n<|eot_id|>"
    plain = bundled.tokenizer.decode(bundled.encode_dialog_prompt(dialog))
    assert text.replace(header + dates, "") == plain


def test_a_system_message_with_tools_and_nothing_more_is_refused(bundled: ChatFormat) -> None:
    dialog: Any = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(DialogError, match="the last message must be from user"):
        bundled.encode_dialog_prompt(dialog, tools=[ADD], date=DATE)


# ---- reading calls -------------------------------------------------------------------------------


def said(text: str, tools: Any = OFFERED) -> list[tuple[str, Any]]:
    calls = read_calls(text, tools)
    return [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


PLUS = ("add", {"a": 1, "b": [2, "x"]})


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"name": "add", "parameters": {"a": 1, "b": [2, "x"]}}', [PLUS]),
        ('{"type": "function", "name": "add", "parameters": {"a": 1, "b": [2, "x"]}}', [PLUS]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": [2, "x"]}}', [PLUS]),
        ('\n{"name": "add", "arguments": {"a": 1, "b": [2, "x"]}} ', [PLUS]),
        ('<function=add>{"a": 1, "b": [2, "x"]}</function>', [PLUS]),
        ('<function=add>{"a": 1, "b": [2, "x"]}</function>\n' * 2, [PLUS] * 2),
        ('[add(a=1, b=[2, "x"])]', [PLUS]),
        ("[add(a=1, b=[2, 'x']), add(a=-1)]", [PLUS, ("add", {"a": -1})]),
        ("[trending_songs()]", [("trending_songs", {})]),
        ("[add(a=True, b=None)]", [("add", {"a": True, "b": None})]),
        ('{"name": "add", "parameters": {}}; {"name": "add", "parameters": {"a": 1}}',
         [("add", {}), ("add", {"a": 1})]),
        ('[{"name": "add", "parameters": {}}]', [("add", {})]),
        ('brave_search.call(query="gold price")', [("brave_search", {"query": "gold price"})]),
        ('<|python_tag|>wolfram_alpha.call(query="say "pi"")',
         [("wolfram_alpha", {"query": 'say "pi"'})]),
        ('{"name": "brave_search", "parameters": {"query": "x"}}',
         [("brave_search", {"query": "x"})]),
        ("<|python_tag|>print(1)\nx()", [("code_interpreter", {"code": "print(1)\nx()"})]),
        ("<|python_tag|>[1, 2]", [("code_interpreter", {"code": "[1, 2]"})]),
        ('<|python_tag|>{"a": 1}', [("code_interpreter", {"code": '{"a": 1}'})]),
    ],
)  # fmt: skip
def test_published_forms_of_a_call(text: str, want: Any) -> None:
    assert said(text) == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "I would call add(a=1).",
        'Here: {"name": "add", "parameters": {}}',
        '{"name": "add", "parameters": {}} is what I called.',
        '{"name": "add"}',
        '{"name": "add", "parameters": 3}',
        '{"name": "add", "parameters": {"a": NaN}}',
        '{"name": "add", "parameters": {"a": 1}',
        '{"name": "add", "parameters": {}, "why": 1}',
        '{"type": "object", "name": "add", "parameters": {}}',
        '{"name": "subtract", "parameters": {}}',
        '{"name": ["add"], "parameters": {}}',
        '{"name": "add", "parameters": {}} {"name": "subtract", "parameters": {}}',
        '["add"]',
        "[1]",
        "[]",
        "[add]",
        "[add(1)]",
        "[add(**{'a': 1})]",
        "[add(a=1), 2]",
        "[add(a=__import__('os').getcwd())]",
        "[add(a=b)]",
        "[add(a={1, 2})]",
        "[add(a=1e999)]",
        "[add(a=b'x')]",
        "[add(a=1j)]",
        "[subtract(a=1)]",
        "[(lambda: add)()(a=1)]",
        "add(a=1)",
        "<function=add>{}",
        "<function=add>{}</function> done",
        "<function=add>no</function>",
        '<function=subtract>{"a": 1}</function>',
        "brave_search.call(gold)",
        'brave_search.call(query="x") and more',
        'other.call(query="x")',
        '{"name": "add", "parameters": ' + '{"a": ' * 20_000 + "1" + "}" * 20_001,
        "[add(a=" + "[" * 20_000 + "]" * 20_000 + ")]",
        "[add(a=" + "-" * 60_000 + "1)]",
        "[add(a=" + "1+" * 30_000 + "1)]",
        '{"name": "add", "parameters": {"a": ' + "9" * 5_000 + "}}",
        "[add(a=" + "9" * 5_000 + ")]",
        '{"name": "add", "parameters": {"a": "' + "x" * MAX_LENGTH + '"}}',
    ],
    ids=lambda text: text[:40],
)
def test_a_text_that_only_looks_like_a_call_stays_text(text: str) -> None:
    assert said(text, [SONGS, ADD, *SEARCH]) == []


def test_code_is_a_call_only_of_an_interpreter_that_was_offered() -> None:
    assert said("<|python_tag|>print(1)", [ADD]) == []
    assert said("<|python_tag|>", [CODE]) == []
    assert said("print(1)", [CODE]) == []


def written_forms(name: str, arguments: dict[str, Any]) -> list[str]:
    text = json.dumps(arguments)
    keywords = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return [
        json.dumps({"name": name, "parameters": arguments}),
        json.dumps({"type": "function", "name": name, "parameters": arguments}, indent=4),
        f"<function={name}>{text}</function>",
        f"[{name}({keywords})]",
    ]


@settings(max_examples=100, deadline=None)
@given(arguments=ARGUMENTS, seed=st.integers(0, 10**6))
def test_any_arguments_come_back(arguments: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    for text in written_forms("add", arguments):
        if "</function>" not in json.dumps(arguments):
            assert said(text) == [("add", arguments)]
        assert streamed(text, rng) == ("", said(text))


def streamed(text: str, rng: random.Random, tools: Any = OFFERED) -> tuple[str, Any]:
    """What a reader makes of the text, which comes in pieces."""
    reader = CallReader(tools)
    shown = ""
    while text:
        n = rng.randrange(1, 9)
        shown += reader.push(text[:n])
        text = text[n:]
    rest, calls = reader.finish()
    return shown + rest, [(c["function"]["name"], c["function"]["arguments"]) for c in calls]


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["{", "[", '"name"', "add", "(", " ", "\n", "<function=", ">", "I",
                         "<|python_tag|>", "brave_search", ".call(", "a=1)]"])
    ).map("".join),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_stream_loses_nothing(text: str, seed: int) -> None:
    calls = said(text)
    assert streamed(text, random.Random(seed)) == ("" if calls else text, calls)
    assert streamed(text, random.Random(seed), []) == (text, [])


def test_plain_text_is_shown_at_once() -> None:
    reader = CallReader(OFFERED)
    assert [reader.push(piece) for piece in ("[", "1", "] is", " it")] == ["", "[1", "] is", " it"]
    assert CallReader(OFFERED).push("Once") == "Once"


# ---- wrong tools ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("add", "tools must be a list"),
        ({"type": "function"}, "tools must be a list"),
        (["add"], "tool 0 must be a mapping whose type is function, or one of the built-in"),
        ([{"type": "web"}], "tool 0 must be a mapping"),
        ([{"type": "function"}], "tool 0 must have a 'function'"),
        ([{"type": "function", "function": {"name": "a b"}}], "tool 0 is named 'a b'"),
        ([{"type": "function", "function": {"name": ""}}], "1 to 64 letters"),
        ([{"type": "function", "function": {"name": "f", "description": 3}}], "description"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "parameters"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"a": {1}}}}], "as JSON"),
        ([ADD, ADD], "two tools are named 'add'"),
        ([ADD] * 129, "129 tools: there may be at most 128"),
    ],
)
def test_wrong_tools(bundled: ChatFormat, tools: Any, message: str) -> None:
    with pytest.raises(DialogError, match=message):
        check_tools(tools)
    with pytest.raises(DialogError, match=message):
        bundled.encode_dialog_prompt([user("Hi")], tools=tools)


@pytest.mark.parametrize(
    ("choice", "tools", "message"),
    [
        ("required", [], "there are no tools"),
        ("subtract", [ADD], "it must be auto, none, required or one of add"),
    ],
)
def test_wrong_choice(choice: str, tools: Any, message: str) -> None:
    with pytest.raises(DialogError, match=message):
        check_choice(tools, choice)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([3], "does not name its function"),
        ([{"function": {"name": "add", "arguments": "no"}}], "no JSON object"),
        ([{"function": {"name": "add", "arguments": "[" * 10**5}}], "no JSON object"),
        ([{"function": {"name": "add", "arguments": [1]}}], "no JSON object"),
        ([{"function": {"name": "add", "arguments": {"a": {1}}}}], "no JSON object"),
    ],
)
def test_wrong_calls_in_a_dialog(bundled: ChatFormat, wrong: Any, message: str) -> None:
    with pytest.raises(DialogError, match=message):
        bundled.encode_dialog_prompt([user("Hi"), calling(*wrong), user("So?")])


def test_calls_of_others_than_the_assistant(bundled: ChatFormat) -> None:
    with pytest.raises(DialogError, match="message 0 from user has tool_calls"):
        bundled.encode_dialog_prompt([{**user("Hi"), "tool_calls": [call("add")]}])


@pytest.mark.parametrize("date", ["", "a\nb", 3])
def test_a_date_is_one_line(bundled: ChatFormat, date: Any) -> None:
    with pytest.raises(DialogError, match="the date is"):
        bundled.encode_dialog_prompt([user("Hi")], date=date)


@pytest.mark.parametrize("name", ["llama2", "zephyr", "chatml"])
def test_other_formats_have_no_tools(name: Any, tmp_path: Path) -> None:
    from llama.chat_forms import make_format
    from llama.errors import LlamaError

    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    if name == "chatml":
        tokenizer.special_tokens = {**tokenizer.special_tokens, "<|im_start|>": 1, "<|im_end|>": 2}
    formatter = make_format(name, tokenizer)
    with pytest.raises(LlamaError, match="only Llama 3's chat format has tools"):
        formatter.encode_dialog_prompt([user("Hi")], tools=[ADD])
    with pytest.raises(LlamaError, match="only Llama 3's chat format has a date"):
        formatter.encode_dialog_prompt([user("Hi")], date=DATE)
    with pytest.raises(LlamaError, match="has tool_calls"):
        formatter.encode_dialog_prompt([user("Hi"), calling(call("add")), user("So?")])


# ---- answers of a model --------------------------------------------------------------------------

DIGIT: Any = {"type": "integer", "minimum": 0, "maximum": 9}
PLACE: Any = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"],
              "additionalProperties": False}  # fmt: skip
SHORT: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": DIGIT, "b": DIGIT},
                       "required": ["a", "b"], "additionalProperties": False},
    },
}  # fmt: skip
GO: Any = {
    "type": "function",
    "function": {
        "name": "go",
        "parameters": {"type": "object", "properties": {"at": {"$ref": "#/$defs/Place"}},
                       "required": ["at"], "additionalProperties": False,
                       "$defs": {"Place": PLACE}},
    },
}  # fmt: skip
ANSWERS = {
    "add": '{"name": "add", "parameters": {"a": 1, "b": 2}}',
    "twice": "[add(a=1, b=2), add(a=3, b=4)]",
    "search the web": '<|python_tag|>brave_search.call(query="gold price")',
    "talk": "[1] is a footnote.",
}
AUTO: Any = [SHORT, SEARCH[0]]


@pytest.fixture(scope="module")
def llama() -> Llama:
    return make_talker(ANSWERS, AUTO, mode="fast", max_batch_size=4)


@pytest.mark.parametrize(
    ("question", "want"),
    [
        ("add", [call("add", a=1, b=2)]),
        ("twice", [call("add", a=1, b=2), call("add", a=3, b=4)]),
        ("search the web", [call("brave_search", query="gold price")]),
        ("talk", None),
    ],
)
def test_a_model_calls_by_itself(llama: Llama, question: str, want: Any) -> None:
    options: Any = dict(temperature=0, max_gen_len=60)
    (answer,) = llama.chat_completion([[user(question)]], tools=AUTO, **options)
    message = answer["generation"]
    assert message.get("tool_calls") == want
    assert message["content"] == ("" if want else ANSWERS[question])
    waits = ANSWERS[question].startswith("<|python_tag|>")
    assert (message.get("stop_reason") == "end_of_message") == waits
    reader = CallReader(AUTO)
    events = llama.stream([user(question)], tools=AUTO, **options)
    shown = "".join(reader.push(event.text) for event in events)
    rest, calls = reader.finish()
    assert (shown + rest, calls) == (message["content"], want or [])
    # A tool that was not offered is not called.
    text = llama.chat_completion([[user(question)]], tools=[GO], **options)[0]["generation"]
    assert "tool_calls" not in text


@pytest.mark.parametrize("date", [None, DATE])
def test_a_call_that_is_required(llama: Llama, date: str | None) -> None:
    dialogs: Any = [[user("What is 1 plus 2?")], [user("Go there, please.")], [user("talk")]]
    tools = [SHORT, GO]
    options: Any = dict(tools=tools, date=date, temperature=1.5, max_gen_len=100)
    answers = llama.chat_completion(dialogs, tool_choice="required", seed=3, **options)
    for dialog, answer in zip(dialogs, answers, strict=True):
        message = answer["generation"]
        (made,) = message["tool_calls"]
        keys = {"add": {"a", "b"}, "go": {"at"}}[made["function"]["name"]]
        assert set(made["function"]["arguments"]) == keys
        assert message["content"] == ""
        result: Any = {"role": "ipython", "content": "3"}  # all of it can stand in a prompt
        llama.chat_completion([[*dialog, message, result]], **{**options, "max_gen_len": 2})


def test_the_tool_that_is_named(llama: Llama) -> None:
    options: Any = dict(tools=[SHORT, GO], tool_choice="go", max_gen_len=100, temperature=0)
    message = llama.chat_completion([[user("add")]], **options)[0]["generation"]
    (made,) = message["tool_calls"]
    assert made["function"]["name"] == "go"
    assert made["function"]["arguments"]["at"]["x"] in (1, 2)  # by the schema's own reference
    reader = CallReader([SHORT, GO])
    stream = llama.stream([user("add")], **options)
    assert "".join(reader.push(event.text) for event in stream) == ""
    assert reader.finish() == ("", message["tool_calls"])


def test_no_tools_where_none_may_be_called(llama: Llama) -> None:
    options: Any = dict(temperature=0, max_gen_len=8, logprobs=True)
    plain = llama.chat_completion([[user("Hi")]], **options)
    with_none = llama.chat_completion([[user("Hi")]], tools=AUTO, tool_choice="none", **options)
    assert with_none == plain
    assert llama.chat_completion([[user("Hi")]], tools=AUTO, **options) != plain


def test_what_cannot_go_together(llama: Llama) -> None:
    begun: Any = [user("Hi"), {"role": "assistant", "content": "So"}]
    with pytest.raises(DialogError, match="continue_final_message cannot be combined with tools"):
        llama.chat_completion([begun], tools=AUTO, continue_final_message=True)
    with pytest.raises(GenerationError, match="tools needs a dialog"):
        list(llama.stream("Once", tools=AUTO))
    with pytest.raises(GenerationError, match="date needs a dialog"):
        list(llama.stream("Once", date=DATE))
