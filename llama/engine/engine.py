"""The engine: one token loop for everything; requests join and leave between its steps.

The key/value cache has one row, a slot, for each request that is under way. A request waits for a
free slot, has its prompt prefilled in chunks, then decodes one token a step together with all
others, each at its own position, and leaves its slot when it is done. What the row holds stays:
the next request that begins with the same tokens goes on from there.

Not for several threads at a time: one thread calls all of an engine's methods.
"""

from collections import deque
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from llama import sampling
from llama.cache import KVCache
from llama.engine.plan import Action, Plan, Wanted, filled_up
from llama.engine.proposer import Proposer
from llama.engine.request import Event, FinishReason, Request
from llama.engine.row_sampling import RowSampler
from llama.engine.slot import Slot
from llama.engine.speculative import MOST, choose, n_alike
from llama.engine.text_stream import TextStream
from llama.errors import GenerationError, ParallelError, TokenizerError
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.gpu.static_step import StaticStep
from llama.fast.mode import check_draft
from llama.model import Transformer
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

Network = Transformer | FastTransformer

PREFILL_CHUNK = 512  # tokens of prompts that one step takes in, at most
LEAST_REUSE = 16  # tokens: a shorter common beginning is not worth giving up another's row for


class Engine:
    """Runs requests on a model, up to `max_batch_size` at a time.

    Args:
        model: the transformer, on its device.
        max_batch_size: slots; more requests than that wait for their turn.
        max_seq_len: tokens of prompt and answer together, at most the model's own max_seq_len.
        tokenizer: gives events their text and requests their stop tokens; without it only those
            that the params name.
        seed: requests without a seed of their own draw from one made of this and their number.
        prefill_chunk: tokens of prompts taken in by one step.
        cache_dtype: of the keys and values, int8 too; None: as the model computes.
        draft: a smaller model with the same vocabulary, which proposes tokens to this one.
        lookup: without one, propose what followed the last tokens where they stood before.
        static: decode in steps of static shapes and choose on the device, for a GPU; the model is
            a Transformer then.

    Raises GenerationError where a number is out of its range, ConfigError for a draft model that
    does not go with this one.
    """

    def __init__(
        self,
        model: Network,
        max_batch_size: int,
        max_seq_len: int,
        tokenizer: Tokenizer | None = None,
        seed: int = 1,
        prefill_chunk: int = PREFILL_CHUNK,
        cache_dtype: torch.dtype | None = None,
        draft: Network | None = None,
        lookup: bool = False,
        static: bool = False,
    ) -> None:
        if prefill_chunk < 1:
            raise GenerationError(f"prefill_chunk is {prefill_chunk}: it must be 1 or above")
        if max_batch_size < 1:
            raise GenerationError(f"max_batch_size is {max_batch_size}: it must be 1 or above")
        longest = model.params.max_seq_len  # of its RoPE table
        if not 1 <= max_seq_len <= longest:
            raise GenerationError(f"max_seq_len is {max_seq_len}: it must be 1 to {longest}")
        if draft is not None:
            check_draft(draft.params, model.vocab_size, max_seq_len)
        self.model = model
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.prefill_chunk = prefill_chunk
        self.cache: KVCache = model.make_cache(max_batch_size, max_seq_len, cache_dtype)
        self._networks = [(model, self.cache)]
        if draft is not None:
            drafts = draft.make_cache(max_batch_size, max_seq_len, cache_dtype)
            self._networks.append((draft, drafts))
        self._proposer: Proposer | None = None
        if draft is not None or lookup:
            self._proposer = Proposer(self._run, max_seq_len, prefill_chunk, draft is not None)
        # What an idle row keeps: steps of the rows beside it store something after its tokens.
        self._kept = max_seq_len - 1 - (MOST if self._proposer else 0)
        self._static: StaticStep | None = None
        self._sampler: RowSampler | None = None
        if static:
            assert isinstance(model, Transformer)
            self._static = StaticStep(model, self.cache)
            if draft is None:  # whose tokens are drawn from another distribution
                self._sampler = RowSampler(max_batch_size, model.vocab_size, model.device)
        self._seed = seed
        self._slots = [Slot(i) for i in range(max_batch_size)]
        self._waiting: deque[Request] = deque()
        self._prefilling: Slot | None = None  # one at a time, so that the next can share with it
        self._cancelled: list[Event] = []  # to be told by the next step
        self._submitted = 0
        self._steps = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do or tell anything."""
        return bool(self._waiting or self._cancelled or any(slot.request for slot in self._slots))

    # ---- requests -----------------------------------------------------------------------------

    def submit(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        row: int = 0,
        generator: torch.Generator | None = None,
        is_private: bool = False,
        is_exact: bool = False,
    ) -> Request:
        """Queue a prompt.

        Args:
            prompt_tokens: its ids, at least one, at most max_seq_len.
            params: how to continue it; several samples (n) are several requests.
            row: any number; events carry it.
            generator: of random numbers; None: the request's own, from its seed.
            is_private: its tokens are kept for no other request, and no other's for it.
            is_exact: Meta's own forwards: the prompt in one piece with all its logits, nothing
                reused, Meta's operations while it decodes alone.

        Raises GenerationError where the prompt or the params do not fit the model.
        """
        prompt = self.check(prompt_tokens, params, row)
        if params.n != 1:
            raise GenerationError(f"n is {params.n}: the engine takes one request for each sample")
        room = max(0, self.max_seq_len - len(prompt))
        wanted = room if params.max_gen_len is None else params.max_gen_len
        stop_tokens = params.stop_tokens
        if stop_tokens is None:
            stop_tokens = self.tokenizer.stop_tokens if self.tokenizer else ()
        request = Request(
            prompt,
            params,
            row,
            is_private,
            is_exact,
            generator or self._generator(params.seed),
            frozenset(() if params.ignore_eos else stop_tokens),
            min(wanted, room),
            None if self.tokenizer is None else TextStream(self.tokenizer, params.stop),
        )
        self._submitted += 1
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request; its slot is free at once, and the next step tells of its end."""
        if request.finish_reason is not None:
            return
        if request in self._waiting:
            self._waiting.remove(request)
        for slot in self._slots:
            if slot.request is request:
                self._release(slot)
        self._cancelled.append(self._end(request, "cancelled"))

    def check(
        self, prompt_tokens: Sequence[int], params: SamplingParams, row: int = 0
    ) -> list[int]:
        """The prompt's ids, after the checks that `submit` makes."""
        params.check_vocabulary(self.model.vocab_size)
        if params.stop and self.tokenizer is None:
            raise GenerationError("stop strings need a tokenizer: give the engine one")
        if isinstance(prompt_tokens, str) or not isinstance(prompt_tokens, Sequence):
            raise GenerationError(f"prompt {row} is {prompt_tokens!r}, not a list of token ids")
        if not prompt_tokens:
            raise GenerationError(f"prompt {row} is empty: it needs at least one token")
        # The last token of what is only scored does not go through the model.
        if len(prompt_tokens) > self.max_seq_len + (params.max_gen_len == 0):
            raise GenerationError(
                f"prompt {row} has {len(prompt_tokens)} tokens, but max_seq_len is "
                f"{self.max_seq_len}"
            )
        for token in prompt_tokens:
            if not isinstance(token, SupportsIndex):
                raise GenerationError(f"prompt {row} has {token!r}, which is no token id")
            if not 0 <= token.__index__() < self.model.vocab_size:
                raise GenerationError(
                    f"prompt {row} has token id {token}, but vocab_size is {self.model.vocab_size}"
                )
        return [token.__index__() for token in prompt_tokens]

    def _generator(self, seed: int | None) -> torch.Generator:
        """Random numbers that depend on no other request."""
        if seed is None:
            mixed = np.random.SeedSequence([self._seed % 2**64, self._submitted])
            seed = int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))
        return torch.Generator(self.model.device).manual_seed(seed)

    # ---- a step -------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Take in up to `prefill_chunk` tokens of prompts and give every request that has all of
        its prompt one token more. Returns what happened, in no order of requests."""
        events, self._cancelled = self._cancelled, []
        self._steps += 1
        is_idle = True
        budget = self.prefill_chunk
        while budget > 0 and (slot := self._next_to_prefill()) is not None:
            taken, event = self._prefill(slot, budget)
            budget -= taken
            events += [event] if event else []
            is_idle = False
        if decoding := [s for s in self._slots if s.request and s is not self._prefilling]:
            events += self._decode(decoding)
            is_idle = False
        if is_idle:
            Plan(Action.NOTHING).send(self.model.device)  # so that nobody waits too long for us
        return events

    def _next_to_prefill(self) -> Slot | None:
        """The slot whose prompt is not all in, else a free one with the next request in it."""
        if self._prefilling is None and self._waiting:
            free = [slot for slot in self._slots if slot.request is None]
            if free:
                self._prefilling = self._admit(self._waiting.popleft(), free)
        return self._prefilling

    def _admit(self, request: Request, free: list[Slot]) -> Slot:
        """Give the request the free slot that saves it most, and what is there of its prompt."""
        prompt = request.prompt_tokens
        needs_all = request.is_exact or request.is_private or request.params.prompt_logprobs
        needs_none = request.max_gen_len == 0
        slot = min(free, key=lambda slot: (slot.last_used, slot.index))
        source, reused = slot, 0
        if not (needs_all or needs_none):
            # The last token is always computed: its logits are wanted. Free slots win a tie.
            shared = {s: n_alike(s.tokens, prompt[:-1]) for s in self._slots if _is_open(s)}
            best = max(shared, key=lambda s: (shared[s], s.request is None), default=slot)
            if shared.get(best, 0) >= LEAST_REUSE:
                source, reused = best, shared[best]
        if source.request is None:
            slot = source
        else:
            self._run(Plan(Action.COPY, row=slot.index, source=source.index, n_keys=reused))
        slot.admit(request, reused, min(source.n_drafted, reused))
        return slot

    def _prefill(self, slot: Slot, budget: int) -> tuple[int, Event | None]:
        """Take in the next part of the slot's prompt; returns its length and, after the last
        part, the event of the first token."""
        request = slot.running
        prompt, start = request.prompt_tokens, len(slot.tokens)
        wants_prompt = request.params.prompt_logprobs
        # What nothing is to follow need not go through the model: the last token, or all of them.
        n_fed = len(prompt) if request.max_gen_len > 0 else (len(prompt) - 1) * wants_prompt
        end = n_fed if request.is_exact else min(start + budget, n_fed)
        is_last = end == n_fed
        wanted = Wanted.LAST if is_last else Wanted.NOTHING
        if request.is_exact or wants_prompt:
            wanted = Wanted.ALL
        logits = None
        if end > start:
            logits = self._run(
                Plan(
                    Action.FORWARD,
                    row=slot.index,
                    n_keys=end,
                    wanted=wanted,
                    is_exact=request.is_exact,
                    start_pos=[start],
                    tokens=[prompt[start:end]],
                )
            )
            slot.tokens = prompt[:end]
        if wants_prompt and logits is not None:
            targets = torch.tensor(prompt[start + 1 : end + 1], device=logits.device)
            scored = logits[0, : len(targets)]
            request.prompt_logprobs += sampling.logprob_of(scored, targets).tolist()
            request.prompt_is_greedy += (scored.argmax(dim=-1) == targets).tolist()
        if not is_last:
            return end - start, None
        self._prefilling = None
        if wants_prompt:
            request.prompt_logprobs.insert(0, 0.0)  # nothing predicts the first
            request.prompt_is_greedy.insert(0, False)
        if request.max_gen_len == 0:
            self._release(slot)
            return end - start, self._end(request, "length")
        assert logits is not None
        return end - start, self._next_tokens([slot], logits[:, -1])[0]

    def _decode(self, decoding: list[Slot]) -> list[Event]:
        """One more token for each of the slots, and one for each that was rightly proposed, in one
        forward of all rows from the first to the last of them. A row between that is idle, or has
        fewer proposals, is computed along and forgotten: what it stores stands where its next
        tokens will overwrite it."""
        first, last = decoding[0].index, decoding[-1].index
        if self._static is not None:
            first, last = 0, self._static.n_rows(last + 1) - 1
        rows = self._slots[first : last + 1]
        for slot in decoding:  # a step that was interrupted may have stored tokens already
            slot.cut(len(slot.running.prompt_tokens) + len(slot.running.tokens) - 1)
        proposed = self._proposer.propose(decoding, rows) if self._proposer else {}
        fed = {s: [s.running.tokens[-1], *proposed.get(s, ())] for s in decoding}
        seqlen = max(map(len, fed.values()))
        start_pos = [len(slot.tokens) for slot in rows]
        logits = self._run(
            Plan(
                Action.FORWARD,
                row=first,
                n_keys=max(start_pos) + seqlen,
                wanted=Wanted.LAST if seqlen == 1 else Wanted.ALL,
                is_exact=len(rows) == 1 and decoding[0].running.is_exact,
                start_pos=start_pos,
                tokens=[filled_up(fed.get(slot, []), seqlen) for slot in rows],
            )
        )
        assert logits is not None
        events: list[Event] = []
        for at in range(seqlen):
            for slot in decoding:
                slot.tokens.append(fed[slot][at])
            of_slots = [logits[slot.index - first, at] for slot in decoding]
            # Stacked, as a GPU would have to wait for a list of indices.
            events += self._next_tokens(decoding, torch.stack(of_slots), at)
            # The next logits count where they were computed after the token that came.
            decoding = [slot for slot in decoding if _goes_on(slot, fed[slot][at + 1 : at + 2])]
            if not decoding:
                break
        if self._proposer is not None:
            self._proposer.end_step(len(rows), seqlen - 1)
        return events

    def _next_tokens(self, slots: list[Slot], logits: Tensor, at: int = 0) -> list[Event]:
        """Choose a token for each slot from its logits (B, V), in the place of the proposal with
        the number `at`. A request whose own options fail ends with the error; the others go on."""
        if self._sampler is not None:
            takes = [self._sampler.takes(slot.running.params) for slot in slots]
            if all(takes):
                drawn = self._sampler(logits, [slot.running for slot in slots])
                return [
                    self._advance(slot, token, logprob, row)
                    for slot, (token, logprob), row in zip(slots, drawn, logits, strict=True)
                ]
            if any(takes):  # the two kinds one after the other
                kinds = [
                    [i for i, taken in enumerate(takes) if taken == kind] for kind in (True, False)
                ]
                events = [
                    self._next_tokens([slots[i] for i in rows], logits[rows], at) for rows in kinds
                ]
                return [event for some in events for event in some]
        chosen: list[Tensor] = []
        for slot, row in zip(slots, logits, strict=True):
            request = slot.running
            try:
                token = choose(row, request, slot.guesses, at)
            except Exception as error:  # a logits_processor may raise anything
                request.error = error
                token = torch.zeros((), dtype=torch.long, device=logits.device)
            chosen.append(token)
        ids = torch.stack(chosen)
        logprobs = sampling.logprob_of(logits, ids).tolist()
        return [
            self._advance(slot, token, logprob, row)
            for slot, token, logprob, row in zip(slots, ids.tolist(), logprobs, logits, strict=True)
        ]

    def _advance(self, slot: Slot, token: int, logprob: float, logits: Tensor) -> Event:
        """Give the slot's request its next token, which may end it."""
        request = slot.running
        if request.error is None and token in request.stop_tokens:
            self._release(slot)
            request.stop_token = token
            return self._end(request, "stop")
        text = ""
        if request.error is None:
            try:
                text = request.push(token, logprob)
            except TokenizerError as error:  # the model's vocabulary may be the larger one
                request.error = error
        if request.error is not None:
            self._release(slot)
            return self._end(request, "error")
        top = None
        if request.params.logprobs is not None:
            top = sampling.top_logprobs(logits, request.params.logprobs)
            request.top_logprobs.append(top)
        is_full = len(request.tokens) == request.max_gen_len
        if not is_full and not request.has_stop_string:
            return Event(request, token, text, logprob, top)
        self._release(slot)
        text += request.finish("length")
        return Event(request, token, text, logprob, top, request.finish_reason)

    def _end(self, request: Request, reason: FinishReason) -> Event:
        """The event of an end without a token."""
        text = request.finish(reason)
        return Event(request, None, text, finish_reason=request.finish_reason)

    def _release(self, slot: Slot) -> None:
        request = slot.running
        slot.request = None
        slot.last_used = self._steps
        slot.cut(0 if request.is_private else self._kept)
        if slot is self._prefilling:
            self._prefilling = None

    # ---- ranks --------------------------------------------------------------------------------

    def follow(self) -> None:
        """On all ranks of a model but the first: do what the first one's steps do, until it calls
        `dismiss`. What was submitted here is the first rank's to run."""
        self._waiting.clear()
        with torch.inference_mode():
            while (plan := Plan.receive(self.model.device)).action is not Action.DONE:
                if plan.action is Action.FAILED:
                    raise ParallelError("the first rank failed: its own message says why")
                self._execute(plan)

    def dismiss(self, failed: bool = False) -> None:
        """On the first rank: let the others return from `follow`, with an error where it failed."""
        Plan(Action.FAILED if failed else Action.DONE).send(self.model.device)

    def _run(self, plan: Plan) -> Tensor | None:
        plan.send(self.model.device)
        return self._execute(plan)

    def _execute(self, plan: Plan) -> Tensor | None:
        """This rank's part of a plan; the logits it wants, of all ranks, (B, S or 1, V)."""
        if plan.action is Action.COPY:
            for _, cache in self._networks:
                cache.copy_row(plan.source, plan.row, plan.n_keys)
        if plan.action is not Action.FORWARD:
            return None
        model, cache = self._networks[plan.is_draft]
        is_decode = plan.wanted is Wanted.LAST and not plan.is_exact and len(plan.tokens[0]) == 1
        if self._static is not None and plan.row == 0 and is_decode and not plan.is_draft:
            return self._static([row[0] for row in plan.tokens], plan.start_pos)[:, None]
        tokens = torch.tensor(plan.tokens, device=model.device)  # (B, S)
        part = cache.part(plan.row, len(plan.tokens), plan.n_keys)
        start_pos: int | Tensor = plan.start_pos[0]
        if not plan.is_exact:
            start_pos = torch.tensor(plan.start_pos, device=model.device)
        features = model.features(tokens, start_pos, part)  # (B, S, D)
        if plan.wanted is Wanted.NOTHING:
            return None
        return model.logits(features if plan.wanted is Wanted.ALL else features[:, -1:])


def _goes_on(slot: Slot, proposal: list[int]) -> bool:
    """Whether the slot's request has not ended and its last token is the one proposed, if any."""
    request = slot.request
    if request is None or request.tokens[-1:] != proposal:
        return False
    request.accepted += 1
    return True


def _is_open(slot: Slot) -> bool:
    """Whether others may share what the slot holds."""
    return slot.request is None or not slot.request.is_private
