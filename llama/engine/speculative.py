"""Speculative decoding: cheap proposals, which one forward of the model checks together.

Leviathan et al. 2023, arxiv.org/abs/2211.17192; Chen et al. 2023, arxiv.org/abs/2302.01318. A
forward of a few tokens costs little more than a forward of one, because both read all weights. It
gives the logits after each token. The model draws a token from each, in order, until a draw differs
from its proposal. All tokens therefore come from the model's own distribution.

Greedy decoding and lookup draw as plain decoding does, with the same random numbers. The proposals
of a draft model are draws themselves. `choose` accepts more of them; a seed then gives another text
of the same distribution.

This file holds proposals and the estimated times of steps. `proposer` decides how many tokens to
propose. The engine runs the forwards.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq

import torch
from torch import Tensor

from llama import sampling
from llama.engine.request import Request
from llama.errors import GenerationError

MAX_PROPOSALS = 15  # for a row in one step
NGRAM = 3  # tokens that a lookup must find earlier in the text
GAIN = 1.05  # the least speedup over plain decoding for which tokens are proposed

ROW_COST = 0.17  # assumed cost of a proposal, as a share of a plain step, until measured
PRIOR = 0.6  # assumed acceptance rate, until measured
MEMORY = 0.97  # weight of the past in the acceptance rate, at each step


class Lookup:
    """Prompt lookup; Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.

    It proposes the tokens that followed the last NGRAM tokens earlier in the prompt or answer.
    """

    def __init__(self) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # index of the token after an n-gram

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            if len(self._text) >= NGRAM:
                self._next[tuple(self._text[-NGRAM:])] = len(self._text)
            self._text.append(token)

    def propose(self, length: int) -> list[int]:
        """Propose `length` tokens, or none where the last NGRAM tokens have not occurred before."""
        start = self._next.get(tuple(self._text[-NGRAM:]))
        if start is None:
            return []
        # Where the match reaches the end of the text, the text is assumed to repeat.
        period = len(self._text) - start
        return [self._text[start + i % period] for i in range(length)]


def draft_token(
    logits: Tensor, request: Request, proposed: Sequence[int]
) -> tuple[int, Tensor | None]:
    """The draft model's next proposal, after the request's tokens and `proposed`.

    logits: the draft model's (V,). At a temperature above 0 the proposal is drawn from the
    distribution q (V,), which is returned too.
    """
    params = request.params
    if params.logits_processor is not None:  # the caller expects one call a token
        params = replace(params, logits_processor=None)
    text = (params, request.prompt_tokens, [*request.tokens, *proposed])
    try:
        if params.temperature == 0:
            return int(sampling.choose(logits, *text)), None
        q = sampling.distribution(logits, *text)
    except GenerationError:  # the logits are not finite; the model will reject any token
        return 0, None
    return int(torch.multinomial(q, 1, generator=request.generator)), q


class Proposals:
    """The proposals for a request, and their acceptance rate.

    Attributes: `proposed`, the latest proposals, of which a step may check only the first ones;
    `drawn_from`, the distribution (V,) that a draft model drew each from; `acceptance_rate`, the
    estimated probability that a proposal is accepted where all before it were.
    """

    def __init__(self) -> None:
        self.proposed: list[int] = []
        self.drawn_from: list[Tensor | None] = []
        self._n_reviewed = 0  # tokens of the request
        self._accepted = PRIOR
        self._tried = 1.0

    @property
    def acceptance_rate(self) -> float:
        return self._accepted / self._tried

    def review(self, tokens: Sequence[int]) -> Sequence[int]:
        """Compare all proposals, checked or not, with the tokens that the request got since. Drops
        the proposals and returns these tokens.

        The acceptance rate falls back to PRIOR in time, so that proposals are tried again.
        """
        new_tokens = tokens[self._n_reviewed :]
        accepted = n_alike(self.proposed, new_tokens)
        has_failed = accepted < min(len(self.proposed), len(new_tokens))
        self._accepted = MEMORY * self._accepted + (1 - MEMORY) * PRIOR + accepted
        self._tried = MEMORY * self._tried + (1 - MEMORY) + accepted + has_failed
        self.proposed, self.drawn_from, self._n_reviewed = [], [], len(tokens)
        return new_tokens


def choose(logits: Tensor, request: Request, proposals: Proposals, at: int = 0) -> Tensor:
    """The request's next token, an id (), from the model's logits (V,).

    at: number of the proposal that the token replaces or confirms. Let p be the distribution that
    `sampling.choose` draws from. A proposal that a draft model drew from q is accepted with
    probability min(1, p / q). Otherwise the token is drawn from max(p - q, 0), rescaled.
    """
    text = (request.params, request.prompt_tokens, request.tokens)
    q = proposals.drawn_from[at] if at < len(proposals.drawn_from) else None
    if q is None:
        return sampling.choose(logits, *text, request.generator)
    p, token = sampling.distribution(logits, *text), proposals.proposed[at]
    number = torch.rand((), generator=request.generator, device=p.device)
    if number.item() * q[token].item() < p[token].item():
        return torch.tensor(token, device=p.device)
    rest = (p - q).clamp(min=0)
    rest = rest if rest.any() else p  # p and q are equal up to rounding
    return torch.multinomial(rest, 1, generator=request.generator).squeeze(0)


@dataclass
class _Timed:
    """The latest times of one kind of step, in seconds."""

    latest: deque[float]
    at: int  # number of the last one among all steps
    median: float = 0.0


class StepTimes:
    """Estimates the seconds of a step by its rows and its proposals a row, from timed steps."""

    LAST = 8  # latest times of a kind that are kept
    FEW = 3  # with fewer times the expected time counts too, because the first may be slow
    AGE = 256  # steps after which a time is dropped

    def __init__(self) -> None:
        self._known: dict[int, dict[int, _Timed]] = {}  # by rows, by proposals
        self._count = 0

    def add(self, n_rows: int, length: int, seconds: float) -> None:
        self._count += 1
        lengths = self._known.setdefault(n_rows, {})
        timed = lengths.get(length)
        if timed is None or self._is_old(timed):
            timed = lengths[length] = _Timed(deque(maxlen=self.LAST), self._count)
        timed.latest.append(seconds)
        timed.at = self._count
        # The median, because the minimum would be a step that accepted no proposal.
        timed.median = sorted(timed.latest)[len(timed.latest) // 2]

    def seconds(self, n_rows: int, length: int) -> float:
        """The median; where there are few times, at most what is expected from the nearest number
        of proposals. 0 as long as a step without proposals was not timed often enough."""
        lengths = self._known.get(n_rows, {})
        plain = self._median(lengths, 0)
        if length == 0 or plain == 0:
            return plain
        if median := self._median(lengths, length):
            return median
        known = [n for n in lengths if n > 0 and self._median(lengths, n)]
        nearest = min(known, key=lambda n: abs(n - length), default=0)
        slope = ROW_COST * plain
        if nearest:
            slope = max(0.0, lengths[nearest].median - plain) / nearest
        expected = plain + slope * length
        few = lengths.get(length)
        return min(few.median, expected) if few and not self._is_old(few) else expected

    def _median(self, lengths: Mapping[int, _Timed], length: int) -> float:
        """0 where there are few times."""
        timed = lengths.get(length)
        if timed is None or len(timed.latest) < self.FEW or self._is_old(timed):
            return 0.0
        return timed.median

    def _is_old(self, timed: _Timed) -> bool:
        return self._count - timed.at > self.AGE


def best_length(
    rates: Sequence[float], limits: Sequence[int], seconds: Callable[[int], float]
) -> int:
    """How many tokens to propose for each row, so that the most tokens come in a second.

    rates, limits: of each row, the probability that a proposal is right and how many there can be.
    seconds: a step's, by its number of proposals for each row; rows with fewer are filled up.
    Returns 0 where proposals gain less than GAIN, or a step without them takes 0 s: not known yet.
    """
    longest = max(limits, default=0)
    if longest == 0 or (plain := seconds(0)) == 0:
        return 0
    best, most = 0, GAIN * len(rates) / plain
    expected = [1.0] * len(rates)  # tokens
    # No request takes more tokens than it has left.
    bound = sum(1 / (1 - rate) if rate < 1 else 1 + longest for rate in rates)
    for length in range(1, longest + 1):
        took = seconds(length)
        if bound < most * took:
            break
        for row, (rate, limit) in enumerate(zip(rates, limits, strict=True)):
            expected[row] += rate**length if length <= limit else 0.0
        if (speed := sum(expected) / took) > most:
            best, most = length, speed
    return best


def n_alike(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    return sum(1 for _ in takewhile(bool, map(eq, a, b)))
