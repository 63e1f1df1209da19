"""Give a model this rank's part of a checkpoint, and check that the checkpoint is complete."""

import torch
from torch import Tensor
from tqdm import tqdm

from llama import parallel
from llama.checkpoints.shards import ALIGNMENT, Checkpoint
from llama.errors import CheckpointError, ConfigError
from llama.fast.quantize import Width, is_quantized, set_quantized
from llama.model import Transformer

MOST_NAMES = 10  # how many tensors an error message names


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, bfloat16 or float16, also by name. Raises ConfigError for any other."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if named not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype is {dtype!s}: float32, bfloat16 and float16 are known")
    return named


def default_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of weights where none is asked for. None: that of the checkpoint."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_weights(
    model: Transformer,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype | None,
    quantize: Width | None = None,
) -> None:
    """Give `model`, built on the meta device, this rank's part of each tensor, however many
    shards and ranks there are.

    dtype: of all weights; None: the checkpoint's own.
    quantize: what the matrices of products are rounded to, from the checkpoint's own numbers, or
        saved in; the model is then one for `FastTransformer` alone.
    Raises CheckpointError naming what is missing, not expected or of another shape.
    """
    params = model.params
    check_complete(checkpoint)
    dtype = dtype or checkpoint.dtype
    state: dict[str, Tensor] = {}
    # One tensor at a time, so that memory never holds all files and all copies at once.
    args = checkpoint.args
    names = args.parameter_shapes() if quantize is None else args.whole_shapes()
    for name in tqdm(names, "Loading", unit="tensor", delay=2, disable=not parallel.is_main_rank()):
        place = parallel.mp_size(), parallel.mp_rank()
        if quantize is not None and is_quantized(name):
            layer = model.get_submodule(name.removesuffix(".weight"))
            set_quantized(layer, checkpoint.quantized_part(name, *place, quantize))
            continue
        part = checkpoint.part(name, *place).to(device, dtype)
        # A product with one row has other last bits where the matrix is not aligned.
        is_multiplied = quantize is None
        state[name] = part.clone() if is_multiplied and part.data_ptr() % ALIGNMENT else part
    if params.tied and quantize is None:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if quantize is None:
        model.tie_weights()


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where the shards' names or shapes are not those of the model."""
    args, folder, shards = checkpoint.args, checkpoint.folder, checkpoint.shards
    if args.n_layers > (held := len(shards[0])):  # far too few to name each missing tensor
        raise CheckpointError(f"{folder} has {held} tensors, n_layers is {args.n_layers}")
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for name, whole in args.whole_shapes().items():
        dim = parallel.shard_dim(name, args.embedding_shard_dim)
        shape = list(whole)
        if dim is not None:  # a shard holds its part of the whole tensor
            if shape[dim] % len(shards):
                raise CheckpointError(
                    f"{folder}: {name} has {shape[dim]} rows or columns in all, which cannot come "
                    f"in {len(shards)} shards"
                )
            shape[dim] //= len(shards)
        expected |= checkpoint.stored(name, shape)
    for i, shard in enumerate(shards):
        if missing := [checkpoint.called(name) for name in expected if name not in shard]:
            raise CheckpointError(f"{checkpoint.file_of(i)} lacks {_listed(missing)}")
        if extra := [name for name in shard if name not in expected]:
            raise CheckpointError(
                f"{checkpoint.file_of(i)} has tensors this model has not: {_listed(extra)}"
            )
    wrong = []
    for name, (local, dtype) in expected.items():
        for i, shard in enumerate(shards):
            found = shard[name]
            file = f"{checkpoint.file_of(i).name}: " if len(shards) > 1 else ""
            called = f"{file}{checkpoint.called(name)}"
            if found.shape != local:
                wrong.append(f"{called} {tuple(found.shape)} instead of {tuple(local)}")
            elif dtype not in (None, found.dtype):
                wrong.append(f"{called} is {found.dtype} instead of {dtype}")
    if wrong:
        raise CheckpointError(f"{folder} does not fit its configuration: {_listed(wrong)}")


def _listed(names: list[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
