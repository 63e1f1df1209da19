"""LoRA adapters in PEFT's format: open them, check them against the base model, merge them, and
write them.

An adapter adds scale * B A to a matrix (N, K), with A (r, K) and B (N, r); Hu et al. 2021,
arxiv.org/abs/2106.09685. It may also store some weights of the model whole.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from llama.checkpoints import hugging_face
from llama.checkpoints.adapter_config import CONFIG, lora_settings, read_lora_config
from llama.checkpoints.pickled import check_kind
from llama.config import ModelArgs
from llama.errors import CheckpointError
from llama.files import atomic_file, write_json

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # of the names in the file; it may be missing
# A name without the prefix: the module's name, then the kind, then perhaps the adapter's own name.
LORA = re.compile(r"(.+)\.(lora_A|lora_B)(\.\w+)?\.weight")
LORA_EMBEDDING = re.compile(r"(.+)\.(lora_embedding_A|lora_embedding_B)(\.\w+)?")
WHOLE = re.compile(r"(.+?)(\.base_layer|\.modules_to_save(\.\w+)?)?\.(weight|bias)")


class Change(NamedTuple):
    """scale * B A, which is added to a matrix (N, K)."""

    a: Tensor  # (r, K)
    b: Tensor  # (N, r), its rows in Meta's order
    scale: float

    def part(self, dim: int | None, n_parts: int, index: int) -> "Change":
        """The change of one of n equal parts of the matrix along `dim`; None: of all of it."""
        a = _cut(self.a, 1, n_parts, index) if dim == 1 else self.a
        b = _cut(self.b, 0, n_parts, index) if dim == 0 else self.b
        return Change(a, b, self.scale)


def _cut(tensor: Tensor, dim: int, n_parts: int, index: int) -> Tensor:
    length = tensor.shape[dim] // n_parts
    return tensor.narrow(dim, index * length, length)


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: its changes and whole weights, by Meta's names of the model's weights."""

    folder: Path
    base: str | None  # name or folder of the model that it was trained on
    changes: dict[str, Change]
    weights: dict[str, Tensor]  # take the place of the base model's

    def touches(self, name: str) -> bool:
        """Whether the weight of this name differs from the base model's."""
        return name in self.changes or name in self.weights

    def merged(self, part: Tensor, name: str, dim: int | None, n_parts: int, index: int) -> Tensor:
        """The adapter's weight in the place of the base model's `part`; float32 if it has a change.

        `part` is one of n equal parts along `dim`, the one with this index; None: all of it.
        """
        if name in self.weights:
            whole = self.weights[name]
            part = whole if dim is None else _cut(whole, dim, n_parts, index).contiguous()
        if name not in self.changes:
            return part
        a, b, scale = self.changes[name].part(dim, n_parts, index)
        return part.to(torch.float32, copy=True).addmm_(b.float(), a.float(), alpha=scale)


def open_adapter(folder: Path, args: ModelArgs) -> Adapter:
    """Open the adapter folder of a base model with this shape.

    Raises ConfigError or CheckpointError for an adapter that is damaged, is not plain LoRA, or does
    not fit the shape.
    """
    shapes = args.whole_shapes()
    matrices = {
        hugging_face.hugging_face_name(name).removesuffix(".weight"): name
        for name, shape in shapes.items()
        if len(shape) == 2
    }
    config = read_lora_config(folder / CONFIG, list(matrices))
    file = next((folder / name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if file is None:
        raise CheckpointError(f"{folder} has no {' or '.join(WEIGHTS)}")
    stored = _read(file)
    changes: dict[str, Change] = {}
    for module, r in config.ranks.items():
        name = matrices[module]
        n, k = shapes[name]
        a = _take(stored, file, f"{module}.lora_A", (r, k))
        b = _take(stored, file, f"{module}.lora_B", (n, r))
        if not (a.isfinite().all() and b.isfinite().all()):
            raise CheckpointError(f"{file}: the change of {module} has numbers that are not finite")
        changes[name] = Change(a, _to_meta_rows(name, b, args), config.scales[module])
    weights: dict[str, Tensor] = {}
    for key in list(stored):
        if (shape := shapes.get(name := hugging_face.meta_name(key))) is not None:
            weights[name] = _to_meta_rows(name, _take(stored, file, key, shape), args)
    if stored:
        raise CheckpointError(f"{file}: {next(iter(stored))} does not belong to {CONFIG} and model")
    for replaced in config.replaced:
        if not any(f".{replaced}." in f".{hugging_face.hugging_face_name(n)}" for n in weights):
            raise CheckpointError(f"{file} lacks {replaced}, which is in modules_to_save")
    return Adapter(folder, config.base, changes, weights)


def write_adapter(
    folder: Path,
    matrices: dict[str, tuple[Tensor, Tensor]],
    args: ModelArgs,
    r: int,
    alpha: float,
    dropout: float,
    base: str | None,
) -> None:
    """Write an adapter in PEFT's format, which PEFT and `open_adapter` open.

    matrices: A and B of each changed matrix, by the matrix' name and in Meta's order of rows. Each
    kind of matrix is changed in all layers.
    base: name or folder of the base model.
    """
    tensors: dict[str, Tensor] = {}
    targets: dict[str, None] = {}
    for name, (a, b) in matrices.items():
        module = hugging_face.hugging_face_name(name).removesuffix(".weight")
        targets[module.rpartition(".")[2]] = None
        if name.endswith(hugging_face.ROTATED):
            b = hugging_face.to_hugging_face_rows(b, args.head_dim)
        for letter, tensor in (("A", a), ("B", b)):
            tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = tensor.detach().cpu().contiguous()
    with atomic_file(folder / WEIGHTS[0]) as out:
        out.write(save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, lora_settings(r, alpha, dropout, list(targets), base))


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of the file, by module and kind: model.layers.0.self_attn.q_proj.lora_A or
    .weight. Names lose the prefix and the adapter's own name. An embedding's change, which is
    stored for the transposed matrix, becomes lora_A and lora_B of the matrix itself."""
    stored: dict[str, Tensor] = {}
    for name, tensor in hugging_face.map_file(file).items():
        check_kind(file, name, tensor)
        key = name.removeprefix(PREFIX)
        if found := LORA.fullmatch(key):
            key = f"{found[1]}.{found[2]}"
        elif found := LORA_EMBEDDING.fullmatch(key):
            key = f"{found[1]}.lora_{'B' if found[2].endswith('A') else 'A'}"
            tensor = tensor.mT if tensor.dim() == 2 else tensor
        elif found := WHOLE.fullmatch(key):
            key = f"{found[1]}.{found[4]}"
        if key in stored:
            raise CheckpointError(f"{file} has {key} twice, under two names")
        stored[key] = tensor
    return stored


def _take(stored: dict[str, Tensor], file: Path, key: str, shape: tuple[int, ...]) -> Tensor:
    """Remove a tensor from `stored` and return it. Raises CheckpointError if it is missing or has
    another shape."""
    tensor = stored.pop(key, None)
    if tensor is None:
        raise CheckpointError(f"{file} lacks {key}")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{file}: {key} is {tuple(tensor.shape)}, but the base model and {CONFIG} need {shape}"
        )
    return tensor


def _to_meta_rows(name: str, tensor: Tensor, args: ModelArgs) -> Tensor:
    if not name.endswith(hugging_face.ROTATED):
        return tensor
    return hugging_face.to_meta_rows(tensor, args.head_dim)
