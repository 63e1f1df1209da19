"""Dialogs as training data. Only the tokens of the assistant have a loss."""

import logging
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama import parallel
from llama.chat_format import ChatFormat, Dialog
from llama.chat_forms import AnyFormat
from llama.errors import DataError, DialogError
from llama.files import read_records
from llama.training.token_files import IGNORED

log = logging.getLogger("llama")
# ShareGPT's names of speakers, and the roles that they become.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "ipython",
}


@dataclass
class Example:
    """The token ids of one dialog, or of the dialogs that share one row."""

    tokens: list[int]
    learned: list[bool]  # for each token: whether predicting it has a loss

    def __len__(self) -> int:
        return len(self.tokens)


def encode_dialog(formatter: ChatFormat, dialog: Dialog) -> Example:
    """Encode the tokens that begin a prompt, and then every message.

    The content of the assistant's messages and their end token are learned. Headers and the other
    messages are not. Raises DialogError for a dialog without a message of the assistant.
    """
    opening = formatter.opening
    example = Example(opening, [False] * len(opening))
    for message in formatter.completed(dialog):
        tokens = formatter.encode_message(message)
        header = len(formatter.encode_header(message))
        example.tokens += tokens
        example.learned += [False] * header
        example.learned += [message["role"] == "assistant"] * (len(tokens) - header)
    if not any(example.learned):
        raise DialogError("the dialog has no message of the assistant: there is nothing to learn")
    return example


def cut_dialog(formatter: ChatFormat, dialog: Dialog, limit: int) -> Dialog:
    """The longest prefix of the dialog that has at most `limit` tokens and ends with a message of
    the assistant. It is empty if no such prefix exists."""
    length, end = len(formatter.opening), 0
    added = len(formatter.completed(dialog)) - len(dialog)  # 1 if a default system message is added
    for i, message in enumerate(formatter.completed(dialog), -added):
        length += len(formatter.encode_message(message))
        if length > limit:
            break
        if message["role"] == "assistant":
            end = i + 1
    return dialog[:end]


def read_dialogs(path: str | Path) -> Iterator[tuple[int, Dialog]]:
    """Yield the line number and the dialog of each line of a JSONL file.

    A line is {"messages": [{"role": …, "content": …}, …]}. Two other forms are converted to it:
    ShareGPT's {"conversations": [{"from": …, "value": …}, …]} and Alpaca's {"instruction": …,
    "input": …, "output": …}. The log reports the first conversion of each form.
    Raises DataError for a line of another form.
    """
    reported: set[str] = set()
    for number, record in read_records(path):
        if isinstance(record.get("messages"), list):
            yield number, record["messages"]
            continue
        if isinstance(record.get("conversations"), list):
            form, dialog = "conversations", _from_conversations(record["conversations"])
        elif {"instruction", "output"} <= record.keys():
            form, dialog = "instruction and output", _from_instruction(record)
        else:
            raise DataError(f'{path}, line {number} has no list "messages"')
        if dialog is None:
            raise DataError(
                f"{path}, line {number}, {form}: a role is unknown or a value is not text"
            )
        if form not in reported:
            reported.add(form)
            if parallel.is_main_rank():
                log.info("%s: converted from %s to messages", path, form)
        yield number, dialog


def _from_conversations(turns: list[Any]) -> Dialog | None:
    """The dialog of ShareGPT's turns. None for an unknown speaker or a value that is not text."""
    dialog: list[Any] = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            return None
        dialog.append({"role": role, "content": turn["value"]})
    return dialog


def _from_instruction(record: dict[str, Any]) -> Dialog | None:
    """The dialog of Alpaca's record. None for a value that is not text."""
    texts = [record["instruction"], record.get("input") or "", record["output"]]
    if not all(isinstance(text, str) for text in texts):
        return None
    instruction, details, output = texts
    question = f"{instruction}\n\n{details}" if details else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]


@dataclass
class DialogData:
    """The encoded dialogs of a file, and the number of dialogs that exceeded the token limit."""

    examples: list[Example]
    cut: int  # dialogs that lost turns at their end
    dropped: int  # dialogs whose first answer ends beyond the limit


def load_dialogs(path: str | Path, formatter: AnyFormat, limit: int) -> DialogData:
    """Encode every dialog of a file. A dialog of more than `limit` tokens is cut after a message of
    the assistant, or dropped.

    Raises DataError for Llama 2's format, for a file without a dialog that fits, and, with the line
    number, for a malformed dialog or one without a message of the assistant.
    """
    if not isinstance(formatter, ChatFormat):
        raise DataError("fine-tuning on dialogs supports Llama 3's chat format, but not Llama 2's")
    data = DialogData([], 0, 0)
    for number, dialog in read_dialogs(path):
        try:
            example = encode_dialog(formatter, dialog)
            if len(example) > limit:
                shorter = cut_dialog(formatter, dialog, limit)
                data.cut += bool(shorter)
                data.dropped += not shorter
                if not shorter:
                    continue
                example = encode_dialog(formatter, shorter)
        except DialogError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        data.examples.append(example)
    if not data.examples:
        raise DataError(f"{path} has no dialog of at most {limit} tokens to learn from")
    return data


class DialogLoader:
    """Endless batches of B rows of T tokens. Each row holds whole dialogs and padding.

    Every epoch has a new order. Each of `num_processes` data-parallel ranks gets its own rows.

    Args:
        examples: encoded dialogs of at most T + 1 tokens.
        pad: token id that fills up a row. It is never learned.
        process_rank: the data-parallel rank, 0 to num_processes - 1.
        seed: with the epoch's number it determines the order of the dialogs.
    """

    def __init__(
        self,
        examples: list[Example],
        pad: int,
        B: int,
        T: int,
        process_rank: int = 0,
        num_processes: int = 1,
        seed: int = 1,
    ) -> None:
        self.examples, self.pad, self.B, self.T, self.seed = examples, pad, B, T, seed
        self.process_rank, self.num_processes = process_rank, num_processes
        self.load_state_dict({"epoch": 0, "row": 0})

    @property
    def rows_an_epoch(self) -> int:
        """Rows of the current epoch, for all ranks together."""
        return len(self._rows)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T), int64. A target that is not learned is -100."""
        rows = []
        for i in range(self.num_processes * self.B):
            if self.row == len(self._rows):
                self.load_state_dict({"epoch": self.epoch + 1, "row": 0})
            if i // self.B == self.process_rank:
                rows.append(self._rows[self.row])
            self.row += 1
        return to_batch(rows)

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch, the same on every rank."""
        return {"epoch": self.epoch, "row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.row = state["epoch"], state["row"]
        order = list(self.examples)
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        self._rows = list(pack(order, self.T + 1, self.pad))


def pack(examples: Iterable[Example], length: int, pad: int) -> Iterator[Example]:
    """Pack examples, in their order, into rows of exactly `length` tokens.

    A row takes whole examples until the next one does not fit. The rest of the row is `pad`, which
    is not learned. No example may be longer than `length`.
    """
    row = Example([], [])
    for example in examples:
        assert len(example) <= length
        if len(row) + len(example) > length:
            yield padded(row, length, pad)
            row = Example([], [])
        row.tokens += example.tokens
        row.learned += example.learned
    if row.tokens:
        yield padded(row, length, pad)


def padded(row: Example, length: int, pad: int) -> Example:
    missing = length - len(row)
    return Example(row.tokens + [pad] * missing, row.learned + [False] * missing)


def to_batch(rows: list[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), int64, from B rows of T + 1 tokens. A target that is not learned
    is -100."""
    tokens = torch.tensor([row.tokens for row in rows])
    learned = torch.tensor([row.learned for row in rows])
    return tokens[:, :-1], tokens.masked_fill(~learned, IGNORED)[:, 1:]
