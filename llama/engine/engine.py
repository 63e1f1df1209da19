"""The engine: the token loop that all text generation goes through.

The KV cache has one row, a slot, for each request in flight. A request waits for a free slot. Its
prompt is prefilled in chunks. Then it decodes one token a step, together with all other requests,
each at its own position. When it ends, its slot is free, but keeps its tokens: a later request with
the same prefix reuses them. One thread at a time may call an engine; `Runner` takes care of that.
"""

import functools
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from llama import parallel
from llama.adapters import RowAdapters
from llama.cache import KVCache
from llama.engine.admission import check_prompt, choose_slot, make_generator, stop_tokens_of
from llama.engine.lookahead import Lookahead
from llama.engine.plan import Action, Plan, Wanted, padded
from llama.engine.proposer import Proposer
from llama.engine.request import Event, Request
from llama.engine.row_sampling import RowSampler
from llama.engine.shortage import check_fits, ending
from llama.engine.slot import Slot, groups
from llama.engine.speculative import MAX_PROPOSALS
from llama.engine.text_stream import TextStream
from llama.engine.token_choice import TokenChooser
from llama.engine.worker import Network, Worker
from llama.errors import GenerationError
from llama.fast.gpu.static_step import StaticStep
from llama.fast.gpu.transformer import GpuTransformer
from llama.fast.mode import check_draft
from llama.sampling import SamplingParams
from llama.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # prompt tokens that one step prefills


class Engine:
    """Runs requests on a model, up to `max_batch_size` at a time.

    Args:
        model: the transformer, on its device.
        max_batch_size: the number of slots; further requests wait for a free one.
        max_seq_len: tokens of prompt and answer together, at most the model's own max_seq_len.
        tokenizer: gives events their text and requests their stop tokens. Without it events have
            no text, and stop tokens come from the params only.
        seed: a request without a seed gets one derived from this and the request's number.
        prefill_chunk: prompt tokens that one step prefills. An exact request (see `submit`) is
            prefilled in one step, whatever its length.
        cache_dtype: dtype of the keys and values, such as int8; None: the model's default.
        draft: a smaller model with the same vocabulary, which proposes tokens to this one.
        lookup: if the last tokens occurred earlier in the text, propose what followed them there.
        static: decode in steps of static shapes and sample on the device; for a GpuTransformer.
        adapters: LoRA changes of the model, which requests may name.

    Raises GenerationError for a number out of range, ConfigError for a draft that does not fit.
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
        adapters: RowAdapters | None = None,
    ) -> None:
        if prefill_chunk < 1:
            raise GenerationError(f"prefill_chunk is {prefill_chunk}: it must be 1 or above")
        if max_batch_size < 1:
            raise GenerationError(f"max_batch_size is {max_batch_size}: it must be 1 or above")
        longest = model.params.max_seq_len  # the model's own limit
        if not 1 <= max_seq_len <= longest:
            raise GenerationError(f"max_seq_len is {max_seq_len}: it must be 1 to {longest}")
        if draft is not None:
            check_draft(draft.params, model.vocab_size, max_seq_len)
        self.model, self.tokenizer = model, tokenizer
        self.max_seq_len = max_seq_len
        self.prefill_chunk = prefill_chunk
        cache = model.make_cache(max_batch_size, max_seq_len, cache_dtype)
        networks, n_words = [(model, cache)], tokenizer.n_words if tokenizer else model.vocab_size
        if draft is not None:
            networks.append((draft, draft.make_cache(max_batch_size, max_seq_len, cache_dtype)))
        self._static: StaticStep | None = None
        self._lookahead: Lookahead | None = None
        sampler: RowSampler | None = None
        if static:
            assert isinstance(model, GpuTransformer)
            self._static = StaticStep(model, cache)
            if draft is None:  # the row sampler has no acceptance rule for a draft's proposals
                sampler = RowSampler(max_batch_size, model.vocab_size, n_words, model.device)
                # The lookahead feeds tokens that are still on the GPU. Other ranks lack them.
                if not lookup and parallel.mp_size() == 1:
                    self._lookahead = Lookahead(self._static)
        self.worker = Worker(networks, self._static, adapters)
        self.adapters = adapters or RowAdapters({})
        self._choose = TokenChooser(n_words, sampler)
        self._proposer: Proposer | None = None
        if draft is not None or lookup:
            sizes = max_seq_len, prefill_chunk, n_words
            self._proposer = Proposer(self.worker.run, *sizes, has_draft=draft is not None)
        # The most tokens that an idle row may keep. The last positions stay free, because a decode
        # step for other rows writes padding to idle rows too, after their kept tokens.
        self._kept = max_seq_len - 1 - (MAX_PROPOSALS if self._proposer else 0)
        self._seed = seed
        self._slots = [Slot(i) for i in range(max_batch_size)]
        self._waiting: deque[Request] = deque()
        self._prefilling: Slot | None = None  # one at a time: the next may reuse its prefix
        self._cancelled: list[Event] = []  # reported by the next step
        self._submitted = self._steps = 0

    @property
    def cache(self) -> KVCache:
        """Keys and values of all slots."""
        return self.worker.cache

    @property
    def has_work(self) -> bool:
        """Whether a step would compute or report anything."""
        return bool(self._waiting or self._cancelled or any(s.request for s in self._slots))

    # ---- requests -----------------------------------------------------------------------------

    def submit(
        self,
        prompt_tokens: Sequence[int],
        params: SamplingParams,
        row: int = 0,
        generator: torch.Generator | None = None,
        is_private: bool = False,
        is_exact: bool = False,
        is_continued: bool = False,
    ) -> Request:
        """Queue a prompt.

        Args:
            prompt_tokens: its ids, at least one, at most max_seq_len.
            params: how to continue it; several samples (n) are several requests.
            row: any number; the request's events carry it.
            generator: makes the random numbers; None: a new one, made from the request's seed.
            is_private: no prefix is reused, neither by this request nor from it.
            is_exact: compute the same forwards as Meta's code. The prompt is computed in one
                forward with all its logits, no prefix is reused, and the decode steps cover no
                other request.
            is_continued: the generated text continues the prompt's text, so that the two can be
                joined; see `TextDecoder`.

        Raises GenerationError if the prompt or the params do not fit the model.
        """
        prompt = self.check(prompt_tokens, params, row)
        if params.n != 1:
            raise GenerationError(f"n is {params.n}: the engine takes one request for each sample")
        room = max(0, self.max_seq_len - len(prompt))
        wanted = room if params.max_gen_len is None else params.max_gen_len
        if generator is None:
            device = self.model.device
            generator = make_generator(params.seed, self._seed, self._submitted, device)
        words, stream = self.tokenizer, None
        if words is not None:
            stream = TextStream(words, params.stop, is_continued)
        request = Request(
            prompt, params, row, is_private, is_exact, generator, stop_tokens_of(params, words),
            min(wanted, room), stream, self.adapters.number(params.adapter),
        )  # fmt: skip
        if not self.has_work and self.worker.renew_caches():
            for slot in self._slots:
                slot.cut(0)
        self._submitted += 1
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request. Its slot is free at once; the next step reports the end."""
        if request.finish_reason is not None:
            return
        if request in self._waiting:
            self._waiting.remove(request)
        for slot in self._slots:
            if slot.request is request:
                self._release(slot)
        self._cancelled.append(request.end("cancelled"))

    def check(
        self, prompt_tokens: Sequence[int], params: SamplingParams, row: int = 0
    ) -> list[int]:
        """Check prompt_tokens, params and row as `submit` does. Returns the prompt's ids."""
        if params.stop and self.tokenizer is None:
            raise GenerationError("stop strings need a tokenizer: give the engine one")
        self.adapters.number(params.adapter)  # raises for an unknown name
        vocab_size = self.model.vocab_size
        return check_prompt(prompt_tokens, params, row, vocab_size, self.max_seq_len)

    # ---- a step -------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Prefill up to `prefill_chunk` prompt tokens, then decode for every request whose prompt
        is complete. Returns the events; the order of requests is not fixed."""
        events, self._cancelled = self._cancelled, []
        self._steps += 1
        budget = self.prefill_chunk
        while budget > 0 and (slot := self._next_to_prefill()) is not None:
            with ending([slot], self.model, events, self._release):
                length, event = self._prefill(slot, budget)
                budget -= length
                events += [event] if event else []
        decoding = groups([s for s in self._slots if s.request and s is not self._prefilling])
        for group in decoding:
            with ending(group, self.model, events, self._release):
                events += self._decode(group)
        if not decoding and budget == self.prefill_chunk:
            self.worker.run(Plan(Action.NOTHING))  # so that the waiting ranks do not time out
        return events

    def _next_to_prefill(self) -> Slot | None:
        """The slot whose prompt is being prefilled. If there is none, the next request is admitted
        to a free slot, and that slot is returned. None if nothing waits or no slot is free."""
        free = [slot for slot in self._slots if slot.request is None]
        if self._prefilling is None and self._waiting and free:
            self._prefilling = self._admit(self._waiting.popleft(), free)
        return self._prefilling

    def _admit(self, request: Request, free: list[Slot]) -> Slot:
        """Give the request a free slot. A prefix that it reuses from another slot is copied."""
        slot, source, n_reused = choose_slot(request, self._slots, free)
        if slot is not source:
            self.worker.run(Plan(Action.COPY, slot.index, source.index, n_reused))
        if slot.may_hold_nan:
            self.worker.run(Plan(Action.CLEAR, slot.index, n_keys=n_reused))
        slot.admit(request, n_reused, min(source.n_in_draft_cache, n_reused))
        return slot

    def _prefill(self, slot: Slot, budget: int) -> tuple[int, Event | None]:
        """Compute the next chunk of the slot's prompt. Returns the chunk's length and, after the
        last chunk, the event of the first generated token."""
        request, start = slot.running, len(slot.tokens)
        prompt, scores_prompt = request.prompt_tokens, request.params.prompt_logprobs
        # With max_gen_len 0 and prompt_logprobs, the prompt is fed without its last token. With
        # max_gen_len 0 and no prompt_logprobs, nothing is fed.
        n_fed = len(prompt) if request.max_gen_len > 0 else (len(prompt) - 1) * scores_prompt
        end = n_fed if request.is_exact else min(start + budget, n_fed)
        is_last = end == n_fed
        wants_all = request.is_exact or scores_prompt
        wanted = Wanted.ALL if wants_all else Wanted.LAST if is_last else Wanted.NOTHING
        logits = None
        if end > start:
            check_fits(request, self.model)
            plan = Plan(
                Action.FORWARD, slot.index, n_keys=end, wanted=wanted, is_exact=request.is_exact,
                start_pos=[start], tokens=[prompt[start:end]], adapters=[request.adapter],
            )  # fmt: skip
            logits = self.worker.run(plan)
            slot.tokens = prompt[:end]
        if scores_prompt:
            request.score_prompt(logits, prompt[start + 1 : end + 1])
        if not is_last and request.error is None:
            return end - start, None
        self._prefilling = None
        if request.error is not None or request.max_gen_len == 0:
            event = request.end("error" if request.error else "length")
            self._release(slot)
            return end - start, event
        assert logits is not None
        return end - start, self._next_tokens([slot], logits[:, -1])[0]

    def _decode(self, decoding: list[Slot]) -> list[Event]:
        """Decode one token for each slot, and one for each accepted proposal, in one forward.

        The forward covers all rows from the first slot to the last. Rows with fewer proposals are
        padded, and idle rows are all padding. The results of padding are dropped. The next tokens
        of a row overwrite what its padding stored in the cache.
        """
        first, last = decoding[0].index, decoding[-1].index
        if self._static is not None:
            first, last = 0, self._static.n_rows(last + 1) - 1
        rows = self._slots[first : last + 1]
        for slot in decoding:  # drop tokens that an interrupted step appended
            slot.cut(len(slot.running.prompt_tokens) + len(slot.running.tokens) - 1)
        proposed = self._proposer.propose(decoding, rows) if self._proposer else {}
        fed = {s: [s.running.tokens[-1], *proposed.get(s, ())] for s in decoding}
        seqlen = max(map(len, fed.values()))
        logits = self._lookahead.take(decoding, len(rows)) if self._lookahead else None
        if logits is None:
            start_pos = [len(slot.tokens) for slot in rows]
            tokens = [padded(fed.get(slot, []), seqlen) for slot in rows]
            is_exact = decoding[0].running.is_exact
            adapters = [slot.running.adapter if slot in fed else 0 for slot in rows]
            plan = Plan.decode(first, start_pos, tokens, is_exact, adapters)
            logits = self.worker.run(plan)
        assert logits is not None
        events: list[Event] = []
        for at in range(seqlen):
            for slot in decoding:
                slot.tokens.append(fed[slot][at])
            of_slots = [logits[slot.index - first, at] for slot in decoding]
            # Stacked, because indexing with a list would make the host wait for the GPU.
            events += self._next_tokens(decoding, torch.stack(of_slots), at, rows)
            # The logits at `at + 1` are valid only for slots whose proposal at `at` was accepted.
            decoding = [slot for slot in decoding if slot.accept(fed[slot][at + 1 : at + 2])]
            if not decoding:
                break
        if self._proposer is not None:
            self._proposer.end_step(len(rows), seqlen - 1)
        return events

    def _next_tokens(
        self, slots: list[Slot], logits: Tensor, at: int = 0, rows: Sequence[Slot] = ()
    ) -> list[Event]:
        """Give each slot's request its next token, from logits (B, V). Free the ended slots.

        rows: the slots of the decode step. If they are given, the lookahead may launch the next
        step before the tokens of this one are known.
        """
        meanwhile = None
        if self._lookahead is not None and rows:
            meanwhile = functools.partial(self._lookahead.launch, slots, rows)
        chosen = self._choose(slots, logits, at, meanwhile)
        events: list[Event] = []
        for slot, (token, logprob), row in zip(slots, chosen, logits, strict=True):
            event = slot.running.advance(token, logprob, row)
            if event.finish_reason is not None:
                self._release(slot)
            events.append(event)
        return events

    def _release(self, slot: Slot) -> None:
        slot.release(self._steps, self._kept)
        if slot is self._prefilling:
            self._prefilling = None

    # ---- ranks --------------------------------------------------------------------------------

    def follow(self) -> None:
        """On every rank but the first: execute the first rank's plans until it calls `dismiss`.
        Every rank has submitted the same requests. The first rank runs them, so the other ranks
        clear their queues."""
        self._waiting.clear()
        self.worker.follow()

    def dismiss(self, failed: bool = False) -> None:
        """On the first rank: end `follow` on the others, with a ParallelError there if `failed`."""
        self.worker.dismiss(failed)
