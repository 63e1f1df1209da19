"""The content of a SentencePiece model: its pieces, read and written.

The numbers of the fields are from
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto, the encoding from
https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from llama.errors import TokenizerError

KINDS = NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
_BPE = 2  # a value of TrainerSpec.model_type


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


def model_of(pieces: Sequence[Piece], bos: int, eos: int, unk: int, puts_blank: bool) -> bytes:
    """The content of a model of Llama 2's kind: BPE with byte fallback, all blanks kept.

    bos, eos, unk: ids. puts_blank: whether a blank is put before a text.
    """
    content = [
        _field(1, _field(1, p.text.encode()) + _field(2, p.score) + _field(3, p.kind))
        for p in pieces
    ]
    trainer = _field(3, _BPE) + _field(35, sum(p.kind == BYTE for p in pieces) == 256)
    for number, i in ((40, unk), (41, bos), (42, eos)):
        trainer += _field(number, i) + _field(number + 5, pieces[i].text.encode())
    normalizer = _field(1, b"identity") + _field(3, puts_blank) + _field(4, False)
    content += [_field(2, trainer), _field(3, normalizer + _field(5, True))]
    return b"".join(content)


def read_pieces(model: bytes, special: Collection[str]) -> list[Piece]:
    """The pieces of a SentencePiece model, in the order of their ids.

    special: the special tokens. Their pieces may be of any type.

    Raises TokenizerError unless the model encodes as Llama 2's does: BPE with byte fallback, all
    blanks kept, one blank put before the text, and no other change of it.
    """
    pieces = []
    specs: dict[int, dict[int, Any]] = {2: {}, 3: {}}
    for number, content in _fields(model):
        if number == 1:
            piece = dict(_fields(content))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
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
        if text not in special and kind not in (NORMAL, UNKNOWN, CONTROL, BYTE):
            raise TokenizerError(
                f"not a SentencePiece model of Llama 2's kind: the piece {text!r:.40} is "
                "user-defined or unused"
            )
    return pieces


# ---- protobuf messages ------------------------------------------------------------------------


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The number and content of each field of a protobuf message: a whole number, or bytes.

    The SentencePiece library has written the message, so it is complete and needs no checks.
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


def _field(number: int, value: bytes | float | int) -> bytes:
    """A field of a protobuf message: its number and type, and its value."""
    if isinstance(value, bytes):
        return _varint(8 * number + 2) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(8 * number + 5) + struct.pack("<f", value)
    return _varint(8 * number) + _varint(value)


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
