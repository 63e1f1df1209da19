"""Files that `torch.save` wrote, `.pth` and `.bin`, opened without running the code in them."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.errors import CheckpointError, is_out_of_memory
from llama.files import why_unreadable
from llama.memory import size

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name, memory-mapped if the file's format allows it.

    Only tensors are unpickled, so a file cannot run code. Raises CheckpointError for a file that is
    damaged or holds anything else.
    """
    if reason := why_unreadable(path):
        raise CheckpointError(f"cannot read {path}: {reason}")
    try:
        with path.open("rb") as file:  # the format of PyTorch before 1.6 cannot be mapped
            is_zip = file.read(4) == b"PK\x03\x04"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        reason = "is not a file of plain tensors: its code was not run"
        raise CheckpointError(f"{path} {reason}") from error
    except Exception as error:  # a damaged file may raise anything
        raise unreadable(path, error) from error
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} does not hold named tensors")
    for name, tensor in state.items():
        check_kind(path, name, tensor)
    return dict(state)


def check_kind(path: Path, name: Any, tensor: Any) -> None:
    """Raise CheckpointError unless this is a plain tensor of floating point with a name."""
    if not isinstance(name, str):
        raise CheckpointError(f"{path} has a tensor named {name!r}, which is not a string")
    kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    if kind not in DTYPES:
        raise CheckpointError(f"{path}: {name} is {kind}, not a tensor of floating point")
    # A sparse tensor, or one with strides of zero, can have a huge shape in few bytes.
    is_plain = tensor.layout == torch.strided and not tensor.is_meta
    if not is_plain or tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name} has fewer numbers than its shape {tuple(tensor.shape)} says"
        )


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error of a file of weights whose reading raised `error`."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if is_out_of_memory(error):
        held = size(path.stat().st_size)
        return CheckpointError(f"no memory to read {path}, a file of {held}: {reason}")
    return CheckpointError(f"{path} is damaged or incomplete: {reason}")
