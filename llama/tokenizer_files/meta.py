"""The two kinds of `tokenizer.model` that Meta ships, as backends of `Tokenizer`.

Llama 2 comes with a SentencePiece model, Llama 3 with a list of byte sequences and their ranks for
tiktoken. A backend has the attributes of `Tokenizer` and encodes, decodes and streams plain ids.
"""

import base64
import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import sentencepiece
import tiktoken

from llama.errors import TokenizerError

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


class Tiktoken:
    """Byte-pair encoding by rank; `always` are special tokens that text becomes without leave."""

    is_llama_2 = False

    def __init__(
        self,
        ranks: dict[bytes, int],
        special: dict[str, int],
        bos: str = "<|begin_of_text|>",
        eos: str = "<|end_of_text|>",
        always: Collection[str] = (),
    ):
        self._bpe = tiktoken.Encoding(
            name="Llama 3", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self._always = set(always)
        self.special_tokens = special
        self.n_words = len(ranks) + len(special)
        self.bos_id = special[bos]
        self.eos_id = special[eos]
        # Llama 3.0 has no <|eom_id|>, and other vocabularies may have neither.
        turn_ends = [special[name] for name in ("<|eom_id|>", "<|eot_id|>") if name in special]
        self.stop_tokens = [self.eos_id, *turn_ends]

    def encode(self, text: str, allowed: set[str]) -> list[int]:
        allowed = allowed | self._always
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


def read_tiktoken(path: Path, data: bytes) -> Tiktoken:
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
    return Tiktoken(ranks, {name: len(ranks) + i for i, name in enumerate(_SPECIAL_TOKENS)})


# ---- Llama 2: SentencePiece ----------------------------------------------------------------------


class SentencePiece:
    is_llama_2 = True

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
        # It never finds its special tokens in text.
        return encode_around(text, allowed, self.special_tokens, self._sp.encode)

    def decode(self, ids: list[int]) -> str:
        return self._sp.decode(ids)

    def stream(self) -> "_SentencePieceStream":
        return _SentencePieceStream(self._sp)


def encode_around(
    text: str, allowed: set[str], special: dict[str, int], encode: Callable[[str], list[int]]
) -> list[int]:
    """Cut the text around the `allowed` names and `encode` each part between them on its own."""
    # The libraries refuse lone surrogates; this is how tiktoken repairs them by itself.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    parts = re.split(f"({'|'.join(map(re.escape, allowed))})", text) if allowed else [text]
    ids: list[int] = []
    for part in parts:
        ids += [special[part]] if part in allowed else encode(part)
    return ids


class PieceStream(ABC):
    """SentencePiece's decoding of a whole list, redone one id at a time.

    Two of its rules look beyond one piece: the first text loses the blank in front, and each byte
    of a run of byte pieces that is not part of a valid character becomes a U+FFFD of its own
    (where Python writes one for all the bytes of a broken character).
    """

    def __init__(self) -> None:
        self._started = False  # past the place where a blank in front is dropped
        self._bytes = b""  # of a character that is not whole yet

    @abstractmethod
    def _byte(self, token_id: int) -> bytes:
        """The byte that a byte piece such as "<0xF0>" stands for, b"" for another piece."""

    @abstractmethod
    def _text(self, token_id: int) -> str:
        """The text of a piece that is no byte; sets `_started` where text starts with it."""

    def push(self, token_id: int) -> str:
        if byte := self._byte(token_id):
            self._started = True
            self._bytes += byte
            return self._whole_characters()
        return self.flush() + self._text(token_id)

    def flush(self) -> str:
        return self._whole_characters(final=True)

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


class _SentencePieceStream(PieceStream):
    def __init__(self, sp: sentencepiece.SentencePieceProcessor):
        super().__init__()
        self._sp = sp

    def _byte(self, token_id: int) -> bytes:
        if not self._sp.is_byte(token_id):
            return b""
        return bytes.fromhex(self._sp.id_to_piece(token_id)[3:5])  # "<0xF0>"

    def _text(self, token_id: int) -> str:
        if self._started:
            # After another piece, any will do and every model has unk, the blank in front is kept.
            other = self._sp.unk_id()
            return self._sp.decode([other, token_id])[len(self._sp.decode([other])) :]
        # bos and eos have no text, however often they come, and so do not count as a start; a blank
        # alone does where models drop only one.
        self._started = self._sp.decode([token_id, token_id]) != ""
        return self._sp.decode([token_id])
