"""Plans: what every rank of a model computes next. The first rank sends each plan to the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import torch

from llama import parallel


class Action(IntEnum):
    """What a plan does."""

    NOTHING = 0
    FORWARD = 1
    COPY = 2  # copy the first positions of one cache row to another row
    CLEAR = 3  # set the positions of one cache row to zero, from `n_keys` on
    DONE = 4
    FAILED = 5


class Wanted(IntEnum):
    """The logits that a forward must return."""

    NOTHING = 0
    LAST = 1  # the logits of each row's last token
    ALL = 2


@dataclass(frozen=True)
class Plan:
    """One action. A plan holds only numbers: indices of cache rows, positions and token ids.

    row: the first cache row of a forward, or the row that a copy writes.
    source: the cache row that a copy reads.
    n_keys: how many positions of each cache row are used.
    is_exact: compute with Meta's operations; all rows then start at the same position.
    is_draft: the draft model computes the forward, instead of the main model.
    start_pos: the position of each row's first token. tokens: ids (B, S).
    adapters: the number of each row's adapter; 0 for none.
    """

    action: Action
    row: int = 0
    source: int = 0
    n_keys: int = 0
    wanted: Wanted = Wanted.NOTHING
    is_exact: bool = False
    is_draft: bool = False
    start_pos: Sequence[int] = ()
    tokens: Sequence[Sequence[int]] = ()
    adapters: Sequence[int] = ()

    @classmethod
    def decode(
        cls,
        row: int,
        start_pos: list[int],
        tokens: list[list[int]],
        is_exact: bool,
        adapters: Sequence[int],
    ) -> Self:
        """A forward of new tokens (B, S) of the cache rows from `row` on, with all their logits."""
        seqlen = len(tokens[0])
        wanted = Wanted.LAST if seqlen == 1 else Wanted.ALL
        return cls(
            Action.FORWARD, row, n_keys=max(start_pos) + seqlen, wanted=wanted, is_exact=is_exact,
            start_pos=start_pos, tokens=tokens, adapters=adapters,
        )  # fmt: skip

    def send(self, device: torch.device) -> None:
        """Send the plan to the other ranks, which call `receive`."""
        if parallel.mp_size() == 1:
            return
        flags = [self.is_exact, self.is_draft]
        head = [self.action, self.row, self.source, self.n_keys, self.wanted, *flags]
        ids = [token for row in self.tokens for token in row]
        sizes = [len(self.start_pos), len(self.adapters)]
        numbers = [*head, *sizes, *self.start_pos, *self.adapters, *ids]
        parallel.broadcast_numbers(numbers, torch.int64, device)

    @classmethod
    def receive(cls, device: torch.device) -> Self:
        numbers = parallel.broadcast_numbers(None, torch.int64, device)
        action, row, source, n_keys, wanted, is_exact, is_draft, n_rows, n_adapters, *rest = numbers
        start_pos, rest = rest[:n_rows], rest[n_rows:]
        adapters, ids = rest[:n_adapters], rest[n_adapters:]
        seqlen = len(ids) // n_rows if n_rows else 0
        tokens = [ids[i * seqlen : (i + 1) * seqlen] for i in range(n_rows)]
        return cls(
            Action(action), row, source, n_keys, Wanted(wanted), bool(is_exact), bool(is_draft),
            start_pos, tokens, adapters,
        )  # fmt: skip


def padded(tokens: list[int], length: int) -> list[int]:
    """Pad tokens with zeros to a length. The caller drops the results of padding."""
    return tokens + [0] * (length - len(tokens))
