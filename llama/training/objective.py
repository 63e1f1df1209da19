"""The training objective: next-token cross-entropy, and the mask that separates documents."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.training.token_files import IGNORED

CHUNK = 256  # positions whose logits `loss_in_chunks` holds at a time


def next_token_loss(
    logits: Tensor, targets: Tensor, ignore_index: int = IGNORED, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy in nats: logits (B, S, V), targets (B, S) -> a scalar.

    reduction: "mean" or "sum", over the targets that are not `ignore_index`.
    """
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction=reduction
    )


def loss_in_chunks(
    features: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """The sum of `next_token_loss` over all targets, with the logits of CHUNK positions at a time.

    features (B, S, D), targets (B, S). logits_of: features -> logits; it must have no weights to
    train, because gradients flow to the features only.
    """
    if torch.is_grad_enabled() and features.requires_grad:
        return _LossInChunks.apply(features, targets, logits_of)
    chunks = zip(features.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True)
    losses = [next_token_loss(logits_of(part), wanted, reduction="sum") for part, wanted in chunks]
    return torch.stack(losses).sum()


class _LossInChunks(torch.autograd.Function):
    """`loss_in_chunks` with gradients. The gradient of a chunk's features is computed together with
    its loss, so that its logits need not be kept."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, targets: Tensor, logits_of: Callable[[Tensor], Tensor]
    ) -> Tensor:
        losses, gradients = [], []
        for part, wanted in zip(features.split(CHUNK, 1), targets.split(CHUNK, 1), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                loss = next_token_loss(logits_of(part), wanted, reduction="sum")
                gradients += torch.autograd.grad(loss, part)
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients, 1))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor, None, None


def document_numbers(inputs: Tensor, targets: Tensor, bos_id: int) -> tuple[Tensor | None, Tensor]:
    """Number the documents in each row of inputs (B, S). Every document begins with `bos_id`.

    Returns the numbers (B, S), or None if every row is one document. Also returns the targets
    (B, S), in which IGNORED replaces `bos_id`: a document does not predict the next document.
    """
    is_first = inputs == bos_id
    targets = targets.masked_fill(targets == bos_id, IGNORED)
    return (is_first.cumsum(1) if is_first[:, 1:].any() else None), targets


def document_mask(documents: Tensor) -> Tensor:
    """Document numbers (B, S) -> attention mask (B, 1, S, S). It is True where the key belongs to
    the query's document and is not after the query."""
    is_same = documents[:, :, None] == documents[:, None, :]
    return is_same.tril()[:, None]


def document_positions(documents: Tensor) -> Tensor:
    """Document numbers (B, S) -> positions (B, S), which start at 0 in every document."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    is_first = documents[:, 1:] != documents[:, :-1]
    start = F.pad(torch.where(is_first, index[:, 1:], 0), (1, 0)).cummax(1).values
    return index - start
