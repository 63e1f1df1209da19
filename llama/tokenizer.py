"""Text to token ids and back: one `Tokenizer` for every file format.

Meta ships two kinds of `tokenizer.model`. Hugging Face's folders hold the same vocabularies as
`tokenizer.json`, and GGUF files hold them in their header. Each format has a backend in
`tokenizer_files/`. All backends have the same attributes and methods.
"""

import codecs
import zlib
from collections.abc import Collection, Sequence
from operator import index
from pathlib import Path
from typing import Any, Literal

import sentencepiece
import tiktoken

from llama.chat_format import ChatFormat, Dialog, Llama2ChatFormat, Message, Role
from llama.chat_forms import AnyFormat, make_format
from llama.errors import DialogError, TokenizerError
from llama.files import read_json, why_unreadable
from llama.gguf_reader import MAGIC
from llama.tokenizer_files.as_gguf import as_gguf
from llama.tokenizer_files.as_json import as_json
from llama.tokenizer_files.chat_templates import ChatForm
from llama.tokenizer_files.from_gguf import open_gguf
from llama.tokenizer_files.hugging_face import ByteFallback, open_json
from llama.tokenizer_files.library import NO_TOKEN, LibraryTokenizer
from llama.tokenizer_files.meta import (
    WORD_PATTERN,
    SentencePiece,
    Tiktoken,
    ranks_file,
    read_tiktoken,
)

__all__ = ["ChatFormat", "Dialog", "Message", "Role", "TextDecoder", "Tokenizer"]


class Tokenizer:
    """The tokenizer of a Llama model, from a file of any of the formats.

    Args:
        model_path: a `tokenizer.model`, a `tokenizer.json` or a GGUF file. The format is found from
            the content, not from the name. A `tokenizer.json` of another kind than Llama 3's needs
            the extra `[hf]`, a GGUF file the extra `[gguf]`.

    Attributes:
        n_words: size of the vocabulary, special tokens included; ids are 0 to n_words - 1.
        bos_id, eos_id: the ids that begin and end a text; -1 if there is no such token, which is
            possible only for a vocabulary of another kind than Llama's.
        form: the chat form of the folder's chat template; None: the chat form that belongs to the
            kind of the vocabulary.
        pad_id: always -1, which is no token. Meta's code pads with it and masks it out.
        stop_tokens: ids that end a generation; may be assigned.
        special_tokens: id of each special token by its name.

    Raises:
        TokenizerError: the file cannot be read or is no tokenizer of these formats.
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
        self.form: ChatForm | None = None

    # ---- attributes of Meta's tokenizer class -------------------------------------------------

    num_reserved_special_tokens = 256
    pat_str = WORD_PATTERN

    @property
    def model(self) -> tiktoken.Encoding:
        """The tiktoken encoding of a Llama 3 vocabulary. AttributeError for another kind."""
        if not isinstance(self._backend, Tiktoken):
            raise AttributeError(f"{self.model_path} is no Llama 3 vocabulary: it has no `model`")
        return self._backend.encoding

    @property
    def sp_model(self) -> sentencepiece.SentencePieceProcessor:
        """The SentencePiece processor of a Llama 2 vocabulary. AttributeError for another kind."""
        if not isinstance(self._backend, SentencePiece):
            raise AttributeError(f"{self.model_path} is no SentencePiece model: no `sp_model`")
        return self._backend.processor

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

        A lone surrogate, which UTF-8 cannot represent, is encoded as U+FFFD, as in tiktoken.

        Args:
            s: any text. By default all of it is plain text, the names of special tokens included.
            bos, eos: put `bos_id` in front, `eos_id` at the end. None: False.
            allowed_special: names that become special tokens where they occur in `s`; "all": every
                name. With a Llama 2 vocabulary, the parts of the text between these names are
                encoded separately.
            disallowed_special: names that must not occur in `s`; "all": every name that is not
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
        if bos and self.bos_id != NO_TOKEN:
            ids.insert(0, self.bos_id)
        if eos and self.eos_id != NO_TOKEN:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Llama 3's special tokens decode to their names, Llama 2's bos and eos to nothing.

        Raises:
            TokenizerError: an id is negative or not below `n_words`.
        """
        ids = [index(i) for i in ids]  # a tensor row is accepted too
        self._check(ids)
        return self._backend.decode(ids)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each id completes. Joined, the texts are `decode(ids)`.

        Raises:
            TokenizerError: an id is negative or not below `n_words`.
        """
        decoder = TextDecoder(self)
        texts = [decoder.push(token_id) for token_id in ids]
        if texts:
            texts[-1] += decoder.flush()
        return texts

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of the text of one token, which may be part of a character. A SentencePiece
        token keeps its blank.

        Raises:
            TokenizerError: token_id is negative or not below `n_words`.
        """
        self._check([token_id])
        return self._backend.token_bytes(token_id)

    @property
    def is_llama_2(self) -> bool:
        """Whether the vocabulary is of Llama 2's kind (SentencePiece), not of Llama 3's."""
        return self._backend.is_llama_2

    def is_like(self, other: "Tokenizer") -> bool:
        """Whether the other tokenizer has as many words, and the same ids for a sample text."""
        sample = 'A king\'s 3 sons said: "Добрый день, 你好!"\n'
        own, others = (each.encode(sample, bos=True, eos=True) for each in (self, other))
        return self.n_words == other.n_words and own == others

    def fingerprint(self) -> int:
        """A checksum (CRC-32, never 0) of the bytes of all tokens in the order of their ids."""
        checksum = 0
        for token_id in range(self.n_words):
            token = self.token_bytes(token_id)
            checksum = zlib.crc32(b"%d:%b" % (len(token), token), checksum)
        return checksum or 1

    @property
    def kind(self) -> str:
        """The kind of the vocabulary, for messages."""
        if isinstance(self._backend, LibraryTokenizer):
            return "a kind of its own"
        return "Llama 2's kind" if self.is_llama_2 else "Llama 3's kind"

    @property
    def start_id(self) -> int:
        """The id that is put before a text to be scored: bos, or eos if there is no bos."""
        return self.eos_id if self.bos_id == NO_TOKEN else self.bos_id

    def chat_format(self) -> AnyFormat:
        """Return the chat format that `form` names. If `form` is None, return the chat format on
        which models with this kind of tokenizer were trained.

        Raises:
            DialogError: no chat format is known, or the vocabulary lacks one of its markers.
        """
        if self.form is not None:
            return make_format(self.form.name, self, self.form.default_system)
        if isinstance(self._backend, LibraryTokenizer):
            raise DialogError(
                f"{self.model_path}: no chat form is known for this vocabulary: name one with the "
                "option format, or use text completion instead of chat"
            )
        return Llama2ChatFormat(self) if self.is_llama_2 else ChatFormat(self)

    def as_json(self) -> dict[str, Any]:
        """Return the content of a `tokenizer.json` with the same ids, for Hugging Face's libraries.

        Raises:
            TokenizerError: a SentencePiece model that is not of Llama 2's kind.
        """
        try:
            if isinstance(self._backend, Tiktoken | SentencePiece):
                return as_json(self._backend)
            if isinstance(self._backend, LibraryTokenizer):
                return self._backend.file
            return read_json(self.model_path)
        except TokenizerError as error:
            raise TokenizerError(f"{self.model_path}: {error}") from error

    def as_gguf(self, size: int) -> dict[str, Any]:
        """Return the keys of a GGUF file with the same ids, filled with unused tokens to `size`.

        Raises:
            TokenizerError: a GGUF file of a Llama has no vocabulary of this kind.
        """
        try:
            return as_gguf(self._backend, size)
        except TokenizerError as error:
            raise TokenizerError(f"{self.model_path}: {error}") from error

    def as_model(self) -> bytes:
        """Return the content of a `tokenizer.model` with the same ids and names.

        Raises:
            TokenizerError: neither of Meta's formats can represent this vocabulary.
        """
        try:
            if isinstance(self._backend, SentencePiece):
                self._backend.check_is_metas()
                return self._backend.processor.serialized_model_proto()
            if not isinstance(self._backend, Tiktoken):
                raise TokenizerError("its vocabulary is not of Llama 3's kind")
            self._backend.check_is_metas()
        except TokenizerError as error:
            raise TokenizerError(f"{self.model_path} is no tokenizer.model: {error}") from error
        return ranks_file(self._backend.ranks)

    def _check(self, ids: list[int]) -> None:
        # tiktoken may answer a bad id with a Rust panic, which `except Exception` does not catch.
        if ids and not 0 <= min(ids) <= max(ids) < self.n_words:
            bad = next(i for i in ids if not 0 <= i < self.n_words)
            raise TokenizerError(
                f"token id {bad} is out of range: this tokenizer has {self.n_words} words"
            )


class TextDecoder:
    """Decodes ids one at a time into whole characters, for text that is shown while generated.

    Joined, the results of all `push` calls and of `flush` equal `tokenizer.decode` of all the ids.
    The cost of one id does not depend on the number of ids before it. Use a new decoder for each
    text.

    is_continued: the ids continue a text, and the results can be appended to it. A SentencePiece
    tokenizer then keeps the space before the first word, which `tokenizer.decode` drops.
    """

    def __init__(self, tokenizer: Tokenizer, is_continued: bool = False):
        self._check = tokenizer._check
        self._stream = tokenizer._backend.stream(is_continued)

    def push(self, token_id: int) -> str:
        """Return the text this id completes: "" while a character still lacks bytes.

        Raises:
            TokenizerError: the id is negative or not below the tokenizer's `n_words`.
        """
        self._check([token_id])
        return self._stream.push(token_id)

    def flush(self) -> str:
        """Return the rest of the text at the end: U+FFFD for an incomplete character."""
        return self._stream.flush()


def _open(path: Path) -> Tiktoken | SentencePiece | ByteFallback | LibraryTokenizer:
    if reason := why_unreadable(path):
        raise TokenizerError(f"{path}: cannot read the tokenizer: {reason}")
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return open_gguf(path)
        data = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
    if not data:
        raise TokenizerError(f"{path}: the tokenizer file is empty")
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        return open_json(path, data)
    # A SentencePiece model is a protobuf message. It starts with 0x0A, the tag of its first field.
    # 0x0A is a newline, with which a tiktoken file does not start.
    if data[0] == 0x0A:
        return SentencePiece(path, data)
    if data.split(b"\n", 1)[0].decode("latin-1").rstrip("\r").isprintable():
        return read_tiktoken(path, data)
    raise TokenizerError(f"{path}: neither a SentencePiece model nor a list of tiktoken ranks")
