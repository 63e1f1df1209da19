"""The tokens of a prompt: what each holds, and where two tokenizers cut the same characters."""

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """One token of a prompt.

    index: its place in the prompt, from 0.
    data: its bytes, which may be part of a character. A SentencePiece token keeps the blank before
        its word.
    text: the characters that it completes in the prompt. "": a character still lacks bytes.
    name: the name of a special token. None: it is a token of plain text.
    """

    index: int
    id: int
    data: bytes
    text: str
    name: str | None


def read_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Token]:
    """The tokens with these ids. Raises TokenizerError for an id that the tokenizer lacks."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return [
        Token(index, i, tokenizer.token_bytes(i), text, names.get(i))
        for index, (i, text) in enumerate(zip(ids, tokenizer.token_texts(ids), strict=True))
    ]


def plain_text(tokens: Sequence[Token]) -> str:
    """The text of the tokens without the special tokens."""
    return "".join(token.text for token in tokens if token.name is None)


class Spelling(NamedTuple):
    """A special token's name in plain text, and the indices of the first and last of its tokens."""

    name: str
    first: int
    last: int


def spelled_names(tokens: Sequence[Token], names: Collection[str]) -> Iterator[Spelling]:
    """Where plain tokens spell one of these names. They are not the special token of that name."""
    if not names:
        return
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    for is_special, run in groupby(tokens, key=lambda token: token.name is not None):
        if is_special:
            continue
        plain = list(run)
        ends = list(accumulate(len(token.text) for token in plain))
        for found in pattern.finditer(plain_text(plain)):
            first, last = (plain[bisect_right(ends, at)] for at in (found.start(), found.end() - 1))
            yield Spelling(found[0], first.index, last.index)


# ---- two lists of tokens --------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """A part of two prompts. Both have the end of a token before it and at its end. Either side may
    be empty."""

    left: Sequence[Token]
    right: Sequence[Token]

    @property
    def is_same_text(self) -> bool:
        """Whether both sides have the same characters, those of special names included."""
        left, right = ("".join(t.name or t.text for t in side) for side in (self.left, self.right))
        return left == right

    @property
    def is_cut_alike(self) -> bool:
        """Whether both sides cut the same characters at the same places."""
        left, right = (
            [(t.name, t.text or t.data) for t in side] for side in (self.left, self.right)
        )
        return left == right


def align(left: Sequence[Token], right: Sequence[Token], shared: Sequence[str]) -> list[Span]:
    """Cut two prompts into the shortest spans of the same characters.

    shared: texts that both prompts contain, in their order. Inside them, a span ends wherever both
    prompts have the end of a token at the same character. What is between them, such as the
    markers of two chat formats, is one span.
    """
    wholes = _text_of(left), _text_of(right)
    ends = _boundaries(left), _boundaries(right)
    after = 0, 0  # positions after the last shared text, on the left and on the right
    cuts = [(0, 0)]  # the numbers of tokens before a common boundary, on the left and on the right
    for text in shared:
        i, j = wholes[0].find(text, after[0]), wholes[1].find(text, after[1])
        if i < 0 or j < 0:  # a tokenizer does not give the text back unchanged
            continue
        for k in range(len(text) + 1):
            if i + k in ends[0] and j + k in ends[1]:
                cuts.append((ends[0][i + k], ends[1][j + k]))
        after = i + len(text), j + len(text)
    cuts.append((len(left), len(right)))
    return [Span(left[a:c], right[b:d]) for (a, b), (c, d) in pairwise(cuts) if (a, b) != (c, d)]


def _characters(token: Token) -> str:
    """The characters of a token. A special token counts as one that no text contains."""
    return token.text if token.name is None else "\0"


def _text_of(tokens: Sequence[Token]) -> str:
    return "".join(map(_characters, tokens))


def _boundaries(tokens: Sequence[Token]) -> dict[int, int]:
    """For each position in the text where a token ends, how many tokens end up to there. Tokens
    without a whole character belong to the next character."""
    found: dict[int, int] = {}
    for n_tokens, position in enumerate(accumulate(map(len, map(_characters, tokens)), initial=0)):
        found.setdefault(position, n_tokens)
    return found
