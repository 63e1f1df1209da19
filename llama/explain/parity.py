"""Compare this library with another implementation on the same weights, module by module.

Both get the same prompt, and forward hooks record the output of every module. Then both decode the
likeliest tokens one after the other, each with its own KV cache.
"""

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llama import parallel
from llama.checkpoints.build import load_model, open_model
from llama.checkpoints.setup import Setup
from llama.config import ModelArgs
from llama.engine.admission import check_prompt
from llama.errors import ConfigError, GenerationError
from llama.explain.difference import Difference, difference, over_ranks
from llama.explain.oracles import OURS, find_oracle
from llama.explain.recording import LOGITS, Run, module_names, record
from llama.generation import Llama
from llama.lost_ranks import naming_lost_ranks
from llama.memory import available_memory, size
from llama.sampling import SamplingParams, logprob_of
from llama.tokenizer import Tokenizer

PROMPT = "Once upon a time there was a king who had three daughters, and"
MAX_GEN_LEN = 32


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    against: the other implementation, which is called the oracle in names.
    oracle_weights: where its weights come from.
    rope_factor: of scaled RoPE. None: RoPE is not scaled.
    limit: the largest difference of the logits in ulps that is expected. 0: every tensor must be
        bit-equal.
    modules: how far the outputs of each module are apart, by Meta's names and in the order of
        computation. "layers.N" is the output of a layer, "output" the logits of the prompt.
    decoded: of the logits of the decoded tokens, up to the first token that differs. After it the
        implementations have different inputs.
    tokens, oracle_tokens: the decoded ones.
    logprob_difference: the largest difference of the logprobs of the tokens in `decoded`, in nats.
    logits_sha256, oracle_logits_sha256: of the prompt's logits.
    """

    against: str
    oracle_weights: str
    dtype: str
    rope_factor: float | None
    device: str
    ranks: int
    prompt_tokens: list[int]
    max_gen_len: int
    limit: float
    modules: dict[str, Difference]
    decoded: Difference
    tokens: list[int]
    oracle_tokens: list[int]
    logprob_difference: float
    logits_sha256: str
    oracle_logits_sha256: str

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments with which `compare` does the same on another machine."""
        return dict(
            against=self.against, prompt=self.prompt_tokens, max_gen_len=self.max_gen_len,
            dtype=self.dtype,
        )  # fmt: skip

    @property
    def differing_modules(self) -> list[str]:
        """The modules whose outputs are not bit-equal, in the order of computation."""
        return [name for name, found in self.modules.items() if found.differing]

    @property
    def is_bit_equal(self) -> bool:
        are_tokens_equal = self.tokens == self.oracle_tokens
        return not self.differing_modules and not self.decoded.differing and are_tokens_equal

    @property
    def n_equal_tokens(self) -> int:
        """How many decoded tokens are equal before the first that differs."""
        return n_equal(self.tokens, self.oracle_tokens)

    @property
    def holds(self) -> bool:
        """Whether the two implementations are as close as expected."""
        if self.limit == 0:
            return self.is_bit_equal
        return self.logit_ulps <= self.limit

    @property
    def logit_ulps(self) -> float:
        """The largest difference of the logits of the prompt and of the decoded tokens, in ulps."""
        return max(self.modules[LOGITS].ulps, self.decoded.ulps)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        if self.limit > 0:
            kind = "within" if self.holds else "NOT within"
            return (
                f"{kind} the limit of {self.against} in {self.dtype}, {self.limit:g} ulps: the "
                f"logits differ by at most {self.logit_ulps:.3g}"
            )
        if self.holds:
            return (
                f"bit-equal to {self.against}: the outputs of all {len(self.modules)} modules, and "
                "the decoded tokens with their logits"
            )
        if not self.differing_modules:
            return f"NOT bit-equal to {self.against}: the decoded tokens or their logits differ"
        first = self.differing_modules[0]
        found = self.modules[first]
        return (
            f"NOT bit-equal to {self.against}: {first} is the first module that differs, in "
            f"{found.differing:,} of {found.elements:,} numbers, by at most {found.ulps:.3g} ulps"
        )


def compare(
    ckpt_dir: str | Path | None = None,
    tokenizer_path: str | Path | None = None,
    against: str = "llama-models",
    prompt: str | Sequence[int] = PROMPT,
    max_gen_len: int = MAX_GEN_LEN,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Comparison:
    """Run this library in reference mode, then another implementation, and compare all tensors.

    Args:
        ckpt_dir, tokenizer_path, device, dtype: as in `Llama.build`.
        against: "llama-models" or "transformers".
        prompt: a text or token ids.
        max_gen_len: how many tokens both decode, at least 1. Stop tokens do not end the text.

    All ranks return the same comparison.
    Raises ConfigError if the other implementation is unknown, not installed or cannot run the
    model, GenerationError if prompt and tokens do not fit the model, and what `Llama.build` raises.
    """
    oracle = find_oracle(against)
    setup, tokenizer, _ = open_model(
        ckpt_dir, tokenizer_path, None, 1, None, "reference", None, None, device, dtype,
        oracle.rope_factor,
    )  # fmt: skip
    assert tokenizer is not None
    args = setup.opened.args
    prompt_tokens = _encode(prompt, max_gen_len, tokenizer, args)
    oracle.check(setup)
    with parallel.failing_together(setup.device):
        _check_memory(setup)
    source = oracle.weights_from(setup)
    with tqdm(
        total=2 * (1 + max_gen_len), desc="Comparing", unit="forward", delay=2,
        disable=not parallel.is_main_rank(),
    ) as bar:  # fmt: skip
        ours, weights = _run_ours(setup, tokenizer, prompt_tokens, max_gen_len, source == OURS, bar)
        gc.collect()  # frees our model, which has references in a cycle: a GPU may hold one only
        with parallel.failing_together(setup.device):
            other = oracle(setup, weights)
        theirs = record(
            {name: other.module(name) for name in module_names(args.n_layers)},
            lambda: other.forward(torch.tensor([prompt_tokens], device=setup.device)),
            lambda: other.decode(prompt_tokens, max_gen_len),
            bar,
        )
    found = [
        difference(ours.outputs[name], other.in_metas_order(name, theirs.outputs[name]))
        for name in ours.outputs
    ]
    # The logits up to the first token that differs. Both computed them from the same tokens.
    n_rows = min(n_equal(ours.tokens, theirs.tokens) + 1, max_gen_len)
    rows, their_rows = ours.decoded[:n_rows], theirs.decoded[:n_rows]
    ids = torch.tensor(ours.tokens[:n_rows])
    logprobs, their_logprobs = (logprob_of(r.float(), ids) for r in (rows, their_rows))
    *found, decoded = over_ranks([*found, difference(rows, their_rows)], setup.device)
    return Comparison(
        against=against,
        oracle_weights=source,
        dtype=str(setup.dtype).removeprefix("torch."),
        rope_factor=None if args.rope_scaling is None else args.rope_scaling.factor,
        device=setup.device.type,
        ranks=setup.mp_size,
        prompt_tokens=prompt_tokens,
        max_gen_len=max_gen_len,
        limit=oracle.limit[setup.dtype],
        modules=dict(zip(ours.outputs, found, strict=True)),
        decoded=decoded,
        tokens=ours.tokens,
        oracle_tokens=theirs.tokens,
        logprob_difference=(logprobs - their_logprobs).abs().max().item(),
        logits_sha256=_sha256(ours.outputs[LOGITS]),
        oracle_logits_sha256=_sha256(theirs.outputs[LOGITS]),
    )


def n_equal(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens are equal before the first that differs."""
    pairs = zip(tokens, others, strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _run_ours(
    setup: Setup,
    tokenizer: Tokenizer,
    prompt_tokens: list[int],
    max_gen_len: int,
    keeps_weights: bool,
    bar: Any,
) -> tuple[Run, dict[str, Tensor]]:
    """Our run in reference mode, and, if they are kept, our weights by name on the CPU."""
    with parallel.failing_together(setup.device):
        model = load_model(setup)
    forward = naming_lost_ranks()(model)
    llama = Llama(model, tokenizer)
    options: dict[str, Any] = dict(temperature=0, ignore_eos=True)
    run = record(
        {name: model.get_submodule(name) for name in module_names(model.n_layers)},
        lambda: forward(torch.tensor([prompt_tokens], device=setup.device), 0),
        lambda: llama.generate([prompt_tokens], max_gen_len, **options)[0][0],
        bar,
    )
    kept = model.state_dict() if keeps_weights else {}
    return run, {name: weight.cpu() for name, weight in kept.items()}


# ---- checks -------------------------------------------------------------------------------------


def _encode(
    prompt: str | Sequence[int], max_gen_len: int, tokenizer: Tokenizer, args: ModelArgs
) -> list[int]:
    """The prompt's token ids, checked."""
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt, bos=True, eos=False)
    if not isinstance(max_gen_len, int) or max_gen_len < 1:
        raise GenerationError(f"max_gen_len is {max_gen_len!r}: it must be 1 or above")
    params = SamplingParams(max_gen_len=max_gen_len)
    tokens = check_prompt(prompt, params, 0, args.vocab_size, args.max_seq_len)
    if len(tokens) + max_gen_len > args.max_seq_len:
        raise GenerationError(
            f"the prompt has {len(tokens)} tokens and max_gen_len is {max_gen_len}, but together "
            f"they may be at most {args.max_seq_len}"
        )
    return tokens


def _check_memory(setup: Setup) -> None:
    """Raise ConfigError if the other implementation's weights do not fit into memory. Ours may be
    mapped from the file, and need none."""
    needed = (sum(setup.weight_bytes()) + setup.cache_bytes) * setup.ranks_per_device
    free = available_memory(setup.device)
    if needed > free:
        raise ConfigError(
            f"not enough memory: the other implementation needs {size(needed)} on {setup.device}, "
            f"but {size(free)} are free"
        )


def _sha256(logits: Tensor) -> str:
    return hashlib.sha256(logits.float().contiguous().numpy().tobytes()).hexdigest()
