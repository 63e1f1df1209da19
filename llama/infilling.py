"""Infilling: the model generates the text between a prefix and a suffix.

Code Llama 7B and 13B were trained for this.

Source: Rozière et al. 2023, https://arxiv.org/abs/2308.12950, section 2.3.
"""

from typing import NotRequired, TypedDict

from llama.engine.request import Request
from llama.errors import GenerationError
from llama.tokenizer import Tokenizer
from llama.tokenizer_files.meta import INFILLING_TOKENS


class InfillingPrediction(TypedDict):
    """generation: the text between prefix and suffix. full_text: prefix, generation and suffix,
    joined. With logprobs=True there are also the text and the logprob of each generated token."""

    generation: str
    full_text: str
    tokens: NotRequired[list[str]]
    logprobs: NotRequired[list[float]]


class InfillingFormat:
    """The prompts of infilling.

    Attributes: `stop_tokens` (the ids that end the text between prefix and suffix).

    Raises GenerationError if the vocabulary lacks the infilling tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        if missing := [name for name in INFILLING_TOKENS if name not in tokenizer.special_tokens]:
            raise GenerationError(
                f"{tokenizer.model_path} has no {missing[0]}: only Code Llama 7B, 13B and 70B and "
                "their instruct models were trained for infilling"
            )
        self.tokenizer = tokenizer
        ids = [tokenizer.special_tokens[name] for name in INFILLING_TOKENS]
        self._prefix, self._middle, self._suffix, end = ids
        self.stop_tokens = {*tokenizer.stop_tokens, end}

    def encode_prompt(self, prefix: str, suffix: str, suffix_first: bool = False) -> list[int]:
        """The ids of bos, prefix and suffix with their markers, and the marker of the middle.

        suffix_first: the suffix comes before the prefix, and the middle continues the prefix.
        Raises GenerationError for a text that contains an infilling token.
        """
        before = self.tokenizer.encode(prefix, bos=False, eos=False)
        after = self._encode_without_space(suffix)
        self._check(before, "prefix")
        self._check(after, "suffix")
        bos = self.tokenizer.bos_id
        if suffix_first:
            return [bos, self._prefix, self._suffix, *after, self._middle, *before]
        return [bos, self._prefix, *before, self._suffix, *after, self._middle]

    def _encode_without_space(self, text: str) -> list[int]:
        """The ids of a text without the space that SentencePiece puts in front of each text.

        The text is encoded with a newline in front, and the ids of the newline are removed."""
        newline = self.tokenizer.encode("\n", bos=False, eos=False)
        return self.tokenizer.encode(f"\n{text}", bos=False, eos=False)[len(newline) :]

    def _check(self, ids: list[int], name: str) -> None:
        markers = {self._prefix, self._middle, self._suffix, *self.stop_tokens}
        if found := markers.intersection(ids):
            token = next(n for n, i in self.tokenizer.special_tokens.items() if i in found)
            raise GenerationError(f"the {name} contains {token}, which infilling reserves")


def infilling(
    request: Request, tokenizer: Tokenizer, prefix: str, suffix: str, logprobs: bool
) -> InfillingPrediction:
    """The prediction of a finished request."""
    text = request.text
    prediction = InfillingPrediction(generation=text, full_text=f"{prefix}{text}{suffix}")
    if logprobs:
        prediction["tokens"] = tokenizer.token_texts(request.tokens)
        prediction["logprobs"] = request.logprobs
    return prediction
