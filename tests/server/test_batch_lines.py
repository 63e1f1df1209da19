"""`llama batch` on lines of OpenAI's Batch API: the answers are the server's."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from openai.types.completion import Completion

from llama import Llama
from llama.__main__ import main

DIALOG: Any = [{"role": "user", "content": "Tell me a tale."}]


def run(folder: Path, lines: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["llama", *words])
    try:
        main()
    except SystemExit as end:
        assert end.code == 1  # noqa: PT017
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def line(name: str, url: str, **body: Any) -> dict[str, Any]:
    body = {"model": "any", "temperature": 0, "max_tokens": 8, **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def test_lines_of_the_batch_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, text = "/v1/chat/completions", "/v1/completions"
    lines = [
        line("chat", chat, messages=DIALOG),
        line("text", text, prompt=["Once upon", "The king"], n=2),
        {"prompt": "Once upon", "temperature": 0, "max_gen_len": 8},
        line("wrong", chat, messages=[]),
        line("elsewhere", "/v1/embeddings", input="x"),
        line("stream", chat, messages=DIALOG, stream=True),
        line("long", text, prompt="x " * 1000),
    ]
    found = run(tmp_path, lines, monkeypatch)
    llama = Llama.build(max_batch_size=1, mode="fast", device="cpu")
    answer = ChatCompletion.model_validate(found[0]["response"]["body"])
    (want,) = llama.chat_completion([DIALOG], temperature=0, max_gen_len=8)
    assert answer.choices[0].message.content == want["generation"]["content"]
    assert found[0]["custom_id"] == "chat"
    assert found[0]["error"] is None
    assert found[0]["response"]["status_code"] == 200
    completion = Completion.model_validate(found[1]["response"]["body"])
    texts = [choice.text for choice in completion.choices]
    plain = llama.text_completion(["Once upon", "The king"], temperature=0, max_gen_len=8)
    assert texts == [p["generation"] for p in plain for _ in range(2)]
    assert found[2]["text"] == texts[0]
    for result, message in zip(
        found[3:], ["at least 1", "only POST", "cannot be streamed", "max_seq_len"], strict=True
    ):
        assert message in result["error"]["message"]
        assert result["response"]["status_code"] == 400
        assert message in result["response"]["body"]["error"]["message"]
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(tmp_path, lines, monkeypatch) == found  # nothing is run again
    assert (tmp_path / "out.jsonl").read_bytes() == before
