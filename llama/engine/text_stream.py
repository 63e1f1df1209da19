"""The text of a request while it is generated, up to a stop string."""

from collections.abc import Sequence

from llama.tokenizer import TextDecoder, Tokenizer


class TextStream:
    """The text of one request while it grows, in whole characters. If the end of the text may be
    the start of a stop string, this end is held back.

    Joined, the strings from `push` and `finish` are the decoded text before its first stop string.
    The first stop string is the one that ends first. If several end at the same place, it is the
    longest of them. The cost of one id depends on the length of the stop strings, not on the number
    of earlier ids.

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
        """Add an id. Returns the text that can be shown now.

        Raises TokenizerError for an id that the tokenizer does not know.
        """
        if self.stopped:
            return ""
        text = self._cut(self._held + self._decoder.push(token_id))
        safe = len(text) if self.stopped else self._safe(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """Call this after the last id. Returns the text that was held back.

        After a stop string, that text is ""."""
        if self.stopped:
            return ""
        text, self._held = self._held + self._decoder.flush(), ""
        return self._cut(text)

    def _cut(self, text: str) -> str:
        """Return the text before the first stop string, or all of it. Sets `stopped`."""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        return text[: min(found)[1]] if found else text

    def _safe(self, text: str) -> int:
        """The length of the text before its longest suffix that is the start of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            end = text[start:]
            if any(stop.startswith(end) for stop in self._stop):
                return start
        return len(text)
