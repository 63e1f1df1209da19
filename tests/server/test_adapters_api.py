"""Adapters over the API: a request names one as its model, and batches mix them."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from helpers.adapters import write_adapter, write_base
from helpers.server import MODEL

from llama import Llama

TEXT = "the word is"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    root = tmp_path_factory.mktemp("adapters")
    base = write_base(root / "base")
    for seed, name in enumerate(("pirate", "poet")):
        write_adapter(base, root / name, seed, target_modules="all-linear", lora_alpha=32)
    adapters = {name: root / name for name in ("pirate", "poet")}
    return Llama.build(base, max_seq_len=96, mode="fast", adapters=adapters)


def test_a_request_names_its_adapter(client: openai.OpenAI, llama: Llama) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "pirate", "poet"]
    assert client.models.retrieve("poet").id == "poet"

    def ask(name: str) -> str:
        answer = client.completions.create(model=name, prompt=TEXT, temperature=0, max_tokens=6)
        assert answer.model == name
        return answer.choices[0].text

    names = [MODEL, "pirate", "poet"] * 3
    with ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(ask, names))
    for name, text in zip(names, found, strict=True):
        adapter = None if name == MODEL else name
        options = dict(temperature=0, max_gen_len=6, adapter=adapter)
        assert text == "".join(event.text for event in llama.stream(TEXT, **options))
    assert len(set(found)) == 3


def test_an_unknown_name(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="'tales' or 'pirate' or 'poet' is"):
        client.completions.create(model="sailor", prompt=TEXT)
    described = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
    assert described["CompletionBody"]["properties"]["model"]["enum"] == [MODEL, "pirate", "poet"]
