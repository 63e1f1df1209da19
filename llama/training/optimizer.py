"""Optimization: the learning-rate schedule, gradient clipping over ranks, and Muon."""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama import parallel
from llama.errors import TrainingError
from llama.model import Transformer


class Schedule(Protocol):
    """The options that determine the learning rate; see `learning_rate_factor`."""

    steps: int
    warmup_steps: int
    decay_steps: int | None
    final_lr: float


def check_schedule(steps: int, warmup_steps: int, decay_steps: int | None, final_lr: float) -> None:
    """Raise TrainingError if warm-up and decay take more than `steps`, or if `final_lr` is not in
    [0, 1]."""
    parts = (warmup_steps, decay_steps or 0)
    if min(parts) < 0 or sum(parts) > steps:
        decay = "" if decay_steps is None else f" and decay_steps {decay_steps}"
        raise TrainingError(f"warmup_steps {warmup_steps}{decay} do not fit into {steps} steps")
    if not 0 <= final_lr <= 1:
        raise TrainingError(f"final_lr is {final_lr}: it must be 0 to 1, a fraction of the peak")


def learning_rate_factor(step: int, schedule: Schedule) -> float:
    """The learning rate of a step, as a fraction of the peak. Steps count from 0.

    The rate rises linearly over `warmup_steps`. Without `decay_steps`, it then falls along a cosine
    to `final_lr`. With `decay_steps`, it then stays constant, and falls linearly to `final_lr` over
    the last `decay_steps` steps.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.decay_steps is None:
        progress = (step - schedule.warmup_steps) / max(1, schedule.steps - schedule.warmup_steps)
        decay = (1 - math.cos(math.pi * progress)) / 2
    else:
        remaining = (schedule.steps - step) / max(1, schedule.decay_steps)
        decay = 1 - min(1.0, remaining)
    return 1 - decay * (1 - schedule.final_lr)


@torch.no_grad()
def clip_grad_norm(model: Transformer, max_norm: float) -> float:
    """Scale all gradients so that their joint L2 norm, over all ranks, is at most `max_norm`.

    Returns the norm before scaling. The ranks of a model hold different parts of a split weight, so
    the squares of all ranks are added. All ranks hold the whole gradient of a replicated weight, so
    its squares are added only once.
    """
    split = torch.zeros((), dtype=torch.float32, device=model.device)
    replicated = split.clone()
    gradients = []
    for name, weight in model.named_parameters():
        if weight.grad is None:
            continue
        is_split_by_fsdp = isinstance(
            weight.grad, DTensor
        )  # each data-parallel rank holds some rows
        gradient = weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad
        gradients.append(gradient)
        square = gradient.float().square().sum()
        if is_split_by_fsdp:
            dist.all_reduce(square, group=fs_init.get_data_parallel_group())
        if parallel.shard_dim(name, model.params.embedding_shard_dim) is None:
            replicated += square
        else:
            split += square
    if parallel.mp_size() > 1:
        dist.all_reduce(split, group=fs_init.get_model_parallel_group())
    norm = (split + replicated).sqrt()
    factor = max_norm / (norm + 1e-6)
    for gradient in gradients:
        gradient.mul_(factor.clamp(max=1.0).to(gradient.dtype))
    return norm.item()


class Muon(torch.optim.Optimizer):
    """Muon: Nesterov momentum whose updates are orthogonalized; Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/.

    Use it for the matrices inside the layers, and AdamW for embedding, output and norms. It
    computes in the dtype of the weights. torch.optim.Muon computes in bfloat16, which is slow on
    CPUs without bfloat16 instructions. Every rank must hold whole matrices, so neither tensor
    parallelism nor FSDP is supported.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        learning_rate: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        defaults = dict(lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalize(weight.grad.lerp(momentum, group["momentum"]))  # Nesterov
                rows, columns = weight.shape
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximately the nearest matrix with all singular values 1, by a Newton-Schulz iteration.

    The matrix is divided by its Frobenius norm. Then each iteration applies an odd polynomial to
    the singular values. Five iterations move values above 0.002 to between 0.68 and 1.21.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (
        matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    )  # x @ x.mT is then the smaller product
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def muon_and_adamw(
    model: Transformer, muon: float = 0.02, adamw: float = 0.003, weight_decay: float = 0.1
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, and AdamW for embedding, output and norms.

    muon, adamw: peak learning rates. Norms and biases have no weight decay. See `Muon` for what is
    not supported.
    """
    layers = [w for w in model.layers.parameters() if w.dim() == 2]
    in_layers = {id(w) for w in layers}
    others = [w for w in model.parameters() if id(w) not in in_layers]
    groups = [
        {"params": [w for w in others if w.dim() == 2], "weight_decay": weight_decay},
        {"params": [w for w in others if w.dim() == 1], "weight_decay": 0.0},
    ]
    return [
        Muon(layers, muon, weight_decay=weight_decay),
        torch.optim.AdamW(groups, lr=adamw, betas=(0.9, 0.95), fused=True),
    ]
