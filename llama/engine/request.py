"""A request in flight, and the events of its progress."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, get_args

import torch
from torch import Tensor

from llama import parallel, sampling
from llama.engine.text_stream import TextStream
from llama.errors import GenerationError, ParallelError, TokenizerError
from llama.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(eq=False)
class Request:
    """A prompt and what the engine has generated for it so far.

    Attributes:
        prompt_tokens, params, row, is_private, is_exact: as given to `Engine.submit`.
        generator: makes the random numbers of sampling.
        stop_tokens: the ids that end the request.
        max_gen_len: the largest number of tokens to generate.
        adapter: the number of the LoRA adapter that the request names; 0: none.
        stream: decodes the tokens, and looks for stop strings. None: there is no tokenizer.
        tokens: the generated ids, without the stop token.
        logprobs: the natural logarithm of each token's probability, before any sampling option.
        top_logprobs: for each token, the likeliest ids and their logprobs, if asked for.
        prompt_logprobs: the logprobs of the prompt's tokens, if asked for; 0.0 for the first.
        prompt_top_logprobs: as top_logprobs, for the prompt's tokens; an empty list for the first.
        prompt_is_greedy: for each token of the prompt, whether it was the likeliest, if asked for;
            False for the first.
        text: the text of the tokens, up to a stop string.
        finish_reason: None until the request ends; then "stop" (a stop token or string), "length"
            (max_gen_len, or the cache is full), "cancelled", or "error" (see `error`).
        stop_token: the stop token that ended the request, if one did.
        n_reused: how many of the prompt's tokens were in the KV cache already.
        proposed, accepted: how many tokens were proposed, and how many of them were accepted.
        error: what ended the request, if finish_reason is "error".
    """

    prompt_tokens: list[int]
    params: SamplingParams
    row: int
    is_private: bool
    is_exact: bool
    generator: torch.Generator
    stop_tokens: frozenset[int]
    max_gen_len: int
    stream: TextStream | None
    adapter: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_is_greedy: list[bool] = field(default_factory=list)
    prompt_top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    n_reused: int = 0
    proposed: int = 0
    accepted: int = 0
    error: Exception | None = None

    def score_prompt(self, logits: Tensor | None, targets: list[int]) -> None:
        """Score the prompt's next tokens, `targets`.

        logits (1, S, V): those at index i predict targets[i]. None: the prompt has only one token,
        and no logits predict it. If they are not finite, `error` is set."""
        if not self.prompt_logprobs:  # no logits predict the first token
            self.prompt_logprobs, self.prompt_is_greedy = [0.0], [False]
            self.prompt_top_logprobs = [[]] if self.params.logprobs is not None else []
        if logits is None:
            return
        scored, ids = logits[0, : len(targets)], torch.tensor(targets, device=logits.device)
        logprobs = sampling.logprob_of(scored, ids)
        if logprobs.isnan().any():
            self.error = GenerationError("the logits of the prompt's tokens are not finite")
        self.prompt_logprobs += logprobs.tolist()
        self.prompt_is_greedy += (scored.argmax(dim=-1) == ids).tolist()
        if self.params.logprobs is not None:
            top = (sampling.top_logprobs(row, self.params.logprobs) for row in scored)
            self.prompt_top_logprobs += top

    def push(self, token: int, logprob: float) -> str:
        """Add a generated token. Returns the text that can be shown now.

        Raises TokenizerError for an id that the tokenizer does not know; nothing is added then.
        """
        text = self.stream.push(token) if self.stream else ""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.text += text
        return text

    def advance(self, token: int, logprob: float, logits: Tensor) -> "Event":
        """Add the next token, which may end the request.

        logits (V,): the logits from which the token was chosen."""
        if self.error is None and token in self.stop_tokens:
            self.stop_token = token
            return self.end("stop")
        text = ""
        if self.error is None:
            try:
                text = self.push(token, logprob)
            except TokenizerError as error:  # the model's vocabulary may exceed the tokenizer's
                self.error = error
        if self.error is not None:
            return self.end("error")
        top = None
        if self.params.logprobs is not None:
            top = sampling.top_logprobs(logits, self.params.logprobs)
            self.top_logprobs.append(top)
        if len(self.tokens) < self.max_gen_len and not self.has_stop_string:
            return Event(self, token, text, logprob, top)
        text += self.finish("length")
        return Event(self, token, text, logprob, top, self.finish_reason)

    def end(self, reason: FinishReason) -> "Event":
        """End the request without another token."""
        return Event(self, None, self.finish(reason), finish_reason=self.finish_reason)

    @property
    def has_stop_string(self) -> bool:
        return self.stream is not None and self.stream.stopped

    def finish(self, reason: FinishReason) -> str:
        """End the request. Returns the text that was held back."""
        text = self.stream.finish() if self.stream else ""
        self.text += text
        self.finish_reason = "stop" if self.has_stop_string else reason
        return text

    def share(self, device: torch.device) -> None:
        """Send the results of a finished request from the first rank of a model to the others. All
        ranks call this."""
        if parallel.mp_size() == 1:
            return
        if parallel.mp_rank() == 0:
            parallel.broadcast_numbers(list(self._numbers()), torch.float64, device)
        else:
            self._fill(iter(parallel.broadcast_numbers(None, torch.float64, device)))

    def _numbers(self) -> Iterator[float]:
        """All results as numbers, which `_fill` reads. Ids are exact in a float64."""
        assert self.finish_reason is not None
        yield get_args(FinishReason).index(self.finish_reason)
        yield -1 if self.stop_token is None else self.stop_token
        yield from (len(self.prompt_logprobs), *self.prompt_logprobs, *self.prompt_is_greedy)
        yield from (len(self.tokens), *self.tokens, *self.logprobs)
        for alternatives in (*self.prompt_top_logprobs[1:], *self.top_logprobs):
            for pair in alternatives:
                yield from pair

    def _fill(self, numbers: Iterator[float]) -> None:
        reason = get_args(FinishReason)[int(next(numbers))]
        stop_token = int(next(numbers))
        self.stop_token = None if stop_token < 0 else stop_token
        n = int(next(numbers))
        self.prompt_logprobs = list(islice(numbers, n))
        self.prompt_is_greedy = list(map(bool, islice(numbers, n)))
        n = int(next(numbers))
        tokens, logprobs = list(islice(numbers, n)), list(islice(numbers, n))
        for token, logprob in zip(tokens, logprobs, strict=True):
            self.push(int(token), logprob)
        if self.params.logprobs is not None:
            pairs = [(int(token), logprob) for token, logprob in zip(numbers, numbers, strict=True)]
            k, n_scored = self.params.logprobs, max(0, len(self.prompt_logprobs) - 1)
            rows = [pairs[i * k : (i + 1) * k] for i in range(n_scored + n)]
            self.prompt_top_logprobs = [[]] * bool(self.prompt_logprobs) + rows[:n_scored]
            self.top_logprobs = rows[n_scored:]
        self.finish(reason)
        if reason == "error":
            self.error = ParallelError("the first rank failed: its own message says why")


@dataclass(frozen=True)
class Event:
    """One step of one request: a token, the end, or both.

    Attributes:
        request: the `Request`.
        token: the id of the generated token. None if the step only ended the request.
        text: whole characters that can be shown now, because they belong to no stop string.
        logprob: the natural logarithm of the token's probability, before any sampling option.
        top_logprobs: the likeliest ids and their logprobs, if asked for.
        finish_reason: None while the request goes on, else as in the `Request`.
    """

    request: Request
    token: int | None
    text: str
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: FinishReason | None = None

    @property
    def row(self) -> int:
        """The row of the request. In a stream it is the index among all samples of all prompts."""
        return self.request.row
