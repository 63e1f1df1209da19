"""Score texts: nats a token, perplexity, and bits a byte.

Bits a byte can be compared between models with different tokenizers, because the number of bytes
does not depend on the tokenizer.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tqdm import tqdm

from llama import parallel
from llama.errors import DataError, GenerationError
from llama.generation import Llama

WINDOW = 512  # tokens, the default


@dataclass(frozen=True)
class Score:
    """The total loss of some texts, in nats, and their sizes."""

    nats: float
    tokens: int
    bytes: int  # in UTF-8

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))  # exp(710) overflows

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def score(llama: Llama, texts: Iterable[str], window: int | None = None) -> Score:
    """Score texts in windows that do not overlap. Every window is fed after bos, or
    after eos if the vocabulary has no bos.

    window: tokens predicted in one window; None: 512, or the model's max_seq_len if smaller.
    Raises GenerationError for a window that is not 1 to max_seq_len, and DataError if the texts are
    empty.
    """
    longest = llama.model.params.max_seq_len
    window = min(WINDOW, longest) if window is None else window
    if not isinstance(window, int) or not 1 <= window <= longest:
        raise GenerationError(f"window is {window!r}: it must be 1 to max_seq_len, {longest}")
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
