"""Speculative decoding: tokens are proposed cheaply, and one forward of the model checks them all.

Leviathan et al. 2023, arxiv.org/abs/2211.17192; Chen et al. 2023, arxiv.org/abs/2302.01318. A
forward of a few tokens costs hardly more than one of a single token, as both read all weights, and
gives the logits after each of them. Tokens are drawn from these one after the other, for as long as
what is drawn is what was proposed. So all come from the model's own distribution.

Greedy tokens and proposals that are looked up need nothing else: the draws are those of plain
decoding, by the same random numbers. A draft model's proposals are draws too, of which `choose`
keeps more, at the price that a seed then gives another text of the same distribution.

Here is what is proposed and how much of it pays; the engine does the forwards.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from operator import eq

import torch
from torch import Tensor

from llama import sampling
from llama.config import ModelArgs
from llama.errors import ConfigError, GenerationError
from llama.request import Request

MOST = 15  # proposals for a row in one step
NGRAM = 3  # tokens that must stand in the text already for a look-up
GAIN = 1.05  # speed over plain decoding from which proposals are worth it

ROW_COST = 0.17  # of a forward's first token, what each further one costs: until that is measured
PRIOR = 0.6  # share of proposals that are right: until that is known, or forgotten
MEMORY = 0.97  # of what is known about a share from one step to the next


def check_draft(draft: ModelArgs, vocab_size: int, max_seq_len: int) -> None:
    """Raise ConfigError where a model of this shape cannot draft for one with that vocabulary, in
    texts of up to that length."""
    if draft.vocab_size != vocab_size:
        raise ConfigError(
            f"the draft model's vocab_size is {draft.vocab_size}, the model's {vocab_size}: they "
            "must have the same vocabulary"
        )
    if draft.max_seq_len < max_seq_len:
        raise ConfigError(
            f"the draft model's max_seq_len is {draft.max_seq_len}: it must be {max_seq_len}, the "
            "model's, or above"
        )


class Lookup:
    """Prompt look-up (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding): proposes what
    followed the last NGRAM tokens where they stood before, in the prompt or the answer."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # place of the token after an n-gram

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            if len(self._text) >= NGRAM:
                self._next[tuple(self._text[-NGRAM:])] = len(self._text)
            self._text.append(token)

    def propose(self, most: int) -> list[int]:
        """The tokens that may follow: `most`, or none where the last NGRAM are new."""
        start = self._next.get(tuple(self._text[-NGRAM:]))
        if start is None:
            return []
        # A text that repeats itself up to its end is thought to go on so.
        period = len(self._text) - start
        return [self._text[start + i % period] for i in range(most)]


def draft_token(
    logits: Tensor, request: Request, proposed: Sequence[int]
) -> tuple[int, Tensor | None]:
    """What a draft model proposes after the request's tokens and `proposed`, from its logits (V,);
    at a temperature above 0 drawn from q (V,), which is returned too."""
    params = request.params
    if params.logits_processor is not None:  # the caller's, who wants it called once a token
        params = replace(params, logits_processor=None)
    text = (params, request.prompt_tokens, [*request.tokens, *proposed])
    try:
        if params.temperature == 0:
            return int(sampling.choose(logits, *text)), None
        q = sampling.distribution(logits, *text)
    except GenerationError:  # not finite: any token will do
        return 0, None
    return int(torch.multinomial(q, 1, generator=request.generator)), q


class Guesses:
    """What is proposed to follow a request's tokens, and how that fares.

    Attributes: `proposed`, the latest, of which a step may check only a part; `drawn_from`, the
    distribution (V,) of each, where a draft model drew them; `rate`, about the probability that a
    proposal is right where those before it are.
    """

    def __init__(self) -> None:
        self.proposed: list[int] = []
        self.drawn_from: list[Tensor | None] = []
        self._n_seen = 0
        self._right = PRIOR
        self._tried = 1.0

    @property
    def rate(self) -> float:
        return self._right / self._tried

    def review(self, tokens: Sequence[int]) -> Sequence[int]:
        """Compare what was proposed, checked or not, with the request's tokens that came since;
        returns these, and proposes nothing any more.

        All that is known fades: after proposals have failed, they come to be tried again.
        """
        came = tokens[self._n_seen :]
        right = n_alike(self.proposed, came)
        has_failed = right < min(len(self.proposed), len(came))
        self._right = MEMORY * self._right + (1 - MEMORY) * PRIOR + right
        self._tried = MEMORY * self._tried + (1 - MEMORY) + right + has_failed
        self.proposed, self.drawn_from, self._n_seen = [], [], len(tokens)
        return came


def choose(logits: Tensor, request: Request, guesses: Guesses, at: int = 0) -> Tensor:
    """The request's next token, an id (), from the model's logits (V,).

    at: the number of the proposal in whose place it comes. One that a draft model drew from q is
    kept with probability min(1, p / q), where p is what `sampling.choose` draws from; else the
    token is drawn from max(p - q, 0), rescaled.
    """
    text = (request.params, request.prompt_tokens, request.tokens)
    q = guesses.drawn_from[at] if at < len(guesses.drawn_from) else None
    if q is None:
        return sampling.choose(logits, *text, request.generator)
    p, token = sampling.distribution(logits, *text), guesses.proposed[at]
    number = torch.rand((), generator=request.generator, device=p.device)
    if number.item() * q[token].item() < p[token].item():
        return torch.tensor(token, device=p.device)
    rest = (p - q).clamp(min=0)
    rest = rest if rest.any() else p  # p and q are the same up to rounding
    return torch.multinomial(rest, 1, generator=request.generator).squeeze(0)


class StepTimes:
    """Seconds that forwards of so many tokens take, from those that were timed.

    first: what a token is thought to take until any was timed.
    """

    LAST = 8  # times of a number that count
    FEW = 3  # as long as there are fewer, the expected time counts too: the first may be slow
    AGE = 256  # after as many to twice as many forwards a time is forgotten

    def __init__(self, first: float) -> None:
        self._first = first
        self._times: dict[int, deque[float]] = {}
        self._older: dict[int, deque[float]] = {}
        self._count = 0

    def add(self, n_tokens: int, seconds: float) -> None:
        self._count += 1
        if self._count % self.AGE == 0:
            self._older, self._times = self._times, {}
        self._times.setdefault(n_tokens, deque(maxlen=self.LAST)).append(seconds)

    def seconds(self, n_tokens: int) -> float:
        """The least of the last times, as whatever disturbs makes them longer; where there are few
        or none, what ROW_COST makes of the time of the next smaller number."""
        known = self._older | self._times
        times = known.get(n_tokens, ())
        if len(times) >= self.FEW:
            return min(times)
        nearest = max((n for n in known if n < n_tokens), default=0)
        expected = self.seconds(nearest) if nearest else self._first
        expected *= (1 + ROW_COST * (n_tokens - 1)) / (1 + ROW_COST * max(nearest - 1, 0))
        return min([*times, expected])


def best_length(
    rates: Sequence[float], limits: Sequence[int], seconds: Callable[[int], float]
) -> int:
    """How many tokens to propose for each row, so that the most tokens come in a second.

    rates, limits: of each row, the probability that a proposal is right and how many there can be.
    seconds: a step's, by its number of proposals for each row; rows with fewer are filled up.
    Returns 0 where proposals gain less than GAIN.
    """
    plain = len(rates) / seconds(0)
    best, most = 0, GAIN * plain
    expected = [1.0] * len(rates)  # tokens
    for length in range(1, max(limits, default=0) + 1):
        for row, (rate, limit) in enumerate(zip(rates, limits, strict=True)):
            expected[row] += rate**length if length <= limit else 0.0
        if (speed := sum(expected) / seconds(length)) > most:
            best, most = length, speed
    return best


def n_alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(bool, map(eq, a, b)))
