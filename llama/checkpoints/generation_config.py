"""The stop tokens and the sampling options that a folder suggests for its model.

Hugging Face's folders keep both in `generation_config.json`. Older ones keep the stop tokens in
`config.json`. A GGUF file keeps the stop tokens with its vocabulary, which `from_gguf.py` reads.
"""

import os
from pathlib import Path
from typing import Any

from llama.errors import MAX_WHOLE_NUMBER, ConfigError, GenerationError
from llama.files import read_json
from llama.gguf_file import is_gguf, read_value
from llama.sampling import SamplingParams

GENERATION_CONFIG = "generation_config.json"
GGUF_KEYS = {"temperature": "general.sampling.temp", "top_p": "general.sampling.top_p"}


def read_stop_tokens(folder: Path) -> list[int] | None:
    """The stop token ids in `generation_config.json`, else in `config.json`, else None.

    Raises ConfigError for values that cannot be ids.
    """
    for path in (find_beside(folder, GENERATION_CONFIG), find_beside(folder, "config.json")):
        eos = read_json(path).get("eos_token_id") if path is not None else None
        stop = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(type(token) is int and 0 <= token <= MAX_WHOLE_NUMBER for token in stop):
            raise ConfigError(f"{path}: eos_token_id is {eos!r}, not a token id or a list of them")
        if stop:
            return stop
    return None


def read_sampling(folder: Path) -> dict[str, float]:
    """The `temperature` and `top_p` in `generation_config.json` or in a GGUF file; empty if it
    names neither.

    Raises ConfigError for a value out of its range.
    """
    path = folder if is_gguf(folder) else find_beside(folder, GENERATION_CONFIG)
    config: dict[str, Any] = {}
    if is_gguf(folder):
        config = {name: read_value(folder, key, float) for name, key in GGUF_KEYS.items()}
    elif path is not None:
        config = read_json(path)
    found = {name: config[name] for name in GGUF_KEYS if config.get(name) is not None}
    try:
        SamplingParams(**found)
    except GenerationError as error:
        raise ConfigError(f"{path}: {error}") from error
    return found


def find_beside(folder: Path, name: str) -> Path | None:
    """The file in the folder of the weights. If that folder is `original/`, the folder around it is
    searched too. None if there is no such file."""
    places = [folder, folder.parent] if folder.name == "original" else [folder]
    return next((place / name for place in places if os.path.lexists(place / name)), None)
