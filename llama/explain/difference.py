"""How far two tensors are apart: bits, absolute, and in units in the last place."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init
from torch import Tensor

from llama import parallel

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@dataclass(frozen=True)
class Difference:
    """How far two tensors of the same shape are apart.

    elements: numbers in the tensor.
    differing: how many of them do not have the same bits.
    absolute: the largest absolute difference.
    ulps: the same in units in the last place. One unit is the spacing of the dtype's numbers at
        the tensor's largest absolute value, so a small number in a tensor of large ones does not
        count more than they do.
    """

    elements: int
    differing: int
    absolute: float
    ulps: float


def difference(x: Tensor, reference: Tensor) -> Difference:
    """How far x is from the reference, which has the same shape and dtype.

    If the bits of two numbers differ and one of them is not finite, the distance is the largest
    float.
    """
    bits, reference_bits = (t.contiguous().view(INTEGERS[t.dtype]) for t in (x, reference))
    is_different = bits != reference_bits
    gaps = torch.where(is_different, (x.double() - reference.double()).abs(), 0.0)
    largest = torch.finfo(torch.float64).max
    absolute = gaps.nan_to_num(nan=largest).max().item()
    finite = torch.where(reference.isfinite(), reference, 0)
    ulps = min(absolute / spacing(finite.abs().max().item(), x.dtype), largest)
    return Difference(x.numel(), int(is_different.sum()), absolute, ulps)


def spacing(magnitude: float, dtype: torch.dtype) -> float:
    """The distance from a positive number to the next larger one of the dtype."""
    limits = torch.finfo(dtype)
    _, exponent = math.frexp(max(magnitude, limits.tiny))  # magnitude is at least 2^(exponent - 1)
    return math.ldexp(limits.eps, exponent - 1)


def over_ranks(differences: Sequence[Difference], device: torch.device) -> list[Difference]:
    """The differences of the whole tensors, from those of each model-parallel rank's part: counts
    are added, and the largest distances are taken."""
    if parallel.mp_size() == 1:
        return list(differences)
    group = fs_init.get_model_parallel_group()
    table = torch.tensor([astuple(d) for d in differences], dtype=torch.float64, device=device)
    counts, distances = table[:, :2].contiguous(), table[:, 2:].contiguous()
    dist.all_reduce(counts, dist.ReduceOp.SUM, group)
    dist.all_reduce(distances, dist.ReduceOp.MAX, group)
    rows = zip(counts.long().tolist(), distances.tolist(), strict=True)
    return [Difference(*numbers, *largest) for numbers, largest in rows]
