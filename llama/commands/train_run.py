"""Training runs from a configuration: build model and loaders, and train."""

from pathlib import Path

import torch

from llama import parallel
from llama.checkpoints.build import load_model, open_model
from llama.checkpoints.folder import run_checkpoints
from llama.commands.train_config import PLACES, FinetuneConfig, PretrainConfig, RunConfig
from llama.config import PRESETS, ModelArgs
from llama.errors import ConfigError, TrainingError
from llama.fast.gpu.device_weights import narrow
from llama.model import Transformer
from llama.terminal_text import say
from llama.tokenizer import Tokenizer
from llama.training.adapter_folder import AdapterFolder
from llama.training.chat_data import DialogLoader, load_dialogs
from llama.training.log import TrainingLog
from llama.training.loop import Loader, Trainer, checkpoint_activations, shard_model
from llama.training.lora import add_lora, check_base, lora_optimizer
from llama.training.token_files import DistributedShardedDataLoader, check_vocabulary


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
    """Check the options, make the groups of ranks, and return this rank's device. It raises for
    wrong options before anything is loaded or written."""
    device = parallel.local_device(config.device)
    config.check()
    config.options(device)
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
