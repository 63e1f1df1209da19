"""A slot of the engine: one row of the KV cache, and the request that uses it."""

from dataclasses import dataclass, field

from llama.engine.request import Request
from llama.engine.speculative import Lookup, Proposals


@dataclass(eq=False)
class Slot:
    """A row of the cache, the tokens whose keys and values it holds, and its request."""

    index: int
    tokens: list[int] = field(default_factory=list)
    request: Request | None = None
    adapter: int = 0  # the number of the adapter that the keys and values belong to; 0: none
    last_used: int = 0
    # Whether the keys and values may be NaN, because the last request failed or was cancelled.
    # A NaN does harm even where the mask hides it, because 0 * NaN is NaN.
    may_hold_nan: bool = False
    n_in_draft_cache: int = 0  # how many of the tokens the draft model's cache holds too
    lookup: Lookup | None = None  # made with the request's first proposals
    proposals: Proposals = field(default_factory=Proposals)

    @property
    def running(self) -> Request:
        """The request of this slot, which must have one."""
        assert self.request is not None
        return self.request

    @property
    def may_be_shared(self) -> bool:
        """Whether another request may reuse the tokens of this slot."""
        return self.request is None or not self.request.is_private

    def accept(self, proposal: list[int]) -> bool:
        """Whether the request is running and its last token is the proposed token. If so, the
        proposal is counted as accepted.

        proposal: a list of one token, or an empty list, which is never accepted.
        """
        request = self.request
        if request is None or request.tokens[-1:] != proposal:
            return False
        request.accepted += 1
        return True

    def admit(self, request: Request, reused: int, n_in_draft_cache: int) -> None:
        """Take a request. The row holds the first `reused` tokens of its prompt already."""
        self.request, self.tokens = request, request.prompt_tokens[:reused]
        self.adapter = request.adapter
        request.n_reused, self.may_hold_nan = reused, False
        self.n_in_draft_cache, self.lookup, self.proposals = n_in_draft_cache, None, Proposals()

    def release(self, step: int, kept: int) -> None:
        """The request has ended. At most `kept` of its tokens stay, for a later request."""
        request, self.request, self.last_used = self.running, None, step
        self.may_hold_nan = request.finish_reason not in ("stop", "length")
        self.cut(0 if request.is_private or request.error is not None else kept)

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens only."""
        del self.tokens[max(0, length) :]
        self.n_in_draft_cache = min(self.n_in_draft_cache, len(self.tokens))


def groups(decoding: list[Slot]) -> list[list[Slot]]:
    """The slots that decode in one forward: each exact request alone, all others together."""
    alone = [[slot] for slot in decoding if slot.running.is_exact]
    together = [slot for slot in decoding if not slot.running.is_exact]
    return [*alone, together] if together else alone
