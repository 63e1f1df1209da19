"""LoRA: train a low-rank change of each matrix, and leave the matrix as it is; Hu et al. 2021,
arxiv.org/abs/2106.09685. The matrices may be rounded, as in QLoRA; Dettmers et al. 2023,
arxiv.org/abs/2305.14314.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from llama import parallel
from llama.adapters import TARGETS
from llama.config import ModelArgs
from llama.errors import TrainingError
from llama.model import Transformer


@dataclass(frozen=True)
class LoraOptions:
    """What is trained. Raises TrainingError for a value that is out of range."""

    r: int  # the rank of a change
    alpha: float  # a change B A is multiplied by alpha / r
    dropout: float = 0.0  # the probability with which an input of a change becomes 0 in training
    targets: tuple[str, ...] = TARGETS  # the matrices of each layer that get a change

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 1:
            raise TrainingError(f"lora_r is {self.r!r}: it must be a whole number, 1 or more")
        if not 0 < self.alpha < math.inf:
            raise TrainingError(f"lora_alpha is {self.alpha}: it must be above 0")
        if not 0 <= self.dropout < 1:
            raise TrainingError(
                f"lora_dropout is {self.dropout}: it must be 0 or more, and below 1"
            )
        if not self.targets or not set(self.targets) <= set(TARGETS):
            given, known = ",".join(self.targets), ",".join(TARGETS)
            raise TrainingError(f"lora_targets is {given!r}: it must be some of {known}")

    @classmethod
    def read(cls, r: int, alpha: float | None, dropout: float, targets: str | None) -> Self:
        """The options of the command line. alpha None: twice r. targets: names with commas between;
        None: all."""
        names = TARGETS if targets is None else tuple(targets.split(","))
        return cls(r, 2 * r if alpha is None else alpha, dropout, names)

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.r


class LoraLinear(nn.Module):
    """A frozen linear layer with a change: x W^T + alpha / r * x A^T B^T.

    On this rank W is (N, K), A (r, K) and B (N, r). A and B are float32. For the products they are
    cast to the dtype of x.
    """

    def __init__(
        self, base: nn.Module, a: Tensor, b: Tensor, options: LoraOptions, is_row_parallel: bool
    ) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.scale, self.dropout = options.scale, options.dropout
        self.is_row_parallel = is_row_parallel

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (n, K)
        out = self.base(rows)  # (n, N)
        # Generation and evaluation compute no gradients, and have no dropout.
        if self.dropout > 0 and torch.is_grad_enabled():
            rows = F.dropout(rows, self.dropout)
        low = F.linear(rows, self.lora_A.to(x.dtype))  # (n, r)
        if self.is_row_parallel:  # x and A are parts, so the products are summed over the ranks
            low = reduce_from_model_parallel_region(low)
        else:  # B is a part, so the gradients of `low` are summed over the ranks
            low = copy_to_model_parallel_region(low)
        # In place, because the outputs of the layers are most of a step's memory.
        out.addmm_(low, self.lora_B.to(low.dtype).T, alpha=self.scale)
        return out.unflatten(0, x.shape[:-1])


def add_lora(model: Transformer, options: LoraOptions, seed: int) -> None:
    """Freeze the model, and give the target matrices a change.

    B is 0, so the model's results are the same as before. Every rank draws the whole A, so that a
    seed gives the same changes at any number of ranks.
    """
    shapes = model.params.whole_shapes()
    draw = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for i, block in enumerate(model.layers):
        for part in ("attention", "feed_forward"):
            parent = block.get_submodule(part)
            for target in [name for name, _ in parent.named_children() if name in options.targets]:
                name = f"layers.{i}.{part}.{target}"
                n, k = shapes[f"{name}.weight"]
                a = torch.empty(options.r, k).uniform_(-(k**-0.5), k**-0.5, generator=draw)
                a, b = (
                    part_of_rank(f"{name}.{kind}", whole).to(model.device)
                    for kind, whole in (("lora_A", a), ("lora_B", torch.zeros(n, options.r)))
                )
                is_row_parallel = parallel.SHARD_DIMS[target] == 1
                layer = LoraLinear(parent.get_submodule(target), a, b, options, is_row_parallel)
                setattr(parent, target, layer)


def part_of_rank(name: str, whole: Tensor) -> Tensor:
    """This rank's part of A or B, by its name in the model."""
    dim = parallel.shard_dim(name, 0)
    return (
        whole if dim is None else whole.chunk(parallel.mp_size(), dim)[parallel.mp_rank()].clone()
    )


def lora_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    device_type: str,
) -> torch.optim.AdamW:
    """AdamW over the changes."""
    weights = trained(model).values()
    fused = device_type == "cuda"
    return torch.optim.AdamW(weights, learning_rate, betas, weight_decay=weight_decay, fused=fused)


def check_base(args: ModelArgs, quantize: str | None) -> None:
    """Raise TrainingError if changes of a model with this shape cannot be trained."""
    mp_size, n_kv_heads = parallel.mp_size(), args.local_kv_heads(1)
    if mp_size > n_kv_heads:
        raise TrainingError(
            f"model_parallel_size is {mp_size}: for LoRA it must be at most {n_kv_heads}, the "
            "number of key/value heads"
        )
    if quantize is not None and args.has_biases:
        raise TrainingError("a model with biases is not trained quantized: leave quantize out")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are not frozen, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
