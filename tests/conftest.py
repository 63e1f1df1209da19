"""Settings and fixtures of all tests: one thread, no GPU, oracles, real tokenizers, a browser."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# One thread, here and in every process that a test starts. So the order of sums does not depend on
# the machine, and ranks do not compete for cores. Tests never download.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# `make test` tests the CPU only, so a GPU is hidden. `make test-gpu` sets LLAMA_TEST_GPU.
if "LLAMA_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # the GPU kernels run in Triton's interpreter

import pytest
import torch
from helpers.oracle import import_oracle

torch.set_num_threads(1)
if "LLAMA_TEST_GPU" not in os.environ:  # also the GPU of a Mac
    torch.backends.mps.is_available = lambda: False


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    """Meta's own code, from the llama-models package."""
    return import_oracle()


@pytest.fixture(scope="session")
def llama3_tokenizer_path() -> Path:
    """The real Llama 3 tokenizer.model, which comes with llama-models."""
    spec = importlib.util.find_spec("llama_models")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="session")
def llama2_tokenizer_path() -> Path:
    """The real Llama 2 tokenizer.model. Its licence keeps it out of the project, so tests that need
    it run only if LLAMA2_TOKENIZER names the file."""
    path = os.environ.get("LLAMA2_TOKENIZER")
    if not path:
        pytest.skip("set LLAMA2_TOKENIZER to the path of Llama 2's tokenizer.model")
    return Path(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, token file and prompts that the jobs of `helpers.jobs` read."""
    from helpers.jobs import write_inputs

    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")  # while it is open, no test can start an event loop
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
