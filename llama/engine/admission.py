"""Admission: which prompts the engine takes, and which KV cache slot a request gets."""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch

from llama.engine.request import Request
from llama.engine.slot import Slot
from llama.engine.speculative import common_prefix_length
from llama.errors import GenerationError
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

# The shortest prefix that is reused. Reusing a shorter one would save little time, and could
# overwrite a slot whose longer prefix a later prompt needs.
MIN_REUSE = 16
NEAR = 8  # rows; a decode step of eight rows takes little longer than a step of fewer rows


def check_prompt(
    prompt_tokens: Sequence[int],
    params: SamplingParams,
    row: int,
    vocab_size: int,
    max_seq_len: int,
) -> list[int]:
    """The prompt's ids as a list. Raises GenerationError if the model cannot take them.

    row: the prompt's number, for the message.
    """
    params.check_vocabulary(vocab_size)
    if isinstance(prompt_tokens, str | bytes) or not isinstance(prompt_tokens, Sequence):
        raise GenerationError(f"prompt {row} is {prompt_tokens!r}, not a list of token ids")
    if not prompt_tokens:
        raise GenerationError(f"prompt {row} is empty: it needs at least one token")
    # With max_gen_len 0 the last token is not fed, so the prompt may have one more token.
    if len(prompt_tokens) > max_seq_len + (params.max_gen_len == 0):
        raise GenerationError(
            f"prompt {row} has {len(prompt_tokens)} tokens, but max_seq_len is {max_seq_len}"
        )
    for token in prompt_tokens:
        if not isinstance(token, SupportsIndex):
            raise GenerationError(f"prompt {row} has {token!r}, which is no token id")
        if not 0 <= token.__index__() < vocab_size:
            raise GenerationError(
                f"prompt {row} has token id {token}, but vocab_size is {vocab_size}"
            )
    return [token.__index__() for token in prompt_tokens]


def make_generator(
    seed: int | None, engine_seed: int, number: int, device: torch.device
) -> torch.Generator:
    """Make the generator of a request's random numbers, which do not depend on other requests.
    seed None: the seed is derived from the engine's seed and the request's number."""
    if seed is None:
        mixed = np.random.SeedSequence([engine_seed % 2**64, number])
        seed = int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


def stop_tokens_of(params: SamplingParams, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The ids that end a request: the params' own, else the tokenizer's."""
    if params.ignore_eos:
        return frozenset()
    if params.stop_tokens is not None:
        return frozenset(params.stop_tokens)
    return frozenset(tokenizer.stop_tokens if tokenizer else ())


def choose_slot(request: Request, slots: list[Slot], free: list[Slot]) -> tuple[Slot, Slot, int]:
    """Returns a free slot, the slot whose prefix the request reuses, and the prefix's length.

    Both are the same slot if the slot with the prefix is free. A request reuses nothing if it is
    exact or private, if its prompt is scored, or if it generates no token.
    """
    least_recent = _least_recent(slots, free)
    is_scored = request.params.prompt_logprobs or request.max_gen_len == 0
    if request.is_exact or request.is_private or is_scored:
        return least_recent, least_recent, 0
    # The last token of the prompt is always computed, because its logits are needed.
    prompt = request.prompt_tokens[:-1]
    shared = {
        slot: common_prefix_length(slot.tokens, prompt)
        for slot in slots
        if slot.may_be_shared and slot.adapter == request.adapter
    }
    # A free slot wins a tie, because its tokens need no copy.
    best = max(shared, key=lambda slot: (shared[slot], slot.request is None), default=least_recent)
    if shared.get(best, 0) < MIN_REUSE:
        return least_recent, least_recent, 0
    slot = best if best.request is None else least_recent
    return slot, best, shared[best]


def _least_recent(slots: list[Slot], free: list[Slot]) -> Slot:
    """Among the free slots near the slots in use, the one that was used least recently.

    A decode step covers all rows from the first slot in use to the last. So slots are
    compared first by the number of rows that the step would cover, rounded up to a multiple of
    NEAR. Among equals, the least recently used slot wins.
    """
    used = [slot.index for slot in slots if slot.request is not None]
    first, last = min(used, default=None), max(used, default=None)

    def cost(slot: Slot) -> tuple[int, int, int]:
        covered = 1
        if first is not None and last is not None:
            covered = max(last, slot.index) - min(first, slot.index) + 1
        return -(-covered // NEAR), slot.last_used, slot.index

    return min(free, key=cost)
