"""The reference library for Meta's Llama text models.

The names below are imported at their first use. So `llama --help` does not wait for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.errors import LlamaError
    from llama.generation import ChatPrediction, CompletionPrediction, Llama
    from llama.model import ModelArgs, Transformer
    from llama.sampling import SamplingParams
    from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer

__all__ = [
    "ChatFormat",
    "ChatPrediction",
    "CompletionPrediction",
    "Dialog",
    "Llama",
    "LlamaError",
    "Message",
    "ModelArgs",
    "SamplingParams",
    "Tokenizer",
    "Transformer",
]
MODULES = ("generation", "model", "tokenizer", "sampling", "errors")


def __getattr__(name: str) -> Any:
    """A public name, or a module such as `llama.model`."""
    if name in MODULES:
        return importlib.import_module(f"llama.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    for module in MODULES:
        found = importlib.import_module(f"llama.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AssertionError(name)
