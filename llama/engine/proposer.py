"""Chooses the tokens that the next step of the engine checks, and how many.

A lookup costs next to nothing. Its proposals update the acceptance rate even where no step checks
them. A draft model must run before anything is known. So it rests where it does not pay: for a
number of steps that doubles each time, and shrinks again while it pays.
"""

import time
from collections.abc import Callable

from torch import Tensor

from llama.engine.plan import Action, Plan, Wanted, filled_up
from llama.engine.slot import Slot
from llama.engine.speculative import MAX_PROPOSALS, Lookup, StepTimes, best_length, draft_token
from llama.sampling import hide_unknown

MAX_REST = 128  # steps without a draft model that does not pay


class Proposer:
    """Proposes tokens for the slots of an engine, by lookup or by a draft model.

    Args:
        run: executes a plan on all ranks and returns the logits that it asks for.
        max_seq_len: the most tokens of a slot.
        prefill_chunk: tokens that the draft model takes in before a step.
        n_words: ids from here on are never proposed.
        drafts: whether a draft model proposes, not a lookup.
    """

    def __init__(
        self,
        run: Callable[[Plan], Tensor | None],
        max_seq_len: int,
        prefill_chunk: int,
        n_words: int,
        drafts: bool,
    ) -> None:
        self._n_words = n_words
        self._run = run
        self._max_seq_len = max_seq_len
        self._prefill_chunk = prefill_chunk
        self._drafts = drafts
        self._times = StepTimes()
        self._start = 0.0
        self._rest = 1  # steps without the draft model, the next time it does not pay
        self._resting = 0  # steps left of the current rest

    def propose(self, decoding: list[Slot], rows: list[Slot]) -> dict[Slot, list[int]]:
        """Propose tokens for the decoding slots, which are some of the rows."""
        room = self._max_seq_len - 1 - max(len(slot.tokens) for slot in rows)
        limits: dict[Slot, int] = {}
        for slot in decoding:
            request, proposals = slot.running, slot.proposals
            limit = min(MAX_PROPOSALS, room, request.max_gen_len - len(request.tokens) - 1)
            new_tokens = proposals.review(request.tokens)
            if not self._drafts:
                if slot.lookup is None:
                    slot.lookup = Lookup()
                    slot.lookup.extend(request.prompt_tokens)
                slot.lookup.extend(new_tokens)
                proposals.proposed = slot.lookup.propose(MAX_PROPOSALS)
                limit = min(limit, len(proposals.proposed))
            limits[slot] = 0 if request.is_exact else limit
        length = self._length(limits, len(rows))
        drafting = [slot for slot in decoding if limits[slot] > 0] if length > 0 else []
        if self._drafts:
            drafting = self._caught_up(drafting)
        self._start = time.perf_counter()
        if self._drafts and drafting:
            self._draft(drafting, rows, length)
        proposed = {slot: slot.proposals.proposed[: min(limits[slot], length)] for slot in drafting}
        for slot, tokens in proposed.items():
            slot.running.proposed += len(tokens)
        return proposed

    def _length(self, limits: dict[Slot, int], n_rows: int) -> int:
        """The number of tokens to propose for each slot, within the limits."""
        if self._resting > 0:
            self._resting -= 1
            return 0
        rates = [slot.proposals.acceptance_rate for slot in limits]
        length = best_length(
            rates, list(limits.values()), lambda length: self._times.seconds(n_rows, length)
        )
        if self._drafts and length > 0:
            self._rest = max(1, self._rest - 1)
        elif self._drafts and any(limits.values()):
            self._resting = self._rest
            self._rest = min(2 * self._rest, MAX_REST)
        return length

    def end_step(self, n_rows: int, length: int) -> None:
        """Record the time of a step with up to `length` proposals a row, drafting included."""
        self._times.add(n_rows, length, time.perf_counter() - self._start)

    def _draft(self, drafting: list[Slot], rows: list[Slot], length: int) -> None:
        """Draft `length` tokens for each slot."""
        # The last two tokens come first: where all proposals were accepted, its cache lacks both.
        fed = {slot: [slot.tokens[-1], slot.running.tokens[-1]] for slot in drafting}
        positions = {slot: len(slot.tokens) - 1 for slot in drafting}
        seqlen = 2
        for _ in range(length):
            start_pos = [positions.get(slot, slot.n_drafted) for slot in rows]
            logits = self._run(
                Plan(
                    Action.FORWARD,
                    row=rows[0].index,
                    n_keys=max(start_pos) + seqlen,
                    wanted=Wanted.LAST,
                    is_draft=True,
                    start_pos=start_pos,
                    tokens=[filled_up(fed.get(slot, []), seqlen) for slot in rows],
                )
            )
            assert logits is not None
            for slot in drafting:
                proposed = slot.proposals.proposed
                row = hide_unknown(logits[slot.index - rows[0].index, -1], self._n_words)
                token, q = draft_token(row, slot.running, proposed)
                proposed.append(token)
                slot.proposals.drawn_from.append(q)
                fed[slot] = [token]
                positions[slot] += seqlen
            seqlen = 1
        for slot in drafting:
            slot.n_drafted = positions[slot]

    def _caught_up(self, slots: list[Slot]) -> list[Slot]:
        """Prefill the draft model's cache. Returns the slots whose text it holds completely."""
        budget = self._prefill_chunk
        for slot in slots:
            budget -= self._catch_up(slot, budget)
        return [slot for slot in slots if slot.n_drafted >= len(slot.tokens) - 1]

    def _catch_up(self, slot: Slot, budget: int) -> int:
        """Prefill the next chunk of the slot's tokens that the draft model's cache lacks.

        The last token is left out. Returns the chunk's length.
        """
        start = slot.n_drafted
        tokens = slot.tokens[start:-1][:budget]
        if tokens:
            end = start + len(tokens)
            self._run(
                Plan(
                    Action.FORWARD,
                    row=slot.index,
                    n_keys=end,
                    is_draft=True,
                    start_pos=[start],
                    tokens=[tokens],
                )
            )
            slot.n_drafted = end
        return len(tokens)
