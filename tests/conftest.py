"""What every test file may use: Meta's code as the oracle, the real tokenizers, steady threads."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

# One thread here and in every process a test starts: then sums are added up in one order, equal
# means equal whatever the machine, and ranks do not fight for cores. Tests never download.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@contextmanager
def torchvision_stand_in() -> Iterator[None]:
    """Empty torchvision modules while Meta's image code is imported, which text never calls.

    They leave again: transformers asks find_spec for torchvision, and must hear the truth.
    """
    if importlib.util.find_spec("torchvision"):
        yield
        return
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    modules = [ModuleType(name) for name in names]
    for parent, child in pairwise(modules):
        setattr(parent, child.__name__.rpartition(".")[2], child)
    sys.modules.update(zip(names, modules, strict=True))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def import_oracle() -> SimpleNamespace:
    """Meta's modules: args, model, tokenizer, chat_format, generation and datatypes.

    A plain function, so that the ranks a test spawns can call it too.
    """
    with torchvision_stand_in():
        generation = importlib.import_module("llama_models.llama3.generation")
    parts = ("args", "model", "tokenizer", "chat_format")
    modules = {name: importlib.import_module(f"llama_models.llama3.{name}") for name in parts}
    datatypes = importlib.import_module("llama_models.datatypes")
    return SimpleNamespace(**modules, generation=generation, datatypes=datatypes)


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
