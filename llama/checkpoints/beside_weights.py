"""The files beside the weights of a converted checkpoint: tokenizer, prompt format, settings, card.

Files that the source has are copied unchanged. The other files of Hugging Face's layout are made
from Meta's tokenizer, so that transformers does not have to guess.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from llama.checkpoints import hugging_face
from llama.checkpoints.build import open_tokenizer
from llama.checkpoints.chat_form import read_template
from llama.checkpoints.folder import find_tokenizer
from llama.checkpoints.generation_config import GENERATION_CONFIG, read_sampling
from llama.checkpoints.params import says_the_same
from llama.checkpoints.shards import Checkpoint
from llama.checkpoints.verify import kind_of
from llama.config import ModelArgs
from llama.errors import CheckpointError, TokenizerError
from llama.files import read_json
from llama.gguf_file import is_gguf
from llama.tokenizer import Tokenizer
from llama.tokenizer_files.chat_templates import LLAMA_2_TEMPLATE, LLAMA_3_TEMPLATE
from llama.tokenizer_files.library import NO_TOKEN

log = logging.getLogger("llama")

COPIED_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    "README.md",
)
# The folder in which Hugging Face's repositories keep Meta's files.
ORIGINAL = "original"
# The keys of config.json and of generation_config.json for special tokens.
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def source_tokenizer(source: Checkpoint, src: Path) -> Tokenizer | None:
    """The tokenizer for `source`, which was opened from `src`, with the stop tokens of the folder.

    None if there is no tokenizer, or only a tokenizer.json that cannot be read here. A warning is
    logged then.
    Raises TokenizerError for a damaged tokenizer.model.
    """
    try:
        path = find_tokenizer(source.folder, src)
    except CheckpointError:
        log.warning("%s has no tokenizer: none is written", src)
        return None
    try:
        return open_tokenizer(path, source.folder, src)
    except TokenizerError as error:
        if path.name != "tokenizer.json":
            raise
        log.warning("%s; the file is copied as it is", error)
        return None


# ---- Meta's layout ----------------------------------------------------------------------------


def meta_files(source: Checkpoint, tokenizer: Tokenizer | None, src: Path) -> dict[str, bytes]:
    """The content of each file beside shards and params.json, by its name."""
    files = _copied(source, src)
    if source.is_hugging_face:
        files.pop("README.md", None)  # the model card, which belongs to the other layout
    if tokenizer is None:
        return files
    if is_gguf(tokenizer.model_path):
        return files | files_of_gguf(tokenizer)
    if tokenizer.model_path.name == "tokenizer.model":
        files["tokenizer.model"] = tokenizer.model_path.read_bytes()
        return files
    try:
        files["tokenizer.model"] = tokenizer.as_model()
    except TokenizerError as error:
        log.warning("%s; the file is copied as it is, and no tokenizer.model is written", error)
    return files


def files_of_gguf(tokenizer: Tokenizer) -> dict[str, bytes]:
    """What a GGUF file says about tokens, dialogs and sampling, as the files of a folder: their
    content by name. If there can be no tokenizer.model, there is a tokenizer.json."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    config: dict[str, Any] = {key: names[i] for key, i in ids.items() if i != NO_TOKEN}
    if template := read_template(tokenizer.model_path):
        config["chat_template"] = template
    settings = _special_ids(tokenizer) | read_sampling(tokenizer.model_path)
    files = {"tokenizer_config.json": _json(config), GENERATION_CONFIG: _json(settings)}
    try:
        return files | {"tokenizer.model": tokenizer.as_model()}
    except TokenizerError:
        return files | {"tokenizer.json": _json(tokenizer.as_json())}


def metas_params(source: Checkpoint, src: Path, args: ModelArgs) -> bytes | None:
    """The content of the source's params.json if it describes `args`, else None."""
    for path in (source.folder / "params.json", src / ORIGINAL / "params.json"):
        if path.is_file() and says_the_same(path, args):
            return path.read_bytes()
    return None


# ---- Hugging Face's layout --------------------------------------------------------------------


def hugging_face_files(
    source: Checkpoint, tokenizer: Tokenizer | None, src: Path, dtype: torch.dtype, name: str
) -> dict[str, bytes]:
    """The content of each file beside the `.safetensors`, by its path in the folder.

    dtype: the dtype of the weights. name: the model's name, for the card.
    Raises CheckpointError if the tokenizer does not fit the model.
    """
    files = _copied(source, src)
    # If config.json has no keys for special tokens, transformers takes the ids of Llama 2.
    ids: dict[str, Any] = {} if source.is_hugging_face else dict.fromkeys(SPECIAL_IDS[:2])
    if tokenizer is not None:
        ids = _special_ids(tokenizer)
        if "tokenizer.json" not in files:
            if tokenizer.n_words > source.args.vocab_size:
                raise CheckpointError(
                    f"{tokenizer.model_path} has {tokenizer.n_words} tokens, but the model's "
                    f"vocab_size is {source.args.vocab_size}: it is not the tokenizer of {src}"
                )
            try:
                made = _tokenizer_files(tokenizer, source)
            except TokenizerError as error:
                raise CheckpointError(
                    f"{error}; move the file away to convert the weights alone"
                ) from error
            files = {file: _json(content) for file, content in made.items()} | files
    if source.is_hugging_face:
        own = read_json(source.folder / "config.json")
        ids |= {key: own[key] for key in SPECIAL_IDS if key in own}
    files["config.json"] = _json(hugging_face.make_config(source.args, dtype) | ids)
    if params := metas_params(source, src, source.args):
        files[f"{ORIGINAL}/params.json"] = params
    if tokenizer is not None and tokenizer.model_path.name == "tokenizer.model":
        # Other programs assume that a tokenizer.model in the folder itself is a SentencePiece one.
        files.pop("tokenizer.model", None)
        place = "" if tokenizer.is_llama_2 else f"{ORIGINAL}/"
        files[f"{place}tokenizer.model"] = tokenizer.model_path.read_bytes()
    files["README.md"] = _card(files.get("README.md", b""), source.args, dtype, name)
    return files


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    ids: dict[str, Any] = {
        "bos_token_id": None if tokenizer.bos_id == NO_TOKEN else tokenizer.bos_id,
        "eos_token_id": tokenizer.stop_tokens or None,
    }
    if (pad := _pad_token(tokenizer)) is not None:
        ids["pad_token_id"] = tokenizer.special_tokens[pad]
    return ids


def _pad_token(tokenizer: Tokenizer) -> str | None:
    """The token with which transformers pads the shorter rows of a batch. It is masked out."""
    names = ("<|finetune_right_pad_id|>", "<unk>")
    return next((name for name in names if name in tokenizer.special_tokens), None)


def _tokenizer_files(tokenizer: Tokenizer, source: Checkpoint) -> dict[str, dict[str, Any]]:
    """The files that give transformers the facts in Meta's tokenizer.model and code."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    special = {"bos_token": names[tokenizer.bos_id], "eos_token": names[tokenizer.eos_id]}
    if tokenizer.is_llama_2 and "<unk>" in tokenizer.special_tokens:
        special["unk_token"] = "<unk>"
    if (pad := _pad_token(tokenizer)) is not None:
        special["pad_token"] = pad
    config: dict[str, Any] = {
        **special,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": source.args.context,
        "tokenizer_class": "PreTrainedTokenizerFast",  # adds nothing to tokenizer.json
    }
    if kind_of(source.folder) != "base":
        config["chat_template"] = chat_template(source, tokenizer)
    return {
        "tokenizer.json": tokenizer.as_json(),
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
        GENERATION_CONFIG: _special_ids(tokenizer) | read_sampling(source.folder),
    }


def chat_template(source: Checkpoint, tokenizer: Tokenizer) -> str:
    """The source's own template. If it has none, that of the tokenizer's kind."""
    own = read_template(source.folder)
    return own or (LLAMA_2_TEMPLATE if tokenizer.is_llama_2 else LLAMA_3_TEMPLATE)


def _card(own: bytes, args: ModelArgs, dtype: torch.dtype, name: str) -> bytes:
    """A model card, followed by the source's README.md, `own`. If `own` is a card, it is returned
    unchanged."""
    if own.startswith(b"---"):
        return own
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- llama",
        "---",
        "",
        f"# {name}",
        "",
        "Written by `llama convert` of llama-reference. The weights have the licence of their "
        "source.",
        "",
        "| | |",
        "| --- | --- |",
        f"| shape | dim {args.dim}, {args.n_layers} layers, {args.n_heads} heads, "
        f"{args.n_kv_heads} key/value heads, feed-forward {args.ffn_dim} |",
        f"| vocabulary | {args.vocab_size:,} tokens |",
        f"| context | {args.context:,} tokens |",
        f"| weights | {str(dtype).removeprefix('torch.')} |",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        "```",
        "",
        "In transformers the name of a special token in a text becomes that token. Give "
        "`split_special_tokens=True` to the tokenizer for text that is not yours.",
        "",
    ]
    return "\n".join(lines).encode() + (b"\n" + own if own else b"")


# ---- both -------------------------------------------------------------------------------------


def _copied(source: Checkpoint, src: Path) -> dict[str, bytes]:
    """The content of COPIED_FILES, by name. A file that the weights' folder lacks is taken from
    `src`, which may contain that folder."""
    found = {}
    for name in COPIED_FILES:
        for folder in (source.folder, src):
            if (folder / name).is_file():
                found[name] = (folder / name).read_bytes()
                break
    return found


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
