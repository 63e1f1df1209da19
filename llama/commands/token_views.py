"""How `llama tokens` shows tokens: as a table, one after the other, or beside other tokens."""

import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, zip_longest

from llama.commands.terminal import MAGENTA, YELLOW, dim, styled
from llama.explain.tokens import Span, Token, plain_text, spelled_names
from llama.terminal_text import printable

WIDTH = 100  # columns, if the output is no terminal
SIDE = 16  # columns of a side of a comparison, at least
INDEX = "index"
OTHER_CUTS, OTHER_TEXT = "!", "~"  # marks of spans in a comparison


def table(tokens: Sequence[Token]) -> Iterator[str]:
    """The lines of a table: index, id and bytes."""
    width = max([len("id"), *(len(str(token.id)) for token in tokens)])
    yield f"{INDEX}  {'id':>{width}}  bytes"
    for token in tokens:
        yield f"{token.index:>{len(INDEX)}}  {token.id:>{width}}  {_coloured(_cell(token), token)}"


def flow(tokens: Sequence[Token]) -> Iterator[str]:
    """The lines of the text, with | between the tokens. A line ends after a newline."""
    bar = dim("|", sys.stdout)
    line = bar
    for token in tokens:
        line += _coloured(_inline(token), token) + bar
        if token.name is None and "\n" in token.text:
            yield line
            line = bar
    yield line


def notes(tokens: Sequence[Token], special_tokens: Mapping[str, int]) -> Iterator[str]:
    """The counts, and the places where plain text spells the name of a special token."""
    text = plain_text(tokens)
    n_special = sum(token.name is not None for token in tokens)
    n_plain = len(tokens) - n_special
    yield (
        f"{len(tokens):,} tokens, {n_special:,} of them special. The others: {len(text):,} "
        f"characters, {len(text.encode()):,} bytes, {len(text) / max(1, n_plain):.2f} characters "
        "a token."
    )
    for name, first, last in spelled_names(tokens, special_tokens.keys()):
        yield (
            f"Tokens {first} to {last} spell {printable(name)} as plain text. The special token "
            f"is {special_tokens[name]}."
        )


N_MARKS = 9  # characters of a line that are neither an index nor of a side


def comparison(spans: Sequence[Span], titles: tuple[str, str]) -> Iterator[str]:
    """The lines of a table with two sides: for each span, its tokens on both sides.

    titles: of the sides. Neighbouring spans that both sides cut alike are shown as one.
    """
    columns = shutil.get_terminal_size((WIDTH, 0)).columns
    width = max(SIDE, (columns - 2 * len(INDEX) - N_MARKS) // 2)
    left, right = titles
    yield f"   {INDEX}  {left}{' ' * (width - _columns(left))}  {INDEX}  {right}"
    for is_alike, group in groupby(spans, key=lambda span: span.is_cut_alike):
        if is_alike:
            yield from _alike(list(group), width)
        else:
            for span in group:
                yield from _unlike(span, width)
    n_left, n_right = sum(len(s.left) for s in spans), sum(len(s.right) for s in spans)
    n_texts = sum(not span.is_same_text for span in spans)
    n_cuts = sum(not span.is_cut_alike for span in spans) - n_texts
    yield from (
        "",
        f"{n_left:,} tokens on the left, {n_right:,} on the right",
        f"{OTHER_CUTS}  spans with the same characters in other tokens: {n_cuts:,}",
        f"{OTHER_TEXT}  spans with other characters: {n_texts:,}",
    )


def _alike(spans: Sequence[Span], width: int) -> Iterator[str]:
    tokens = [token for span in spans for token in span.left]
    count = dim(f"{len(tokens):,} token{'s' * (len(tokens) > 1)} alike", sys.stdout)
    right = f"{spans[0].right[0].index:>{len(INDEX)}}  {count}"
    for line in _wrapped(tokens, width):
        yield f"   {_side(line, width)}  {right}".rstrip()
        right = ""


def _unlike(span: Span, width: int) -> Iterator[str]:
    mark = styled(OTHER_CUTS if span.is_same_text else OTHER_TEXT, YELLOW, sys.stdout)
    sides = (_wrapped(side, width) for side in (span.left, span.right))
    for left, right in zip_longest(*sides, fillvalue=[]):
        yield f"{mark}  {_side(left, width)}  {_side(right, 0)}".rstrip()
        mark = " "


def _wrapped(tokens: Sequence[Token], width: int) -> Iterator[list[Token]]:
    """The tokens in lines of at most this many columns. A wider token has a line of its own."""
    line: list[Token] = []
    free = width
    for token in tokens:
        needed = _columns(_cell(token)) + 1
        if line and needed > free + 1:
            yield line
            line, free = [], width
        line.append(token)
        free -= needed
    if line:
        yield line


def _side(tokens: Sequence[Token], width: int) -> str:
    """The index of the first token, and the bytes of all, with blanks up to the width."""
    index = str(tokens[0].index) if tokens else ""
    blanks = width - _columns(" ".join(map(_cell, tokens)))
    shown = " ".join(_coloured(_cell(token), token) for token in tokens)
    return f"{index:>{len(INDEX)}}  {shown}{' ' * blanks}"


# ---- one token ----------------------------------------------------------------------------------


def _cell(token: Token) -> str:
    """A special token's name, or the bytes: text in quotes, and hex if they are not printable, as
    in '\\n'=0A."""
    if token.name is not None:
        return printable(token.name)
    try:
        text = token.data.decode()
    except UnicodeDecodeError:
        return _hex(token.data)
    return repr(text) if text.isprintable() else f"{text!r}={_hex(token.data)}"


def _inline(token: Token) -> str:
    """The name or the text without quotes, or hex for bytes that are part of a character."""
    try:
        return printable(token.name or token.data.decode())
    except UnicodeDecodeError:
        return _hex(token.data)


def _coloured(shown: str, token: Token) -> str:
    return shown if token.name is None else styled(shown, MAGENTA, sys.stdout)


def _hex(data: bytes) -> str:
    return data.hex().upper()


def _columns(text: str) -> int:
    """The columns that a terminal uses for the text. East Asian characters are wide, and combining
    characters have no column of their own."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
