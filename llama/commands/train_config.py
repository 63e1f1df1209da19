"""The configuration of a training run: read from flags and a TOML file, and checked."""

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch

from llama.adapters import TARGETS
from llama.errors import MAX_NUMBER, ConfigError, require_number
from llama.files import check_can_make_folder
from llama.training.loop import (
    TrainingOptions,
)
from llama.training.lora import LoraOptions

log = logging.getLogger("llama")

# Options that may differ between machines.
PLACES = {"data", "eval_data", "tokenizer", "ckpt_dir", "adapter", "out_dir", "log_dir", "device"}


TrainedWeights = Literal["all", "norms", "all_but_embeddings"]


@dataclass(kw_only=True)
class RunConfig:
    """The options that training and fine-tuning share. `RUN` in flags.py explains them."""

    out_dir: str  # folder for the checkpoints; a run in this folder is continued
    batch: int = 8  # rows that a rank computes at a time
    seq_len: int = 512  # tokens of a row
    accumulation: int = 1  # batches of a step, on each rank
    steps: int = 1000
    learning_rate: float = 1e-3  # peak
    warmup_steps: int = 50
    decay_steps: int | None = None  # steps of a linear decay at the end; None: cosine decay
    final_lr: float = 0.1  # learning rate at the end, as a fraction of the peak
    weight_decay: float = 0.1  # of matrices
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest norm of the gradient
    train: TrainedWeights = "all"
    separate_documents: bool = True  # no attention between the documents of a row
    autocast: bool | None = None  # matrix products in bfloat16; None: only on a GPU
    checkpoint_activations: bool = False  # keep each layer's input only, compute the rest again
    eval_every: int = 100  # steps
    eval_batches: int = 20  # batches of an evaluation, on each rank
    checkpoint_every: int = 200  # steps
    keep: int = 2  # how many checkpoints stay; older ones are deleted
    seed: int = 1
    device: str | None = None  # None: this rank's GPU, else the CPU
    model_parallel_size: int = 1  # ranks that share one model
    fsdp: bool | None = None  # split the model over replicas; None: if a GPU is too small
    log_dir: str | None = None  # for TensorBoard; None: nothing is written
    sample_every: int = 0  # steps between sample texts; 0: none
    sample_prompt: str = "Once upon a time"

    @classmethod
    def read(cls, path: str | Path | None, flags: Mapping[str, Any]) -> Self:
        """Read the TOML file and the flags, which take precedence.

        Raises ConfigError for an unreadable file, and for an unknown, missing or wrong option.
        """
        given: dict[str, Any] = {}
        if path is not None:
            try:
                given |= tomllib.loads(Path(path).read_bytes().decode("utf-8"))
            except OSError as error:
                raise ConfigError(f"cannot read {path}: {error.strerror}") from error
            except ValueError as error:  # the errors of TOML and of Unicode are ValueErrors
                if Path(path).suffix in (".jsonl", ".json"):
                    raise ConfigError(
                        f"{path} is not a TOML file of options; did you mean --data {path}?"
                    ) from None
                raise ConfigError(f"{path} is not TOML: {error}") from error
        given |= flags
        known = {f.name: f for f in fields(cls)}
        if unknown := sorted(given.keys() - known.keys()):
            raise ConfigError(f"unknown option(s): {', '.join(unknown)}")
        for name, f in known.items():
            if name not in given:
                if f.default is f.default_factory:  # both are MISSING: the field has no default
                    raise ConfigError(f"{name} is missing: give it as a flag or in the TOML file")
                continue
            kind = f.type.__name__ if isinstance(f.type, type) else str(f.type)
            given[name] = _convert(name, given[name], kind)
        if "warmup_steps" not in given:
            _shorten_warmup(given, cls.warmup_steps)
        return cls(**given)

    def check(self) -> None:
        """Raise a LlamaError for an option that is out of its range. `options` checks others."""
        for name in ("batch", "seq_len"):
            require_number(name, getattr(self, name), whole=True)
        for name in ("sample_every", "weight_decay"):
            if not 0 <= getattr(self, name) <= MAX_NUMBER:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be 0 or above")
        require_number("learning_rate", self.learning_rate)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}: it must be 0 to 2**63 - 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be 0 to below 1")
        if self.train not in get_args(TrainedWeights):
            known = ", ".join(get_args(TrainedWeights))
            raise ConfigError(f"train is {self.train!r}: it must be one of {known}")
        for folder in (self.out_dir, self.log_dir):
            if folder is not None:
                check_can_make_folder(folder)

    def options(self, device: torch.device) -> TrainingOptions:
        """The options of `Trainer`."""
        autocast = device.type == "cuda" if self.autocast is None else self.autocast
        same = {f.name for f in fields(TrainingOptions)} - {"autocast"}
        values = {name: value for name, value in asdict(self).items() if name in same}
        return TrainingOptions(**values, autocast=torch.bfloat16 if autocast else None)


def _shorten_warmup(given: dict[str, Any], usual: int) -> None:
    """Shorten the warm-up of a short run. If the steps before the decay are fewer than the usual
    warm-up, half of these steps are for the warm-up."""
    room = given.get("steps", usual) - (given.get("decay_steps") or 0)
    if 0 < room < usual:
        given["warmup_steps"] = room // 2
        log.info("warmup_steps is %d, not %d: the run is short", room // 2, usual)


def _convert(name: str, value: Any, kind: str) -> Any:
    """Convert a value to the type of its field, `kind`. Raises ConfigError if that is not possible.
    An int is accepted for a float, and a number for a str."""
    if value is None and "None" in kind:
        return None
    if "float" in kind and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if ("str" in kind or "Literal" in kind) and isinstance(value, int | float | Path):
        value = str(value)  # fire converts the name 1 of a folder to a number
    for word, types in {"bool": bool, "int": int, "float": float}.items():
        if word in kind and "Literal" not in kind:
            if not isinstance(value, types) or isinstance(value, bool) != (types is bool):
                raise ConfigError(f"{name} is {value!r}: it must be {kind}")
            return value
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}: it must be {kind}")
    return value


@dataclass(kw_only=True)
class PretrainConfig(RunConfig):
    """The options for training a new model. `preset`, or `dim` and the options after it, give the
    shape."""

    data: str  # pattern of token files
    tokenizer: str  # tokenizer.model; it gives vocab_size and is copied into the checkpoints
    eval_data: str | None = None  # pattern of token files
    preset: str | None = None  # a name in PRESETS
    dim: int = 256
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    hidden_dim: int | None = None
    multiple_of: int = 32
    rope_theta: float = 500000.0
    tied: bool = False


@dataclass(kw_only=True)
class FinetuneConfig(RunConfig):
    """The options for fine-tuning a checkpoint on dialogs."""

    data: str  # JSONL file of dialogs
    ckpt_dir: str | None = None  # None: the bundled model
    tokenizer: str | None = None  # None: the one in ckpt_dir
    eval_data: str | None = None  # JSONL file of dialogs
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    steps: int = 100
    warmup_steps: int = 10
    adapter: str | None = None  # folder of a LoRA adapter, merged into the base before training
    lora_r: int | None = None  # train changes of this rank; None: train the weights
    lora_alpha: float | None = None  # a change is multiplied by lora_alpha / lora_r; None: by 2
    lora_dropout: float = 0.0
    lora_targets: str = ",".join(TARGETS)  # the matrices that get a change
    quantize: Literal["int8", "int4"] | None = None  # round the frozen matrices

    @property
    def lora(self) -> LoraOptions | None:
        """The options for LoRA; None: train the weights. Raises a LlamaError if they clash."""
        if self.lora_r is None:
            for name in ("lora_alpha", "lora_dropout", "lora_targets", "quantize"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ConfigError(f"{name} is for LoRA: give lora_r too")
            return None
        if self.train != "all" or self.adapter is not None:
            raise ConfigError(
                "lora_r trains changes of the model in ckpt_dir: leave out train and adapter"
            )
        if self.quantize not in (None, "int8", "int4"):
            raise ConfigError(f"quantize is {self.quantize!r}: it must be int8 or int4")
        return LoraOptions.read(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_targets)
