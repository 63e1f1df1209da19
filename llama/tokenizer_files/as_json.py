"""Meta's two kinds of `tokenizer.model` as Hugging Face's `tokenizer.json`, with the same ids.

`hugging_face.py` reads such files. The `tokenizers` library defines the format, but this module
does not need the library: https://huggingface.co/docs/tokenizers
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from llama.errors import TokenizerError
from llama.tokenizer_files.hugging_face import LLAMA_2_DECODER, LLAMA_3_STEPS
from llama.tokenizer_files.library import BYTE_OF_CHARACTER
from llama.tokenizer_files.meta import SentencePiece, Tiktoken

_CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def as_json(tokenizer: Tiktoken | SentencePiece) -> dict[str, Any]:
    """The content of a `tokenizer.json` with which the `tokenizers` library gives the same ids.

    Raises TokenizerError for a SentencePiece model that no such file can describe.
    """
    if isinstance(tokenizer, Tiktoken):
        return _byte_level(tokenizer)
    return _byte_fallback(tokenizer)


def _file(
    special: dict[str, int], bos_id: int, model: dict[str, Any], **steps: Any
) -> dict[str, Any]:
    names = {i: name for name, i in special.items()}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": names[i], **flags} for i in sorted(names)],
        "normalizer": steps.get("normalizer"),
        "pre_tokenizer": steps.get("pre_tokenizer"),
        "post_processor": _bos_first(names[bos_id], bos_id),
        "decoder": steps["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
        },
    }


def _bos_first(name: str, i: int) -> dict[str, Any]:
    """The step that puts bos before a text, and before each text of a pair."""

    def with_bos(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": name, "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": with_bos("A", 0),
        "pair": with_bos("A", 0) + with_bos("B", 1),
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]}},
    }


def _merges(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{left} {right}" for left, right in pairs]


# ---- Llama 3: byte-level BPE -----------------------------------------------------------------


def _byte_level(tokenizer: Tiktoken) -> dict[str, Any]:
    vocab = {
        "".join(_CHARACTER_OF_BYTE[byte] for byte in sequence): rank
        for sequence, rank in sorted(tokenizer.ranks.items(), key=lambda item: item[1])
    }
    # tiktoken merges any two neighbours that form a token, lowest rank first. So each pair of
    # tokens that forms a third one is a merge, in the order of the ranks.
    pairs = (
        (token[:i], token[i:])
        for token in vocab
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    )
    model = {
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,  # a word that is a token stays whole, as in tiktoken
        "vocab": vocab,
        "merges": _merges(pairs),
    }
    byte_level = {"type": "ByteLevel", "trim_offsets": True}
    split, characters = LLAMA_3_STEPS
    return _file(
        tokenizer.special_tokens,
        tokenizer.bos_id,
        model,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level | characters]},
        decoder=byte_level | {"add_prefix_space": True, "use_regex": True},
    )


# ---- Llama 2: BPE with byte fallback ---------------------------------------------------------

# Types of pieces in sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
_BPE = 2  # a value of TrainerSpec.model_type


def _byte_fallback(tokenizer: SentencePiece) -> dict[str, Any]:
    pieces = _read_pieces(tokenizer.processor.serialized_model_proto(), tokenizer.special_tokens)
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    scores = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    pairs = [
        (piece[:i], piece[i:])
        for piece in scores
        for i in range(1, len(piece))
        if piece[:i] in scores and piece[i:] in scores
    ]
    # SentencePiece merges the pair with the best score first. In Llama 2, all pieces that consist
    # only of blanks have the same score. Among equal scores, the longest left half comes first, and
    # then the longest right half.
    pairs.sort(key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))
    model = {
        "unk_token": tokenizer.processor.id_to_piece(tokenizer.processor.unk_id()),
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": _merges(pairs),
    }
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return _file(
        tokenizer.special_tokens,
        tokenizer.bos_id,
        model,
        # The normalizer puts a blank before a text, and also before each part of a text that
        # follows a special token. `Llama2ChatFormat` gives the same blanks, because it encodes each
        # turn of a dialog on its own.
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, blank],
        },
        decoder={"type": "Sequence", "decoders": LLAMA_2_DECODER},
    )


def _read_pieces(model: bytes, special: dict[str, int]) -> list[tuple[str, float, int]]:
    """The text, score and type of each piece of a SentencePiece model, in the order of their ids.

    special: the special tokens. Their pieces may be of any type.

    Raises TokenizerError unless the model encodes as Llama 2's does: BPE with byte fallback, all
    blanks kept, one blank put before the text, and no other change of it. The field numbers are
    from https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto.
    """
    pieces = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, content in _fields(model):
        if number == 1:
            piece = dict(_fields(content))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((piece[1].decode(), score, piece.get(3, _NORMAL)))
        elif number in specs:
            specs[number] = dict(_fields(content))
    trainer, normalizer = specs[2], specs[3]
    for differs, what in (
        (trainer.get(3, 1) != _BPE, "it is not BPE"),
        (not trainer.get(35), "it has no byte fallback"),
        (trainer.get(24), "it puts blanks after words"),
        (normalizer.get(2), "it changes characters"),
        (not normalizer.get(3, 1), "it puts no blank before a text"),
        (normalizer.get(4, 1), "it removes blanks"),
        (not normalizer.get(5, 1), "it does not write blanks as ▁"),
    ):
        if differs:
            raise TokenizerError(f"not a SentencePiece model of Llama 2's kind: {what}")
    for text, _, kind in pieces:
        if text not in special and kind not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE):
            raise TokenizerError(
                f"not a SentencePiece model of Llama 2's kind: the piece {text!r:.40} is "
                "user-defined or unused"
            )
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The number and content of each field of a protobuf message: a whole number, or bytes.

    The SentencePiece library has written the message, so it is complete and needs no checks.
    Source: https://protobuf.dev/programming-guides/encoding
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        length = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, message[at : at + length]
        at += length
