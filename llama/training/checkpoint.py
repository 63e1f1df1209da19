"""Checkpoints of a training run: folders `step_00000200`, and how to resume.

A checkpoint is written to a folder `partial_…`, which becomes `step_…` when all its files are
written. So every folder `step_…` is complete. A kill or a full disk does not harm older ones.
"""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from filelock import FileLock
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llama import parallel
from llama.checkpoints import shards
from llama.checkpoints.beside_weights import files_of_gguf
from llama.checkpoints.folder import run_checkpoints
from llama.checkpoints.params import write_params
from llama.errors import CheckpointError, LlamaError, TrainingError
from llama.files import atomic_file, lock, unlock
from llama.gguf_file import is_gguf
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from llama.training.token_files import Loader

# If these files are beside the tokenizer, they are copied too. They say which tokens end a text,
# and how dialogs are written.
OF_TOKENIZER = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class Stored(Protocol):
    """What a checkpoint stores of the model, and in which files."""

    def weights(self, model: Transformer) -> dict[str, Tensor]:
        """This rank's parts of the weights that are stored, by name."""

    def gathered(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `write` gets of the weights. All ranks of a model call it together, because they may
        exchange their parts."""

    def write(self, folder: Path, model: Transformer, weights: dict[str, Tensor]) -> None:
        """Write this rank's files."""

    def read(self, folder: Path, model: Transformer) -> dict[str, Tensor]:
        """The stored parts of this rank, by name."""


class WholeModel:
    """A folder in Meta's format, with the tokenizer if its path is given."""

    def __init__(self, tokenizer_path: str | Path | None) -> None:
        self.tokenizer_path = None if tokenizer_path is None else Path(tokenizer_path)

    def weights(self, model: Transformer) -> dict[str, Tensor]:
        return model.state_dict()

    def gathered(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return weights

    def write(self, folder: Path, model: Transformer, weights: dict[str, Tensor]) -> None:
        if parallel.dp_rank() == 0:
            shards.write_shard(folder / shards.shard_name(parallel.mp_rank()), weights)
        if not parallel.is_main_rank():
            return
        write_params(folder / "params.json", model.params)
        if self.tokenizer_path is not None:
            _write_tokenizer(self.tokenizer_path, folder)

    def read(self, folder: Path, model: Transformer) -> dict[str, Tensor]:
        return shards.read_shard(folder / shards.shard_name(parallel.mp_rank()))


@dataclass
class Run:
    """The state of a training run, and the folder and the options of its checkpoints."""

    out_dir: Path
    model: Transformer
    optimizers: list[torch.optim.Optimizer]
    loader: Loader
    stored: Stored
    keep: int  # how many checkpoints stay; older ones are deleted
    step: int = 0  # finished steps


def save(run: Run) -> Path:
    """Write a checkpoint of the run's current step, then delete all but the newest `keep`.

    Returns the new checkpoint's folder. If one rank cannot write, all ranks raise TrainingError and
    the incomplete checkpoint is removed.
    """
    final = run.out_dir / f"step_{run.step:08d}"
    partial = run.out_dir / f"partial_{run.step:08d}"
    parts = run.stored.weights(run.model)
    weights = run.stored.gathered({name: _full_tensor(part) for name, part in parts.items()})
    error: Exception | None = None
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write(run, partial, weights)
    except (OSError, LlamaError) as caught:
        error = caught
    try:
        parallel.raise_together(error, run.model.device)
    except (OSError, LlamaError) as caught:
        if parallel.is_main_rank():
            shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(f"step {run.step} could not be saved: {caught}") from caught
    if parallel.is_main_rank():
        if final.exists():  # this step was saved before, by this run or another
            _remove(final)
        partial.rename(final)
        for old in run_checkpoints(run.out_dir)[: -run.keep]:
            _remove(old)
    _wait_for_all()
    return final


def _remove(folder: Path) -> None:
    """Delete a checkpoint. Its name goes first, because a kill may leave some of the files."""
    old = folder.with_name(folder.name.replace("step_", "old_"))
    folder.rename(old)
    shutil.rmtree(old)


@contextlib.contextmanager
def only_run_in(out_dir: Path, device: torch.device) -> Iterator[None]:
    """A block in which no other run writes to the folder. Leftovers of killed runs are removed.

    Raises a LlamaError on every rank if there is another run, or if the folder cannot be written.
    """
    held: FileLock | None = None
    with parallel.failing_together(device):
        if parallel.is_main_rank():
            try:
                out_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TrainingError(f"cannot write {out_dir}: {error.strerror}") from error
            held = lock(out_dir / "run")
            for leftover in (*out_dir.glob("partial_*"), *out_dir.glob("old_*")):
                shutil.rmtree(leftover)
    try:
        yield
    finally:
        if held is not None:
            unlock(held)


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's file and the settings beside it. From a GGUF file they are made."""
    if is_gguf(source):
        for name, content in files_of_gguf(Tokenizer(source)).items():
            (folder / name).write_bytes(content)
        return
    is_json = source.suffix == ".json"
    shutil.copyfile(source, folder / ("tokenizer.json" if is_json else "tokenizer.model"))
    for path in (source.with_name(name) for name in OF_TOKENIZER):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _write(run: Run, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write this rank's files of a checkpoint."""
    run.stored.write(folder, run.model, weights)
    if parallel.dp_rank() == 0 or isinstance(run.model, FSDPModule):
        state = {
            "step": run.step,
            "split": _split(run),
            "loader": run.loader.state_dict(),
            "optimizers": [_local_state(optimizer.state_dict()) for optimizer in run.optimizers],
        }
        with atomic_file(folder / _state_name(run)) as file:
            torch.save(state, file)


def load_newest(run: Run) -> bool:
    """Load the newest checkpoint in `run.out_dir` into `run`. Returns False if there is none.

    Raises TrainingError if the model or the optimizer's state was split differently, or has other
    shapes, and CheckpointError for a damaged file.
    """
    found = run_checkpoints(run.out_dir)
    if not found:
        return False
    folder = found[-1]
    path = folder / _state_name(run)
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot resume from {path}: {reason}") from error
    if "split" not in state:
        raise CheckpointError(f"cannot resume from {path}: an earlier version has written it")
    if state["split"] != _split(run):
        before, now = (
            f"splits the model over {model} rank(s) and the optimizer's state over {replicas} "
            "replica(s)" for model, replicas in (state["split"], _split(run))
        )  # fmt: skip
        raise TrainingError(f"{folder} {before}, but this run {now}")
    weights = run.stored.read(folder, run.model)
    with torch.no_grad():
        for name, weight in run.stored.weights(run.model).items():
            shape = tuple(weights[name].shape) if name in weights else None
            if shape != tuple(weight.shape):
                raise TrainingError(
                    f"{folder} is of another model: {name} is {shape}, not {tuple(weight.shape)}; "
                    "choose another out_dir"
                )
            weight.copy_(_distributed_like(weights[name].to(run.model.device), weight))
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        parameters = [w for group in optimizer.param_groups for w in group["params"]]
        for index, values in saved["state"].items():
            for key, value in values.items():
                if isinstance(parameters[index], DTensor) and value.dim() > 0:
                    values[key] = _from_local(value.to(run.model.device), parameters[index])
        optimizer.load_state_dict(saved)
    run.loader.load_state_dict(state["loader"])
    run.step = state["step"]
    _wait_for_all()
    return True


def _state_name(run: Run) -> str:
    """The name of the file for this rank's optimizer state and the loader's position.

    Data-parallel replicas share a file. Under FSDP each replica has a file of its own, because each
    has a part of the optimizer state.
    """
    rank = dist.get_rank() if isinstance(run.model, FSDPModule) else parallel.mp_rank()
    return f"training.{rank:02d}.pt"


def _split(run: Run) -> list[int]:
    """The number of ranks that share a model, and of the replicas that share an optimizer's state.

    DDP's replicas each have all of it, so a run may go on with more or fewer of them.
    """
    return [parallel.mp_size(), parallel.dp_size() if isinstance(run.model, FSDPModule) else 1]


def _wait_for_all() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


# ---- FSDP's tensors: each rank holds some rows of a DTensor ------------------------------------


def _full_tensor(weight: Tensor) -> Tensor:
    """The weight with the rows of all ranks. A weight that is not FSDP's is returned as it is."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _distributed_like(whole: Tensor, weight: Tensor) -> Tensor:
    """`whole`, distributed over the ranks as `weight` is."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements)


def _from_local(rows: Tensor, weight: DTensor) -> DTensor:
    """A tensor that is distributed as `weight` is. `rows` are the rows that this rank holds."""
    return DTensor.from_local(
        rows, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )


def _local_state(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state, in which this rank's rows replace each DTensor."""
    values = {
        index: {k: v.to_local() if isinstance(v, DTensor) else v for k, v in value.items()}
        for index, value in state["state"].items()
    }
    return {**state, "state": values}
