"""The files beside the weights: copied where the source has them, else written for the layout."""

import logging
import shutil
from pathlib import Path
from typing import Any

from llama.checkpoints.folder import find_tokenizer
from llama.checkpoints.generation_config import GENERATION_CONFIG, read_stop_tokens
from llama.checkpoints.params import read_params
from llama.checkpoints.shards import Checkpoint
from llama.checkpoints.verify import kind_of
from llama.errors import CheckpointError, TokenizerError
from llama.files import atomic_file, sync_file, write_json
from llama.tokenizer import Tokenizer
from llama.tokenizer_files.chat_templates import LLAMA_2_TEMPLATE, LLAMA_3_TEMPLATE

log = logging.getLogger("llama")

# Files of the tokenizer and of generation, which are copied unchanged.
COPIED_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
)
PARAMS = Path("original", "params.json")  # Meta's file, in a folder of Hugging Face's layout
CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- llama
---

# {title}

{layers} layers, {heads} heads on {kv_heads}, width {dim}, vocabulary {vocab}, context {context}.
Converted by llama-reference. Token ids and chat prompts are those of Meta's code.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


def copy_files(source: Checkpoint, src: Path, destination: Path) -> None:
    """Copy COPIED_FILES from the weights' folder, or else from `src`, which may contain it."""
    for name in COPIED_FILES:
        found = next((p / name for p in (source.folder, src) if (p / name).is_file()), None)
        if found is not None:
            _copy(found, destination / name)


def complete_meta(source: Checkpoint, src: Path, destination: Path) -> None:
    """Complete a folder of Meta's layout: its first params.json, and Llama 3's `tokenizer.model`.

    The params.json that the folder once had replaces the new one where both describe one model.
    """
    original = src / PARAMS
    params = destination / "params.json"
    if source.is_hugging_face and original.is_file():
        before, now = read_params(original), read_params(params)
        if before.vocab_size == -1:
            before.vocab_size = now.vocab_size
        same = before.same_shape(now) and before.norm_eps == now.norm_eps
        if same and (before.context, before.rope_scaling) == (now.context, now.rope_scaling):
            _copy(original, params)
    if not (destination / "tokenizer.model").exists():
        tokenizer = _tokenizer(source, src)
        ranks = tokenizer.to_ranks() if tokenizer is not None else None
        if ranks is not None:
            _write(destination / "tokenizer.model", ranks)


def complete_hugging_face(source: Checkpoint, src: Path, destination: Path) -> None:
    """Complete a folder of Hugging Face's layout with the files that transformers reads: tokenizer,
    chat template, special tokens, stop tokens, and a card."""
    if not source.is_hugging_face:
        (destination / PARAMS).parent.mkdir()
        _copy(source.folder / "params.json", destination / PARAMS)
    args = source.args
    card = CARD.format(
        title=src.resolve().name, layers=args.n_layers, heads=args.n_heads,
        kv_heads=args.n_kv_heads, dim=args.dim, vocab=args.vocab_size, context=args.context,
    )  # fmt: skip
    _write(destination / "README.md", card.encode())
    tokenizer = _tokenizer(source, src)
    if tokenizer is None:
        return
    if not (destination / "tokenizer.json").exists():
        try:
            _write(destination / "tokenizer.json", tokenizer.to_json())
        except TokenizerError as error:
            log.warning("%s: no tokenizer.json is written, because %s", src, error)
            return
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    tokens = {"bos_token": names[tokenizer.bos_id], "eos_token": names[tokenizer.eos_id]}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": args.context,
        **tokens,
    }
    if kind_of(source.folder) != "base":
        config["chat_template"] = LLAMA_2_TEMPLATE if tokenizer.is_llama_2 else LLAMA_3_TEMPLATE
    stop_tokens = read_stop_tokens(source.folder) or tokenizer.stop_tokens
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(stop_tokens)}
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", tokens),
        (GENERATION_CONFIG, ids),
    ):
        if not (destination / name).exists():
            write_json(destination / name, content)


def _tokenizer(source: Checkpoint, src: Path) -> Tokenizer | None:
    """The source's tokenizer; None where it has none."""
    try:
        path = find_tokenizer(source.folder, src)
    except CheckpointError:
        return None
    return Tokenizer(path)


def _copy(source: Path, destination: Path) -> None:
    shutil.copyfile(source, destination)
    sync_file(destination)


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)
