"""From logits to tokens: pure functions of the logits, the parameters and a generator."""

import math

import torch
from torch import Tensor

from llama.errors import GenerationError


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise GenerationError where a sampling parameter is out of its range."""
    # Comparisons with NaN are false, so it is refused too.
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        raise GenerationError(f"temperature is {temperature!r}: it must be 0 (greedy) or above")
    if not isinstance(top_p, (int, float)) or not 0 <= top_p <= 1:
        raise GenerationError(f"top_p is {top_p!r}: it must be between 0 and 1")


def next_token(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Choose one token a row: logits (B, V) -> ids (B,). Temperature 0 takes the likeliest."""
    if temperature == 0:
        return torch.argmax(logits, dim=-1)
    probs = torch.softmax(logits / temperature, dim=-1)
    return sample_top_p(probs, top_p, generator).squeeze(-1)


def sample_top_p(probs: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Nucleus sampling: draw from the smallest set of likeliest tokens whose probability exceeds p;
    Holtzman et al. 2019, arxiv.org/abs/1904.09751. probs (..., V) -> ids (..., 1)."""
    sorted_probs, ids = torch.sort(probs, dim=-1, descending=True)
    before = torch.cumsum(sorted_probs, dim=-1) - sorted_probs  # mass of the likelier tokens
    nucleus = sorted_probs.masked_fill(before > p, 0.0)
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    return ids.gather(-1, torch.multinomial(nucleus, num_samples=1, generator=generator))
