"""The vocabulary in a GGUF file, as a backend of `Tokenizer`.

A SentencePiece vocabulary becomes a SentencePiece model, and a byte-level one the content of a
`tokenizer.json`, so that each is read as it is from a folder. The keys are those of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections import Counter
from pathlib import Path
from typing import Any

from llama.errors import TokenizerError
from llama.gguf_file import GgufFile, read_gguf, read_value
from llama.tokenizer_files.as_json import bos_first
from llama.tokenizer_files.hugging_face import LLAMA_3_STEPS, ByteFallback, open_content
from llama.tokenizer_files.library import LibraryTokenizer
from llama.tokenizer_files.meta import SentencePiece, Tiktoken
from llama.tokenizer_files.sentencepiece_model import (
    BYTE,
    CONTROL,
    KINDS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    model_of,
)

KEYS = "tokenizer.ggml."
SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"  # values of tokenizer.ggml.model
# How the kinds of byte-level vocabularies split a text into words, by tokenizer.ggml.pre.
_LLAMA_3 = dict(steps=LLAMA_3_STEPS, ignore_merges=True)
WORDS: dict[str, dict[str, Any]] = {
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "smollm": dict(
        steps=(
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ),
        ignore_merges=False,
    ),
}


Backend = Tiktoken | SentencePiece | ByteFallback | LibraryTokenizer


def has_vocabulary(path: Path) -> bool:
    """Whether a GGUF file holds a vocabulary."""
    return read_value(path, f"{KEYS}model", str) not in (None, "no_vocab", "none")


def open_gguf(path: Path) -> Backend:
    """The backend for the vocabulary in a GGUF file.

    Raises TokenizerError if there is none, or if it is damaged or of a kind that is not read.
    """
    file = read_gguf(path)
    model = file.get(f"{KEYS}model", str)
    try:
        tokens = file.get_list(f"{KEYS}tokens", str)
        if not tokens:
            raise TokenizerError("it has no vocabulary")
        token, times = Counter(tokens).most_common(1)[0]
        if times > 1:
            raise TokenizerError(f"it has the token {token!r:.40} {times} times")
        kinds = file.get_list(f"{KEYS}token_type", int) or [NORMAL] * len(tokens)
        scores = file.get_list(f"{KEYS}scores", float) or [0.0] * len(tokens)
        for name, values in (("token_type", kinds), ("scores", scores)):
            if len(values) != len(tokens):
                raise TokenizerError(f"it has {len(values)} {name} for {len(tokens)} tokens")
        if unknown := set(kinds) - set(KINDS):
            raise TokenizerError(f"it has tokens of the unknown type {min(unknown)}")
        backend: Backend
        if model == SENTENCEPIECE:
            backend = _sentencepiece(file, path, list(map(Piece, tokens, scores, kinds)))
        elif model == BYTE_LEVEL:
            backend = _byte_level(file, path, tokens, kinds)
        else:
            raise TokenizerError(
                f"{KEYS}model is {model!r:.40}, not {SENTENCEPIECE} or {BYTE_LEVEL}"
            )
        ends = [_id(file, name, tokens) for name in ("eos", "eot", "eom")]
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error
    stop_tokens = [*backend.stop_tokens, *(i for i in ends if i is not None)]
    backend.stop_tokens = list(dict.fromkeys(stop_tokens))
    return backend


def _id(file: GgufFile, name: str, tokens: list[str]) -> int | None:
    """The id of a special token, None if the file does not name one."""
    i = file.get(f"{KEYS}{name}_token_id", int)
    if i is not None and not 0 <= i < len(tokens):
        raise TokenizerError(f"{KEYS}{name}_token_id is {i}, and it has {len(tokens)} tokens")
    return i


def _required(file: GgufFile, name: str, tokens: list[str]) -> int:
    i = _id(file, name, tokens)
    if i is None:
        raise TokenizerError(f"it lacks {KEYS}{name}_token_id")
    return i


# ---- Llama 2: SentencePiece --------------------------------------------------------------------


def _sentencepiece(file: GgufFile, path: Path, pieces: list[Piece]) -> SentencePiece:
    tokens = [piece.text for piece in pieces]
    bos, eos = (_required(file, name, tokens) for name in ("bos", "eos"))
    unk = _id(file, "unknown", tokens) or 0
    for i, kind in ((bos, CONTROL), (eos, CONTROL), (unk, UNKNOWN)):
        pieces[i] = pieces[i]._replace(kind=kind)
    puts_blank = file.get(f"{KEYS}add_space_prefix", bool) is not False
    added = {p.text: i for i, p in enumerate(pieces) if p.kind in (CONTROL, USER_DEFINED, UNUSED)}
    in_text = [p.text for p in pieces if p.kind == USER_DEFINED]
    return SentencePiece(path, model_of(pieces, bos, eos, unk, puts_blank), added, in_text)


# ---- byte-level BPE ----------------------------------------------------------------------------


def _byte_level(
    file: GgufFile, path: Path, tokens: list[str], kinds: list[int]
) -> Tiktoken | ByteFallback | LibraryTokenizer:
    pre = file.get(f"{KEYS}pre", str)
    if pre not in WORDS:
        raise TokenizerError(
            f"{KEYS}pre is {pre!r:.40}: of the ways to split a text, {', '.join(WORDS)} are known"
        )
    bos, eos = (_required(file, name, tokens) for name in ("bos", "eos"))
    for i in (bos, eos):
        kinds[i] = CONTROL
    merges = file.get_list(f"{KEYS}merges", str)
    if not merges:
        raise TokenizerError(f"it lacks {KEYS}merges")
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    added = {token: i for i, token in enumerate(tokens) if kinds[i] not in (NORMAL, BYTE)}
    content: dict[str, Any] = {
        "added_tokens": [
            {"id": i, "content": token, "special": kinds[i] != USER_DEFINED, **flags}
            for token, i in added.items()
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"trim_offsets": True} | step for step in WORDS[pre]["steps"]],
        },
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "ignore_merges": WORDS[pre]["ignore_merges"],
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    if file.get(f"{KEYS}add_bos_token", bool) is not False:
        content["post_processor"] = bos_first(tokens[bos], bos)
    # Files of instruct models name the end of a turn as eos.
    end = "<|end_of_text|>" if "<|end_of_text|>" in added else tokens[eos]
    return open_content(path, content, tokens[bos], end)
