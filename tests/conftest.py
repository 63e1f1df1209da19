"""What every test file may use: Meta's code as the oracle, the real tokenizers, steady threads."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

# One thread here and in every process a test starts: then sums are added up in one order, equal
# means equal whatever the machine, and ranks do not fight for cores. Tests never download.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# A GPU in the machine is hidden: `make test` is about the CPU, `make test-gpu` sets LLAMA_TEST_GPU.
if "LLAMA_TEST_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # a GPU's kernels run in Triton's interpreter

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
    """The real Llama 2 tokenizer.model, which only its owner can hand us."""
    path = os.environ.get("LLAMA2_TOKENIZER")
    if not path:
        pytest.skip("LLAMA2_TOKENIZER does not say where the Llama 2 tokenizer.model is")
    return Path(path)
