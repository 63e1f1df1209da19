"""Proposes tokens, which the engine's next step checks.

The number of proposals is chosen so that generation is as fast as possible. Lookup costs next to
nothing, and its acceptance rate is known even if no step checks its tokens. The acceptance rate of
a draft model is known only while the draft model runs. If drafting would make generation slower, it
pauses for some steps. Each pause makes the next pause twice as long, and each step that drafts
makes the next pause one step shorter.
"""

import time
from collections.abc import Callable

from torch import Tensor

from llama.engine.plan import Action, Plan, Wanted, padded
from llama.engine.slot import Slot
from llama.engine.speculative import MAX_PROPOSALS, Lookup, StepTimes, best_length, draft_token
from llama.sampling import hide_unknown

MAX_PAUSE = 128  # steps


class Proposer:
    """Proposes tokens for the slots of an engine, by lookup or by a draft model.

    Args:
        run: executes a plan on all ranks and returns the logits that the plan asks for.
        max_seq_len: the most tokens of a slot.
        prefill_chunk: the most tokens that the draft model prefills before a step.
        n_words: ids from here on are never proposed.
        has_draft: whether a draft model proposes, instead of lookup.
    """

    def __init__(
        self,
        run: Callable[[Plan], Tensor | None],
        max_seq_len: int,
        prefill_chunk: int,
        n_words: int,
        has_draft: bool,
    ) -> None:
        self._run = run
        self._max_seq_len = max_seq_len
        self._prefill_chunk = prefill_chunk
        self._n_words = n_words
        self._has_draft = has_draft
        self._times = StepTimes()
        self._start = 0.0
        self._next_pause = 1  # steps
        self._pause_left = 0  # steps

    def propose(self, decoding: list[Slot], rows: list[Slot]) -> dict[Slot, list[int]]:
        """Propose tokens for the decoding slots. rows: all slots that the forward covers."""
        room = self._max_seq_len - 1 - max(len(slot.tokens) for slot in rows)
        limits: dict[Slot, int] = {}
        for slot in decoding:
            request, proposals = slot.running, slot.proposals
            limit = min(MAX_PROPOSALS, room, request.max_gen_len - len(request.tokens) - 1)
            new_tokens = proposals.review(request.tokens)
            if not self._has_draft:
                if slot.lookup is None:
                    slot.lookup = Lookup()
                    slot.lookup.extend(request.prompt_tokens)
                slot.lookup.extend(new_tokens)
                proposals.tokens = slot.lookup.propose(MAX_PROPOSALS)
                limit = min(limit, len(proposals.tokens))
            limits[slot] = 0 if request.is_exact else limit
        length = self._length(limits, len(rows))
        drafting = [slot for slot in decoding if limits[slot] > 0] if length > 0 else []
        if self._has_draft:
            drafting = self._prefill_draft(drafting)
        self._start = time.perf_counter()
        if self._has_draft and drafting:
            self._draft(drafting, rows, length)
        proposed = {slot: slot.proposals.tokens[: min(limits[slot], length)] for slot in drafting}
        for slot, tokens in proposed.items():
            slot.running.proposed += len(tokens)
        return proposed

    def _length(self, limits: dict[Slot, int], n_rows: int) -> int:
        """The number of tokens to propose for each slot, within the limits."""
        if self._pause_left > 0:
            self._pause_left -= 1
            return 0
        rates = [slot.proposals.rate for slot in limits]
        length = best_length(
            rates, list(limits.values()), lambda length: self._times.seconds(n_rows, length)
        )
        if self._has_draft and length > 0:
            self._next_pause = max(1, self._next_pause - 1)
        elif self._has_draft and any(limits.values()):
            self._pause_left = self._next_pause
            self._next_pause = min(2 * self._next_pause, MAX_PAUSE)
        return length

    def end_step(self, n_rows: int, length: int) -> None:
        """Record the time of a step with up to `length` proposals a row, drafting included."""
        self._times.add(n_rows, length, time.perf_counter() - self._start)

    def _draft(self, drafting: list[Slot], rows: list[Slot], length: int) -> None:
        """Draft `length` tokens for each slot."""
        # The first forward takes the last two tokens. The draft model's cache lacks both if all
        # proposals of the last step were accepted.
        fed = {slot: [slot.tokens[-1], slot.running.tokens[-1]] for slot in drafting}
        positions = {slot: len(slot.tokens) - 1 for slot in drafting}
        seqlen = 2
        for _ in range(length):
            start_pos = [positions.get(slot, slot.n_in_draft_cache) for slot in rows]
            logits = self._run(
                Plan(
                    Action.FORWARD,
                    row=rows[0].index,
                    n_keys=max(start_pos) + seqlen,
                    wanted=Wanted.LAST,
                    is_draft=True,
                    start_pos=start_pos,
                    tokens=[padded(fed.get(slot, []), seqlen) for slot in rows],
                )
            )
            assert logits is not None
            for slot in drafting:
                proposed = slot.proposals.tokens
                row = hide_unknown(logits[slot.index - rows[0].index, -1], self._n_words)
                token, q = draft_token(row, slot.running, proposed)
                proposed.append(token)
                slot.proposals.drawn_from.append(q)
                fed[slot] = [token]
                positions[slot] += seqlen
            seqlen = 1
        for slot in drafting:
            slot.n_in_draft_cache = positions[slot]

    def _prefill_draft(self, slots: list[Slot]) -> list[Slot]:
        """Prefill the draft model's cache. Returns the slots whose prefill is complete."""
        budget = self._prefill_chunk
        for slot in slots:
            budget -= self._prefill_slot(slot, budget)
        return [slot for slot in slots if slot.n_in_draft_cache >= len(slot.tokens) - 1]

    def _prefill_slot(self, slot: Slot, budget: int) -> int:
        """Prefill the next chunk of the slot's tokens that the draft model's cache lacks.

        The slot's last token is left to `_draft`. Returns the chunk's length.
        """
        start = slot.n_in_draft_cache
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
            slot.n_in_draft_cache = end
        return len(tokens)
