"""Tell the kinds of prompts apart: texts, token ids or dialogs, one or several."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from llama.errors import GenerationError


def is_dialog(prompt: Any) -> bool:
    """Whether a prompt is a dialog, not a text or token ids."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return is_list and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def is_prompt_list(prompts: Any) -> bool:
    """Whether `prompts` is a list of texts, of lists of ids, or of dialogs, not one prompt."""
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str) and len(prompts) > 0
    return is_list and isinstance(prompts[0], Sequence)


def as_ids(prompt: Any) -> Any:
    """Tensors and arrays as lists, also inside a list; anything else unchanged."""
    if isinstance(prompt, list | tuple):
        return [as_ids(part) for part in prompt]
    return prompt.tolist() if hasattr(prompt, "tolist") else prompt


def check_is_list(prompts: Any) -> None:
    """Raise GenerationError unless `prompts` is a list."""
    if isinstance(prompts, str):
        raise GenerationError("prompts is one string: give a list of strings")
    if not isinstance(prompts, Sequence):
        raise GenerationError(f"prompts is {reprlib.repr(prompts)}: it must be a list")
