"""Decide which module chooses a row's token: `speculative`, `row_sampling` or `sampling`."""

from collections.abc import Callable

import torch
from torch import Tensor

from llama import sampling
from llama.engine.row_sampling import RowSampler
from llama.engine.slot import Slot
from llama.engine.speculative import choose


class TokenChooser:
    """Chooses a token for each slot.

    n_words: ids from n_words on can be chosen only for a request with a logits_processor.
    sampler: draws the tokens of many rows at once on a GPU, for rows whose options allow it. None:
        the token of each row is drawn separately.
    """

    def __init__(self, n_words: int, sampler: RowSampler | None = None) -> None:
        self._n_words = n_words
        self._sampler = sampler

    def __call__(
        self,
        slots: list[Slot],
        logits: Tensor,
        at: int = 0,
        meanwhile: Callable[[Tensor], None] | None = None,
    ) -> list[tuple[int, float]]:
        """Choose a token for each slot, from the slots' logits (B, V). Returns the tokens and their
        logprobs. If a request's own options fail, its `error` is set and its token has no meaning.

        at: index of the proposal that the token is compared with.
        meanwhile: if all tokens are drawn on the device, this is called with the tokens (B,) there,
            before the host waits for them.
        """
        if self._sampler is None:
            return self._one_by_one(slots, logits, at)
        is_taken = [self._sampler.takes(slot.running.params) for slot in slots]
        if all(is_taken):
            return self._sampler(logits, [slot.running for slot in slots], meanwhile)
        chosen: dict[int, tuple[int, float]] = {}
        for kind in (True, False):
            rows = [row for row, taken in enumerate(is_taken) if taken == kind]
            if not rows:
                continue
            members, part = [slots[row] for row in rows], logits[rows]
            if kind:
                drawn = self._sampler(part, [slot.running for slot in members])
            else:
                drawn = self._one_by_one(members, part, at)
            chosen |= dict(zip(rows, drawn, strict=True))
        return [chosen[row] for row in range(len(slots))]

    def _one_by_one(self, slots: list[Slot], logits: Tensor, at: int) -> list[tuple[int, float]]:
        chosen: list[Tensor] = []
        for slot, row in zip(slots, logits, strict=True):
            request = slot.running
            if request.params.logits_processor is None:
                row = sampling.hide_unknown(row, self._n_words)
            try:
                token = choose(row, request, slot.proposals, at)
            except Exception as error:  # a logits_processor of the caller may raise anything
                request.error = error
                token = torch.zeros((), dtype=torch.long, device=logits.device)
            chosen.append(token)
        ids = torch.stack(chosen)
        logprobs = sampling.logprob_of(logits, ids).tolist()
        return list(zip(ids.tolist(), logprobs, strict=True))
