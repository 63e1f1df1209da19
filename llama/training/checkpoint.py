"""Checkpoints of a training run: folders `step_00000200` in Meta's format, and how to resume.

A folder is written under another name and renamed when all of it is on disk. So every folder named
step_… is complete, and a kill or a full disk damages none of the earlier ones.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llama import parallel
from llama.checkpoints import shards
from llama.checkpoints.folder import run_checkpoints
from llama.checkpoints.params import write_params
from llama.errors import CheckpointError, LlamaError, TrainingError
from llama.files import atomic_file
from llama.model import Transformer
from llama.training.token_files import Loader

# Files beside the tokenizer that say which tokens end a text, and how dialogs are written.
OF_TOKENIZER = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass
class Run:
    """The state of a training run that a checkpoint holds, and the folder of the checkpoints."""

    out_dir: Path
    model: Transformer
    optimizers: list[torch.optim.Optimizer]
    loader: Loader
    tokenizer_path: str | Path | None  # copied into each checkpoint
    keep: int  # checkpoints, the newest
    step: int = 0  # steps done


def save(run: Run) -> Path:
    """Write the run's state after its last step, then delete the oldest beyond `keep`.

    Where one rank fails, all ranks raise, and the incomplete folder is removed.
    """
    final = run.out_dir / f"step_{run.step:08d}"
    partial = run.out_dir / f"partial_{run.step:08d}"
    weights = {name: _whole(weight) for name, weight in run.model.state_dict().items()}
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
        if final.exists():  # a resumed run repeats this step
            shutil.rmtree(final)
        partial.rename(final)
        for old in run_checkpoints(run.out_dir)[: -run.keep]:
            shutil.rmtree(old)
    _wait_for_all()
    return final


def _write(run: Run, folder: Path, weights: dict[str, Tensor]) -> None:
    is_first_replica = parallel.dp_rank() == 0
    if is_first_replica:
        shards.write_shard(folder / shards.shard_name(parallel.mp_rank()), weights)
    if parallel.is_main_rank():
        write_params(folder / "params.json", run.model.params)
        if run.tokenizer_path is not None:
            is_json = Path(run.tokenizer_path).suffix == ".json"
            name = "tokenizer.json" if is_json else "tokenizer.model"
            shutil.copyfile(run.tokenizer_path, folder / name)
            for path in (Path(run.tokenizer_path).with_name(name) for name in OF_TOKENIZER):
                if path.is_file():
                    shutil.copyfile(path, folder / path.name)
    if is_first_replica or isinstance(run.model, FSDPModule):
        state = {
            "step": run.step,
            "ranks": _ranks(),
            "loader": run.loader.state_dict(),
            "optimizers": [_local(optimizer.state_dict()) for optimizer in run.optimizers],
        }
        with atomic_file(folder / _state_name(run)) as file:
            torch.save(state, file)


def load_newest(run: Run) -> bool:
    """Put the run's newest checkpoint into `run`; False where there is none.

    Raises TrainingError for another number of ranks, CheckpointError for a damaged file.
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
    if state["ranks"] != _ranks():
        raise TrainingError(
            f"{folder} was written by {state['ranks'][0]} rank(s), {state['ranks'][1]} for each "
            f"model; this run has {_ranks()[0]}, {_ranks()[1]} for each model"
        )
    weights = shards.read_shard(folder / shards.shard_name(parallel.mp_rank()))
    with torch.no_grad():
        for name, weight in run.model.state_dict().items():
            shape = tuple(weights[name].shape) if name in weights else None
            if shape != tuple(weight.shape):
                raise TrainingError(
                    f"{folder} is of another model: {name} is {shape}, not {tuple(weight.shape)}; "
                    "name another out_dir"
                )
            weight.copy_(_as(weights[name].to(run.model.device), weight))
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
    """Each rank of a model has a state file. Under FSDP each rank of every replica has one."""
    rank = dist.get_rank() if isinstance(run.model, FSDPModule) else parallel.mp_rank()
    return f"training.{rank:02d}.pt"


def _ranks() -> list[int]:
    return [dist.get_world_size(), parallel.mp_size()]


def _wait_for_all() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


# ---- FSDP's tensors: a rank holds some of the rows --------------------------------------------


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _as(whole: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole, weight.device_mesh, weight.placements)


def _from_local(rows: Tensor, weight: DTensor) -> DTensor:
    return DTensor.from_local(
        rows, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )


def _local(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with the rows that this rank holds in place of FSDP's tensors."""
    values = {
        index: {k: v.to_local() if isinstance(v, DTensor) else v for k, v in value.items()}
        for index, value in state["state"].items()
    }
    return {**state, "state": values}
