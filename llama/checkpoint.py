"""Meta's checkpoint folders: `params.json` and the shards `consolidated.NN.pth`.

A shard is mapped, not read, and a rank touches nothing but its own part: on the CPU, with as many
ranks as shards, the weights are the file's own pages.
"""

import json
import math
import pickle
from pathlib import Path

import torch
from torch import Tensor

from llama import parallel
from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.files import atomic_file
from llama.model import Transformer

BUNDLED = Path(__file__).parent / "bundled"  # the trained model that comes with the package
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


def shard_name(rank: int) -> str:
    return f"consolidated.{rank:02d}.pth"


def find_shards(folder: Path) -> list[Path]:
    """The shards consolidated.00.pth, consolidated.01.pth, … in the order of the ranks."""
    shards = sorted(folder.glob("consolidated.*.pth"))
    if not shards:
        raise CheckpointError(f"{folder} has no shards (consolidated.00.pth and so on)")
    for rank, shard in enumerate(shards):
        if shard.name != shard_name(rank):
            raise CheckpointError(f"{folder} has {shard.name} where {shard_name(rank)} is expected")
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


def shards_of_rank(n_shards: int) -> range:
    """The shards, out of `n_shards`, that hold something of this rank's part of a split tensor."""
    rank, ranks = parallel.mp_rank(), parallel.mp_size()
    return range(rank * n_shards // ranks, math.ceil((rank + 1) * n_shards / ranks))


def embedding_shard_dim(shard: dict[str, Tensor], n_shards: int, dim: int, default: int) -> int:
    """How `tok_embeddings` is split, by its shape: narrower than `dim` means by features."""
    embedding = shard.get("tok_embeddings.weight")
    if embedding is None or embedding.dim() != 2 or n_shards == 1:
        return default
    return 0 if embedding.shape[1] == dim else 1


def load_shards(
    model: Transformer,
    shards: dict[Path, dict[str, Tensor]],
    n_shards: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Give `model`, built on the meta device, this rank's part of each tensor.

    shards: what `read_shard` gave for each of `shards_of_rank`, in order; emptied on the way.
    dtype: of all weights; None: the output matrix's, which is the file's.
    Raises CheckpointError naming what is missing, not expected or of another shape.
    """
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    dims = {name: parallel.shard_dim(name, model.params.embedding_shard_dim) for name in shapes}
    for path, shard in shards.items():
        if missing := [name for name in shapes if name not in shard]:
            raise CheckpointError(f"{path} lacks {_listed(missing)}")
        if extra := [name for name in shard if name not in shapes]:
            raise CheckpointError(f"{path} has tensors this model has not: {_listed(extra)}")
        wrong = []
        for name, mine in shapes.items():
            found, expected = tuple(shard[name].shape), list(mine)
            if (dim := dims[name]) is not None:
                whole = mine[dim] * parallel.mp_size()
                if whole % n_shards:
                    raise CheckpointError(
                        f"{path.parent}: {name} has size {whole}, which {n_shards} shards cannot "
                        "share evenly"
                    )
                expected[dim] = whole // n_shards
            if found != tuple(expected):
                wrong.append(f"{name} {found} instead of {tuple(expected)}")
        if wrong:
            raise CheckpointError(f"{path} does not fit params.json: {_listed(wrong)}")

    dtype = dtype or next(iter(shards.values()))["output.weight"].dtype
    state = {}
    for name, dim in dims.items():  # one at a time, so a copy never stands beside all the others
        pieces = [shard.pop(name) for shard in shards.values()]
        state[name] = _my_part(pieces, dim, n_shards).to(device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()


def _my_part(pieces: list[Tensor], dim: int | None, n_shards: int) -> Tensor:
    """This rank's part of a tensor from its pieces in `shards_of_rank`.

    Where it is exactly one piece it is that tensor itself, and nothing is copied.
    """
    if dim is None:
        return pieces[0]
    size = pieces[0].shape[dim]
    mine = size * n_shards // parallel.mp_size()
    if mine == size:
        return pieces[0]
    start = mine * parallel.mp_rank() - size * shards_of_rank(n_shards).start  # in what we have
    if len(pieces) == 1:
        return pieces[0].narrow(dim, start, mine).clone()
    # Only the first and the last can reach beyond this rank's part.
    cut = []
    for i, piece in enumerate(pieces):
        low, high = max(start - i * size, 0), min(start + mine - i * size, size)
        cut.append(piece.narrow(dim, low, high - low))
    return torch.cat(cut, dim)


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


# ---- writing ----------------------------------------------------------------------------------


def write_params(path: Path, args: ModelArgs) -> None:
    """Write a `params.json` that `config.read_params` reads back as the same model."""
    keys = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"]
    keys += ["ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope"]
    keys += ["hidden_dim", "context_length"]  # Meta's files have no such keys
    params = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    with atomic_file(path) as file:
        file.write((json.dumps(params, indent=2) + "\n").encode())


def write_shard(path: Path, state: dict[str, Tensor]) -> None:
    """Write one rank's tensors as Meta does, atomically. Tensors that share their memory (a tied
    embedding and output) are written once."""
    with atomic_file(path) as file:
        torch.save(state, file)


def split_state(
    state: dict[str, Tensor], n_shards: int, embedding_dim: int
) -> list[dict[str, Tensor]]:
    """Cut the tensors of a whole model into those of `n_shards` shards. A tensor that has two
    names, as a tied one, is cut once."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(n_shards)]
    pieces: dict[int, list[Tensor]] = {}  # by the tensor's identity
    for name, tensor in state.items():
        dim = parallel.shard_dim(name, embedding_dim)
        if dim is not None and tensor.shape[dim] % n_shards:
            raise CheckpointError(
                f"{name} {tuple(tensor.shape)} cannot be cut into {n_shards} shards"
            )
        if id(tensor) not in pieces:
            cut = [tensor] * n_shards if dim is None else tensor.chunk(n_shards, dim)
            # A copy of its own: torch.save writes the whole storage behind a view.
            pieces[id(tensor)] = [piece.clone() for piece in cut]
        for shard, piece in zip(shards, pieces[id(tensor)], strict=True):
            shard[name] = piece
    return shards
