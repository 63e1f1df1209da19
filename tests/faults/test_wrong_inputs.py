"""Ids, prompts and options that the model cannot take are one error, and harm no other call."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fault_plan import Trials

from llama import Llama
from llama.errors import LlamaError

LENGTH = 32
BIG = 10**30


@pytest.fixture(scope="module", params=["reference", "fast"])
def llama(request: pytest.FixtureRequest) -> Llama:
    return Llama.build(max_seq_len=LENGTH, max_batch_size=2, device="cpu", mode=request.param)


def check(llama: Llama, call: Callable[[], object]) -> None:
    """One error, of one line. The next call gives what it gave before."""
    before = llama.generate([[1, 2, 3]], 2, temperature=0)
    message = ""
    try:
        call()
    except LlamaError as error:
        message = str(error)
    assert message, "no error"
    assert message.isprintable()
    assert len(message) < 500
    assert not llama.engine.has_work
    assert llama.generate([[1, 2, 3]], 2, temperature=0) == before


@pytest.mark.fault(9)
def test_prompts_of_ids(trials: Trials, llama: Llama) -> None:
    n_words = llama.tokenizer.n_words
    wrong: list[Any] = [
        [[n_words]], [[-1]], [[1, 2, n_words + 10**6]], [[2**63]], [[-(2**70)]], [[1.5]], [["1"]],
        [[None]], [[]], [], [[1], []], [[1] * (LENGTH + 1)], [[1] * 10**6], "text", b"bytes",
        ["text"], [None], None, 5, [5], {1: 2}, [[[1]]], [[float("nan")]],
        torch.tensor([[n_words]]), torch.tensor([[0.5]]), torch.zeros(0, 4), torch.zeros(1, 0),
        np.array([[-1]]), np.array(["a"]), torch.zeros(1, 2, 3, dtype=torch.long),
    ]  # fmt: skip
    for prompts in wrong:
        with trials.trial(f"{prompts!r:.60}"):
            check(llama, lambda prompts=prompts: llama.generate(prompts, 2))  # type: ignore[misc]


@pytest.mark.fault(9)
def test_prompts_at_the_limit(trials: Trials, llama: Llama) -> None:
    for length in (1, LENGTH - 1, LENGTH):
        with trials.trial(f"{length} ids"):
            ((tokens,), _) = llama.generate([[1] * length], None, ignore_eos=True)
            assert len(tokens) == LENGTH - length


@pytest.mark.fault(9)
def test_texts_and_dialogs(trials: Trials, llama: Llama) -> None:
    for prompts in ("text", 5, None, [5], [None], [b"x"], [], ["word " * 100], [["a"]]):
        with trials.trial(f"text_completion({prompts!r:.60})"):
            check(
                llama,
                lambda prompts=prompts: llama.text_completion(prompts),  # type: ignore[misc]
            )
    user = {"role": "user", "content": "Hi"}
    dialogs: list[Any] = [
        [], [[]], user, [user], [[user, user, {"role": "user"}]], [[{"content": "Hi"}]], "Hi", None,
        [[{"role": "nobody", "content": "Hi"}]], [[{"role": "user", "content": 5}]], [["Hi"]],
        [[{"role": "user", "content": None}]], [[user, {"role": "assistant", "content": "Yes"}]],
        [[user, {"role": "system", "content": "late"}, user]],
        [[{"role": "user", "content": "word " * 100}]], [[None]], 7,
    ]  # fmt: skip
    for dialog in dialogs:
        with trials.trial(f"chat_completion({dialog!r:.60})"):
            check(
                llama,
                lambda dialog=dialog: llama.chat_completion(dialog),  # type: ignore[misc]
            )


# Values of a wrong type or out of range, for each option.
OPTIONS: dict[str, list[Any]] = {
    "temperature": [-1, "1", None, float("nan"), float("inf"), [1], True, BIG * 10**300],
    "top_p": [-0.1, 1.1, "1", None, float("nan")],
    "top_k": [-1, 1.5, "3", None],
    "min_p": [-0.1, 2, "0", None],
    "repetition_penalty": [0, -1, "1", None, float("inf")],
    "presence_penalty": ["1", None, float("nan")],
    "frequency_penalty": ["1", None, float("-inf")],
    "logit_bias": [5, [1], {"1": 1.0}, {-1: 1.0}, {10**9: 1.0}, {BIG: 1.0}, {1: "x"}],
    "seed": [-1, 2**64, 1.5, "1"],
    "max_gen_len": [-1, 1.5, "1", True],
    "stop": ["x", [5], [""], ["x"] * 17, 5],
    "stop_tokens": [5, ["1"], [-1], [10**9], [BIG]],
    "ignore_eos": [1, "yes", None],
    "logprobs": [-1, 10**9, "1", 1.5],
    "n": [0, -1, 1025, 1.5, "1", None],
    "logits_processor": [5, "f"],
    "no_such_option": [1],
}


@pytest.mark.fault(9)
def test_options(trials: Trials, llama: Llama) -> None:
    for name, values in OPTIONS.items():
        for value in values:
            # `generate` and `text_completion` have a switch of the name logprobs.
            with trials.trial(f"{name}={value!r:.40}"):
                check(
                    llama,
                    lambda options={name: value}: list(llama.stream([[1, 2]], **options)),  # type: ignore[misc]
                )
