"""Edits of a tensor during a trace: replace it, scale it, or set the output of heads to zero."""

from collections.abc import Callable

import torch
from torch import Tensor

from llama.errors import ExplainError

Edit = Callable[[Tensor], Tensor]  # returns a tensor of the same shape and dtype


def replace(value: Tensor | float) -> Edit:
    """An edit that replaces the tensor by `value`: a number, or a tensor that can be broadcast to
    the shape of the replaced one. If it cannot, the trace raises ExplainError."""

    def edit(tensor: Tensor) -> Tensor:
        new = torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
        try:
            return new.expand_as(tensor).clone()
        except RuntimeError:
            raise ExplainError(
                f"a value of shape {list(new.shape)} cannot replace a tensor of shape "
                f"{list(tensor.shape)}"
            ) from None

    return edit


def scale(factor: float) -> Edit:
    """An edit that multiplies the tensor by `factor`. The factor 0 sets all numbers to zero."""
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise ExplainError(f"factor is {factor!r}: it must be a number")
    return lambda tensor: tensor * factor


def knock_out(*heads: int) -> Edit:
    """An edit that sets the output of some query heads to zero. It is for
    `layers.N.attention.heads`, (B, S, H, hd).

    heads: their numbers, from 0. Under torchrun, 0 is the first head of this rank. If the layer has
        no such head, the trace raises ExplainError.
    """
    if not heads:
        raise ExplainError("knock_out needs the numbers of the heads")

    def edit(tensor: Tensor) -> Tensor:
        if tensor.dim() != 4:
            raise ExplainError(
                "knock_out is for layers.N.attention.heads, not for a tensor of shape "
                f"{list(tensor.shape)}"
            )
        n_heads = tensor.shape[2]
        for head in heads:
            if not 0 <= head < n_heads:
                raise ExplainError(f"head {head}: the layer has heads 0 to {n_heads - 1}")
        tensor = tensor.clone()
        tensor[:, :, list(heads)] = 0
        return tensor

    return edit
