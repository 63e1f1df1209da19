"""Copy this rank's weights from a checkpoint into a model, and check that none is missing."""

import torch
from torch import Tensor
from tqdm import tqdm

from llama import parallel
from llama.checkpoints.shards import ALIGNMENT, Checkpoint
from llama.errors import CheckpointError, ConfigError
from llama.fast.quantize import Width, is_quantized, set_quantized
from llama.model import Transformer

MAX_NAMES = 10  # the most names of tensors in an error message


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype, which may be given by its name. Raises ConfigError unless it is float32, bfloat16
    or float16."""
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if named not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype is {dtype!s}: it must be float32, bfloat16 or float16")
    return named


def default_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the weights if the user asks for none. None: the checkpoint's dtype."""
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
    """Load this rank's part of each tensor into `model`, which was built on the meta device. The
    number of shards may differ from the number of ranks.

    dtype: dtype of all weights; None: the checkpoint's own.
    quantize: the width to which the matrices are quantized, now or already in the checkpoint. Only
        `FastTransformer` can run the model then.
    Raises a CheckpointError that names missing or unexpected tensors, those of another shape, or a
    file that was changed since it was opened.
    """
    params = model.params
    check_complete(checkpoint)
    dtype = dtype or checkpoint.dtype
    state: dict[str, Tensor] = {}
    # One tensor at a time, so that memory never holds all files and all copies at once.
    args = checkpoint.args
    names = args.parameter_shapes() if quantize is None else args.whole_shapes()
    for name in tqdm(names, "Loading", unit="tensor", delay=2, disable=not parallel.is_main_rank()):
        checkpoint.files.check()
        place = parallel.mp_size(), parallel.mp_rank()
        if quantize is not None and is_quantized(name):
            layer = model.get_submodule(name.removesuffix(".weight"))
            set_quantized(layer, checkpoint.quantized_part(name, *place, quantize))
            continue
        part = checkpoint.part(name, *place, dtype).to(device, dtype)
        # With an unaligned matrix, the last bits of a matrix-vector product would differ. So an
        # unaligned part is copied.
        needs_alignment = quantize is None
        state[name] = part.clone() if needs_alignment and part.data_ptr() % ALIGNMENT else part
    if params.tied and quantize is None:
        state["output.weight"] = state["tok_embeddings.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if quantize is None:
        model.tie_weights()


def check_complete(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the names or shapes in the shards differ from the model's."""
    args, folder, shards = checkpoint.args, checkpoint.folder, checkpoint.shards
    if args.n_layers > (held := len(shards[0])):  # so few that the missing ones are not listed
        raise CheckpointError(f"{folder} has {held} tensors, n_layers is {args.n_layers}")
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for name, whole in args.whole_shapes().items():
        dim = parallel.shard_dim(name, args.embedding_shard_dim)
        shape = list(whole)
        if dim is not None:  # a shard holds its part of the whole tensor
            if shape[dim] % len(shards):
                raise CheckpointError(
                    f"{folder}: {name} has {shape[dim]} rows or columns in all, which cannot be "
                    f"split into {len(shards)} shards"
                )
            shape[dim] //= len(shards)
        expected |= checkpoint.stored_tensors(name, shape)
    for i, shard in enumerate(shards):
        if missing := [checkpoint.name_in_file(name) for name in expected if name not in shard]:
            raise CheckpointError(f"{checkpoint.file_of(i)} lacks {_listed(missing)}")
        if extra := [name for name in shard if name not in expected]:
            raise CheckpointError(
                f"{checkpoint.file_of(i)} has unexpected tensors: {_listed(extra)}"
            )
    wrong = []
    for name, (local, dtype) in expected.items():
        for i, shard in enumerate(shards):
            found = shard[name]
            file = f"{checkpoint.file_of(i).name}: " if len(shards) > 1 else ""
            where = f"{file}{checkpoint.name_in_file(name)}"
            if found.shape != local:
                wrong.append(f"{where} {tuple(found.shape)} instead of {tuple(local)}")
            elif dtype not in (None, found.dtype):
                wrong.append(f"{where} is {found.dtype} instead of {dtype}")
    if wrong:
        raise CheckpointError(f"{folder} does not fit its configuration: {_listed(wrong)}")


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
