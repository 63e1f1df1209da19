"""Checkpoints of a LoRA run: folders in PEFT's format with the trained changes alone."""

from pathlib import Path

import torch
from fairscale.nn.model_parallel.mappings import gather_from_model_parallel_region
from torch import Tensor

from llama import parallel
from llama.checkpoints.adapter import open_adapter, write_adapter
from llama.errors import TrainingError
from llama.model import Transformer
from llama.training.lora import LoraOptions, part_of_rank, trained


class AdapterFolder:
    """What `Trainer` stores of a model with changes; see `checkpoint.Stored`.

    base: name or folder of the base model, which the adapter records.
    """

    def __init__(self, options: LoraOptions, base: str | None) -> None:
        self.options, self.base = options, base

    def weights(self, model: Transformer) -> dict[str, Tensor]:
        return dict(trained(model))

    @torch.no_grad()
    def gathered(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        whole = {}
        for name, part in weights.items():
            dim = parallel.shard_dim(name, 0)
            if dim == 0:
                part = gather_from_model_parallel_region(part.T.contiguous()).T
            elif dim == 1:
                part = gather_from_model_parallel_region(part)
            whole[name] = part
        return whole

    def write(self, folder: Path, model: Transformer, weights: dict[str, Tensor]) -> None:
        if not parallel.is_main_rank():
            return
        modules = dict.fromkeys(name.rpartition(".")[0] for name in weights)
        matrices = {
            f"{module}.weight": (weights[f"{module}.lora_A"], weights[f"{module}.lora_B"])
            for module in modules
        }
        r, alpha, dropout = self.options.r, self.options.alpha, self.options.dropout
        write_adapter(folder, matrices, model.params, r, alpha, dropout, self.base)

    def read(self, folder: Path, model: Transformer) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        scales = set()
        for name, change in open_adapter(folder, model.params).changes.items():
            module = name.removesuffix(".weight")
            scales.add(change.scale)
            for part, whole in ((f"{module}.lora_A", change.a), (f"{module}.lora_B", change.b)):
                parts[part] = part_of_rank(part, whole)
        if parts.keys() != trained(model).keys() or scales != {self.options.scale}:
            raise TrainingError(
                f"{folder} is of a run with other lora_targets, or another lora_alpha / lora_r; "
                "choose another out_dir"
            )
        return parts
