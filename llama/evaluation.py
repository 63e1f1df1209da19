"""How well a model predicts a text: nats a token, perplexity, and bits a byte.

Bits a byte compare models of any vocabulary, because bytes do not depend on how they are cut.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from llama.errors import DataError, GenerationError
from llama.generation import Llama
from llama.model import next_token_loss
from llama.token_files import IGNORED

WINDOW = 512  # tokens, where the caller does not say
MOST_LOGITS = 2**26  # numbers computed at a time: a quarter of a gigabyte


@dataclass(frozen=True)
class Score:
    """The sum of all tokens' losses, and what to divide it by."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))  # beyond, a float has no room

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def score(llama: Llama, texts: Iterable[str], window: int | None = None) -> Score:
    """Score texts in windows that do not overlap, each after a <|begin_of_text|> of its own.

    window: tokens predicted in one window; None: 512, or the model's max_seq_len if smaller.
    Raises GenerationError for a window the model has no room for, DataError without any text.
    """
    longest = llama.model.params.max_seq_len
    window = min(WINDOW, longest) if window is None else window
    if not 1 <= window <= longest:
        raise GenerationError(f"a window of {window} tokens, but max_seq_len is {longest}")
    rows_at_a_time = max(1, MOST_LOGITS // (window * llama.model.params.vocab_size))
    device = llama.model.device
    n_bytes, windows = 0, []
    for text in texts:
        n_bytes += len(text.encode("utf-8", "replace"))
        tokens = llama.tokenizer.encode(text, bos=False, eos=False)
        windows += [tokens[i : i + window] for i in range(0, len(tokens), window)]
    if not windows:
        raise DataError("the text is empty: there is nothing to score")
    nats = 0.0
    for rows in _batches(windows, rows_at_a_time):
        length = max(map(len, rows))
        targets = torch.tensor([row + [IGNORED] * (length - len(row)) for row in rows])
        inputs = targets.roll(1, dims=1).clamp(min=0)  # what stands after a short row's end
        inputs[:, 0] = llama.tokenizer.bos_id  # has no part in its losses
        logits = llama.model(inputs.to(device))
        nats += next_token_loss(logits, targets.to(device), IGNORED, "sum").item()
    return Score(nats, sum(map(len, windows)), n_bytes)


def _batches(windows: list[list[int]], rows: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(windows), rows):
        yield windows[start : start + rows]
