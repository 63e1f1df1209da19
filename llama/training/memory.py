"""The memory that a training step needs, by formula. benchmarks/train_memory.py measures it."""

from dataclasses import dataclass, replace

import torch

from llama.checkpoints.inspect import bytes_of, resolve, size, weights_of
from llama.checkpoints.load import parse_dtype
from llama.config import ModelArgs
from llama.errors import ConfigError
from llama.fast.quantize import GPU_BLOCK, Width
from llama.parallel import SHARD_DIMS
from llama.training.lora import LoraOptions
from llama.training.objective import CHUNK

FLOAT = torch.float32.itemsize
# A step holds the logits' logarithms and two gradients of that size.
LOGITS = 3
DEQUANTIZING = 3  # tensors of the block's size in float32


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one rank, without data-parallel sharding and autocast."""

    weights: int  # for LoRA the frozen base, which a CPU maps from the file if it can
    adapter: int  # A and B in float32
    gradients: int
    optimizer: int  # AdamW's two moments
    activations: int  # what the layers keep for the backward pass
    logits: int
    dequantized: int  # some rows of a quantized matrix, during a product

    @property
    def peak(self) -> int:
        """The most at one time. Activations and logits are freed while the gradients are made."""
        always = self.weights + self.adapter + self.optimizer + self.dequantized
        return always + max(self.activations + self.logits, self.gradients)


def training_memory(
    args: ModelArgs,
    batch: int,
    seq_len: int,
    lora: LoraOptions | None = None,
    dtype: torch.dtype = torch.float32,
    quantize: Width | None = None,
    checkpointed: bool = False,
    mp_size: int = 1,
) -> TrainingMemory:
    """The memory of a step of `batch` rows of `seq_len` tokens.

    lora: None: all weights are trained, in float32.
    dtype, quantize: of the frozen weights with LoRA.
    checkpointed: each layer keeps only its input; see `checkpoint_activations`.
    """
    dtype = torch.float32 if lora is None else dtype
    shape = args if quantize is None else replace(args, tied=False)  # both matrices exist then
    weights = weights_of(shape, mp_size)
    held = sum(w.per_rank(mp_size) * bytes_of(w.name, dtype, quantize) for w in weights)
    adapter = 0 if lora is None else adapter_size(args, lora, mp_size)
    trained = sum(w.per_rank(mp_size) for w in weights) if lora is None else adapter
    tokens = batch * seq_len
    one_layer = tokens * layer_bytes(args, lora, dtype, mp_size)
    if checkpointed:
        activations = args.n_layers * tokens * args.dim * dtype.itemsize + one_layer
    else:
        activations = args.n_layers * one_layer
    largest = args.dim * max(args.vocab_size, args.ffn_dim) // mp_size  # a matrix of a rank
    with_logits = tokens if lora is None else batch * min(CHUNK, seq_len)
    return TrainingMemory(
        weights=int(held),
        adapter=FLOAT * adapter,
        gradients=FLOAT * trained,
        optimizer=2 * FLOAT * trained,
        activations=activations,
        logits=LOGITS * FLOAT * with_logits * args.vocab_size,
        dequantized=0 if quantize is None else DEQUANTIZING * FLOAT * min(GPU_BLOCK, largest),
    )


def adapter_size(args: ModelArgs, lora: LoraOptions, mp_size: int = 1) -> int:
    """The numbers in A and B on one rank."""
    count = 0
    for name, (n, k) in _matrices(args).items():
        if name in lora.targets:
            is_row_parallel = SHARD_DIMS[name] == 1
            count += lora.r * (n + k // mp_size if is_row_parallel else n // mp_size + k)
    return args.n_layers * count


def layer_bytes(args: ModelArgs, lora: LoraOptions | None, dtype: torch.dtype, mp_size: int) -> int:
    """Bytes that one layer keeps of a token for the backward pass, as PyTorch's autograd does.

    A matrix keeps its input only if it is trained or has a change.
    """
    trained = set(_matrices(args) if lora is None else lora.targets)
    q, kv = (_matrices(args)[name][0] // mp_size for name in ("wq", "wk"))
    f = args.ffn_dim // mp_size
    numbers = 2 * q + 2 * kv + 3 * f  # attention's q, k, v and result; SiLU's input, both factors
    numbers += args.dim * (not trained.isdisjoint(("wq", "wk", "wv")))
    numbers += args.dim * (not trained.isdisjoint(("w1", "w3")))
    numbers += f * ("w2" in trained)
    if lora is None:
        numbers += 2 * args.dim  # the normalized inputs, for the gradients of the norms' weights
    else:
        numbers += lora.r * len(lora.targets)
    return numbers * dtype.itemsize + 2 * args.dim * FLOAT  # the norms' inputs, in float32


def _matrices(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shapes of a layer's matrices: wq, wk, …"""
    shapes = replace(args, n_layers=1).whole_shapes().items()
    return {
        name.split(".")[-2]: shape for name, shape in shapes if name.split(".")[-2] in SHARD_DIMS
    }


def describe_training(
    name: str,
    batch: int,
    seq_len: int | None,
    lora: LoraOptions | None,
    dtype: str,
    quantize: Width | None,
    checkpointed: bool,
    mp_size: int,
) -> str:
    """The report of `llama inspect --train`. seq_len None: 2048, or the context if smaller."""
    title, args, saved = resolve(name)
    args.check_split(mp_size)
    seq_len = min(2048, args.context) if seq_len is None else seq_len
    for option, value in (("batch", batch), ("seq_len", seq_len)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{option} is {value!r}: it must be 1 or more")
    if seq_len > args.context:
        raise ConfigError(f"seq_len {seq_len}: the model's context is {args.context}")
    width = quantize or saved
    if width not in (None, "int8", "int4"):
        raise ConfigError(f"quantize is {width!r}: int8 or int4")
    if width is not None and lora is None:
        raise ConfigError(f"weights in {width} are trained by LoRA only: give lora_r")
    kind = torch.float32 if lora is None else parse_dtype(dtype)
    needed = training_memory(args, batch, seq_len, lora, kind, width, checkpointed, mp_size)
    form = width or str(kind).removeprefix("torch.")
    rows = [
        (f"weights in {form}{'' if lora is None else ', frozen'}", needed.weights),
        ("adapter", needed.adapter),
        ("gradients", needed.gradients),
        ("AdamW's moments", needed.optimizer),
        ("activations", needed.activations),
        ("logits", needed.logits),
        ("dequantized weights", needed.dequantized),
        ("peak", needed.peak),
    ]
    where = "" if mp_size == 1 else f", on each of {mp_size} ranks"
    lines = [f"Training {title}: {batch} × {seq_len:,} tokens a step{where}"]
    lines += [f"{what:<28}{size(n_bytes):>12}" for what, n_bytes in rows if n_bytes]
    return "\n".join(lines)
