"""The random model that several test files run, in different shapes."""

from typing import Any

import torch
from make_checkpoint import demo_pieces

from llama import ModelArgs, Transformer

VOCAB = len(demo_pieces()) + 256
MAX_SEQ_LEN = 96
SHAPE: dict[str, Any] = dict(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=32
)


def make_sharp_model(
    sharpness: float = 10, dtype: torch.dtype = torch.float32, **args: Any
) -> Transformer:
    """A random model with the same weights in every call.

    The matrices are `sharpness` times as large as initial weights. So the likeliest token has a
    clear lead, and rounding does not change it.
    """
    torch.manual_seed(1)
    model = Transformer(ModelArgs(max_batch_size=8, **args))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= sharpness
    return model.to(dtype)


def make_model() -> Transformer:
    """The model of the engine's tests."""
    return make_sharp_model(**SHAPE, max_seq_len=MAX_SEQ_LEN)
