"""Meta's two kinds of `tokenizer.model` as Hugging Face's `tokenizer.json`, with the same ids.

`hugging_face.py` reads such files. The `tokenizers` library defines the format, but this module
does not need the library: https://huggingface.co/docs/tokenizers
"""

from collections.abc import Collection, Iterable
from typing import Any

from llama.tokenizer_files.hugging_face import LLAMA_2_DECODER, LLAMA_3_STEPS
from llama.tokenizer_files.library import BYTE_OF_CHARACTER
from llama.tokenizer_files.meta import SentencePiece, Tiktoken
from llama.tokenizer_files.sentencepiece_model import NORMAL, read_pieces

_CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}


def as_json(tokenizer: Tiktoken | SentencePiece) -> dict[str, Any]:
    """The content of a `tokenizer.json` with which the `tokenizers` library gives the same ids.

    Raises TokenizerError for a SentencePiece model that no such file can describe.
    """
    if isinstance(tokenizer, Tiktoken):
        return _byte_level(tokenizer)
    return _byte_fallback(tokenizer)


def _file(
    special: dict[str, int],
    bos_id: int,
    model: dict[str, Any],
    in_text: Collection[str] = (),
    **steps: Any,
) -> dict[str, Any]:
    """in_text: the special tokens that are recognized in plain text too."""
    names = {i: name for name, i in special.items()}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": names[i], "special": names[i] not in in_text, **flags}
            for i in sorted(names)
        ],
        "normalizer": steps.get("normalizer"),
        "pre_tokenizer": steps.get("pre_tokenizer"),
        "post_processor": bos_first(names[bos_id], bos_id),
        "decoder": steps["decoder"],
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
        },
    }


def bos_first(name: str, i: int) -> dict[str, Any]:
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
        tokenizer.always_allowed,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level | characters]},
        decoder=byte_level | {"add_prefix_space": True, "use_regex": True},
    )


# ---- Llama 2: BPE with byte fallback ---------------------------------------------------------


def _byte_fallback(tokenizer: SentencePiece) -> dict[str, Any]:
    pieces = read_pieces(tokenizer.processor.serialized_model_proto(), tokenizer.special_tokens)
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
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
        tokenizer.always_allowed,
        # The normalizer puts a blank before a text, and also before each part of a text that
        # follows a special token. `Llama2ChatFormat` gives the same blanks, because it encodes each
        # turn of a dialog on its own.
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, blank],
        },
        decoder={"type": "Sequence", "decoders": LLAMA_2_DECODER},
    )
