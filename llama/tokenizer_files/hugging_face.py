"""Hugging Face's `tokenizer.json` for the vocabularies of Llama 3 and of Llama 2.

Llama 3's is byte-level BPE. It is converted to tiktoken's ranks, which give the same merges. Llama
2's is BPE with byte fallback, where "▁" stands for a blank. The `tokenizers` library (extra `[hf]`)
encodes text with it. For any other kind the library does everything; see `library.py`.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llama.errors import ConfigError, TokenizerError
from llama.files import parse_json, read_json
from llama.tokenizer_files.library import (
    BYTE_OF_CHARACTER,
    BYTE_PIECE,
    LibraryTokenizer,
    open_library_tokenizer,
)
from llama.tokenizer_files.meta import WORD_PATTERN, PieceStream, Tiktoken, encode_around


class _Content(NamedTuple):
    """The checked content of a file."""

    file: dict[str, Any]
    model: dict[str, Any]
    vocab: dict[str, int]  # without the added tokens
    merges: list[tuple[str, str]]
    special: dict[str, int]  # the added tokens, in the order of their ids
    always_allowed: set[str]  # the added tokens that are recognized in plain text too
    bos: str
    eos: str


class _OtherKind(Exception):
    """The file is of neither of Llama's two kinds, or this module's backend would not give the ids
    that the `tokenizers` library gives."""


def open_json(path: Path, data: bytes) -> "Tiktoken | ByteFallback | LibraryTokenizer":
    """The backend for a `tokenizer.json` with this content.

    bos and eos have Llama's names, or else those in the `tokenizer_config.json` beside the file.
    Raises TokenizerError for a file that is damaged.
    """
    try:
        return open_content(path, _parse(data))
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def open_content(
    path: Path, file: dict[str, Any], bos: str | None = None, eos: str | None = None
) -> "Tiktoken | ByteFallback | LibraryTokenizer":
    """The backend for a parsed file. bos, eos: their names, where the caller knows them."""
    try:
        _check_kind(file)
        content = _read(path, file, bos, eos)
        if content.model.get("byte_fallback"):
            return ByteFallback(content)
        return _tiktoken(content)
    except _OtherKind:
        return LibraryTokenizer(path, file, eos)


# ---- the file --------------------------------------------------------------------------------


def _parse(data: bytes) -> dict[str, Any]:
    try:
        file = parse_json(data)
    except ValueError as error:
        raise TokenizerError(f"not whole JSON: {error}") from error
    model = file.get("model")
    if not isinstance(model, dict):
        raise TokenizerError("a tokenizer.json needs a model, and this has none")
    if model.get("dropout"):
        raise TokenizerError("the merges have dropout: the ids of a text would be random")
    return file


def _check_kind(file: dict[str, Any]) -> None:
    """Raise _OtherKind unless the steps of encoding and decoding are Llama 3's or Llama 2's."""
    model = file["model"]
    has_affix = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type", "BPE") != "BPE" or has_affix:
        raise _OtherKind
    if model.get("byte_fallback"):
        if _steps(file, "decoder", "decoders") not in (LLAMA_2_DECODER, LLAMA_2_DECODER[:-1]):
            raise _OtherKind
        return
    if not splits_by(file, LLAMA_3_STEPS):
        raise _OtherKind


def splits_by(file: dict[str, Any], wanted: Sequence[dict[str, Any]]) -> bool:
    """Whether a file splits a text into words by these steps, and changes no character before."""
    steps = _steps(file, "pre_tokenizer", "pretokenizers")
    is_same = len(steps) == len(wanted) and all(map(_has_entries, steps, wanted))
    return is_same and file.get("normalizer") is None


def _read(path: Path, file: dict[str, Any], bos: str | None, eos: str | None) -> _Content:
    model = file["model"]
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise TokenizerError("the model has no vocab")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise TokenizerError("the model has no list of merges")
    added = file.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise TokenizerError("added_tokens is not a list of objects")
    _check_ids([*vocab.items(), *((token.get("content"), token.get("id")) for token in added)])
    special = {token["content"]: token["id"] for token in sorted(added, key=lambda t: t["id"])}
    always_allowed = [token for token in added if not token.get("special")]
    for token in always_allowed:
        if any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
            raise _OtherKind
    return _Content(
        file,
        model,
        {token: i for token, i in vocab.items() if token not in special},
        [_pair(merge) for merge in merges],
        special,
        {token["content"] for token in always_allowed},
        bos or _bos_or_eos(path, special, "bos", ("<|begin_of_text|>", "<s>")),
        eos or _bos_or_eos(path, special, "eos", ("<|end_of_text|>", "</s>")),
    )


def _check_ids(tokens: list[tuple[Any, Any]]) -> None:
    """Raise TokenizerError unless n names have the ids 0 to n - 1, each name one id."""
    ids: dict[str, int] = {}
    names: dict[int, str] = {}
    for name, i in tokens:
        if not isinstance(name, str) or not name or type(i) is not int:
            raise TokenizerError(f"{name!r:.40} with id {i!r:.40} is no token")
        if ids.setdefault(name, i) != i:
            raise TokenizerError(f"the token {name!r:.40} has two ids, {ids[name]} and {i}")
        if names.setdefault(i, name) != name:
            raise TokenizerError(f"the id {i} has two tokens, {names[i]!r:.40} and {name!r:.40}")
    try:
        "".join(ids).encode()
    except UnicodeEncodeError:
        raise TokenizerError("a token contains a lone surrogate, which is no valid text") from None
    if missing := set(range(len(names))) - names.keys():
        raise TokenizerError(
            f"{len(names)} tokens must have the ids 0 to {len(names) - 1}, "
            f"but none has {min(missing)}"
        )


def _steps(file: dict[str, Any], section: str, key: str) -> list[Any]:
    """The list under `key` in a section of the file, or [] if there is none."""
    content = file.get(section)
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, list) else []


def _has_entries(step: Any, wanted: dict[str, Any]) -> bool:
    """Whether a step has these entries. It may have others too."""
    return isinstance(step, dict) and {key: step.get(key) for key in wanted} == wanted


def _pair(merge: Any) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge  # "a b" in older files
    if not isinstance(parts, list) or [type(part) for part in parts] != [str, str]:
        raise TokenizerError(f"the merge {merge!r:.40} is not of two tokens")
    return parts[0], parts[1]


def _bos_or_eos(path: Path, special: dict[str, int], which: str, known: tuple[str, ...]) -> str:
    """The name of the bos or eos token: a known name, or else the name in tokenizer_config.json."""
    if name := next((name for name in known if name in special), None):
        return name
    try:
        token = read_json(path.with_name("tokenizer_config.json")).get(f"{which}_token")
    except ConfigError as error:
        raise TokenizerError(f"no {which} token such as {known[0]}: {error}") from error
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or token not in special:
        raise TokenizerError(f"no {which} token: neither {known[0]} nor {token!r:.40} is there")
    return token


# ---- Llama 3: byte-level BPE -----------------------------------------------------------------


LLAMA_3_STEPS = (
    {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
)
# Characters, twice the length of Llama 3's longest token. It limits the time of `_check_merges`.
_MAX_TOKEN_LENGTH = 256


def _tiktoken(content: _Content) -> Tiktoken:
    """Convert to tiktoken. Raises _OtherKind if tiktoken's ids could differ from the library's."""
    try:
        ranks = {
            bytes(BYTE_OF_CHARACTER[character] for character in token): i
            for token, i in content.vocab.items()
        }
    except KeyError as error:
        raise TokenizerError(f"the character {error} stands for no byte") from None
    if lacking := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"no token for the single byte 0x{lacking[0]:02X}")
    if any(len(token) > _MAX_TOKEN_LENGTH for token in content.vocab):
        raise _OtherKind
    _check_merges(content.vocab, content.merges)
    for name, other in pairwise(sorted(content.special)):
        if other.startswith(name):  # tiktoken does not look for the longer one first
            raise _OtherKind
    return Tiktoken(ranks, content.special, content.bos, content.eos, content.always_allowed)


def _check_merges(vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Raise _OtherKind unless tiktoken, which sees only the ids, would make the same merges.

    tiktoken merges any two neighbours that form a token, lowest id first. So the merges must be in
    the order of the ids, and include every pair that tiktoken can meet. Converted vocabularies list
    all pairs. Trained ones list one pair per token. That is enough if, for each token, merging its
    characters into all possible tokens of lower ids leaves exactly the listed pair.
    """
    previous = 0
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(f"the merge {left!r:.40} {right!r:.40} is not in the vocab")
        if vocab[left + right] < previous:
            raise _OtherKind
        previous = vocab[left + right]
    known = set(merges)
    for token, rank in vocab.items():
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        is_trained = any(a in vocab and b in vocab and (a, b) not in known for a, b in pairs)
        if is_trained and tuple(_merge_below(token, vocab, rank)) not in known:
            raise _OtherKind


def _merge_below(token: str, vocab: dict[str, int], end: int) -> list[str]:
    """The token's characters after all merges to ids below `end`."""
    parts = list(token)
    while True:
        ranks = [vocab.get(a + b, end) for a, b in pairwise(parts)]
        lowest = min(ranks, default=end)
        if lowest >= end:
            return parts
        at = ranks.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


# ---- Llama 2: BPE with byte fallback ---------------------------------------------------------

# The last step drops the blank that the encoder puts before each text.
LLAMA_2_DECODER = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


class ByteFallback:
    """Encodes with the `tokenizers` library. Decodes by SentencePiece's rules, as for a
    `tokenizer.model`."""

    is_llama_2 = True

    def __init__(self, content: _Content):
        self.file = content.file
        self._bpe = open_library_tokenizer(content.file)
        for name, i in content.special.items():
            if self._bpe.token_to_id(name) != i:  # the library renumbers unordered added tokens
                raise TokenizerError(f"the added token {name!r:.40} cannot have the id {i}")
        # Without the last step the decoder keeps the leading blank of a text.
        self._drops_blank = _steps(content.file, "decoder", "decoders") == LLAMA_2_DECODER
        self._pieces = _pieces(content)
        self.special_tokens = content.special
        self.n_words = len(self._pieces)
        self.bos_id = content.special[content.bos]
        self.eos_id = content.special[content.eos]
        self.stop_tokens = [self.eos_id]

    def encode(self, text: str, allowed: set[str]) -> list[int]:
        return encode_around(text, allowed, self.special_tokens, self._encode)

    def _encode(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._pieces[token_id]
        return piece if isinstance(piece, bytes) else piece.encode()

    def stream(self, is_continued: bool = False) -> "_ByteFallbackStream":
        return _ByteFallbackStream(self._pieces, self._drops_blank, is_continued)


class _ByteFallbackStream(PieceStream):
    def __init__(self, pieces: list[str | bytes], drops_blank: bool, is_continued: bool):
        super().__init__(is_continued)
        self._pieces = pieces
        self._drops_blank = drops_blank

    def _byte(self, token_id: int) -> bytes:
        piece = self._pieces[token_id]
        return piece if isinstance(piece, bytes) else b""

    def _text(self, token_id: int) -> str:
        text = self._pieces[token_id]
        assert isinstance(text, str)
        if text and not self._started:
            self._started = True
            return text.removeprefix(" ") if self._drops_blank else text
        return text


def _pieces(content: _Content) -> list[str | bytes]:
    """What each id decodes to: text, a byte, or "" for a special token."""
    tokens = {i: token for token, i in (content.vocab | content.special).items()}
    without_text = content.special.keys() - content.always_allowed
    pieces: list[str | bytes] = []
    for _, token in sorted(tokens.items()):
        if byte := BYTE_PIECE.fullmatch(token):
            pieces.append(bytes.fromhex(byte[1]))
        else:
            pieces.append("" if token in without_text else token.replace("▁", " "))
    if lacking := [byte for byte in range(256) if bytes([byte]) not in pieces]:
        raise TokenizerError(f"no token for the single byte 0x{lacking[0]:02X}")
    return pieces
