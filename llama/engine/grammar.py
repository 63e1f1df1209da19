"""Text that is JSON by construction: only tokens that keep to a schema can be chosen.

The llguidance library (extra `[json]`) compiles a schema and tells which tokens may follow. Source
of the method: Willard and Louf 2023, arxiv.org/abs/2307.09702.
"""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llama.errors import GenerationError
from llama.sampling import LogitsProcessor
from llama.tokenizer import Tokenizer
from llama.tools import Tool, ToolChoice, call_schema

MAX_SCHEMA_LENGTH = 1 << 16  # characters
KEPT = 64  # states that are kept; more than the samples of a prompt and their proposals need
# What is allowed between tokens of JSON: one blank, or a newline with at most 16 blanks. Without a
# limit a model may write blanks forever.
WHITESPACE = r" |\n {0,16}"


def json_grammar(tokenizer: Tokenizer) -> "JsonGrammar":
    """The `JsonGrammar` of a tokenizer. The first call makes it, and later calls reuse it."""
    if tokenizer not in _grammars:
        _grammars[tokenizer] = JsonGrammar(tokenizer)
    return _grammars[tokenizer]


def call_processor(
    tokenizer: Tokenizer,
    tools: Sequence[Tool],
    choice: ToolChoice,
    prompts: Sequence[Sequence[int]],
) -> LogitsProcessor | None:
    """A logits processor that forces the answers to these prompts to be tool calls. None if the
    tool_choice does not force a call."""
    if choice in ("auto", "none"):
        return None
    return json_grammar(tokenizer).processor(call_schema(tools, choice), prompts)


class JsonGrammar:
    """Makes logits processors for one tokenizer.

    Raises GenerationError if the library is not installed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise GenerationError(
                "JSON by a schema needs llguidance: pip install 'llama-reference[json]'"
            ) from error
        self._library = llguidance
        wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=sorted(tokenizer.stop_tokens))

    def processor(
        self, schema: Mapping[str, Any] | None, prompts: Sequence[Sequence[int]]
    ) -> LogitsProcessor:
        """A processor for requests with these prompts. schema: a JSON schema; None: any object.

        The text ends at a stop token. A stop token is allowed only if the JSON is complete.
        Raises GenerationError for a schema that is too large or that the library refuses.
        """
        text = json.dumps({"type": "object"} if schema is None else schema)
        if len(text) > MAX_SCHEMA_LENGTH:
            raise GenerationError(
                f"the schema has {len(text)} characters: at most {MAX_SCHEMA_LENGTH} are read"
            )
        matcher_of = self._library.LLMatcher
        try:
            options: Any = {"whitespace_pattern": WHITESPACE}
            grammar = matcher_of.grammar_from_json_schema(text, defaults=options)
        except ValueError as error:
            raise GenerationError(f"the schema is wrong: {str(error).splitlines()[0]}") from error
        matcher = matcher_of(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise GenerationError(f"the schema is wrong: {matcher.get_error().splitlines()[0]}")
        return _Processor(matcher, prompts)


_grammars: WeakKeyDictionary[Tokenizer, JsonGrammar] = WeakKeyDictionary()


class _Processor:
    """The logits of tokens that cannot follow become minus infinity.

    The processor is a function of the tokens alone, so that several samples and proposals can
    share it. It keeps the matcher's states for the texts that were used last.
    """

    def __init__(self, matcher: Any, prompts: Sequence[Sequence[int]]) -> None:
        self._prompts = sorted(map(list, prompts), key=len, reverse=True)
        self._states: OrderedDict[tuple[int, ...], Any] = OrderedDict({(): matcher})

    def __call__(self, tokens: Sequence[int], logits: Tensor) -> Tensor:
        ids = list(tokens)
        n_prompt = next(len(prompt) for prompt in self._prompts if ids[: len(prompt)] == prompt)
        state = self._state(tuple(ids[n_prompt:]))
        mask = torch.zeros((len(logits) + 31) // 32, dtype=torch.int32, device="cpu")
        state.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        bits = torch.arange(32, dtype=torch.int32, device="cpu")
        allowed = ((mask[:, None] >> bits) & 1).flatten()[: len(logits)].bool().to(logits.device)
        return logits.masked_fill(~allowed, -torch.inf)

    def _state(self, text: tuple[int, ...]) -> Any:
        """The matcher after the generated tokens."""
        if text not in self._states:
            known = next(
                n for n in range(len(text) - 1, -1, -1) if text[:n] in self._states or n == 0
            )
            state = self._states[text[:known]].deep_copy()
            state.consume_tokens(list(text[known:]))
            self._states[text] = state
        self._states.move_to_end(text)
        while len(self._states) > KEPT:
            oldest = next(key for key in self._states if key)  # the state of the empty text stays
            del self._states[oldest]
        return self._states[text]


class _Vocabulary:
    """The attributes and methods that llguidance requires of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self.eos_token_id = min(tokenizer.stop_tokens)
        self.bos_token_id = tokenizer.bos_id if tokenizer.bos_id >= 0 else None
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_words)]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._encode(plain, bos=False, eos=False)
