"""The whole way from a checkpoint to a tokenizer and this rank's model: open, check, plan, load."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from llama import parallel
from llama.adapters import Change, RowAdapters
from llama.chat_forms import FormatName
from llama.checkpoints import hub
from llama.checkpoints.adapter import WEIGHTS, open_adapter
from llama.checkpoints.chat_form import read_form
from llama.checkpoints.doctor import require, require_draft
from llama.checkpoints.folder import (
    BUNDLED,
    adapter_warning,
    find_adapter,
    find_tokenizer,
    open_checkpoint,
)
from llama.checkpoints.generation_config import read_stop_tokens
from llama.checkpoints.load import load_weights
from llama.checkpoints.setup import Setup
from llama.errors import ConfigError
from llama.fast.gpu.device_weights import narrow
from llama.fast.mode import CacheWidth, Mode
from llama.fast.quantize import Width
from llama.files import MappedFiles
from llama.model import Transformer
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")


def open_model(
    ckpt_dir: str | Path | None,
    tokenizer_path: str | Path | None,
    max_seq_len: int | None,
    max_batch_size: int,
    model_parallel_size: int | None,
    mode: Mode,
    quantize: Width | None,
    kv_cache: CacheWidth | None,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    rope_factor: float | None = None,
    draft: str | Path | None = None,
    format: FormatName | None = None,
    adapter: str | Path | None = None,
    *,
    needs_tokenizer: bool = True,
) -> tuple[Setup, Tokenizer | None, Setup | None]:
    """Initialize the ranks, open the folders and check that everything fits. No weight is read.

    The options are those of `Llama.build`. needs_tokenizer: False accepts a folder without
    a tokenizer.
    Returns the model's setup, its tokenizer and the draft model's setup.
    """
    target = parallel.local_device(device)
    parallel.initialize(model_parallel_size, target)
    if ckpt_dir is None:
        ckpt_dir = BUNDLED
        dtype = torch.float32 if dtype is None and target.type == "cpu" else dtype
    with parallel.failing_together(target):
        folder = hub.local_folder(ckpt_dir)
        draft_folder = None if draft is None else hub.local_folder(draft)
    # All ranks measure free memory before any of them allocates.
    with parallel.failing_together(target):
        opened = open_checkpoint(folder, rope_factor)
        if adapter is not None:
            opened.merge(find_adapter(adapter))
        tokenizer = None
        if needs_tokenizer or tokenizer_path is not None:
            tokenizer = open_tokenizer(tokenizer_path, opened.folder, folder, format)
        setup = Setup.make(
            opened, parallel.mp_size(), parallel.local_size(), max_seq_len, max_batch_size,
            target, dtype, mode, quantize, kv_cache,
        )  # fmt: skip
        require(setup, tokenizer)
        draft_setup = None
        if draft_folder is not None:
            assert tokenizer is not None
            draft_setup = require_draft(draft_folder, setup, tokenizer)
        facts: dict[str, object] = {}
        if parallel.mp_size() * parallel.dp_size() > 1:
            facts = {"mode": mode, "the draft model": draft_setup and _facts(draft_setup)}
            facts |= _facts(setup)
            facts["the vocabulary's checksum"] = tokenizer and tokenizer.fingerprint()
    parallel.require_same(facts, target)
    return setup, tokenizer, draft_setup


def _facts(setup: Setup) -> dict[str, object]:
    """What must be the same on all ranks, by the names in the error."""
    opened = setup.opened
    facts: dict[str, object] = {**vars(opened.args)}
    facts |= dict(quantize=setup.quantize, kv_cache=setup.kv_cache, dtype=setup.dtype)
    facts["the weight files' checksum"] = opened.files.fingerprint()
    if opened.adapter is not None:
        files = (opened.adapter.folder / name for name in WEIGHTS)
        found = MappedFiles(file for file in files if file.exists())
        facts["the adapter's checksum"] = found.fingerprint()
    return facts


def load_adapters(setup: Setup, names: Mapping[str, str | Path] | None) -> RowAdapters | None:
    """This rank's part of the LoRA adapters that stay beside the weights. None: there are none.

    names: for each name the adapter's folder or id; see `find_adapter`.
    Raises a LlamaError for an adapter that does not fit the model or changes more than the layers.
    """
    if not names:
        return None
    opened = setup.opened
    if opened.adapter is not None:
        raise ConfigError("adapter is merged into the weights that adapters need: give one of them")
    dtype = torch.float32 if setup.is_fast else setup.dtype
    adapters: dict[str, dict[str, Change]] = {}
    for name, place in names.items():
        adapter = open_adapter(find_adapter(place), opened.args)
        others = [weight for weight in adapter.changes if not weight.startswith("layers.")]
        if adapter.weights or others:
            what = next(iter([*adapter.weights, *others]))
            raise ConfigError(
                f"{adapter.folder} changes {what}: only changes of the layers' matrices can stay "
                "beside the weights; merge it, as adapter"
            )
        if (warning := adapter_warning(adapter, opened.folder)) and parallel.is_main_rank():
            log.warning(warning)
        adapters[name] = {}
        for weight, change in adapter.changes.items():
            place_of_rank = opened.distinct(weight, setup.mp_size, parallel.mp_rank())
            a, b, scale = change.part(parallel.shard_dim(weight, 0), *place_of_rank)
            pair = a.to(setup.device, dtype), (scale * b.float()).to(setup.device, dtype)
            adapters[name][weight.removesuffix(".weight")] = pair
    return RowAdapters(adapters)


def open_tokenizer(
    path: str | Path | None, folder: Path, ckpt_dir: Path, format: FormatName | None = None
) -> Tokenizer:
    """The tokenizer for the weights in `folder`, with the stop tokens and the chat form that the
    folder names; format: the form that the user names."""
    tokenizer = Tokenizer(path or find_tokenizer(folder, ckpt_dir))
    tokenizer.form = read_form(folder, format)
    stop_tokens = read_stop_tokens(folder) or tokenizer.stop_tokens
    end = tokenizer.special_tokens.get("<|im_end|>")
    if tokenizer.form is not None and tokenizer.form.name == "chatml" and end is not None:
        stop_tokens = list(dict.fromkeys([*stop_tokens, end]))
    tokenizer.stop_tokens = stop_tokens
    if format is not None:
        tokenizer.chat_format()  # raises if the vocabulary lacks a marker
    return tokenizer


def load_model(setup: Setup) -> Transformer:
    """This rank's part of the model, on its device."""
    args = setup.opened.args
    # With more ranks than key/value heads, each head is on several ranks.
    n_kv_heads = max(args.local_kv_heads(1), setup.mp_size)
    with torch.device("meta"):
        model = Transformer(replace(args, n_kv_heads=n_kv_heads))
    if setup.quantize is None or setup.device.type != "cuda":
        load_weights(model, setup.opened, setup.device, setup.dtype, setup.quantize)
        return model
    # Matrices are quantized one by one, so that the GPU never holds the model unquantized.
    saved = setup.opened.quantization
    load_weights(model, setup.opened, torch.device("cpu"), setup.dtype, saved)
    narrow(model, setup.quantize, setup.device)
    return model.to(setup.device)
