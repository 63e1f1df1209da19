"""What teaches the bundled model not to repeat itself: the repeats, and their loss."""

import math

import pytest
import torch
from bundled_refine import Story, repeats, unlikelihood

from llama import Llama
from llama.checkpoints.build import load_model, open_model


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([], []),
        ([1, 2, 3, 4, 5, 6], []),
        ([1, 2, 3, 4, 1, 2, 3, 4, 5], [107]),
        ([7, 7, 7, 7, 7, 7], [104, 105]),
    ],
)
def test_a_repeat_ends_a_run_that_was_there_before(answer: list[int], expected: list[int]) -> None:
    assert repeats(answer, 100) == expected


def test_unlikelihood_is_that_of_the_repeats_alone() -> None:
    llama = Llama.build(device="cpu")
    model = llama.model
    tokens = llama.tokenizer.encode("The king is a king is a king", bos=True, eos=False)
    longer = [*tokens, 5, 6]
    with torch.no_grad():
        found = unlikelihood(model, [Story(tokens, [7, 8]), Story(longer, [6])])
        logits = model(torch.tensor([tokens]), 0)[0]
    probabilities = logits.softmax(-1)
    wanted = -sum(math.log(1 - probabilities[at - 1, tokens[at]].item()) for at in (7, 8, 6))
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_its_gradient_makes_the_repeat_less_likely() -> None:
    setup, tokenizer, _ = open_model(None, None, 64, 1, 1, "reference", None, None, "cpu", None)
    assert tokenizer is not None
    model = load_model(setup)
    tokens = tokenizer.encode("The king is a king is a king", bos=True, eos=False)
    loss = unlikelihood(model, [Story(tokens, [8])])
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.01 * weight.grad
        assert unlikelihood(model, [Story(tokens, [8])]) < loss
