"""The two kinds of `tokenizer.model` that Meta ships, as backends of `Tokenizer`.

Llama 2 comes with a SentencePiece model, Llama 3 with a list of byte sequences and their ranks for
tiktoken. A backend has the attributes of `Tokenizer` and the methods `encode`, `decode` and
`stream`.
"""

import base64
import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import sentencepiece
import tiktoken

from llama.errors import TokenizerError

# ---- Llama 3: tiktoken ---------------------------------------------------------------------------

# Meta's pattern that splits text into words. The bytes of each word are then merged by rank.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The published names of Llama 3.1 in the order of their ids. The first id follows the last rank. In
# Llama 3.0 the names at the indices 4, 8 and 10 were still reserved tokens. Both versions have the
# same file of ranks.
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
    """Byte-pair encoding by rank. Names in `always_allowed` are special tokens in any text."""

    is_llama_2 = False

    def __init__(
        self,
        ranks: dict[bytes, int],
        special: dict[str, int],
        bos: str = "<|begin_of_text|>",
        eos: str = "<|end_of_text|>",
        always_allowed: Collection[str] = (),
    ):
        self.encoding = tiktoken.Encoding(
            name="Llama 3", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self.always_allowed = set(always_allowed)
        self.ranks = ranks
        self.special_tokens = special
        self.n_words = len(ranks) + len(special)
        self.bos_id = special[bos]
        self.eos_id = special[eos]
        # Llama 3.0 has no <|eom_id|>, and other vocabularies may have neither.
        turn_ends = [special[name] for name in ("<|eom_id|>", "<|eot_id|>") if name in special]
        self.stop_tokens = [self.eos_id, *turn_ends]

    def encode(self, text: str, allowed: set[str]) -> list[int]:
        allowed = allowed | self.always_allowed
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self.encoding.encode(piece, allowed_special=allowed, disallowed_special=())
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token_id)

    def stream(self, is_continued: bool = False) -> "_TiktokenStream":
        return _TiktokenStream(self.encoding)

    def check_is_metas(self) -> None:
        """Raise TokenizerError if a file of ranks cannot represent this tokenizer. Such a file does
        not hold the names of special tokens, so they must be Meta's names."""
        if self.always_allowed:
            raise TokenizerError(f"its added token {min(self.always_allowed)!r:.40} is not special")
        metas = {i: name for name, i in _special_tokens(len(self.ranks)).items()}
        own = {i: name for name, i in self.special_tokens.items()}
        if own.keys() != metas.keys():
            raise TokenizerError(f"its special tokens are not the {len(metas)} ids after the ranks")
        for i, name in own.items():
            # Some names of Llama 3.1 were reserved in Llama 3.0.
            if name != metas[i] and not name.startswith("<|reserved_special_token_"):
                raise TokenizerError(f"its token {i} is {name!r:.40}, not {metas[i]}")


class _TiktokenStream:
    def __init__(self, bpe: tiktoken.Encoding):
        self.encoding = bpe
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self.encoding.decode_single_token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


# Meta's limits for one call of tiktoken: the length of the text, and of a run of blanks or of
# non-blanks. They are kept because the places where a text is cut change its ids.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` every 400,000 characters, and each run of blanks or non-blanks every 25,000."""
    for start in range(0, len(text), _MAX_CHARS):
        block = text[start : start + _MAX_CHARS]
        cut = 0
        for run in _RUN.finditer(block):
            for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield block[cut:end]
                cut = end
        yield block[cut:]


def read_tiktoken(path: Path, data: bytes) -> Tiktoken:
    """Read lines of "base64 rank". Raises TokenizerError if a rank or byte is missing."""
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
    return Tiktoken(ranks, _special_tokens(len(ranks)))


def ranks_file(ranks: dict[bytes, int]) -> bytes:
    """The lines that `read_tiktoken` reads, in the order of the ranks."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def _special_tokens(first_id: int) -> dict[str, int]:
    return {name: first_id + i for i, name in enumerate(_SPECIAL_TOKENS)}


# ---- Llama 2: SentencePiece ----------------------------------------------------------------------


# Code Llama's marks of prefix, middle, suffix and end. "▁" is SentencePiece's blank.
INFILLING_TOKENS = ("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>")


class SentencePiece:
    """A SentencePiece model. added: more special tokens. always_allowed: those of them that are
    special tokens in any text."""

    is_llama_2 = True

    def __init__(
        self,
        path: Path,
        data: bytes,
        added: Mapping[str, int] = MappingProxyType({}),
        always_allowed: Collection[str] = (),
    ):
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.n_words = self.processor.vocab_size()
            self.processor.id_to_piece(list(range(self.n_words)))
        except (RuntimeError, UnicodeDecodeError):  # a piece, or the error's text, is not UTF-8
            raise TokenizerError(f"{path}: not a whole SentencePiece model") from None
        self.bos_id = self.processor.bos_id()
        self.eos_id = self.processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise TokenizerError(f"{path}: the SentencePiece model lacks a bos or eos token")
        special_ids = (self.bos_id, self.eos_id, self.processor.unk_id())
        self.special_tokens = {self.processor.id_to_piece(i): i for i in special_ids}
        infilling = {name: self.processor.piece_to_id(name) for name in INFILLING_TOKENS}
        self.special_tokens |= {
            name: i for name, i in infilling.items() if i != self.processor.unk_id()
        }
        self._added = added.keys() - self.special_tokens.keys()
        self.special_tokens |= added
        self.always_allowed = set(always_allowed)
        self.stop_tokens = [self.eos_id]

    def encode(self, text: str, allowed: set[str]) -> list[int]:
        # SentencePiece itself never encodes text as a special token.
        allowed = allowed | self.always_allowed
        return encode_around(text, allowed, self.special_tokens, self.processor.encode)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def token_bytes(self, token_id: int) -> bytes:
        piece = self.processor.id_to_piece(token_id)
        if self.processor.is_byte(token_id):
            return bytes.fromhex(piece[3:5])  # "<0xF0>"
        return piece.replace("▁", " ").encode()

    def check_is_metas(self) -> None:
        """Raise TokenizerError if the model alone does not say which tokens are special."""
        if self._added:
            raise TokenizerError(f"it has the added token {min(self._added)!r:.40}")

    def stream(self, is_continued: bool = False) -> "_SentencePieceStream":
        return _SentencePieceStream(self.processor, is_continued)


def encode_around(
    text: str, allowed: set[str], special: dict[str, int], encode: Callable[[str], list[int]]
) -> list[int]:
    """Cut the text around the `allowed` names and `encode` each part between them on its own. If
    one name begins with another, the longer one is looked for first."""
    # The libraries refuse lone surrogates. So these are replaced, as tiktoken replaces them.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    names = sorted(allowed, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids: list[int] = []
    for part in parts:
        ids += [special[part]] if part in allowed else encode(part)
    return ids


class PieceStream(ABC):
    """Decode one id at a time, with the same result as SentencePiece's decoding of a whole list.

    Two of its rules depend on several pieces. The first text loses its leading blank. Consecutive
    byte pieces are decoded together: each byte that is not part of a valid character becomes one
    U+FFFD (Python writes one for all the bytes of a broken character).
    """

    def __init__(self, is_continued: bool = False) -> None:
        self._started = is_continued  # True: a leading blank is kept
        self._bytes = b""  # of an incomplete character

    @abstractmethod
    def _byte(self, token_id: int) -> bytes:
        """The byte that a byte piece such as "<0xF0>" stands for, b"" for another piece."""

    @abstractmethod
    def _text(self, token_id: int) -> str:
        """The text of a piece that is not a byte piece. Sets `_started` at the first text."""

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
    def __init__(self, sp: sentencepiece.SentencePieceProcessor, is_continued: bool):
        super().__init__(is_continued)
        self._sp = sp

    def _byte(self, token_id: int) -> bytes:
        if not self._sp.is_byte(token_id):
            return b""
        return bytes.fromhex(self._sp.id_to_piece(token_id)[3:5])  # "<0xF0>"

    def _text(self, token_id: int) -> str:
        if self._started:
            # SentencePiece keeps a leading blank only after another piece. So the piece is decoded
            # after unk, which every model has, and unk's text is cut off.
            other = self._sp.unk_id()
            return self._sp.decode([other, token_id])[len(self._sp.decode([other])) :]
        # All pieces but bos and eos start the text, even a blank. A single blank may decode to "",
        # as a bos does. So the piece is decoded twice in a row: two blanks give text, but two
        # bos still give "".
        self._started = self._sp.decode([token_id, token_id]) != ""
        return self._sp.decode([token_id])
