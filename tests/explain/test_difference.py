"""Differences count bits, and measure distances in ulps of the largest number."""

import math

import pytest
import torch

from llama.explain.difference import Difference, difference, spacing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1.5, 4.0, 3.999, 1000.0, 0.007])
def test_an_ulp_is_the_distance_to_the_next_number(dtype: torch.dtype, magnitude: float) -> None:
    number = torch.tensor(magnitude, dtype=dtype)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    following = (number.view(integers) + 1).view(dtype)
    assert spacing(number.item(), dtype) == (following.double() - number.double()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tensors(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -0.0, math.inf, math.nan]], dtype=dtype)
    assert difference(x, x.clone()) == Difference(4, 0, 0.0, 0.0)


def test_distances() -> None:
    reference = torch.tensor([4.0, 1.0, -2.0, 0.0])
    ulp = 2.0**-21  # of numbers from 4 to 8 in float32
    x = reference + torch.tensor([0.0, 3 * ulp, -ulp, 0.0])
    assert difference(x, reference) == Difference(4, 2, 3 * ulp, 3.0)


def test_the_sign_of_zero_is_a_bit() -> None:
    assert difference(torch.tensor([0.0]), torch.tensor([-0.0])) == Difference(1, 1, 0.0, 0.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_as_far_as_floats_go(wrong: float) -> None:
    largest = torch.finfo(torch.float64).max
    found = difference(torch.tensor([1.0, wrong]), torch.tensor([1.0, 2.0]))
    assert (found.differing, found.absolute, found.ulps) == (1, largest, largest)


def test_zeros_as_the_reference() -> None:
    assert difference(torch.tensor([1.0]), torch.tensor([0.0])).ulps > 1e30
