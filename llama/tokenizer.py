"""Text to token ids and back, for both kinds of `tokenizer.model` that Meta ships.

Llama 2 comes with a SentencePiece model, Llama 3 with a list of byte sequences and their ranks for
tiktoken. One `Tokenizer` opens either; `_Tiktoken` and `_SentencePiece` below hold what differs,
behind the same attributes and methods.
"""

import base64
import codecs
import re
from collections.abc import Collection, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Literal

import sentencepiece
import tiktoken

from llama.chat_format import ChatFormat, Dialog, Llama2ChatFormat, Message, Role
from llama.errors import TokenizerError
from llama.files import why_unreadable

__all__ = ["ChatFormat", "Dialog", "Message", "Role", "TextDecoder", "Tokenizer"]


class Tokenizer:
    """The tokenizer of a Llama model, whichever of the two formats its file has.

    Args:
        model_path: the `tokenizer.model` file; its content tells the format, its name does not.

    Attributes:
        n_words: size of the vocabulary, special tokens included; ids are 0 to n_words - 1.
        bos_id, eos_id: the ids that begin and end a text.
        pad_id: always -1, no token: Meta pads with it and masks it out.
        stop_tokens: ids that end a generation; may be assigned.
        special_tokens: id of each special token by its name.

    Raises:
        TokenizerError: the file cannot be read or is no tokenizer of either format.
    """

    def __init__(self, model_path: str | Path):
        self.model_path = Path(model_path)
        self._backend = _open(self.model_path)
        self.special_tokens: dict[str, int] = self._backend.special_tokens
        self.n_words: int = self._backend.n_words
        self.bos_id: int = self._backend.bos_id
        self.eos_id: int = self._backend.eos_id
        self.pad_id = -1
        self.stop_tokens: list[int] = self._backend.stop_tokens

    def encode(
        self,
        s: str,
        bos: bool | None,
        eos: bool | None,
        *,
        allowed_special: Literal["all"] | Collection[str] = (),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Return the ids of `s`.

        Half a surrogate pair, which UTF-8 cannot write, is encoded as U+FFFD (as tiktoken does).

        Args:
            s: any text. By default all of it is plain text, the names of special tokens included.
            bos, eos: put `bos_id` in front, `eos_id` at the end.
            allowed_special: names that become their special token where they stand in `s`; "all"
                for every one. The Llama 2 format encodes the text between them piece by piece.
            disallowed_special: names that must not stand in `s`; "all" for all that are not
                allowed.

        Raises:
            TokenizerError: `s` is not a string or contains a disallowed name.
        """
        if not isinstance(s, str):
            raise TokenizerError(f"the text to encode must be a str, not {type(s).__name__}")
        names = self.special_tokens.keys()
        allowed = set(names if allowed_special == "all" else names & set(allowed_special))
        for name in names - allowed if disallowed_special == "all" else disallowed_special:
            if name in s:
                raise TokenizerError(f"the text contains the disallowed special token {name}")
        ids = self._backend.encode(s, allowed)
        if bos:
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Llama 3's special tokens decode to their names, Llama 2's bos and eos to nothing.

        Raises:
            TokenizerError: an id is negative or not below `n_words`.
        """
        ids = [index(i) for i in ids]  # a row of a tensor will do
        self._check(ids)
        return self._backend.decode(ids)

    def chat_format(self) -> ChatFormat | Llama2ChatFormat:
        """Return the prompt format that models with this kind of tokenizer were trained on."""
        return self._backend.chat_format(self)

    def _check(self, ids: list[int]) -> None:
        # tiktoken may answer a bad id with a Rust panic, which `except Exception` does not catch.
        if ids and not 0 <= min(ids) <= max(ids) < self.n_words:
            bad = next(i for i in ids if not 0 <= i < self.n_words)
            raise TokenizerError(
                f"token id {bad} is out of range: this tokenizer has {self.n_words} words"
            )


class TextDecoder:
    """Decodes ids one at a time into whole characters, for text that is shown as it is generated.

    All that `push` returned and then `flush`, joined, is `tokenizer.decode` of all the ids. The
    cost of one id does not depend on how many came before. Use a new decoder for each text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._check = tokenizer._check
        self._stream = tokenizer._backend.stream()

    def push(self, token_id: int) -> str:
        """Return the text this id completes: "" while a character still lacks bytes.

        Raises:
            TokenizerError: the id is negative or not below the tokenizer's `n_words`.
        """
        self._check([token_id])
        return self._stream.push(token_id)

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for a character that never became whole."""
        return self._stream.flush()


def _open(path: Path) -> "_Tiktoken | _SentencePiece":
    if reason := why_unreadable(path):
        raise TokenizerError(f"{path}: cannot read the tokenizer: {reason}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
    if not data:
        raise TokenizerError(f"{path}: the tokenizer file is empty")
    if data.lstrip().startswith(b"{"):
        raise TokenizerError(f"{path}: this is Hugging Face's tokenizer.json, not tokenizer.model")
    # A SentencePiece model is a protobuf message whose first field, the pieces, has the tag 0x0A: a
    # newline. tiktoken's file is text, and its first line is not empty.
    if data[0] == 0x0A:
        return _SentencePiece(path, data)
    if data.split(b"\n", 1)[0].decode("latin-1").rstrip("\r").isprintable():
        return _Tiktoken(path, data)
    raise TokenizerError(f"{path}: neither a SentencePiece model nor a list of tiktoken ranks")


# ---- Llama 3: tiktoken ---------------------------------------------------------------------------

# Meta's pattern for cutting text into words, which are then merged from bytes by rank.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The published names of Llama 3.1, in the order of their ids, which follow the last rank. Llama 3.0
# had the same ids with fewer names: 4, 8 and 10 were reserved, and a file does not tell.
_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)


class _Tiktoken:
    chat_format = ChatFormat

    def __init__(self, path: Path, data: bytes):
        ranks = _read_ranks(path, data)
        special = {name: len(ranks) + i for i, name in enumerate(_SPECIAL_TOKENS)}
        self._bpe = tiktoken.Encoding(
            name=path.name, pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self.special_tokens = special
        self.n_words = len(ranks) + len(special)
        self.bos_id = special["<|begin_of_text|>"]
        self.eos_id = special["<|end_of_text|>"]
        self.stop_tokens = [self.eos_id, special["<|eom_id|>"], special["<|eot_id|>"]]

    def encode(self, text: str, allowed: set[str]) -> list[int]:
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self._bpe.encode(piece, allowed_special=allowed, disallowed_special=())
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._bpe.decode(ids)

    def stream(self) -> "_TiktokenStream":
        return _TiktokenStream(self._bpe)


class _TiktokenStream:
    def __init__(self, bpe: tiktoken.Encoding):
        self._bpe = bpe
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bpe.decode_single_token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


# tiktoken's limits as Meta keeps them, for text and for runs without a word boundary: where a text
# is cut shows in its ids.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` every 400,000 characters, and there every 25,000 of a run of (non-)blanks."""
    for start in range(0, len(text), _MAX_CHARS):
        block = text[start : start + _MAX_CHARS]
        cut = 0
        for run in _RUN.finditer(block):
            for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield block[cut:end]
                cut = end
        yield block[cut:]


def _read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """Read lines of "base64 rank" and require what byte-pair encoding needs to work on any text."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            sequence = base64.b64decode(token, validate=True)
            if not sequence or sequence in ranks:
                raise ValueError
            ranks[sequence] = int(rank)
        except ValueError:
            message = f"{line[:40]!r} is not a new token in base64 and its rank"
            raise TokenizerError(f"{path}, line {number}: {message}") from None
    if missing := set(range(len(ranks))) - set(ranks.values()):
        raise TokenizerError(
            f"{path}: {len(ranks)} tokens must have the ranks 0 to {len(ranks) - 1}, "
            f"but none has {min(missing)}"
        )
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{path}: no token for the single byte 0x{lacking[0]:02X}")
    return ranks


# ---- Llama 2: SentencePiece ----------------------------------------------------------------------


class _SentencePiece:
    chat_format = Llama2ChatFormat

    def __init__(self, path: Path, data: bytes):
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise TokenizerError(f"{path}: not a whole SentencePiece model") from None
        self.n_words = self._sp.vocab_size()
        self.bos_id = self._sp.bos_id()
        self.eos_id = self._sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise TokenizerError(f"{path}: the SentencePiece model lacks a bos or eos token")
        special_ids = (self.bos_id, self.eos_id, self._sp.unk_id())
        self.special_tokens = {self._sp.id_to_piece(i): i for i in special_ids}
        self.stop_tokens = [self.eos_id]

    def encode(self, text: str, allowed: set[str]) -> list[int]:
        # SentencePiece refuses lone surrogates; this is how tiktoken repairs them by itself.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        # It never finds its special tokens in text, so the text is cut around the allowed ones.
        parts = re.split(f"({'|'.join(map(re.escape, allowed))})", text) if allowed else [text]
        ids: list[int] = []
        for part in parts:
            ids += [self.special_tokens[part]] if part in allowed else self._sp.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)

    def stream(self) -> "_SentencePieceStream":
        return _SentencePieceStream(self._sp)


class _SentencePieceStream:
    """SentencePiece's decoding of a whole list, redone one id at a time.

    Two of its rules look beyond one piece: the first text loses the blank in front, and each byte
    of a run of byte pieces that is not part of a valid character becomes a U+FFFD of its own
    (where Python writes one for all the bytes of a broken character).
    """

    def __init__(self, sp: sentencepiece.SentencePieceProcessor):
        self._sp = sp
        self._started = False  # past the place where a blank in front is dropped
        self._bytes = b""  # of a character that is not whole yet

    def push(self, token_id: int) -> str:
        if self._sp.is_byte(token_id):
            self._started = True
            self._bytes += bytes.fromhex(self._sp.id_to_piece(token_id)[3:5])  # "<0xF0>"
            return self._whole_characters()
        return self.flush() + self._piece(token_id)

    def flush(self) -> str:
        return self._whole_characters(final=True)

    def _piece(self, token_id: int) -> str:
        if self._started:
            # After another piece, any will do and every model has unk, the blank in front is kept.
            other = self._sp.unk_id()
            return self._sp.decode([other, token_id])[len(self._sp.decode([other])) :]
        # bos and eos have no text, however often they come, and so do not count as a start; a blank
        # alone does where models drop only one.
        self._started = self._sp.decode([token_id, token_id]) != ""
        return self._sp.decode([token_id])

    def _whole_characters(self, final: bool = False) -> str:
        text = ""
        while True:
            try:
                whole, used = codecs.utf_8_decode(self._bytes, "strict", final)
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode() + "\ufffd"
                self._bytes = self._bytes[error.start + 1 :]
            else:
                self._bytes = self._bytes[used:]
                return text + whole
