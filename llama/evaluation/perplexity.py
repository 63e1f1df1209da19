"""Score texts: nats a token, perplexity, and bits a byte.

Bits a byte can be compared between vocabularies: the number of bytes depends on no tokenizer.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tqdm import tqdm

from llama import parallel
from llama.errors import DataError, GenerationError
from llama.generation import Llama

WINDOW = 512  # tokens, by default


@dataclass(frozen=True)
class Score:
    """The summed loss of all tokens, and the numbers of tokens and bytes."""

    nats: float
    tokens: int
    bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))  # exp overflows above 709

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def score(llama: Llama, texts: Iterable[str], window: int | None = None) -> Score:
    """Score texts in windows that do not overlap. Each window begins with bos, or with eos where
    the vocabulary has no bos.

    window: tokens predicted in one window; None: 512, or the model's max_seq_len if smaller.
    Raises GenerationError for a window the model has no room for, DataError without any text.
    """
    longest = llama.model.params.max_seq_len
    window = min(WINDOW, longest) if window is None else window
    if not isinstance(window, int) or not 1 <= window <= longest:
        raise GenerationError(f"a window of {window!r} tokens, but max_seq_len is {longest}")
    n_bytes, windows = 0, []
    for text in texts:
        n_bytes += len(text.encode("utf-8", "replace"))
        tokens = llama.tokenizer.encode(text, bos=False, eos=False)
        windows += [tokens[i : i + window] for i in range(0, len(tokens), window)]
    if not windows:
        raise DataError("the text is empty: there is nothing to score")
    nats = 0.0
    hidden = not parallel.is_main_rank()
    for tokens in tqdm(windows, "Scoring", unit="window", delay=2, disable=hidden):
        (logprobs,) = llama.score([[llama.tokenizer.start_id, *tokens]])
        nats -= sum(logprobs)
    return Score(nats, sum(map(len, windows)), n_bytes)
