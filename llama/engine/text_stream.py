"""The text of a request while it is generated, up to a stop string."""

from collections.abc import Sequence

from llama.tokenizer import TextDecoder, Tokenizer


class TextStream:
    """Text of one request as it grows: whole characters, held back while the end may be the start
    of a stop string.

    All that `push` returned and then `finish`, joined, is the decoded text, cut where its first
    stop string begins: the one that ends first, of those the longest. The cost of one id depends
    on the length of the stop strings, not on how many ids came before.

    is_continued: the text can be appended to the prompt; see `TextDecoder`.

    Attributes: `stopped`, whether a stop string was completed; nothing comes after it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), is_continued: bool = False):
        self.stopped = False
        self._decoder = TextDecoder(tokenizer, is_continued)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""

    def push(self, token_id: int) -> str:
        """Return the text that this id makes safe to show.

        Raises TokenizerError where the id is not the tokenizer's.
        """
        if self.stopped:
            return ""
        text = self._cut(self._held + self._decoder.push(token_id))
        safe = len(text) if self.stopped else self._safe(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """Return what was held back, at the end of the ids; nothing after a stop string."""
        if self.stopped:
            return ""
        text, self._held = self._held + self._decoder.flush(), ""
        return self._cut(text)

    def _cut(self, text: str) -> str:
        """Return what stands before the first stop string, all where there is none."""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        return text[: min(found)[1]] if found else text

    def _safe(self, text: str) -> int:
        """Length of the text before the longest end that a stop string may start with."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            end = text[start:]
            if any(stop.startswith(end) for stop in self._stop):
                return start
        return len(text)
