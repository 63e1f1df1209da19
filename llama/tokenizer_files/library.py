"""Any `tokenizer.json`, encoded and decoded by Hugging Face's `tokenizers` library (extra `[hf]`).

Llama's own two kinds have backends of their own in `hugging_face.py`. These backends give Meta's
ids even for texts for which the library gives other ids.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama.errors import ConfigError, TokenizerError
from llama.files import read_json
from llama.tokenizer_files.meta import encode_around

# An incomplete character waits for more ids. After this many ids, it is shown as it is, as U+FFFD.
MAX_PENDING = 8
NO_TOKEN = -1  # the id of a bos or eos token that a vocabulary lacks
END_TOKENS = ("</s>", "<|endoftext|>", "<|im_end|>", "<|end_of_text|>")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # a token that stands for one byte


def _alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(0x100 + i): byte for i, byte in enumerate(others)}
    return table


# The byte for each character of the `tokenizers` library's byte alphabet. A printable Latin-1
# character stands for its own byte. The other bytes have the characters from U+0100 on, in order.
BYTE_OF_CHARACTER = _alphabet()


def open_library_tokenizer(file: dict[str, Any]) -> Any:
    """The library's tokenizer for the content of a `tokenizer.json`.

    Raises TokenizerError if the library is not installed or refuses the file.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise TokenizerError(
            "a tokenizer.json of this kind needs the tokenizers library: "
            "pip install 'llama-reference[hf]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_str(json.dumps(file))
    except BaseException as error:
        # The library's errors are Exceptions. A panic of its Rust code is only a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"not a whole tokenizer: {str(error).splitlines()[0]}") from error
    # A file may hold these settings from the training in which it was saved.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # encode the names of special tokens as plain text
    return tokenizer


class LibraryTokenizer:
    """A vocabulary that is neither Llama 2's nor Llama 3's.

    bos is the token that the file puts before each text. If it puts none there, there is no bos.
    eos is the token that the caller names, else the eos_token of `tokenizer_config.json`, else a
    token with a known name, else the token that the file puts after each text.

    Text never becomes a special token, except in a Unigram model, because its pieces include the
    names of the special tokens.
    """

    is_llama_2 = False

    def __init__(self, path: Path, file: dict[str, Any], eos: str | None = None):
        self.file = file
        self._tokenizer = open_library_tokenizer(file)
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in sorted(self._added.items())}
        decoder = file.get("decoder") or {}
        self._decoders = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
        self.n_words = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        is_framed = bool(self._tokenizer.encode("").ids)  # the file adds tokens to each text
        framed, plain = self._tokenizer.encode("a").ids, self._encode("a")
        self.bos_id = framed[0] if is_framed and framed[0] != plain[0] else NO_TOKEN
        last = framed[-1] if is_framed and framed[-1] != plain[-1] else NO_TOKEN
        self.eos_id = self._named_eos(path) if eos is None else self.special_tokens[eos]
        if self.eos_id == NO_TOKEN:
            known = (self.special_tokens.get(name) for name in END_TOKENS)
            self.eos_id = next((i for i in known if i is not None), last)
        self.stop_tokens = [] if self.eos_id == NO_TOKEN else [self.eos_id]

    def _named_eos(self, path: Path) -> int:
        try:
            token = read_json(path.with_name("tokenizer_config.json")).get("eos_token")
        except ConfigError:
            return NO_TOKEN
        name = token.get("content") if isinstance(token, dict) else token
        return self.special_tokens.get(name, NO_TOKEN) if isinstance(name, str) else NO_TOKEN

    def encode(self, text: str, allowed: set[str]) -> list[int]:
        return encode_around(text, allowed, self.special_tokens, self._encode)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id) or ""
        if "ByteFallback" in self._decoders and (byte := BYTE_PIECE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        is_text = token_id not in self._added and all(c in BYTE_OF_CHARACTER for c in token)
        if "ByteLevel" in self._decoders and is_text:
            return bytes(BYTE_OF_CHARACTER[character] for character in token)
        stream = self.stream(is_continued=True)  # keeps a leading blank
        return (stream.push(token_id) + stream.flush()).encode()

    def stream(self, is_continued: bool = False) -> "_LibraryStream":
        # A continued text is decoded after the ids of "a". So the library does not drop its leading
        # blank.
        return _LibraryStream(self.decode, self._encode("a") if is_continued else [])


class _LibraryStream:
    """Decodes the last ids twice, without and with the new one. The difference is the new text.

    Only a window of ids is decoded: those that were shown last, and those that were not shown yet.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: list[int]):
        self._decode = decode
        self._shown = before  # they give the new ids their context
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._new_text()
        if not text.endswith("\ufffd"):
            return self._show(text)
        if len(self._pending) < MAX_PENDING:
            return ""  # the character lacks bytes
        return self._show_all_but_last(text)

    def flush(self) -> str:
        return self._show(self._new_text())

    def _new_text(self) -> str:
        return self._decode(self._shown + self._pending)[len(self._decode(self._shown)) :]

    def _show_all_but_last(self, text: str) -> str:
        """Show the text without its last ids, which may be the beginning of a character."""
        for n_kept in (3, 2, 1):  # a character has at most four bytes
            kept = self._pending[-n_kept:]
            shown = text.removesuffix(self._decode(kept))
            self._pending = self._pending[:-n_kept]
            if self._new_text() == shown:  # no character has bytes on both sides
                self._show(shown)
                self._pending = kept
                return shown
            self._pending += kept
        return self._show(text)

    def _show(self, text: str) -> str:
        if self._pending:
            self._shown, self._pending = self._pending, []
        return text
