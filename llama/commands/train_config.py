"""Training from a configuration: read flags and a TOML file, build model and loaders, and train."""

import logging
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch

from llama import parallel
from llama.adapters import TARGETS
from llama.checkpoints.build import load_model, open_model
from llama.checkpoints.folder import run_checkpoints
from llama.config import PRESETS, ModelArgs
from llama.errors import ConfigError, TrainingError
from llama.fast.gpu.device_weights import narrow
from llama.model import Transformer
from llama.terminal_text import say
from llama.tokenizer import Tokenizer
from llama.training.adapter_folder import AdapterFolder
from llama.training.chat_data import DialogLoader, load_dialogs
from llama.training.log import TrainingLog
from llama.training.loop import (
    Loader,
    Trainer,
    TrainingOptions,
    checkpoint_activations,
    shard_model,
)
from llama.training.lora import LoraOptions, add_lora, check_base, lora_optimizer
from llama.training.token_files import DistributedShardedDataLoader, check_vocabulary

log = logging.getLogger("llama")

# Options that may differ between machines.
PLACES = {"data", "eval_data", "tokenizer", "ckpt_dir", "adapter", "out_dir", "log_dir", "device"}


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
    train: Literal["all", "norms", "all_but_embeddings"] = "all"
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
            for name in ("lora_alpha", "quantize"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} is for LoRA: give lora_r too")
            return None
        if self.train != "all" or self.adapter is not None:
            raise ConfigError(
                "lora_r trains changes of the model in ckpt_dir: leave out train and adapter"
            )
        if self.quantize not in (None, "int8", "int4"):
            raise ConfigError(f"quantize is {self.quantize!r}: int8 or int4")
        return LoraOptions.read(self.lora_r, self.lora_alpha, self.lora_dropout, self.lora_targets)


def pretrain(config: PretrainConfig) -> Path:
    """Train a new model. Returns the folder of the last checkpoint.

    Raises a LlamaError for wrong options or data, and for a loss that is not finite.
    """
    device = _start(config)
    tokenizer = Tokenizer(config.tokenizer)
    if config.preset is not None:
        if config.preset not in PRESETS:
            known = ", ".join(PRESETS)
            raise ConfigError(f"preset is {config.preset!r}: it must be one of {known}")
        args = ModelArgs(**vars(PRESETS[config.preset]))
    else:
        names = "dim n_layers n_heads n_kv_heads hidden_dim multiple_of rope_theta tied".split()
        args = ModelArgs(**{name: getattr(config, name) for name in names})
        args.context_length = config.seq_len
    args.vocab_size = tokenizer.n_words
    args.max_seq_len = config.seq_len
    args.check()
    rank, ranks = parallel.dp_rank(), parallel.dp_size()

    def load(pattern: str) -> DistributedShardedDataLoader:
        loader = DistributedShardedDataLoader(pattern, config.batch, config.seq_len, rank, ranks)
        check_vocabulary(loader.files, tokenizer)
        return loader

    loader = load(config.data)
    eval_loader = None if config.eval_data is None else load(config.eval_data)
    torch.manual_seed(config.seed)
    with device:
        model = Transformer(args)
    return _run(config, model, tokenizer, loader, eval_loader)


def finetune(config: FinetuneConfig) -> Path:
    """Train a checkpoint on the assistant's messages of dialogs. Returns the folder of the last
    checkpoint.

    Raises a LlamaError for wrong options or data, and for a loss that is not finite.
    """
    device, lora = _start(config), config.lora
    setup, tokenizer, _ = open_model(
        config.ckpt_dir, config.tokenizer, config.seq_len, 1, config.model_parallel_size,
        "reference" if lora is None else "fast", config.quantize, None, device,  # may be quantized
        # bfloat16 would round small updates of trained weights away.
        "float32" if lora is None else None,
        adapter=config.adapter,
    )  # fmt: skip
    assert tokenizer is not None
    if lora is not None:
        check_base(setup.opened.args, setup.quantize)
    pad = max(tokenizer.eos_id, 0)  # any id will do: padding has no loss

    def load(path: str) -> DialogLoader:
        data = load_dialogs(path, tokenizer.chat_format(), config.seq_len + 1)
        if parallel.is_main_rank() and data.cut + data.dropped:
            say(
                f"{path}: {data.cut} dialogs cut after an answer and {data.dropped} dropped, to "
                f"fit into {config.seq_len} tokens"
            )
        rank, ranks = parallel.dp_rank(), parallel.dp_size()
        sizes = (config.batch, config.seq_len, rank, ranks)
        return DialogLoader(data.examples, pad, *sizes, seed=config.seed)

    # The data is read before the weights, so that a mistake in it is told at once.
    loader = load(config.data)
    eval_loader = None if config.eval_data is None else load(config.eval_data)
    with parallel.failing_together(device):
        model = load_model(setup)
    stored = None
    if lora is not None:
        if setup.quantize is not None:
            narrow(model, setup.quantize, device)
        add_lora(model, lora, config.seed)
        stored = AdapterFolder(lora, config.ckpt_dir)
    return _run(config, model, tokenizer, loader, eval_loader, stored)


def _start(config: RunConfig) -> torch.device:
    """Check the options, make the groups of ranks, and return this rank's device."""
    device = parallel.local_device(config.device)
    config.options(device)  # raises now for wrong options, before anything is loaded or written
    parallel.initialize(config.model_parallel_size, device)
    same = {name: value for name, value in vars(config).items() if name not in PLACES}
    parallel.require_same(same, device)
    return device


def _run(
    config: RunConfig,
    model: Transformer,
    tokenizer: Tokenizer,
    loader: Loader,
    eval_loader: Loader | None,
    stored: AdapterFolder | None = None,
) -> Path:
    """Continue the run in `out_dir`, or start it. Returns the folder of the last checkpoint."""
    device = model.device
    if config.checkpoint_activations:
        checkpoint_activations(model)
    if _needs_fsdp(config, model, device):
        shard_model(model)
    rates = config.learning_rate, config.weight_decay, (config.beta1, config.beta2), device.type
    try:
        if stored is not None:
            optimizer = lora_optimizer(model, *rates)
        else:
            optimizer = model.configure_optimizers(*rates, config.train)
    except ValueError as error:  # AdamW raises it if a rate or a beta is out of its range
        raise TrainingError(str(error)) from error
    replicas = parallel.dp_size()
    step_tokens = config.batch * config.seq_len * config.accumulation * replicas
    report = TrainingLog(
        tokenizer, step_tokens, config.log_dir, config.sample_every, [config.sample_prompt]
    )
    trainer = Trainer(
        model,
        [optimizer],
        loader,
        tokenizer.bos_id,
        config.options(device),
        config.out_dir,
        tokenizer.model_path,
        eval_loader,
        report,
        stored,
    )
    if trainer.resume() and parallel.is_main_rank():
        if trainer.step < config.steps:
            say(f"Continuing after step {trainer.step} of {config.out_dir}")
        else:
            say(f"{config.out_dir} is finished at step {trainer.step}: more need larger --steps")
    try:
        trainer.run()
    finally:
        report.close()
    return run_checkpoints(trainer.out_dir)[-1]


def _needs_fsdp(config: RunConfig, model: Transformer, device: torch.device) -> bool:
    """Whether to use FSDP: as the option `fsdp` says, or, if it is None, whether weights, gradients
    and AdamW's two moments need more than 80% of the GPU's memory."""
    if parallel.dp_size() == 1:
        if config.fsdp:
            raise TrainingError(
                "fsdp needs two or more data-parallel ranks: start them by torchrun"
            )
        return False
    if config.fsdp is not None or device.type != "cuda":
        return bool(config.fsdp)
    weights = list(model.parameters())
    needed = sum(weight.nbytes * (4 if weight.requires_grad else 1) for weight in weights)
    return needed > 0.8 * torch.cuda.get_device_properties(device).total_memory
