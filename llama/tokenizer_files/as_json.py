"""A tokenizer as Hugging Face's `tokenizer.json`, and Llama 3's as Meta's `tokenizer.model`."""

import base64
import json
from collections.abc import Iterator
from typing import Any

from llama.errors import TokenizerError
from llama.tokenizer_files.hugging_face import BYTE_OF_CHARACTER, LLAMA_2_DECODER, LLAMA_3_STEPS
from llama.tokenizer_files.meta import SPECIAL_TOKENS, SentencePiece, Tiktoken

_CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
_BLANK = "▁"  # SentencePiece's


def as_json(tokenizer: Tiktoken | SentencePiece) -> bytes:
    """The content of a `tokenizer.json` with the same ids, which puts bos before each text.

    Raises TokenizerError for a SentencePiece model that normalizes texts otherwise than Llama 2's.
    """
    file = _of_ranks(tokenizer) if isinstance(tokenizer, Tiktoken) else _of_pieces(tokenizer)
    return json.dumps(file, ensure_ascii=False, indent=1).encode()


def as_ranks(tokenizer: Tiktoken) -> bytes | None:
    """The content of Meta's `tokenizer.model` of Llama 3: lines of "base64 rank".

    Returns None where special tokens are not Llama 3's, because the file does not name them.
    """
    n_ranks = tokenizer.n_words - len(SPECIAL_TOKENS)
    metas = {name: n_ranks + i for i, name in enumerate(SPECIAL_TOKENS)}
    # Llama 3.0 calls some of them reserved, and the reserved ones have other numbers there.
    are_metas = set(tokenizer.special_tokens.values()) == set(metas.values()) and all(
        metas.get(name, i) == i or "reserved" in name
        for name, i in tokenizer.special_tokens.items()
    )
    if not are_metas:
        return None
    tokens = (tokenizer.encoding.decode_single_token_bytes(rank) for rank in range(n_ranks))
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    return b"".join(lines)


def _of_ranks(tokenizer: Tiktoken) -> dict[str, Any]:
    special = tokenizer.special_tokens
    ranks = [
        tokenizer.encoding.decode_single_token_bytes(rank)
        for rank in range(tokenizer.n_words - len(special))
    ]
    names = ["".join(_CHARACTER_OF_BYTE[byte] for byte in token) for token in ranks]
    model = {"unk_token": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    split, to_bytes = LLAMA_3_STEPS
    steps = [split, to_bytes | {"trim_offsets": True}]
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    return _file(
        special,
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        bos=next(name for name, i in special.items() if i == tokenizer.bos_id),
        decoder=decoder | {"use_regex": True},
        model=model
        | {"vocab": {name: i for i, name in enumerate(names)}, "merges": _merges(names)},
    )


def _of_pieces(tokenizer: SentencePiece) -> dict[str, Any]:
    sp = tokenizer.processor
    for text in (
        "a",
        " a  b\t\n",
        "\ufb01 \u00e9",
    ):  # a ligature and a letter that NFKC would change
        if sp.normalize(text) != _BLANK + text.replace(" ", _BLANK):
            raise TokenizerError("the SentencePiece model does not keep texts as they are")
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    special = tokenizer.special_tokens
    plain = [p for p, i in vocab.items() if p not in special and not sp.is_byte(i)]
    plain.sort(key=lambda piece: -sp.get_score(vocab[piece]))  # the likeliest are merged first
    model = {"unk_token": sp.id_to_piece(sp.unk_id()), "fuse_unk": True, "byte_fallback": True}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
    return _file(
        special,
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": _BLANK}, replace],
        },
        pre_tokenizer=None,
        bos=sp.id_to_piece(tokenizer.bos_id),
        decoder={"type": "Sequence", "decoders": list(LLAMA_2_DECODER)},
        model=model | {"ignore_merges": False, "vocab": vocab, "merges": _merges(plain)},
    )


def _merges(tokens: list[str]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token, in the order of the joined tokens."""
    known = set(tokens)

    def pairs(token: str) -> Iterator[tuple[str, str]]:
        for i in range(1, len(token)):
            if token[:i] in known and token[i:] in known:
                yield token[:i], token[i:]

    return [pair for token in tokens for pair in pairs(token)]


def _file(special: dict[str, int], bos: str, model: dict[str, Any], **steps: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": name, **flags, "special": True}
        for name, i in sorted(special.items(), key=lambda item: item[1])
    ]

    def begun(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": bos, "type_id": type_id}},
            {"Sequence": {"id": sequence, "type_id": type_id}},
        ]

    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **steps,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": begun("A", 0),
            "pair": begun("A", 0) + begun("B", 1),
            "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}},
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
        },
    }
