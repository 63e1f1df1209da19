"""Meta's checkpoint folders: `params.json` and one `consolidated.NN.pth` a rank.

A shard is mapped, not read: on the CPU the weights are the file's own pages, and a rank touches
nothing but its own shard.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from llama import parallel
from llama.errors import CheckpointError
from llama.model import Transformer

MOST_NAMES = 10  # how many tensors an error message names
IGNORED = "rope.freqs"  # a table that Llama 2's files carry; it is computed here


def find_folder(ckpt_dir: str | Path) -> Path:
    """The folder that holds `params.json`: `ckpt_dir`, or the `original/` inside it, where
    Hugging Face's repositories keep Meta's files."""
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        raise CheckpointError(f"no such checkpoint folder: {folder}")
    for candidate in (folder, folder / "original"):
        if (candidate / "params.json").exists():
            return candidate
    raise CheckpointError(f"{folder} has no params.json, nor has an original/ folder in it")


def find_shards(folder: Path) -> list[Path]:
    """The shards consolidated.00.pth, consolidated.01.pth, … in the order of the ranks."""
    shards = sorted(folder.glob("consolidated.*.pth"))
    if not shards:
        raise CheckpointError(f"{folder} has no shards (consolidated.00.pth and so on)")
    for rank, shard in enumerate(shards):
        if shard.name != f"consolidated.{rank:02d}.pth":
            raise CheckpointError(
                f"{folder} has {shard.name} where consolidated.{rank:02d}.pth is expected"
            )
    return shards


def read_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one `.pth` file by name, mapped from the file where its format allows.

    Nothing but tensors is unpickled, so a file cannot run code. Raises CheckpointError for a file
    that is damaged or holds anything else.
    """
    try:
        with path.open("rb") as file:  # the format before PyTorch 1.6 cannot be mapped
            is_zip = file.read(4) == b"PK\x03\x04"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} is not a file of plain tensors and was not run") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or incomplete: {reason}") from error
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} does not hold named tensors")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{path}: {name} is {kind}, not a tensor of floating point")
    return {name: tensor for name, tensor in state.items() if name != IGNORED}


def embedding_shard_dim(shard: dict[str, Tensor], dim: int, default: int) -> int:
    """How `tok_embeddings` is split, by its shape: narrower than `dim` means by features."""
    embedding = shard.get("tok_embeddings.weight")
    if embedding is None or embedding.dim() != 2 or parallel.mp_size() == 1:
        return default
    return 0 if embedding.shape[1] == dim else 1


def load_shard(
    model: Transformer,
    shard: dict[str, Tensor],
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Give `model`, built on the meta device, the tensors of its rank's shard.

    dtype: of all weights; None: the output matrix's, which is the file's.
    Raises CheckpointError naming what is missing, not expected or of another shape.
    """
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    if missing := [name for name in expected if name not in shard]:
        raise CheckpointError(f"{path} lacks {_listed(missing)}")
    if extra := [name for name in shard if name not in expected]:
        raise CheckpointError(f"{path} has tensors this model has not: {_listed(extra)}")
    wrong = [
        f"{name} {tuple(shard[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if tuple(shard[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(f"{path} does not fit params.json: {_listed(wrong)}")

    dtype = dtype or shard["output.weight"].dtype
    for name in expected:  # one at a time, so that a copy never stands beside all the others
        shard[name] = shard[name].to(device, dtype)
    model.load_state_dict(shard, strict=True, assign=True)
    model.tie_weights()


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
