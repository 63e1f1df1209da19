"""The API over a real socket: OpenAI's client, plain HTTP, and the library's own answers."""

import asyncio
import json
import time
from typing import Any

import httpx
import openai
import pytest
from helpers.server import MODEL, running

from llama import Llama

DIALOG: Any = [{"role": "user", "content": "Tell me a tale of a fox."}]
GREEDY: Any = dict(model=MODEL, temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=256, max_batch_size=4, mode="fast", device="cpu")


@pytest.fixture(scope="module")
def alone() -> Llama:
    """The same model, for answers without a server."""
    return Llama.build(max_seq_len=256, max_batch_size=4, mode="fast", device="cpu")


def post(url: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=60)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def assert_idle_soon(url: str) -> None:
    """Within two seconds no request is open."""
    deadline = time.monotonic() + 2
    while httpx.get(f"{url}/health").json()["open_requests"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert httpx.get(f"{url}/health").json()["open_requests"] == 0


# ---- chat ----------------------------------------------------------------------------------------


def test_a_chat_is_the_librarys(client: openai.OpenAI, alone: Llama) -> None:
    answer = client.chat.completions.create(messages=DIALOG, **GREEDY)
    (want,) = alone.chat_completion([DIALOG], temperature=0, max_gen_len=24, logprobs=True)
    assert answer.choices[0].message.content == want["generation"]["content"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(alone.encode_dialog(DIALOG))
    assert answer.usage.completion_tokens == 24
    again = client.chat.completions.create(messages=DIALOG, **GREEDY)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached == len(alone.encode_dialog(DIALOG)) - 1


def test_a_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=DIALOG, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=DIALOG, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_bytes_of_a_stream(url: str) -> None:
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json={**GREEDY, "messages": DIALOG, "stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        events = response.read().decode().split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-2])


def test_samples_seeds_and_stop_strings(client: openai.OpenAI) -> None:
    options: Any = dict(model=MODEL, messages=DIALOG, max_tokens=12, temperature=1.0)
    one, two = (client.chat.completions.create(n=3, seed=5, **options) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert [choice.index for choice in one.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in two.choices]
    greedy: Any = {**GREEDY, "messages": DIALOG}
    whole = client.chat.completions.create(**greedy).choices[0].message.content
    assert whole is not None
    stop = whole[10:14]
    cut = client.chat.completions.create(stop=[stop], **greedy).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=DIALOG, logprobs=True, top_logprobs=3, **GREEDY
    ).choices[0]
    assert answer.logprobs is not None
    content = answer.logprobs.content
    assert content is not None
    assert b"".join(bytes(t.bytes or []) for t in content).decode() == answer.message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
    chunks = client.chat.completions.create(
        messages=DIALOG, logprobs=True, top_logprobs=3, stream=True, **GREEDY
    )
    parts = [c.choices[0].logprobs for c in chunks if c.choices]
    streamed = [t for part in parts if part and part.content for t in part.content]
    assert [t.token for t in streamed] == [t.token for t in content]


def test_forms_of_messages(client: openai.OpenAI) -> None:
    content = [{"type": "text", "text": text} for text in ("Tell me ", "a tale of a fox.")]
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": content},
    ]
    plain: Any = [{"role": "system", "content": "Be brief."}, *DIALOG]
    one, two = (client.chat.completions.create(messages=m, **GREEDY) for m in (parts, plain))
    assert one.choices[0].message.content == two.choices[0].message.content


def test_a_final_message_is_continued(client: openai.OpenAI, alone: Llama) -> None:
    begun: Any = [*DIALOG, {"role": "assistant", "content": "There was once"}]
    answer = client.chat.completions.create(
        messages=begun, extra_body={"continue_final_message": True}, **GREEDY
    )
    (want,) = alone.chat_completion(
        [begun], continue_final_message=True, temperature=0, max_gen_len=24
    )
    text = answer.choices[0].message.content
    assert text is not None
    assert "There was once" + text == want["generation"]["content"]


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "any", "schema": schema}}


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["fox", "cat"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def test_answers_in_json(client: openai.OpenAI) -> None:
    """Also with several samples, and in a stream."""
    options: Any = dict(model=MODEL, messages=DIALOG, max_tokens=200, temperature=1.0)
    options |= dict(response_format=schema_format(SCHEMA), seed=3)
    for choice in client.chat.completions.create(n=4, **options).choices:
        assert choice.finish_reason == "stop"
        content = json.loads(choice.message.content or "")
        assert content.keys() == {"name", "age", "tags"}
        assert len(content["name"]) <= 12
        assert 0 <= content["age"] <= 99
        assert set(content["tags"]) <= {"fox", "cat"}
    stream = client.chat.completions.create(stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(text).keys() == {"name", "age", "tags"}
    any_object = client.chat.completions.create(
        model=MODEL, messages=DIALOG, max_tokens=20, response_format={"type": "json_object"}
    )
    assert (any_object.choices[0].message.content or "").startswith("{")


# ---- completions ---------------------------------------------------------------------------------


def test_completions_of_all_kinds_of_prompts(client: openai.OpenAI, alone: Llama) -> None:
    prompts = ["Once upon a time", "The king said"]
    want = [p["generation"] for p in alone.text_completion(prompts, 0, max_gen_len=24)]
    ids = [alone.encode_prompt(prompt) for prompt in prompts]
    for prompt in (prompts, ids):
        answer = client.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == want
    for single in (prompts[0], ids[0]):
        assert client.completions.create(prompt=single, **GREEDY).choices[0].text == want[0]
    stream = client.completions.create(prompt=prompts, stream=True, **GREEDY)
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == want


def test_echo_and_logprobs(client: openai.OpenAI, alone: Llama) -> None:
    prompt = "Once upon a time"
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    choice = answer.choices[0]
    assert choice.text == prompt
    assert choice.logprobs is not None
    (scores,) = alone.score([prompt])
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(scores[1:], abs=1e-4)
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.tokens is not None
    for token, offset in list(
        zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True)
    )[1:]:
        assert prompt[offset:].startswith(token)


def test_models_health_and_tokens(client: openai.OpenAI, url: str, alone: Llama) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert httpx.get(f"{url}/health").json() == {"status": "ok", "open_requests": 0}
    tokens = post(url, "/tokenize", prompt="Once \u65e5").json()["tokens"]
    assert tokens == alone.encode_prompt("Once \u65e5")
    assert post(url, "/detokenize", tokens=tokens[1:]).json()["prompt"] == "Once \u65e5"
    chat = post(url, "/tokenize", messages=DIALOG).json()
    assert chat["tokens"] == alone.encode_dialog(DIALOG)
    assert chat["special"][0]
    assert chat["texts"][0] == "<|begin_of_text|>"


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "gpt-4"}, 404, "model", "the model 'gpt-4' is not served"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": None}, 400, "messages", "valid list"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "no content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None, "must be from user"),
        ({"temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, 400, "temperature", "valid number"),
        ({"n": 9}, 400, "n", "less than or equal to 8"),
        ({"n": True}, 400, "n", "valid integer"),
        ({"n": 1.5}, 400, "n", "valid integer"),
        ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "'x' is no token id"),
        ({"logit_bias": {"99999": 1}}, 400, None, "99999"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"tools": [{}]}, 400, "tools.0.type", "required"),
        ({"response_format": {"type": "xml"}}, 400, "response_format.type", "'text'"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format", "has a json_schema"),
        (
            {"response_format": schema_format({"type": "nothing"})},
            400,
            None,
            "the schema is wrong: Invalid type: nothing",
        ),
        (
            {"response_format": schema_format({"enum": ["x" * 70_000]})},
            400,
            None,
            "the schema has 70",
        ),
        ({"flavour": "sweet"}, 400, "flavour", "unknown or not supported"),
        ({"messages": [{"role": "user", "content": "x " * 3000}]}, 400, None, "max_seq_len is 256"),
    ],
)
def test_a_mistake_in_a_chat(
    url: str, change: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    body = {**GREEDY, "messages": DIALOG, **change}
    for stream in (False, True):  # it is found before a stream begins
        response = post(url, "/v1/chat/completions", **body, stream=stream)
        assert response.status_code == status
        error = error_of(response)
        assert error["param"] == param
        assert message in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "the body is no JSON"),
        (b"[1]", "application/json", 400, "the body is a list, not a JSON object"),
        (b'{"a": NaN}', "application/json", 400, "NaN is no JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "application/json", 400, "the body is no JSON"),
        (b"[" * 10_000, "application/json", 400, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "application/json", 400, "nested deeper than 64 levels"),
        (b'{"a": "\xff"}', "application/json", 400, "the body is no JSON"),
        (b"{}", "text/plain", 415, "the content type is text/plain, not application/json"),
        (b"{}", "", 415, "the content type is missing"),
        (b'"' + b"x" * (1 << 20) + b'"', "application/json", 413, "at most 1048576 are read"),
    ],
    ids=range(10),
)
def test_a_body_that_is_none(
    url: str, content: bytes, kind: str, status: int, message: str
) -> None:
    headers = {"content-type": kind} if kind else {}
    response = httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == status
    assert message in error_of(response)["message"]


def test_routes_that_are_none(url: str) -> None:
    assert error_of(httpx.get(f"{url}/v1/chat/completions"))["message"].endswith("not GET")
    assert httpx.get(f"{url}/v1/chat/completions").status_code == 405
    response = httpx.get(f"{url}/v2")
    assert response.status_code == 404
    assert error_of(response)["message"] == "there is no /v2"
    assert httpx.get(f"{url}/v1/models/other").status_code == 404


# ---- company, haste and ends ---------------------------------------------------------------------


def test_many_clients_some_of_whom_leave(llama: Llama, url: str, alone: Llama) -> None:
    """Greedy texts are those of solo runs, and slots are free soon after a client left."""
    prompts = [f"Once upon a time there was a {word}" for word in "king fox cat witch".split()] * 8
    want = {p: alone.text_completion([p], 0, max_gen_len=24)[0]["generation"] for p in set(prompts)}

    async def one(client: httpx.AsyncClient, index: int, prompt: str) -> None:
        body = {**GREEDY, "prompt": prompt, "stream": True}
        text = ""
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            assert response.status_code == 200
            n_lines = 0
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                n_lines += 1
                if index % 5 == 4 and n_lines > 4:
                    return
        assert text == want[prompt]

    async def all_of_them() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            await asyncio.gather(*(one(client, i, prompt) for i, prompt in enumerate(prompts)))

    asyncio.run(all_of_them())
    assert_idle_soon(url)


def test_a_client_that_leaves_before_its_whole_answer(url: str) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "n": 4}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.02)
    assert_idle_soon(url)


def test_a_full_queue_and_a_late_answer(alone: Llama) -> None:
    llama = Llama(alone.model, alone.tokenizer, mode="fast", max_batch_size=1)
    body: Any = {"model": MODEL, "prompt": "Once", "max_tokens": 200, "ignore_eos": True}

    async def statuses(url: str) -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            calls = [client.post(f"{url}/v1/completions", json=body) for _ in range(6)]
            answers = await asyncio.gather(*calls)
        refused = [answer for answer in answers if answer.status_code == 429]
        assert all(answer.headers["retry-after"] == "1" for answer in refused)
        return sorted(answer.status_code for answer in answers)

    with running(llama, max_waiting=2) as (_, url):
        assert asyncio.run(statuses(url)) == [200, 200, 200, 429, 429, 429]
    with running(llama, timeout=0.05) as (_, url):
        response = post(url, "/v1/completions", **body)
        assert response.status_code == 504
        with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as stream:
            events = stream.read().decode().split("\n\n")
        assert "no end after 0.05 seconds" in json.loads(events[-2][6:])["error"]["message"]


def test_who_may_call(alone: Llama) -> None:
    with running(alone, api_key="secret", origins=("https://friend.example",)) as (_, url):
        models = f"{url}/v1/models"
        assert httpx.get(models).status_code == 401
        assert httpx.get(models).json()["error"]["code"] == "invalid_api_key"
        key = {"Authorization": "Bearer secret"}
        assert httpx.get(models, headers=key).status_code == 200
        assert httpx.get(models, headers={"Authorization": "Bearer secrets"}).status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(models, headers={**key, "Host": "evil.example"}).status_code == 403
        assert (
            httpx.get(models, headers={**key, "Origin": "http://evil.example"}).status_code == 403
        )
        assert httpx.get(models, headers={**key, "Origin": url}).status_code == 200
        friend = httpx.get(models, headers={**key, "Origin": "https://friend.example"})
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"
        preflight = httpx.options(models, headers={"Origin": "https://friend.example"})
        assert preflight.status_code == 204


def test_a_log_of_calls_has_no_text(alone: Llama, capfd: pytest.CaptureFixture[str]) -> None:
    llama = Llama(alone.model, alone.tokenizer, mode="fast", max_batch_size=1)
    with running(llama, has_log=True) as (_, url):
        capfd.readouterr()
        body: Any = {**GREEDY, "prompt": "a secret", "max_tokens": 2}
        httpx.post(f"{url}/v1/completions?question=secret", json=body)
        httpx.post(f"{url}/v1/completions", json={"model": "secret"})
        httpx.get(f"{url}/health", headers={"Host": "other.example"})
    log = capfd.readouterr().err
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    calls = [(line["method"], line["path"], line["status"]) for line in lines]
    assert calls == [
        ("POST", "/v1/completions", 200),
        ("POST", "/v1/completions", 400),
        ("GET", "/health", 403),
    ]
    assert all(0 < line["seconds"] < 60 for line in lines)
    assert "secret" not in log


def test_metrics(alone: Llama) -> None:
    llama = Llama(alone.model, alone.tokenizer, mode="fast", max_batch_size=2)
    with running(llama, has_metrics=True) as (_, url):
        prompt = "Once upon a time there was a king who had three sons, and the youngest of them"
        cached = n_prompt = 0
        for _ in range(2):
            answer = post(url, "/v1/completions", model=MODEL, prompt=prompt, max_tokens=3)
            usage = answer.json()["usage"]
            n_prompt += usage["prompt_tokens"]
            cached += usage["prompt_tokens_details"]["cached_tokens"]
        post(url, "/v1/completions", model="other", prompt="Once")
        httpx.get(f"{url}/nowhere/at/all")
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    assert 'llama_answers_total{path="/v1/completions",status="200"} 2.0' in lines
    assert 'llama_answers_total{path="/v1/completions",status="404"} 1.0' in lines
    assert 'llama_answers_total{path="other",status="404"} 1.0' in lines
    assert "llama_open_requests 0.0" in lines
    assert f"llama_prompt_tokens_total {n_prompt:.1f}" in lines
    assert f"llama_cached_tokens_total {cached:.1f}" in lines
    assert cached > 0
    assert "llama_generated_tokens_total 6.0" in lines


def test_stopping_lets_calls_finish(alone: Llama) -> None:
    llama = Llama(alone.model, alone.tokenizer, mode="fast", max_batch_size=2)
    body: Any = {"model": MODEL, "prompt": "Once", "max_tokens": 200, "ignore_eos": True}
    with running(llama) as (server, url):
        with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.begin_stopping()
            assert httpx.get(f"{url}/health").status_code == 503
            refused = post(url, "/v1/completions", **body)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "30"
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"


def test_the_death_of_the_engine(alone: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = Llama(alone.model, alone.tokenizer, mode="fast", max_batch_size=1)
    with running(llama) as (server, url):
        monkeypatch.setattr(llama.engine, "step", lambda: 1 / 0)
        response = post(url, "/v1/completions", model=MODEL, prompt="Once")
        assert response.status_code == 500
        assert "the engine has failed" in error_of(response)["message"]
        assert not server.service.is_alive
