"""Meta's own code from the llama-models package, imported without torchvision."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType, SimpleNamespace


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
