"""Which tokens the engine's next step is to check, and how many: those that pay."""

import time
from collections.abc import Callable

from torch import Tensor

from llama.plan import Action, Plan, Wanted, filled_up
from llama.slot import Slot
from llama.speculative import MOST, Lookup, StepTimes, best_length, draft_token


class Proposer:
    """Proposes tokens for the slots of an engine: looked up, or drafted by a smaller model.

    Args:
        run: does a plan on all ranks; returns the logits that it wants.
        max_seq_len: tokens of a slot at most.
        prefill_chunk: tokens that the draft model takes in before a step.
        drafts: whether there is a draft model, for plans that say so.
    """

    def __init__(
        self,
        run: Callable[[Plan], Tensor | None],
        max_seq_len: int,
        prefill_chunk: int,
        drafts: bool,
    ) -> None:
        self._run = run
        self._max_seq_len = max_seq_len
        self._prefill_chunk = prefill_chunk
        self._drafts = drafts
        self._times = StepTimes(first=1.0)
        self._draft_times = StepTimes(first=0.0)  # so that it is tried
        self._start = 0.0

    def propose(self, decoding: list[Slot], rows: list[Slot]) -> dict[Slot, list[int]]:
        """Tokens that may follow in each of the slots that decode, which are among the rows."""
        room = self._max_seq_len - 1 - max(len(slot.tokens) for slot in rows)
        limits: dict[Slot, int] = {}
        for slot in decoding:
            request, guesses = slot.running, slot.guesses
            limit = min(MOST, room, request.max_gen_len - len(request.tokens) - 1)
            came = guesses.review(request.tokens)
            if not self._drafts:
                if slot.lookup is None:
                    slot.lookup = Lookup()
                    slot.lookup.extend(request.prompt_tokens)
                slot.lookup.extend(came)
                guesses.proposed = slot.lookup.propose(MOST)
                limit = min(limit, len(guesses.proposed))
            limits[slot] = 0 if request.is_exact else limit

        def seconds(length: int) -> float:
            drafting = length * self._draft_times.seconds(len(rows))
            return self._times.seconds(len(rows) * (1 + length)) + drafting

        rates = [slot.guesses.rate for slot in decoding]
        length = best_length(rates, list(limits.values()), seconds)
        if self._drafts and length > 0:
            self._draft([slot for slot in decoding if limits[slot] > 0], rows, length)
        proposed = {slot: slot.guesses.proposed[: min(limits[slot], length)] for slot in decoding}
        for slot, tokens in proposed.items():
            slot.running.proposed += len(tokens)
        self._start = time.perf_counter()
        return proposed

    def end_step(self, n_rows: int, length: int) -> None:
        """Note how long the step took that checked up to `length` proposals for each row."""
        self._times.add(n_rows * (1 + length), time.perf_counter() - self._start)

    def _draft(self, drafting: list[Slot], rows: list[Slot], length: int) -> None:
        """Let the draft model propose `length` tokens for each slot whose text it knows by then."""
        budget = self._prefill_chunk
        for slot in drafting:
            budget -= self._catch_up(slot, budget)
        drafting = [slot for slot in drafting if slot.n_drafted >= len(slot.tokens) - 1]
        if not drafting:
            return
        start = time.perf_counter()
        # The last two tokens first: it lacks both, if all that it proposed was right.
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
                row, proposed = logits[slot.index - rows[0].index, -1], slot.guesses.proposed
                token, q = draft_token(row, slot.running, proposed)
                proposed.append(token)
                slot.guesses.drawn_from.append(q)
                fed[slot] = [token]
                positions[slot] += seqlen
            seqlen = 1
        for slot in drafting:
            slot.n_drafted = positions[slot]
        self._draft_times.add(len(rows), (time.perf_counter() - start) / length)

    def _catch_up(self, slot: Slot, budget: int) -> int:
        """Show the draft model the next part of the slot's tokens that it has not seen, all but the
        last; returns its length."""
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
