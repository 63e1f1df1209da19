"""Describe a model without loading a weight: modules, sizes, splits, KV cache and FLOPs."""

import os
from dataclasses import dataclass, replace
from operator import mul

import torch

from llama import parallel
from llama.checkpoints import shards
from llama.checkpoints.folder import (
    find_folder,
    open_checkpoint,
    read_args,
    read_quantization,
)
from llama.checkpoints.load import parse_dtype
from llama.config import PRESETS, ModelArgs
from llama.errors import CheckpointError, ConfigError, require_number
from llama.fast.quantize import BYTES, Width, is_quantized
from llama.memory import size

SPLITS = {0: "rows (dim 0)", 1: "columns (dim 1)", None: "copied"}


@dataclass
class Weight:
    """One weight outside the layers, or one weight that every layer has."""

    name: str  # in the state dict; layers.N.… stands for all layers
    shape: tuple[int, ...]
    split: int | None  # the dimension that is split over ranks; None: each rank has all
    count: int  # how many of them the model has
    copies: int = 1  # ranks that hold the same part, if there are more ranks than key/value heads

    @property
    def parameters(self) -> int:
        return self.count * torch.Size(self.shape).numel()

    @property
    def names(self) -> list[str]:
        """The names in the state dict, one for each layer that has the weight."""
        return [self.name.replace(".N.", f".{i}.") for i in range(self.count)]

    def per_rank(self, mp_size: int) -> int:
        """Parameters that one rank holds."""
        if self.split is None:
            return self.parameters
        return self.parameters * self.copies // mp_size

    def shape_per_rank(self, mp_size: int) -> tuple[int, ...]:
        """The shape of the part that one rank holds."""
        shape = list(self.shape)
        if self.split is not None:
            shape[self.split] = shape[self.split] * self.copies // mp_size
        return tuple(shape)


def weights_of(args: ModelArgs, mp_size: int) -> list[Weight]:
    """Every weight by Meta's name, embedding first. A weight of the layers is listed once."""
    copies = max(1, mp_size // args.local_kv_heads(1))
    weights = []
    for name, shape in replace(args, n_layers=1).parameter_shapes().items():
        weights.append(
            Weight(
                name.replace("layers.0.", "layers.N."),
                shape,
                parallel.shard_dim(name, args.embedding_shard_dim),
                args.n_layers if name.startswith("layers.") else 1,
                copies if name.endswith(shards.KEYS_AND_VALUES) else 1,
            )
        )
    return weights


def cache_bytes(args: ModelArgs, mp_size: int, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers, on one rank. For int8, the scales are
    included."""
    heads = max(1, args.local_kv_heads(mp_size))
    scale = torch.float32.itemsize if dtype == torch.int8 else 0
    return 2 * args.n_layers * heads * (args.head_dim * dtype.itemsize + scale)


def bytes_of(name: str, dtype: torch.dtype, quantization: Width | None) -> float:
    """Bytes per parameter of a weight, including its share of the scales."""
    if quantization is not None and is_quantized(name):
        return BYTES[quantization]
    return dtype.itemsize


def flops_per_token(args: ModelArgs, context: int) -> int:
    """FLOPs of one token: two for each parameter of the matrices, and the FLOPs of attention
    over `context` keys and values."""
    matrices = sum(w.parameters for w in weights_of(args, 1) if len(w.shape) == 2)
    embedding = 0 if args.tied else args.vocab_size * args.dim  # a look-up, not a product
    return 2 * (matrices - embedding) + 4 * args.n_layers * args.dim * context


def resolve(name: str) -> tuple[str, ModelArgs, Width | None]:
    """The name to show, the shape and the quantization of a preset or a checkpoint."""
    if name in PRESETS:
        return name, PRESETS[name], None
    try:
        folder = find_folder(name)
    except CheckpointError as error:
        if os.path.lexists(name):
            raise
        raise ConfigError(f"{error}; published models are {', '.join(PRESETS)}") from error
    args = read_args(folder)
    if any(folder.glob(shards.shard_name(0))):
        # params.json says neither that a model is tied nor, for Llama 2, its vocab_size.
        opened = open_checkpoint(folder)
        opened.set_vocab_size()
        args = opened.args
    elif args.vocab_size == -1:
        args.vocab_size = PRESETS[next(iter(args.published()), "llama-2-7b")].vocab_size
    return next(iter(args.published()), name), args, read_quantization(folder)


def describe(
    name: str,
    mp: int = 1,
    max_seq_len: int | None = None,
    max_batch_size: int = 4,
    dtype: str = "bfloat16",
) -> str:
    """The whole report, as `llama inspect` prints it."""
    title, args, quantization = resolve(name)
    args.check_split(mp)
    require_number("max_batch_size", max_batch_size, whole=True)
    kind = parse_dtype(dtype)
    context = args.context if max_seq_len is None else max_seq_len
    if not 0 < context <= args.context:
        raise ConfigError(f"max_seq_len is {context}: it must be 1 to the context, {args.context}")
    weights = weights_of(args, mp)
    total = sum(w.parameters for w in weights)
    total_per_rank = sum(w.per_rank(mp) for w in weights)
    token = cache_bytes(args, mp, kind)
    parameter_bytes = [bytes_of(w.name, kind, quantization) for w in weights]
    whole, share = (
        sum(map(mul, parameter_bytes, numbers))
        for numbers in ([w.parameters for w in weights], [w.per_rank(mp) for w in weights])
    )
    saved_in = dtype if quantization is None else f"{quantization}, embedding and norms in {dtype}"

    lines = [f"{title}: {total:,} parameters, {args.n_layers} layers, context {args.context:,}", ""]
    header: tuple[str, ...] = (
        "module",
        "shape",
        "split over ranks",
        "each",
        "times",
        "parameters",
        "a rank",
    )
    rows = [header]
    for w in weights:
        shape = " × ".join(map(str, w.shape))
        split = SPLITS[w.split] + (f", {w.copies} ranks the same" if w.copies > 1 else "")
        numbers = (w.parameters // w.count, w.count, w.parameters, w.per_rank(mp))
        rows.append((w.name.removesuffix(".weight"), shape, split, *(f"{n:,}" for n in numbers)))
    if args.tied:
        rows.append(("output", "is tok_embeddings", "", "", "", "", ""))
    rows.append(("all", "", "", "", "", f"{total:,}", f"{total_per_rank:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())

    scaling = args.rope_scaling
    rope = f"theta {args.rope_theta:g}" + (f", scaled by {scaling.factor:g}" if scaling else "")
    lines += [
        "",
        f"ranks            {mp} (can be {', '.join(map(str, args.workable_sizes()))})",
        f"weights          {size(whole)} in {saved_in}, {size(share)} a rank",
        f"KV cache         {size(token)} a token and rank; {max_batch_size} rows of {context:,}: "
        f"{size(token * context * max_batch_size)} a rank",
        f"FLOPs a token    {flops_per_token(args, 0) / 1e9:,.2f} billion, and "
        f"{flops_per_token(args, context) / 1e9:,.2f} billion with {context:,} tokens before it",
        f"heads            {args.n_heads} queries on {args.n_kv_heads} keys/values of "
        f"{args.head_dim}; feed-forward {args.ffn_dim:,}; RoPE {rope}",
    ]
    return "\n".join(lines)
