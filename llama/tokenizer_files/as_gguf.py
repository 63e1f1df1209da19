"""A vocabulary as the keys of a GGUF file, with the same ids; `from_gguf.py` reads them.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp merges
the pieces of a SentencePiece vocabulary by their scores, and tokens of bytes by a list of merges.
"""

from typing import Any

from llama.errors import TokenizerError
from llama.tokenizer_files.as_json import as_json
from llama.tokenizer_files.from_gguf import BYTE_LEVEL, KEYS, SENTENCEPIECE, WORDS, Backend
from llama.tokenizer_files.hugging_face import ByteFallback, splits_by
from llama.tokenizer_files.library import NO_TOKEN
from llama.tokenizer_files.meta import SentencePiece, Tiktoken
from llama.tokenizer_files.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    read_pieces,
)

LAST = -1e6  # the score of a piece that no merge makes, below that of every other piece


def as_gguf(backend: Backend, size: int) -> dict[str, Any]:
    """The keys of a vocabulary, filled with unused tokens to `size` tokens.

    Raises TokenizerError for a vocabulary of a kind that GGUF files of Llamas do not have.
    """
    if isinstance(backend, SentencePiece):
        model = backend.processor.serialized_model_proto()
        keys = _sentencepiece(read_pieces(model, backend.special_tokens), size)
    elif isinstance(backend, ByteFallback):
        keys = _sentencepiece(_scored(backend.file), size)
    else:
        file = as_json(backend) if isinstance(backend, Tiktoken) else backend.file
        keys = _byte_level(file, size)
    keys[f"{KEYS}add_bos_token"] = backend.bos_id != NO_TOKEN
    keys[f"{KEYS}add_eos_token"] = False
    ids = {"bos": backend.bos_id, "eos": backend.eos_id} | _ends(backend)
    return keys | {f"{KEYS}{name}_token_id": i for name, i in ids.items() if i != NO_TOKEN}


def _ends(backend: Backend) -> dict[str, int]:
    """The ids that end a message, and that end a turn."""
    message = backend.special_tokens.get("<|eom_id|>", NO_TOKEN)
    others = [i for i in backend.stop_tokens if i not in (backend.eos_id, message)]
    return {"eom": message, "eot": others[0] if others else NO_TOKEN}


def _sentencepiece(pieces: list[Piece], size: int) -> dict[str, Any]:
    pieces = pieces + [Piece(f"[PAD{i}]", LAST, UNUSED) for i in range(len(pieces), size)]
    texts, scores, kinds = map(list, zip(*pieces, strict=True))
    return {
        f"{KEYS}model": SENTENCEPIECE,
        f"{KEYS}pre": "default",
        f"{KEYS}tokens": texts,
        f"{KEYS}scores": scores,
        f"{KEYS}token_type": kinds,
        f"{KEYS}unknown_token_id": kinds.index(UNKNOWN),
        f"{KEYS}add_space_prefix": True,
    }


def _scored(file: dict[str, Any]) -> list[Piece]:
    """The pieces of a `tokenizer.json` of Llama 2's kind.

    Its merges are in the order of the scores. So the score of a piece is the negative number of the
    first merge that makes it."""
    model = file["model"]
    scores: dict[str, float] = {}
    for number, merge in enumerate(model["merges"]):
        piece = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        scores.setdefault(piece, -float(number))
    kinds = dict.fromkeys(model["vocab"], NORMAL)
    kinds |= {token["content"]: _kind(token) for token in file["added_tokens"]}
    kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    kinds[model.get("unk_token") or "<unk>"] = UNKNOWN
    ids = model["vocab"] | {token["content"]: token["id"] for token in file["added_tokens"]}
    texts = sorted(ids, key=lambda text: ids[text])
    return [Piece(text, scores.get(text, LAST), kinds[text]) for text in texts]


def _byte_level(file: dict[str, Any], size: int) -> dict[str, Any]:
    words, model = _words(file), file["model"]
    ids = model["vocab"] | {token["content"]: token["id"] for token in file["added_tokens"]}
    kinds = dict.fromkeys(model["vocab"], NORMAL)
    kinds |= {token["content"]: _kind(token) for token in file["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    padding = [f"[PAD{i}]" for i in range(len(tokens), size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        raise TokenizerError("no two of its tokens make a third, and a GGUF file needs merges")
    return {
        f"{KEYS}model": BYTE_LEVEL,
        f"{KEYS}pre": words,
        f"{KEYS}tokens": tokens + padding,
        f"{KEYS}token_type": [kinds[token] for token in tokens] + [UNUSED] * len(padding),
        f"{KEYS}merges": merges,
    }


def _words(file: dict[str, Any]) -> str:
    """The value of tokenizer.ggml.pre for the steps that split a text into words."""
    is_bpe = file["model"].get("type", "BPE") == "BPE"
    for name, words in WORDS.items():
        is_merged_so = bool(file["model"].get("ignore_merges")) == words["ignore_merges"]
        if is_bpe and is_merged_so and splits_by(file, words["steps"]):
            return name
    raise TokenizerError("a GGUF file of a Llama has no vocabulary of this kind")


def _kind(added: dict[str, Any]) -> int:
    return CONTROL if added.get("special") else USER_DEFINED
