"""Tools over the API: OpenAI's client and LangChain's, whole answers and streams."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from helpers.server import MODEL
from helpers.talker import make_talker

from llama import Llama

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [3, 4]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
SEARCH: Any = {"type": "brave_search"}
TOOLS = [ADD, SEARCH]
ANSWERS = {
    "add": '{"name": "add", "parameters": {"a": 1, "b": 3}}',
    "twice": "[add(a=1, b=3), add(a=2, b=4)]",
    "search the web": '<|python_tag|>brave_search.call(query="gold price")',
    "talk": "[1] is a footnote.",
    "open": '{"name": of a thing',
}
GREEDY: Any = dict(model=MODEL, temperature=0, max_tokens=60)
CALLS = {
    "add": [("add", {"a": 1, "b": 3})],
    "twice": [("add", {"a": 1, "b": 3}), ("add", {"a": 2, "b": 4})],
    "search the web": [("brave_search", {"query": "gold price"})],
}


def user(text: str) -> Any:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def llama() -> Llama:
    return make_talker(ANSWERS, TOOLS, mode="fast", max_batch_size=4)


def found(calls: Any) -> list[tuple[str, Any]]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in calls or ()]


@pytest.mark.parametrize("question", ANSWERS)
def test_calls_whole_and_streamed(client: openai.OpenAI, question: str) -> None:
    ask: Any = dict(messages=[user(question)], tools=TOOLS, **GREEDY)
    choice = client.chat.completions.create(**ask).choices[0]
    want = CALLS.get(question, [])
    assert found(choice.message.tool_calls) == want
    assert choice.message.content == (None if want else ANSWERS[question])
    assert choice.finish_reason == ("tool_calls" if want else "stop")
    with client.chat.completions.stream(**ask) as stream:  # it puts the deltas together
        for _ in stream:
            pass
        streamed = stream.get_final_completion().choices[0]
    assert found(streamed.message.tool_calls) == want
    assert (streamed.message.content or None) == choice.message.content
    assert streamed.finish_reason == choice.finish_reason
    ids = [call.id for answer in (choice, streamed) for call in answer.message.tool_calls or ()]
    assert len(set(ids)) == len(ids)
    assert all(call.startswith("call_") for call in ids)


def test_streamed_deltas(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            messages=[user("twice")], tools=TOOLS, stream=True, logprobs=True, **GREEDY
        )
    )
    deltas = [chunk.choices[0] for chunk in chunks]
    assert deltas[0].delta.role == "assistant"
    assert not any(choice.delta.content for choice in deltas)  # nothing of a call is shown as text
    calls = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    assert [call.index for call in calls] == [0, 1]
    assert deltas[-1].finish_reason == "tool_calls"
    n_logprobs = sum(len(c.logprobs.content or ()) for c in deltas if c.logprobs is not None)
    whole = client.chat.completions.create(
        messages=[user("twice")], tools=TOOLS, logprobs=True, **GREEDY
    )
    assert whole.choices[0].logprobs is not None
    assert n_logprobs == len(whole.choices[0].logprobs.content or ())


def test_asynchronously_and_several_samples(url: str) -> None:
    async def ask() -> Any:
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(
            messages=[user("add")], tools=TOOLS, stream=True, n=2, **GREEDY
        )
        return [chunk async for chunk in stream]

    choices = [choice for chunk in asyncio.run(ask()) for choice in chunk.choices]
    for index in (0, 1):
        calls = [c for choice in choices if choice.index == index
                 for c in choice.delta.tool_calls or ()]  # fmt: skip
        assert found(calls) == CALLS["add"]


def test_the_answer_of_a_tool_goes_back(client: openai.OpenAI, llama: Llama) -> None:
    """As in OpenAI's guide: the message is appended as it came, then the tool's answer."""
    messages: Any = [user("twice")]
    message = client.chat.completions.create(messages=messages, tools=TOOLS, **GREEDY).choices[0]
    messages.append(message.message)
    for call in message.message.tool_calls or ():
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "4"})
    answer = client.chat.completions.create(messages=messages, tools=TOOLS, **GREEDY)
    calls = [{"function": {"name": name, "arguments": a}} for name, a in CALLS["twice"]]
    result = {"role": "ipython", "content": "4"}
    dialog: Any = [
        user("twice"), {"role": "assistant", "content": "", "tool_calls": calls}, result, result,
    ]  # fmt: skip
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(llama.encode_dialog(dialog, tools=TOOLS))


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"add", "brave_search"}),
        ({"type": "function", "function": {"name": "add"}}, {"add"}),
        ({"type": "function", "function": {"name": "brave_search"}}, {"brave_search"}),
        ({"type": "brave_search"}, {"brave_search"}),
    ],
)
def test_a_call_that_must_come(client: openai.OpenAI, choice: Any, names: set[str]) -> None:
    for seed in range(3):
        answer = client.chat.completions.create(
            messages=[user("Say something.")], tools=TOOLS, tool_choice=choice, seed=seed,
            model=MODEL, temperature=1, max_tokens=200, top_p=0.9,
        ).choices[0]  # fmt: skip
        if answer.finish_reason == "length":  # within a query, which may be of any length
            assert "brave_search" in (answer.message.content or "")
            continue
        ((name, arguments),) = found(answer.message.tool_calls)
        assert name in names
        assert set(arguments) == ({"a", "b"} if name == "add" else {"query"})


def test_strict_functions(client: openai.OpenAI) -> None:
    from pydantic import BaseModel

    class Add(BaseModel):
        a: int
        b: bool

    tool = openai.pydantic_function_tool(Add)
    choice: Any = {"type": "function", "function": {"name": "Add"}}
    answer = client.chat.completions.parse(
        messages=[user("Hi")], tools=[tool], tool_choice=choice, model=MODEL, max_tokens=200,
        temperature=0,
    )  # fmt: skip
    if answer.choices[0].finish_reason == "tool_calls":
        assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Add)
    with pytest.raises(openai.BadRequestError, match="strict: true needs tool_choice"):
        client.chat.completions.parse(messages=[user("Hi")], tools=[tool], model=MODEL)


def test_no_call(client: openai.OpenAI, llama: Llama) -> None:
    ask: Any = dict(messages=[user("add")], **GREEDY)
    plain = client.chat.completions.create(**ask)
    none = client.chat.completions.create(tools=TOOLS, tool_choice="none", **ask)
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


def test_the_first_call_alone(client: openai.OpenAI) -> None:
    ask: Any = dict(messages=[user("twice")], tools=TOOLS, parallel_tool_calls=False, **GREEDY)
    answer = client.chat.completions.create(**ask).choices[0].message
    assert found(answer.tool_calls) == CALLS["twice"][:1]
    with client.chat.completions.stream(**ask) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert found(streamed.tool_calls) == CALLS["twice"][:1]


def test_a_date(client: openai.OpenAI, llama: Llama, url: str) -> None:
    body: Any = dict(messages=[user("Hi")], tools=TOOLS, date="26 Jul 2024")
    answer = client.chat.completions.create(
        messages=body["messages"], tools=TOOLS, extra_body={"date": body["date"]}, **GREEDY
    )
    want = llama.encode_dialog([user("Hi")], tools=TOOLS, date="26 Jul 2024")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(want)
    assert httpx.post(f"{url}/tokenize", json=body).json()["tokens"] == want


CALL: Any = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
CALLING: Any = {"role": "assistant", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        (dict(tools=[{"type": "web_search"}]), "tools.0.type", "function"),
        (dict(tools=[{"type": "function"}]), None, "must have a 'function'"),
        (dict(tools=[ADD, ADD]), None, "two tools are named 'add'"),
        (dict(tools=[ADD] * 129), "tools", "128"),
        (dict(tools=[{**ADD, "function": {"name": "a b"}}]), "tools.0.function.name", "pattern"),
        (dict(tool_choice="required"), None, "there are no tools"),
        (dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "sub"}}), None,
         "one of add, brave_search"),
        (dict(tools=TOOLS, tool_choice="any"), "tool_choice", "required"),
        (dict(tools=TOOLS, response_format={"type": "json_object"}), "response_format", "tools"),
        (dict(messages=[user("Hi"), {**CALLING, "role": "user"}]), "messages.1.tool_calls",
         "only an assistant"),
        (dict(messages=[user("Hi"), CALLING, {"role": "tool", "content": "1"}]),
         "messages.2.tool_call_id", "needs the tool_call_id"),
        (dict(messages=[user("Hi"), CALLING, {"role": "tool", "content": "1",
                                              "tool_call_id": "d"}]),
         "messages.2.tool_call_id", "no earlier message"),
        (dict(messages=[user("Hi"), {"role": "assistant", "content": None}]),
         "messages.1.content", "no content"),
        (dict(messages=[user("Hi"), {"role": "assistant", "tool_calls": [
            {**CALL, "function": {"name": "add", "arguments": "[1"}}]}, user("So?")]), None,
         "arguments that are no JSON object"),
        (dict(date="a\nb"), None, "the date is"),
        (dict(date=3), "date", "string"),
        (dict(tools=TOOLS, continue_final_message=True,
              messages=[user("Hi"), {"role": "assistant", "content": "So"}]), None,
         "calls no tools"),
    ],
)  # fmt: skip
def test_mistakes(url: str, change: Any, param: str | None, message: str) -> None:
    for stream in (False, True):
        body = {"messages": [user("Hi")], **GREEDY, **change, "stream": stream}
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert message in error["message"]
        if param is not None:
            assert error["param"] == param


def test_langchain(url: str) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    options: Any = dict(temperature=0, max_retries=0, max_completion_tokens=60)
    model = ChatOpenAI(
        base_url=f"{url}/v1", api_key="none", model=MODEL, use_responses_api=False, **options
    )
    assert isinstance(model.invoke("talk").content, str)
    assert "".join(chunk.text for chunk in model.stream("talk")) == model.invoke("talk").text
    bound = model.bind(tools=TOOLS)
    answer = bound.invoke("twice")
    assert [(c["name"], c["args"]) for c in answer.tool_calls] == CALLS["twice"]
    whole: Any = None
    for chunk in bound.stream("twice"):
        whole = chunk if whole is None else whole + chunk
    assert [(c["name"], c["args"]) for c in whole.tool_calls] == CALLS["twice"]
    results = [ToolMessage(str(add.invoke(c["args"])), tool_call_id=c["id"])
               for c in answer.tool_calls]  # fmt: skip
    assert isinstance(bound.invoke([HumanMessage("twice"), answer, *results]).content, str)
    forced = model.bind_tools([ADD], tool_choice="add").invoke("talk")
    assert forced.tool_calls[0]["name"] == "add"
