"""Dialogs for fine-tuning: only the assistant's tokens are learned, and long dialogs are cut."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from make_checkpoint import demo_pieces, write_tokenizer

from llama.chat_format import ChatFormat, Dialog
from llama.errors import DataError, DialogError
from llama.tokenizer import Tokenizer
from llama.training.chat_data import (
    DialogLoader,
    Example,
    cut_dialog,
    encode_dialog,
    load_dialogs,
    pack,
    read_dialogs,
    to_batch,
)

DIALOG: Dialog = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "this one"},
    {"role": "user", "content": "and two?"},
    {"role": "assistant", "content": "that"},
]


@pytest.fixture(scope="module")
def formatter(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path, demo_pieces())
    return ChatFormat(Tokenizer(path))


def write(path: Path, *dialogs: Any) -> Path:
    path.write_text("".join(json.dumps({"messages": dialog}) + "\n" for dialog in dialogs))
    return path


def test_only_the_assistant_is_learned(formatter: ChatFormat) -> None:
    example = encode_dialog(formatter, DIALOG)
    learned = [t for t, is_learned in zip(*vars(example).values(), strict=True) if is_learned]
    assert formatter.tokenizer.decode(learned) == "this one<|eot_id|>that<|eot_id|>"
    # The tokens are the prompt for the last answer, and that answer.
    prompt = formatter.encode_dialog_prompt(DIALOG[:-1])
    assert example.tokens[: len(prompt)] == prompt
    assert formatter.tokenizer.decode(example.tokens[len(prompt) :]) == "that<|eot_id|>"


def test_a_dialog_without_the_assistant(formatter: ChatFormat) -> None:
    with pytest.raises(DialogError, match="no message of the assistant"):
        encode_dialog(formatter, DIALOG[:2])


def test_cut_at_a_turn(formatter: ChatFormat) -> None:
    length = len(encode_dialog(formatter, DIALOG))
    first = len(encode_dialog(formatter, DIALOG[:3]))
    assert cut_dialog(formatter, DIALOG, length) == DIALOG
    assert cut_dialog(formatter, DIALOG, length - 1) == DIALOG[:3]
    assert cut_dialog(formatter, DIALOG, first) == DIALOG[:3]
    assert cut_dialog(formatter, DIALOG, first - 1) == []


def test_what_was_cut_is_counted(formatter: ChatFormat, tmp_path: Path) -> None:
    first = len(encode_dialog(formatter, DIALOG[:3]))
    long = [DIALOG[0], {"role": "user", "content": "x " * first}, *DIALOG[2:]]
    data = load_dialogs(write(tmp_path / "a", DIALOG, DIALOG[:3], long), formatter, first)
    assert (len(data.examples), data.cut, data.dropped) == (2, 1, 1)
    assert data.examples[0] == data.examples[1]
    with pytest.raises(DataError, match="no dialog of at most 5 tokens"):
        load_dialogs(write(tmp_path / "b", DIALOG), formatter, 5)


def test_packing_keeps_every_dialog_whole() -> None:
    examples = [Example([n] * n, [True] * n) for n in (3, 2, 4, 1, 5)]
    rows = list(pack(examples, 5, pad=9))
    assert [row.tokens for row in rows] == [
        [3, 3, 3, 2, 2], [4, 4, 4, 4, 1], [5, 5, 5, 5, 5],
    ]  # fmt: skip
    (short,) = pack([Example([7, 7], [False, True])], 5, pad=9)
    assert short == Example([7, 7, 9, 9, 9], [False, True, False, False, False])
    inputs, targets = to_batch([short])
    assert inputs.tolist() == [[7, 7, 9, 9]]
    assert targets.tolist() == [[7, -100, -100, -100]]


def test_every_epoch_has_every_dialog_once() -> None:
    examples = [Example([n, n], [True, True]) for n in range(1, 8)]
    loader = DialogLoader(examples, pad=0, B=1, T=3)
    orders = []
    for _ in range(2):
        rows = [loader.next_batch()[0][0].tolist() for _ in range(loader.rows_an_epoch)]
        tokens = [token for row in rows for token in row if token]
        assert set(tokens) == set(range(1, 8))
        orders.append(tokens)
    assert orders[0] != orders[1]


def test_ranks_share_the_rows_and_the_state_leads_back() -> None:
    examples = [Example([n] * 3, [True] * 3) for n in range(1, 8)]
    whole = DialogLoader(examples, 0, B=4, T=4)
    parts = [DialogLoader(examples, 0, 2, 4, rank, 2) for rank in range(2)]
    for _ in range(4):
        state = whole.state_dict()
        inputs, targets = whole.next_batch()
        found = [part.next_batch() for part in parts]
        assert torch.equal(torch.cat([x for x, _ in found]), inputs)
        assert torch.equal(torch.cat([y for _, y in found]), targets)
    whole.load_state_dict(state)
    assert torch.equal(whole.next_batch()[0], inputs)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"text": "no"}', 'line 2 has no list "messages"'),
        ('{"messages": []}', "line 2: the dialog has no message of the assistant"),
        ('{"messages": [3]}', "line 2: the message must be a mapping"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "line 2: the dialog has no message"),
        ('{"messages": [{"role": "king", "content": "hi"}]}', r"line 2: .*role 'king'"),
    ],
)
def test_bad_lines(formatter: ChatFormat, tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "dialogs.jsonl", DIALOG)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        load_dialogs(path, formatter, 100)


def test_bad_files(formatter: ChatFormat, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none"):
        load_dialogs(tmp_path / "none", formatter, 100)
    (tmp_path / "latin").write_bytes(b'{"messages": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8 text: byte 14"):
        load_dialogs(tmp_path / "latin", formatter, 100)


OTHER_FORMS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"},
                           {"from": "gpt", "value": "A"}], "id": 7},
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
         {"role": "assistant", "content": "A"}],
    ),
    (
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        [{"role": "user", "content": "Add\n\n1 and 2"}, {"role": "assistant", "content": "3"}],
    ),
    (
        {"instruction": "Greet", "input": "", "output": "Hello"},
        [{"role": "user", "content": "Greet"}, {"role": "assistant", "content": "Hello"}],
    ),
]  # fmt: skip


def test_other_forms_of_dialogs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a file with a byte-order mark, Windows line ends and blank lines, as other tools write."""
    lines = [json.dumps(record) for record, _ in OTHER_FORMS * 2]
    path = tmp_path / "dialogs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines, "", ""]).encode())
    with caplog.at_level("INFO", logger="llama"):
        dialogs = list(read_dialogs(path))
    assert dialogs == [(i + 1, dialog) for i, (_, dialog) in enumerate(OTHER_FORMS * 2)]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{path}: converted from conversations to messages",
        f"{path}: converted from instruction and output to messages",
    ]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "narrator", "value": "x"}]},
        {"conversations": [{"from": "gpt", "value": 3}]},
        {"conversations": ["x"]},
        {"instruction": 1, "output": "x"},
    ],
)
def test_dialogs_that_cannot_be_mapped(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "dialogs.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"line 1, .*: a role is unknown or a value is not text"):
        list(read_dialogs(path))
