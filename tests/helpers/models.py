"""The random model that several test files run, each in a shape of its own."""

from typing import Any

import torch

from llama import ModelArgs, Transformer


def make_sharp_model(
    sharpness: float = 10, dtype: torch.dtype = torch.float32, **args: Any
) -> Transformer:
    """The matrices are that much larger than they are made, so that the likeliest token is clearly
    so; the same weights each time."""
    torch.manual_seed(1)
    model = Transformer(ModelArgs(max_batch_size=8, **args))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= sharpness
    return model.to(dtype)
