"""The batches that the bundled model is trained on: windows of the tales, and rows of dialogs."""

import random
from collections.abc import Sequence
from typing import Any

from bundled_corpus import Tale
from bundled_dialogs import SHORTEST_STORY, DialogSource
from torch import Tensor

from llama.chat_format import ChatFormat
from llama.tokenizer import Tokenizer
from llama.training.chat_data import Example, padded, to_batch

CONTEXT = 1024  # tokens
BATCH = 4096  # tokens
# The rows of the batches, in turn: dialogs in rows of 256, 512 or 1,024 tokens, or windows of the
# tales (None). Short rows need less attention, and most stories are short.
TURNS = [256, None, 512, 256, None, 512, 256, None, 512, 256,
         None, 1024, 256, None, 512, 256, None, 512, 1024, None]  # fmt: skip


class StoryLoader:
    """Endless batches of 4,096 tokens: windows of the tales, or rows of whole dialogs.

    Every epoch cuts the tales into other windows. The content of a batch depends only on its
    number, so that number is the state of the loader.
    """

    def __init__(self, tales: Sequence[Tale], tokenizer: Tokenizer) -> None:
        self.tales = [tokenizer.encode(tale.text, bos=False, eos=True) for tale in tales]
        self.dialogs = DialogSource(tales, ChatFormat(tokenizer))
        self.bos, self.eos = tokenizer.bos_id, tokenizer.eos_id
        self.batch = 0  # number of the next batch
        self.epoch, self.windows = -1, self._cut(0)
        self.windows_an_epoch = len(self.windows)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        number = self.batch
        self.batch += 1
        turn, index = divmod(number, len(TURNS))
        length = TURNS[index] or CONTEXT
        count = BATCH // length
        rows = [Example([], []) for _ in range(count)]
        if TURNS[index] is None:
            first = (turn * TURNS.count(None) + TURNS[:index].count(None)) * count
            rows = [self._window(first + i) for i in range(count)]
        rng = random.Random(f"batch {number}")
        return to_batch([self._filled(rng, row, length + 1) for row in rows])

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]

    def _window(self, number: int) -> Example:
        """The window with this number, at most CONTEXT + 1 tokens."""
        epoch, index = divmod(number, self.windows_an_epoch)
        if epoch != self.epoch:
            self.epoch, self.windows = epoch, self._cut(epoch)
        window = self.windows[index % len(self.windows)]
        return Example(window, [False] + [True] * (len(window) - 1))

    def _cut(self, epoch: int) -> list[list[int]]:
        """The windows of an epoch, shuffled, each with a bos before it."""
        rng = random.Random(f"epoch {epoch}")
        windows = []
        for tale in self.tales:
            for start in range(-rng.randrange(CONTEXT), len(tale), CONTEXT):
                window = tale[max(0, start) : start + CONTEXT]
                if len(window) >= 64:
                    windows.append([self.bos, *window])
        rng.shuffle(windows)
        return windows

    def _filled(self, rng: random.Random, row: Example, length: int) -> Example:
        """The row with dialogs after it, filled up to `length` tokens."""
        row = Example(list(row.tokens), list(row.learned))
        while (room := length - len(row)) > 40:
            if room < SHORTEST_STORY and row.tokens and rng.random() < 0.85:
                break  # so that answers about the model itself, which fit, stay rare
            if dialog := self.dialogs.draw(rng, room):
                row.tokens += dialog.tokens
                row.learned += dialog.learned
        return padded(row, length, self.eos)
