"""Meta's own code from the llama-models package, imported without torchvision."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType, SimpleNamespace

from llama.explain.oracles import import_llama_models


@contextmanager
def torchvision_stand_in() -> Iterator[None]:
    """A block with empty modules in the place of torchvision, if that is not installed.

    Meta's code imports torchvision for images, and never calls it for text. The modules are removed
    after the block, because transformers looks for torchvision and would believe it is installed.
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
    """Meta's modules: those that the library compares with, and tokenizer, chat_format, generation
    and datatypes.

    This is a function and no fixture, because the processes that tests spawn call it too.
    """
    with torchvision_stand_in():
        generation = importlib.import_module("llama_models.llama3.generation")
    parts = ("tokenizer", "chat_format")
    modules = {name: importlib.import_module(f"llama_models.llama3.{name}") for name in parts}
    datatypes = importlib.import_module("llama_models.datatypes")
    others = dict(generation=generation, datatypes=datatypes)
    return SimpleNamespace(**vars(import_llama_models()), **modules, **others)
