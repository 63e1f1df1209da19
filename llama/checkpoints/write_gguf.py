"""Write a checkpoint as a GGUF file, with the keys and the vocabulary that llama.cpp expects."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama.checkpoints.beside_weights import chat_template
from llama.checkpoints.generation_config import GGUF_KEYS, read_sampling
from llama.checkpoints.gguf_checkpoint import ARCHITECTURE, ROPE_DIVISORS, gguf_name, rope_divisors
from llama.checkpoints.inspect import weights_of
from llama.checkpoints.shards import Checkpoint
from llama.checkpoints.verify import kind_of
from llama.config import ModelArgs
from llama.errors import CheckpointError, ConfigError, TokenizerError
from llama.gguf_file import in_threads
from llama.gguf_reader import package
from llama.tokenizer import Tokenizer
from llama.tokenizer_files.from_gguf import KEYS

# The type of the matrices in the file, by the name that the user gives.
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
VALUES = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}


def parse_type(dtype: str | None, source: Checkpoint) -> str:
    """The type of the matrices. None: the dtype of the source, or bfloat16 if the source is
    quantized. Raises ConfigError for an unknown type, or one that does not fit the matrices."""
    name = str(source.dtype).removeprefix("torch.") if dtype is None else dtype
    if name not in TYPES:
        raise ConfigError(f"dtype is {name}: for a GGUF file it must be one of {', '.join(TYPES)}")
    gguf = package()
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[TYPES[name]]]
    for weight, shape in source.args.parameter_shapes().items():
        if len(shape) == 2 and shape[1] % block:
            raise ConfigError(
                f"dtype is {name}: a row of {weight} has {shape[1]} weights, not a multiple of "
                f"{block}"
            )
    return TYPES[name]


def header(
    source: Checkpoint, tokenizer: Tokenizer | None, name: str, matrix_type: str
) -> dict[str, Any]:
    """The keys and values of the file, without those of the tensors.

    name: the model's. Raises CheckpointError if llama.cpp cannot run the model, or if the tokenizer
    does not fit it.
    """
    gguf = package()
    n_parameters = sum(weight.parameters for weight in weights_of(source.args, 1))
    values = {
        "general.type": "model",
        "general.name": name,
        "general.size_label": gguf.size_label(n_parameters, 0, 0, 0),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": _file_type(matrix_type),
    }
    suggested = read_sampling(source.folder)
    values |= {GGUF_KEYS[option]: float(value) for option, value in suggested.items()}
    values |= {f"{ARCHITECTURE}.{key}": value for key, value in _shape(source.args).items()}
    if tokenizer is None:
        return values | {f"{KEYS}model": "no_vocab"}
    if tokenizer.n_words > source.args.vocab_size:
        raise CheckpointError(
            f"{tokenizer.model_path} has {tokenizer.n_words} tokens, but the model's vocab_size is "
            f"{source.args.vocab_size}: it is not the tokenizer of {source.folder}"
        )
    try:
        values |= tokenizer.as_gguf(source.args.vocab_size)
    except TokenizerError as error:
        raise CheckpointError(f"{error}; move it away to convert the weights alone") from error
    if kind_of(source.folder) != "base":
        values["tokenizer.chat_template"] = chat_template(source, tokenizer)
    return values


def _file_type(matrix_type: str) -> int:
    """The number that stands for "most tensors are of this type"."""
    types = package().LlamaFileType
    return int(types.ALL_F32 if matrix_type == "F32" else types[f"MOSTLY_{matrix_type}"])


def _shape(args: ModelArgs) -> dict[str, Any]:
    """The keys of the model's shape, without the architecture's name in front."""
    values: dict[str, Any] = {
        "vocab_size": args.vocab_size,
        "context_length": args.context,
        "embedding_length": args.dim,
        "block_count": args.n_layers,
        "feed_forward_length": args.ffn_dim,
        "attention.head_count": args.n_heads,
        "attention.head_count_kv": args.local_kv_heads(1),
        "attention.key_length": args.head_dim,
        "attention.value_length": args.head_dim,
        "attention.layer_norm_rms_epsilon": float(args.norm_eps),
        "rope.dimension_count": args.head_dim,
        "rope.freq_base": float(args.rope_theta),
    }
    scaling = args.rope_scaling
    if scaling is None:
        return values
    if scaling.kind == "dynamic":
        raise CheckpointError("RoPE scaling of kind dynamic cannot be stored in a GGUF file")
    if scaling.kind == "linear":
        return values | {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(scaling.factor),
        }
    return values | {"rope.scaling.original_context_length": scaling.original_context_length}


# ---- the file ---------------------------------------------------------------------------------


def write_gguf(source: Checkpoint, path: Path, values: dict[str, Any], matrix_type: str) -> None:
    """Write the header and all tensors. Memory holds one tensor at a time. Vectors are float32.

    Meta's and GGUF's rotary layouts both pair neighbouring rows, so nothing is permuted.
    """
    gguf = package()
    names = {gguf_name(name): name for name in source.args.parameter_shapes()}
    shapes = {gguf_name(name): shape for name, shape in source.args.parameter_shapes().items()}
    vectors: dict[str, Tensor] = {}
    if source.args.rope_scaling is not None and source.args.rope_scaling.kind == "llama3":
        vectors[ROPE_DIVISORS] = rope_divisors(source.args, source.args.rope_scaling)
        shapes[ROPE_DIVISORS] = tuple(vectors[ROPE_DIVISORS].shape)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in values.items():
        writer.add_key_value(key, value, gguf.GGUFValueType[VALUES[type(value)]])
    types = {name: _type(shape, matrix_type) for name, shape in shapes.items()}
    for name, type_ in types.items():
        in_bytes = gguf.quant_shape_to_byte_shape(shapes[name], type_)
        n_bytes = math.prod(in_bytes)
        writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), n_bytes, type_)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, type_ in tqdm(types.items(), "Converting", unit="tensor", delay=2):
            weight = vectors[name] if name in vectors else source.part(names[name], 1, 0)
            writer.write_tensor_data(pack(weight, type_))
    finally:
        writer.close()


def _type(shape: tuple[int, ...], matrix_type: str) -> Any:
    return package().GGMLQuantizationType[matrix_type if len(shape) == 2 else "F32"]


def pack(weight: Tensor, type_: Any) -> np.ndarray:
    """The bytes of a weight in a type of the package, uint8 (…, bytes of a row)."""
    gguf = package()
    floats = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if type_.name in floats:
        return weight.to(floats[type_.name]).contiguous().view(torch.uint8).numpy()
    packed = np.empty(gguf.quant_shape_to_byte_shape(weight.shape, type_), np.uint8)

    def pack_rows(some: range) -> None:
        for row in some:
            chunk = slice(row, row + some.step)
            packed[chunk] = gguf.quantize(weight[chunk].float().numpy(), type_)

    in_threads(pack_rows, *weight.shape)
    return packed
