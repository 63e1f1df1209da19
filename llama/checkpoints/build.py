"""Build what a checkpoint describes: the tokenizer, and this rank's part of the model."""

from dataclasses import replace
from pathlib import Path

import torch

from llama.checkpoints.folder import find_tokenizer
from llama.checkpoints.hugging_face import read_stop_tokens
from llama.checkpoints.load import load_weights
from llama.checkpoints.setup import Setup
from llama.fast.gpu.device_weights import narrow
from llama.model import Transformer
from llama.tokenizer import Tokenizer


def open_tokenizer(path: str | Path | None, folder: Path, ckpt_dir: Path) -> Tokenizer:
    """The tokenizer of the weights in `folder`; its stop tokens are those that the folder names."""
    tokenizer = Tokenizer(path or find_tokenizer(folder, ckpt_dir))
    if stop_tokens := read_stop_tokens(folder):
        tokenizer.stop_tokens = stop_tokens
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
    # Matrices are rounded on the CPU one by one: the GPU never holds all of them whole.
    saved = setup.opened.quantization
    load_weights(model, setup.opened, torch.device("cpu"), setup.dtype, saved)
    narrow(model, setup.quantize, setup.device)
    return model.to(setup.device)
