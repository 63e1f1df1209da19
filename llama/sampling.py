"""From logits to tokens: pure functions of the logits, the parameters and a generator."""

import math
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from llama.errors import GenerationError

# (tokens so far, logits (V,)) -> logits (V,)
LogitsProcessor = Callable[[Sequence[int], Tensor], Tensor]

MAX_STOP_STRINGS = 16
MAX_SAMPLES = 1024  # of one prompt
_MAX_FLOAT = sys.float_info.max


@dataclass(frozen=True)
class SamplingParams:
    """How the text of one request is generated.

    Bias, penalties and logits_processor are applied to the logits first. Temperature, top_k, min_p
    and top_p follow in this order.

    Args:
        temperature: 0 takes the likeliest token. Above 0, the logits are divided by it.
        top_p: draw from the smallest set of likeliest tokens whose total probability exceeds this;
            Holtzman et al. 2019, arxiv.org/abs/1904.09751.
        top_k: draw from this many likeliest tokens, and those that tie with the last one. 0: all;
            Fan et al. 2018, arxiv.org/abs/1805.04833.
        min_p: draw from tokens with at least this fraction of the likeliest token's probability;
            Nguyen et al. 2024, arxiv.org/abs/2407.01082.
        repetition_penalty: for each token of the prompt and the generated text, a positive logit is
            divided by this, and a negative logit is multiplied by it; Keskar et al. 2019,
            arxiv.org/abs/1909.05858.
        presence_penalty: subtracted from the logit of each generated token.
        frequency_penalty: subtracted from a token's logit once for each time it was generated.
        logit_bias: added to the logits of these ids; -inf forbids a token.
        seed: seed of the random numbers of this request; None: made from the seed of the Llama.
        max_gen_len: most tokens to generate; None: until a stop token or until the cache is full.
        stop: strings that end the text and are not part of it.
        stop_tokens: ids that end the text; None: the tokenizer's stop tokens.
        ignore_eos: do not stop at stop tokens.
        logprobs: for each generated token, report the logprobs of this many likeliest tokens;
            None: report none.
        prompt_logprobs: report the logprobs of the prompt too.
        n: number of samples per prompt.
        logits_processor: a function of the tokens so far and the logits (V,); returns logits (V,).
        adapter: name of one of the LoRA adapters in `adapters` of `Llama.build`; None: none.

    Raises GenerationError if a value is out of its range.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_gen_len: int | None = None
    stop: Sequence[str] = ()
    stop_tokens: Collection[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    n: int = 1
    logits_processor: LogitsProcessor | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        def require(name: str, valid: bool, limit: str) -> None:
            if not valid:
                shown = reprlib.repr(getattr(self, name))  # shortened
                raise GenerationError(f"{name} is {shown}: it must be {limit}")

        require("temperature", _number(self.temperature, 0), "0 (greedy) or above")
        require("top_p", _number(self.top_p, 0, 1), "between 0 and 1")
        require("top_k", _integer(self.top_k), "0 (all tokens) or above")
        require("min_p", _number(self.min_p, 0, 1), "between 0 and 1")
        repetition = self.repetition_penalty
        require("repetition_penalty", _number(repetition, 0) and repetition > 0, "above 0")
        require("presence_penalty", _number(self.presence_penalty), "a finite number")
        require("frequency_penalty", _number(self.frequency_penalty), "a finite number")
        require(
            "logit_bias",
            isinstance(self.logit_bias, Mapping)
            and all(_integer(token) for token in self.logit_bias)
            and all(_number(b) or b == -math.inf for b in self.logit_bias.values()),
            "a mapping of token ids to finite numbers or -inf",
        )
        require("seed", self.seed is None or _integer(self.seed, 0, 2**63 - 1), "0 to 2**63 - 1")
        require("max_gen_len", self.max_gen_len is None or _integer(self.max_gen_len), "0 or above")
        if isinstance(self.stop, str):
            shown = reprlib.repr(self.stop)
            raise GenerationError(f"stop is one string, {shown}: give a list of strings")
        require(
            "stop",
            isinstance(self.stop, Sequence)
            and len(self.stop) <= MAX_STOP_STRINGS
            and all(isinstance(text, str) and text for text in self.stop),
            f"a list of at most {MAX_STOP_STRINGS} strings, none of them empty",
        )
        require(
            "stop_tokens",
            self.stop_tokens is None
            or (isinstance(self.stop_tokens, Collection) and all(map(_integer, self.stop_tokens))),
            "a list of token ids, such as [1, 2]",
        )
        require("ignore_eos", isinstance(self.ignore_eos, bool), "True or False")
        require("logprobs", self.logprobs is None or _integer(self.logprobs), "0 or above")
        require("prompt_logprobs", isinstance(self.prompt_logprobs, bool), "True or False")
        require("n", _integer(self.n, 1, MAX_SAMPLES), f"1 to {MAX_SAMPLES}")
        processor = self.logits_processor
        require("logits_processor", processor is None or callable(processor), "a function")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "SamplingParams":
        """Make the parameters from options by name. Raises GenerationError for an unknown name."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise GenerationError(
                f"unknown option {unknown[0]}: it must be one of {', '.join(known)}"
            )
        return cls(**options)

    def samples(self) -> list["SamplingParams"]:
        """The parameters of each of the n samples. Their seeds are consecutive."""
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n)]
        return [replace(self, n=1, seed=seed) for seed in seeds]

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise GenerationError if a token id or the number of logprobs exceeds vocab_size."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_tokens", self.stop_tokens or ())):
            for token in ids:
                if token >= vocab_size:
                    raise GenerationError(
                        f"{name} has token id {token}, but vocab_size is {vocab_size}"
                    )
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise GenerationError(f"logprobs is {self.logprobs}, but vocab_size is {vocab_size}")


def _number(value: object, low: float = -_MAX_FLOAT, high: float = _MAX_FLOAT) -> bool:
    # Comparisons with NaN are false, so NaN is refused too.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _integer(value: object, low: int = 0, high: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def choose(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the token that follows `prompt` and `generated`: logits (V,) -> id ().

    Raises GenerationError if the logits hold NaN or only -inf.
    """
    logits = _scaled(logits, params, prompt, generated)
    if params.temperature == 0:
        return logits.argmax()
    return _draw(torch.softmax(logits, dim=-1), params.top_p, generator)


def hide_unknown(logits: Tensor, n_words: int) -> Tensor:
    """Set the logits of the ids from n_words on to minus infinity: (…, V) -> (…, V).

    The tokenizer cannot decode these ids. A model's vocabulary may be larger than its tokenizer's,
    for example 32,016 ids for 32,000 tokens.
    """
    if n_words >= logits.shape[-1]:
        return logits
    return logits.index_fill(
        -1, torch.arange(n_words, logits.shape[-1], device=logits.device), -math.inf
    )


def distribution(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> Tensor:
    """The distribution that `choose` draws from: logits (V,) -> probabilities (V,)."""
    probs = torch.softmax(_scaled(logits, params, prompt, generated), dim=-1)
    ids = _candidates(probs, params.top_p)
    sorted_probs, order = probs[ids].sort(descending=True)
    nucleus = _nucleus(sorted_probs, params.top_p)
    return torch.zeros_like(probs).index_copy(0, ids[order], nucleus / nucleus.sum())


def _scaled(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> Tensor:
    """Apply every option except top_p, which needs probabilities: logits (V,) -> (V,)."""
    logits = adjust_logits(logits.float(), params, prompt, generated)
    if params.temperature > 0:
        logits = truncate_logits(logits / params.temperature, params)
    # Only the largest logit is checked: it is NaN if any logit is NaN, and -inf if all are -inf.
    if not math.isfinite(logits.max().item()):
        raise not_finite(params)
    return logits


def not_finite(params: SamplingParams) -> GenerationError:
    """The error for logits that hold NaN or only -inf."""
    return GenerationError(
        f"the logits of the next token are not finite at temperature {params.temperature}"
    )


def adjust_logits(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> Tensor:
    """Apply bias, penalties and the caller's function: logits (V,) float32 -> (V,)."""
    device, dtype = logits.device, logits.dtype
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=device)
        bias = torch.tensor(list(params.logit_bias.values()), device=device, dtype=dtype)
        logits = logits.index_add(0, ids, bias)
    if params.repetition_penalty != 1:
        ids = torch.tensor(list({*prompt, *generated}), dtype=torch.long, device=device)
        seen = logits[ids]
        penalty = params.repetition_penalty
        logits = logits.index_copy(0, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
    if generated and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(generated)
        ids = torch.tensor(list(counts), device=device)
        times = torch.tensor(list(counts.values()), device=device, dtype=dtype)
        penalties = params.presence_penalty + params.frequency_penalty * times
        logits = logits.index_add(0, ids, penalties, alpha=-1)
    if params.logits_processor is not None:
        # The caller's function gets a copy of the logits, because it may write to its argument.
        processed = params.logits_processor([*prompt, *generated], logits.clone())
        if not isinstance(processed, Tensor) or processed.shape != logits.shape:
            is_tensor = isinstance(processed, Tensor)
            what = list(processed.shape) if is_tensor else type(processed).__name__
            raise GenerationError(
                f"logits_processor returned {what}: it must be a tensor of {len(logits)} logits"
            )
        logits = processed.to(logits)
    return logits


def truncate_logits(logits: Tensor, params: SamplingParams) -> Tensor:
    """Set a logit to -inf if it is not in top_k or is below min_p: logits (V,) -> (V,)."""
    if 0 < params.top_k < len(logits):
        least = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < least, -math.inf)
    if params.min_p > 0:
        # p / p_max >= min_p is the same as logit - logit_max >= log(min_p).
        least = logits.max() + math.log(params.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


def sample_top_p(probs: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Nucleus sampling: draw from the smallest set of likeliest tokens whose total probability
    exceeds p; Holtzman et al. 2019, arxiv.org/abs/1904.09751. probs (..., V) -> ids (..., 1)."""
    sorted_probs, ids = torch.sort(probs, dim=-1, descending=True)
    nucleus = _nucleus(sorted_probs, p)
    nucleus = nucleus / nucleus.sum(dim=-1, keepdim=True)
    return ids.gather(-1, torch.multinomial(nucleus, num_samples=1, generator=generator))


def _nucleus(sorted_probs: Tensor, p: float | Tensor) -> Tensor:
    before = torch.cumsum(sorted_probs, dim=-1) - sorted_probs  # probability of all likelier tokens
    return sorted_probs.masked_fill(before > p, 0.0)


def _candidates(probs: Tensor, p: float) -> Tensor:
    """Ids that include the whole nucleus, found without sorting. probs (V,).

    Tokens with a probability of at most (1 - p) / V are left out. Their total is at most 1 - p.
    """
    ids = (probs > (1 - p) / len(probs)).nonzero().flatten()
    # The margin is for rounding errors. If p is 1, only tokens of probability 0 are left out.
    has_nucleus = p == 1 or probs[ids].sum() > p + 1e-5
    return ids if has_nucleus else torch.arange(len(probs), device=probs.device)


def _draw(probs: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """`sample_top_p` of one row, probs (V,) -> id (). It draws the same token without a full sort.

    On the CPU torch.multinomial divides each probability by a random number from the exponential
    distribution, and takes the largest quotient. Here the same is done on the candidates.
    """
    if probs.device.type != "cpu":
        return sample_top_p(probs, p, generator).squeeze(-1)
    candidates = probs[_candidates(probs, p)]
    if len(candidates) > len(probs) // 4:
        return sample_top_p(probs, p, generator).squeeze(-1)
    candidates = candidates.sort(descending=True).values
    nucleus = torch.zeros_like(probs)  # V numbers, so that the sum rounds as in `sample_top_p`
    nucleus[: len(candidates)] = _nucleus(candidates, p)
    noise = torch.empty_like(probs).exponential_(1, generator=generator)
    place = (nucleus / nucleus.sum() / noise).argmax()  # index in the order of probability
    ids = (probs == candidates[place]).nonzero().flatten()
    # If several tokens have this probability, only a full sort tells which one is at `place`.
    return ids[0] if len(ids) == 1 else probs.argsort(descending=True)[place]


def options_of(params: SamplingParams) -> list[float]:
    """The options that `draw_rows` takes: temperature, top_k, the logarithm of min_p, top_p."""
    min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
    return [params.temperature, params.top_k, min_p, params.top_p]


def draw_rows(logits: Tensor, options: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row with the row's options. Temperature 0 takes the likeliest token.

    logits (B, V), options (4, B) from `options_of`, noise (B, V) from the exponential distribution
    -> ids (B,), and whether the logits are finite (B,). noise[:, i] belongs to the token with the
    i-th highest logit, because `sample_top_p` calls torch.multinomial on sorted probabilities.
    """
    temperature, top_k, log_min_p, top_p = options[:, :, None]  # (B, 1) each
    scaled = logits / temperature.masked_fill(temperature == 0, 1)
    ordered, order = scaled.sort(dim=-1, descending=True)
    vocab_size = scaled.shape[-1]
    k = top_k.masked_fill(top_k == 0, vocab_size).clamp(max=vocab_size).long()
    least = torch.maximum(ordered.gather(-1, k - 1), ordered[:, :1] + log_min_p)
    probs = scaled.masked_fill(scaled < least, -math.inf).softmax(-1)
    nucleus = _nucleus(probs.gather(-1, order), top_p)
    nucleus = nucleus / nucleus.sum(-1, keepdim=True)
    drawn = order.gather(-1, (nucleus / noise).argmax(-1, keepdim=True))
    ids = torch.where(temperature == 0, logits.argmax(-1, keepdim=True), drawn)
    return ids[:, 0], scaled.amax(-1).isfinite()


def logprob_of(logits: Tensor, tokens: Tensor | int) -> Tensor:
    """Natural logarithm of each token's probability, before temperature and the other options:
    logits (..., V), tokens (...) -> (...)."""
    ids = torch.as_tensor(tokens, device=logits.device)
    return logits.log_softmax(dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def top_logprobs(logits: Tensor, k: int) -> list[tuple[int, float]]:
    """The k likeliest tokens and their logprobs, likeliest first: logits (V,)."""
    values, ids = logits.log_softmax(dim=-1).topk(k)
    return list(zip(ids.tolist(), values.tolist(), strict=True))
