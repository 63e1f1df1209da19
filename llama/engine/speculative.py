"""Speculative decoding: one forward of the model checks several cheaply proposed tokens.

Leviathan et al. 2023, arxiv.org/abs/2211.17192; Chen et al. 2023, arxiv.org/abs/2302.01318. A
forward of a few tokens costs little more than a forward of one, because both read all weights. The
forward gives the logits after each token. A token is drawn from the logits of each position, in
order, until a drawn token differs from the proposed one. So all tokens come from the model's own
distribution.

With greedy decoding or lookup, tokens are drawn as in plain decoding, with the same random numbers.
With a draft model at a temperature above 0, the proposals are random too. The acceptance rule in
`choose` then accepts more proposals than a comparison with a drawn token would. With the same seed
the text differs from that of plain decoding, but it comes from the same distribution.

This file holds the acceptance rule, lookup, and the estimates of rates and times. `proposer`
decides what to propose. The engine runs the model.
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

PROPOSAL_COST = 0.17  # assumed cost of a proposal, as a share of a plain step, until measured
PRIOR = 0.6  # assumed acceptance rate, until measured
DECAY = 0.97  # each step multiplies the weight of earlier results in the acceptance rate by this


class Lookup:
    """Prompt lookup; Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding.

    It finds the latest earlier occurrence of the last NGRAM tokens in the prompt and answer, and
    proposes the tokens that followed it.
    """

    def __init__(self) -> None:
        self._text: list[int] = []
        self._index_after: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token after it

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            if len(self._text) >= NGRAM:
                self._index_after[tuple(self._text[-NGRAM:])] = len(self._text)
            self._text.append(token)

    def propose(self, most: int) -> list[int]:
        """Propose `most` tokens, or none if the last NGRAM tokens do not occur earlier."""
        start = self._index_after.get(tuple(self._text[-NGRAM:]))
        if start is None:
            return []
        # At the end of the text the proposals go on from `start`, as if the text repeated itself.
        period = len(self._text) - start
        return [self._text[start + i % period] for i in range(most)]


def draft_token(
    logits: Tensor, request: Request, proposed: Sequence[int]
) -> tuple[int, Tensor | None]:
    """The draft model's next proposal, after the request's tokens and `proposed`.

    logits: the draft model's logits (V,). At a temperature above 0 the proposal is drawn from the
    distribution q (V,), which is returned too.
    """
    params = request.params
    if params.logits_processor is not None:  # the processor expects one call for each token
        params = replace(params, logits_processor=None)
    context = (params, request.prompt_tokens, [*request.tokens, *proposed])
    try:
        if params.temperature == 0:
            return int(sampling.choose(logits, *context)), None
        q = sampling.distribution(logits, *context)
    except GenerationError:  # the logits are not finite; any proposal will do
        return 0, None
    return int(torch.multinomial(q, 1, generator=request.generator)), q


class Proposals:
    """The proposals for a request, and their acceptance rate.

    Attributes:
        tokens: the latest proposals. A step may check only the first few of them.
        drawn_from: for each proposal of a draft model, the distribution (V,) that it was drawn
            from, or None if it was not drawn. Empty for lookup.
        rate: estimated probability that a proposal is right if all proposals before it are right.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.drawn_from: list[Tensor | None] = []
        self._n_seen = 0
        self._right = PRIOR
        self._tried = 1.0

    @property
    def rate(self) -> float:
        return self._right / self._tried

    def review(self, tokens: Sequence[int]) -> Sequence[int]:
        """Update the rate and clear the proposals. Returns the tokens added since the last call.

        Proposals are compared with these tokens even if no step checked them. The rate decays to
        PRIOR, so that proposals are tried again some time after they failed.
        """
        new_tokens = tokens[self._n_seen :]
        right = common_prefix_length(self.tokens, new_tokens)
        has_failed = right < min(len(self.tokens), len(new_tokens))
        self._right = DECAY * self._right + (1 - DECAY) * PRIOR + right
        self._tried = DECAY * self._tried + (1 - DECAY) + right + has_failed
        self.tokens, self.drawn_from, self._n_seen = [], [], len(tokens)
        return new_tokens


def choose(logits: Tensor, request: Request, proposals: Proposals, at: int = 0) -> Tensor:
    """The request's next token, an id (), from the model's logits (V,).

    at: index of the proposal that the token is compared with. A proposal that a draft model drew
    from q is accepted with probability min(1, p / q), where p is the distribution that
    `sampling.choose` draws from. Otherwise the token is drawn from max(p - q, 0), rescaled.
    """
    context = (request.params, request.prompt_tokens, request.tokens)
    q = proposals.drawn_from[at] if at < len(proposals.drawn_from) else None
    if q is None:
        return sampling.choose(logits, *context, request.generator)
    p, token = sampling.distribution(logits, *context), proposals.tokens[at]
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
    at: int  # number of the step that was timed last
    median: float = 0.0


class StepTimes:
    """Estimates a step's time from earlier steps, by number of rows and of proposals per row."""

    LAST = 8  # how many of the latest times are kept for each kind of step
    FEW = 3  # with fewer times a kind's median is not trusted, because the first may be slow
    AGE = 256  # after this many steps without a new time, a kind's times are ignored

    def __init__(self) -> None:
        self._known: dict[int, dict[int, _Timed]] = {}  # [rows][proposals per row]
        self._count = 0

    def add(self, n_rows: int, length: int, seconds: float) -> None:
        self._count += 1
        lengths = self._known.setdefault(n_rows, {})
        timed = lengths.get(length)
        if timed is None or self._is_old(timed):
            timed = lengths[length] = _Timed(deque(maxlen=self.LAST), self._count)
        timed.latest.append(seconds)
        timed.at = self._count
        # The minimum would be too low: it is the time of a step that accepted no proposal.
        timed.median = sorted(timed.latest)[len(timed.latest) // 2]

    def seconds(self, n_rows: int, length: int) -> float:
        """The estimated time of such a step: the median, if FEW or more were timed. If fewer were
        timed, it is extrapolated from steps with no or other proposals, but at most their median.
        0 means unknown: fewer than FEW steps without proposals were timed."""
        lengths = self._known.get(n_rows, {})
        plain = self._median(lengths, 0)
        if length == 0 or plain == 0:
            return plain
        if median := self._median(lengths, length):
            return median
        known = [n for n in lengths if n > 0 and self._median(lengths, n)]
        nearest = min(known, key=lambda n: abs(n - length), default=0)
        slope = PROPOSAL_COST * plain
        if nearest:
            slope = max(0.0, lengths[nearest].median - plain) / nearest
        expected = plain + slope * length
        few = lengths.get(length)
        return min(few.median, expected) if few and not self._is_old(few) else expected

    def _median(self, lengths: Mapping[int, _Timed], length: int) -> float:
        """The median, or 0 if the times are old or fewer than FEW."""
        timed = lengths.get(length)
        if timed is None or len(timed.latest) < self.FEW or self._is_old(timed):
            return 0.0
        return timed.median

    def _is_old(self, timed: _Timed) -> bool:
        return self._count - timed.at > self.AGE


def best_length(
    rates: Sequence[float], limits: Sequence[int], seconds: Callable[[int], float]
) -> int:
    """The number of proposals per row that gives the most tokens per second.

    rates: for each row, the probability that a proposal is right.
    limits: for each row, the largest number of proposals.
    seconds(n): estimated time of a step with n proposals per row. Rows with fewer proposals are
        padded.
    Returns 0 if no number reaches a speedup of GAIN, or seconds(0) is 0, which means unknown.
    """
    longest = max(limits, default=0)
    if longest == 0 or (plain := seconds(0)) == 0:
        return 0
    best, most = 0, GAIN * len(rates) / plain
    expected = [1.0] * len(rates)  # tokens that each row gets from a step
    # An upper bound of sum(expected): 1 + rate + rate**2 + … without end, or 1 + longest.
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


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    return sum(1 for _ in takewhile(bool, map(eq, a, b)))
