"""A server for the `llama` fixture of a test file, and OpenAI's client of it."""

from collections.abc import Iterator

import openai
import pytest
from helpers.server import running

from llama import Llama


@pytest.fixture(scope="module")
def url(llama: Llama) -> Iterator[str]:
    with running(llama) as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
