"""The training loop: steps, evaluation, checkpoints and exact resumption.

The ranks of a model-parallel group share one model through fairscale's tensor parallelism. DDP
replicates the model across groups. With `shard_model`, FSDP2 splits it across groups instead. Use
`shard_model` if weights, gradients and optimizer state do not fit in the memory of one group.
The initial weights, the loader and the options determine a run. Only dropout draws random numbers,
from a seed of the step.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from llama import parallel
from llama.errors import DataError, TrainingError
from llama.lost_ranks import naming_lost_ranks
from llama.model import Transformer
from llama.training import checkpoint
from llama.training.objective import (
    document_mask,
    document_numbers,
    document_positions,
    loss_in_chunks,
    next_token_loss,
)
from llama.training.optimizer import check_schedule, clip_grad_norm, learning_rate_factor
from llama.training.token_files import IGNORED, DistributedShardedDataLoader, Loader

__all__ = ["DistributedShardedDataLoader", "Loader", "Trainer", "TrainingOptions", "shard_model"]


@dataclass
class TrainingOptions:
    """How to train. The optimizer holds the peak learning rate and the weight decay."""

    steps: int = 1000
    warmup_steps: int = 50
    decay_steps: int | None = None  # steps of a linear decay at the end; None: cosine decay
    final_lr: float = 0.1  # learning rate at the end, as a fraction of the peak
    accumulation: int = 1  # batches of a step, on each rank
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 1  # of dropout
    separate_documents: bool = True  # no attention between the documents of a row
    autocast: torch.dtype | None = None  # of matrix products; None: the dtype of the weights
    eval_every: int = 100  # steps
    eval_batches: int = 20  # batches of an evaluation, on each rank
    checkpoint_every: int = 200  # steps
    keep: int = 2  # how many checkpoints stay; older ones are deleted

    def __post_init__(self) -> None:
        counts = "steps accumulation eval_every eval_batches checkpoint_every keep".split()
        for name in counts:
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}: it must be 1 or more")
        if not self.clip > 0:
            raise TrainingError(f"clip is {self.clip}: it must be above 0")
        check_schedule(self.steps, self.warmup_steps, self.decay_steps, self.final_lr)


def checkpoint_activations(model: Transformer) -> None:
    """Keep only the input of each layer for the backward pass, and compute the rest again there;
    Chen et al. 2016, arxiv.org/abs/1604.06174. Call this before `shard_model`."""
    for block in model.layers:
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)


def shard_model(model: Transformer) -> Transformer:
    """Split weights, gradients and optimizer state over the data-parallel ranks (FSDP2), in place.

    A layer's weights are gathered only while the layer computes. Call this before the optimizers
    are made. Returns the model.
    """
    mesh = DeviceMesh.from_group(fs_init.get_data_parallel_group(), model.device.type)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("features", "logits"):  # generation calls them, for sample texts
        register_fsdp_forward_method(model, method)
    return model


class Trainer:
    """One training run. `resume()` continues an earlier run, and `run()` trains to the last step.

    Args:
        model: on its device, float32 or bfloat16. For FSDP, call `shard_model` on it first.
        optimizers: they hold the model's parameters. Their learning rates are the schedule's peak.
        loader: this rank's batches. All ranks of a model-parallel group must get the same batches.
        bos_id: the token that begins a document.
        options: steps, schedule, clipping, evaluation and checkpoints.
        out_dir: folder for the checkpoints `step_00000200` and so on.
        tokenizer_path: tokenizer file that is copied into each checkpoint.
        eval_loader: held-out batches. Every evaluation starts at the position that the
            loader has when the Trainer is made.
        on_step: called after every step, on every rank, as on_step(trainer, StepReport).
        stored: what a checkpoint stores of the model. None: all of it, as a folder of Meta's.
    """

    def __init__(
        self,
        model: Transformer,
        optimizers: Sequence[torch.optim.Optimizer],
        loader: Loader,
        bos_id: int,
        options: TrainingOptions,
        out_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        eval_loader: Loader | None = None,
        on_step: "Callable[[Trainer, StepReport], None] | None" = None,
        stored: checkpoint.Stored | None = None,
    ) -> None:
        self.model, self.optimizers, self.loader = model, list(optimizers), loader
        self.options, self.bos_id = options, bos_id
        self.out_dir, self.stored = Path(out_dir), stored or checkpoint.WholeModel(tokenizer_path)
        self.eval_loader, self.on_step = eval_loader, on_step
        self.eval_start = eval_loader.state_dict() if eval_loader is not None else {}
        self.device = model.device
        self.step = 0  # finished steps
        self.peak_rates = [[g["lr"] for g in o.param_groups] for o in self.optimizers]
        self.dp_size = parallel.dp_size()
        self.loss: nn.Module = _Loss(model)  # perhaps inside DDP
        if self.dp_size > 1 and not isinstance(model, FSDPModule):
            # DDP begins with a broadcast of all weights. It would write to frozen ones, which are
            # mapped from a file, and are equal on all ranks like the changes that are trained.
            is_whole = all(weight.requires_grad for weight in model.parameters())
            self.loss = DistributedDataParallel(
                self.loss, process_group=fs_init.get_data_parallel_group(), init_sync=is_whole,
                broadcast_buffers=False,
            )  # fmt: skip

    def run(self) -> list[float]:
        """Train to the last step. Returns the loss of each step of this call, in nats a token.

        Raises what `train_step` and `save` raise, DataError if another process is running in
        `out_dir`, and ParallelError if a rank is lost.
        """
        with checkpoint.only_run_in(self.out_dir, self.device), naming_lost_ranks():
            return self._train()

    def _train(self) -> list[float]:
        losses = []
        while self.step < self.options.steps:
            start = time.perf_counter()
            loss, norm = self.train_step()
            losses.append(loss)
            seconds = time.perf_counter() - start
            is_last = self.step == self.options.steps
            held_out = None
            if self.eval_loader is not None and self._is_due(self.options.eval_every):
                held_out = self.evaluate()
            if self.on_step is not None:
                rate = self.optimizers[0].param_groups[0]["lr"]
                self.on_step(self, StepReport(self.step, loss, norm, rate, seconds, held_out))
            if is_last or self._is_due(self.options.checkpoint_every):
                self.save()
        return losses

    def _is_due(self, every: int) -> bool:
        """Whether the current step is a multiple of `every`, or the last step."""
        return self.step % every == 0 or self.step == self.options.steps

    def train_step(self) -> tuple[float, float]:
        """Update the weights once. Returns the mean loss in nats a token and the gradient's norm
        before clipping.

        Raises TrainingError if all targets are IGNORED, or if the loss or the norm is not finite.
        The weights are unchanged then. Raises DataError for a token id outside the vocabulary.
        """
        count = self.options.accumulation
        batches = [self._prepare(*self.loader.next_batch()) for _ in range(count)]
        n_targets = self._sum_over_replicas(sum(batch.n_targets for batch in batches))
        if n_targets == 0:
            raise TrainingError(
                f"step {self.step + 1}: no target in its batches counts for the loss"
            )
        total = 0.0
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with self._gradient_sync(is_last), self._dropout(i):
                loss = self._loss(batch)
                # DDP and FSDP divide the sum of the replicas' gradients by dp_size. The factor
                # undoes that, and divides by the number of targets of the step.
                (loss * (self.dp_size / n_targets)).backward()
            total += loss.item()
        loss_mean = self._sum_over_replicas(total) / n_targets
        norm = clip_grad_norm(self.model, self.options.clip)
        if not (math.isfinite(loss_mean) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss_mean} and the gradient's norm {norm}; "
                f"the checkpoints in {self.out_dir} are of earlier steps"
            )
        factor = learning_rate_factor(self.step, self.options)
        for optimizer, rates in zip(self.optimizers, self.peak_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss_mean, norm

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss of the first `eval_batches` held-out batches, in nats a token."""
        assert self.eval_loader is not None
        self.eval_loader.load_state_dict(self.eval_start)
        total, count = 0.0, 0
        for _ in range(self.options.eval_batches):
            batch = self._prepare(*self.eval_loader.next_batch())
            total += self._loss(batch).item()
            count += batch.n_targets
        return self._sum_over_replicas(total) / max(1.0, self._sum_over_replicas(count))

    def save(self) -> Path:
        """Write a checkpoint, which `Llama.build` and `resume` can load. Returns its folder.

        Raises TrainingError on every rank if one rank cannot write.
        """
        return checkpoint.save(self._run())

    def resume(self) -> bool:
        """Load the newest checkpoint in `out_dir`. Returns False if there is none.

        Raises TrainingError if the model or the optimizer's state was split differently, or has
        other shapes, and CheckpointError for a damaged file. The number of DDP's replicas may be
        another one.
        """
        run = self._run()
        is_found = checkpoint.load_newest(run)
        self.step = run.step
        return is_found

    def _run(self) -> checkpoint.Run:
        return checkpoint.Run(
            self.out_dir, self.model, self.optimizers, self.loader, self.stored,
            self.options.keep, self.step,
        )  # fmt: skip

    # ---- parts of a step ----------------------------------------------------------------------

    def _prepare(self, inputs: Tensor, targets: Tensor) -> "_Batch":
        """Check inputs and targets (B, T). Returns them on the device, with positions and mask."""
        if (largest := int(inputs.max())) >= self.model.vocab_size:
            raise DataError(
                f"the data has token id {largest}, but vocab_size is {self.model.vocab_size}: "
                "was it written with another tokenizer?"
            )
        documents = None
        if self.options.separate_documents:
            documents, targets = document_numbers(inputs, targets, self.bos_id)
        n_targets = int((targets != IGNORED).sum())
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        if documents is None:
            return _Batch(inputs, targets, None, None, n_targets)
        documents = documents.to(self.device)
        positions, mask = document_positions(documents), document_mask(documents)
        return _Batch(inputs, targets, positions, mask, n_targets)

    def _loss(self, batch: "_Batch") -> Tensor:
        """The sum of the losses of all targets, in nats."""
        dtype = self.options.autocast
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            loss: Tensor = self.loss(batch)
        return loss

    def _gradient_sync(self, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Synchronize the gradients of the replicas only in the last batch of a step. The batches
        before it accumulate gradients on their own rank."""
        if isinstance(self.loss, DistributedDataParallel) and not is_last:
            return self.loss.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(is_last)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _dropout(self, batch: int) -> Iterator[None]:
        """A block whose random numbers depend only on the seed, the step, the batch of the step and
        the replica. So a resumed run has the same dropout."""
        source = [self.options.seed, self.step, batch, parallel.dp_rank()]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(int(np.random.SeedSequence(source).generate_state(1)[0]))
            yield

    def _sum_over_replicas(self, value: float) -> float:
        if self.dp_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=fs_init.get_data_parallel_group())
        return total.item()


class _Loss(nn.Module):
    """The model with the loss: the sum over the targets of a batch, in nats."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: "_Batch") -> Tensor:
        model = self.model
        where: dict[str, Any] = dict(positions=batch.positions, mask=batch.mask)
        trains_output = any(weight.requires_grad for weight in model.output.parameters())
        if trains_output or isinstance(model, FSDPModule):
            return next_token_loss(model(batch.inputs, **where), batch.targets, reduction="sum")
        return loss_in_chunks(model.features(batch.inputs, **where), batch.targets, model.logits)


@dataclass
class _Batch:
    """A batch on the device."""

    inputs: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    positions: Tensor | None  # (B, T); None: 0 to T - 1
    mask: Tensor | None  # (B, 1, T, T); None: causal
    n_targets: int  # targets with a loss


@dataclass
class StepReport:
    """The figures of a step."""

    step: int  # counted from 1
    loss: float  # nats a token
    norm: float  # of the gradient, before clipping
    learning_rate: float
    seconds: float  # of the step alone, without evaluation and checkpoint
    held_out: float | None = None  # loss, nats a token; None: not evaluated after this step
