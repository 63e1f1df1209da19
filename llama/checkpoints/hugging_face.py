"""Hugging Face's layout of a Llama folder: `config.json`, names, rotary order, `.safetensors`.

Only this file knows Hugging Face's names of tensors and settings.
"""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.checkpoints.pickled import read_pickled, unreadable
from llama.config import ModelArgs
from llama.errors import CheckpointError, ConfigError
from llama.files import parse_json, read_json, why_unreadable
from llama.rope_scaling import RopeScaling

# The names of the weights' file, in the order in which they are looked for. The weights may also be
# in several files with an index.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")

# Hugging Face's name for each of Meta's module names: outside the layers, and within a layer.
MODEL_MODULES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LAYER_MODULES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TO_META = {theirs: metas for metas, theirs in (MODEL_MODULES | LAYER_MODULES).items()}
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # RoPE's table in old files, which is not needed


def hugging_face_name(name: str) -> str:
    """Hugging Face's name of a tensor: layers.0.attention.wq.weight becomes
    model.layers.0.self_attn.q_proj.weight."""
    module, _, kind = name.rpartition(".")
    if module in MODEL_MODULES:
        return f"{MODEL_MODULES[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"model.layers.{layer}.{LAYER_MODULES[inner]}.{kind}"


def meta_name(name: str) -> str:
    """Meta's name of a tensor. An unknown name stays as it is."""
    module, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        layer, inner = found.groups()
        return f"layers.{layer}.{TO_META[inner]}.{kind}" if inner in TO_META else name
    return f"{TO_META[module]}.{kind}" if module in TO_META else name


# ---- the order of rows in Q and K -------------------------------------------------------------
# RoPE rotates pairs of features of a head. Meta pairs neighbours, (0, 1), (2, 3), …; Hugging Face
# pairs feature i with i + head_dim / 2. So the rows of Q and K have another order in each head.

ROTATED = ("wq.weight", "wk.weight", "wq.bias", "wk.bias")  # the ends of their names


def to_meta_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows from Hugging Face's order into Meta's: (heads * head_dim, …), a copy."""
    heads = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)


def to_hugging_face_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows from Meta's order into Hugging Face's: (heads * head_dim, …), a copy."""
    heads = weight.view(-1, head_dim // 2, 2, *weight.shape[1:])
    return heads.transpose(1, 2).reshape(weight.shape)


# ---- config.json ------------------------------------------------------------------------------

FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
SCALING_FIELDS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_context_length": "original_max_position_embeddings",
}


def read_config(path: Path, rope_factor: float | None = None) -> ModelArgs:
    """Read a `config.json`; rope_factor, if given, replaces its factor of scaled RoPE.

    Raises ConfigError if the file is damaged or does not describe a plain Llama text model.
    """
    config = read_json(path)
    try:
        _check_is_plain_llama(config)
        known: dict[str, Any] = {}
        for ours, theirs in FIELDS.items():
            if theirs not in config:
                raise ConfigError(f"lacks {theirs}")
            known[ours] = config[theirs]
        theta, scaling = _rope(config, rope_factor)
        args = ModelArgs(
            **known,
            n_kv_heads=config.get("num_key_value_heads"),
            head_width=_head_width(config),
            context_length=_context(config.get("max_position_embeddings"), scaling),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            tied=_flag(config, "tie_word_embeddings"),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return args


def _flag(config: dict[str, Any], name: str) -> bool:
    """A setting that is true or false; absent or null is false."""
    value = config.get(name)
    if value not in (True, False, None):
        raise ConfigError(f"{name} is {value!r}: it must be true or false")
    return bool(value)


def _head_width(config: dict[str, Any]) -> int | None:
    """`head_dim` if it is not hidden_size / num_attention_heads, as in pruned models; else None."""
    width, dim, n_heads = (
        config.get(k) for k in ("head_dim", "hidden_size", "num_attention_heads")
    )
    is_usual = isinstance(dim, int) and isinstance(n_heads, int) and width == dim / max(n_heads, 1)
    return None if is_usual else width


def make_config(args: ModelArgs, dtype: torch.dtype) -> dict[str, Any]:
    """The content of a `config.json` for `LlamaForCausalLM`, with the keys of transformers 4, which
    transformers 5 reads too."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": args.attention_bias,
        "mlp_bias": args.mlp_bias,
        "num_key_value_heads": args.n_kv_heads,
        "max_position_embeddings": _max_position(args),
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": args.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    config |= {theirs: getattr(args, ours) for ours, theirs in FIELDS.items()}
    config["intermediate_size"] = args.ffn_dim
    if args.head_width is not None:
        config["head_dim"] = args.head_width
    if args.rope_scaling is not None:
        scaling = {theirs: getattr(args.rope_scaling, o) for o, theirs in SCALING_FIELDS.items()}
        if args.rope_scaling.kind != "llama3":
            scaling = {"factor": args.rope_scaling.factor}
        config["rope_scaling"] = {"rope_type": args.rope_scaling.kind, **scaling}
    return config


# Llamas that this library cannot run, by `model_type`, and what to take instead.
OTHER_MODELS = {
    "mllama": "Llama 3.2 Vision: its text model is Llama 3.1 8B or 70B, take that instead",
    "llama4": "Llama 4, another architecture: take a Llama of 3.3 or before",
    "llama4_text": "Llama 4, another architecture: take a Llama of 3.3 or before",
}


def _check_is_plain_llama(config: dict[str, Any]) -> None:
    """Raise a ConfigError that names the key, if this is not a plain Llama text model."""
    if other := OTHER_MODELS.get(str(config.get("model_type"))):
        raise ConfigError(f"this is {other}")
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConfigError(
            f"it is quantized ({method or 'by an unknown method'}): take the original model. To "
            'quantize that here, give quantize="int8" or "int4"'
        )
    plain = {
        "model_type": ("llama",),
        "hidden_act": ("silu", None),
        "vision_config": (None,),
    }
    for key, allowed in plain.items():
        value = config.get(key)
        if value not in allowed:
            raise ConfigError(f"{key} is {value!r}: not a plain Llama text model")


def _rope(config: dict[str, Any], rope_factor: float | None) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from the keys of transformers 5 (`rope_parameters`) or of 4."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"the RoPE settings are {rope!r}, not an object")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind in ("linear", "dynamic") and "factor" in rope:
        scaling = RopeScaling(rope["factor"] if rope_factor is None else rope_factor, kind=kind)
        if kind == "dynamic":
            length: Any = config.get("max_position_embeddings")
            scaling = replace(scaling, original_context_length=length)
        return theta, scaling
    if kind != "llama3":
        raise ConfigError(f"RoPE of type {kind!r}: it must be default, llama3, linear or dynamic")
    if missing := [theirs for theirs in SCALING_FIELDS.values() if theirs not in rope]:
        raise ConfigError(f"the RoPE settings lack {', '.join(missing)}")
    values = {ours: rope[theirs] for ours, theirs in SCALING_FIELDS.items()}
    return theta, RopeScaling(**values | ({} if rope_factor is None else {"factor": rope_factor}))


def _context(length: Any, scaling: RopeScaling | None) -> Any:
    """The context in tokens, computed from `length`, a config.json's `max_position_embeddings`.

    With dynamic scaling, `length` is the original context. With linear scaling, some files give the
    original context and others the scaled one. An original context is at most 4096, as of Llama 2,
    so a larger `length` is taken as scaled.
    """
    if scaling is None or type(length) is not int:
        return length
    is_original = scaling.kind == "dynamic" or (scaling.kind == "linear" and length <= 4096)
    return int(length * scaling.factor) if is_original else length


def _max_position(args: ModelArgs) -> int:
    """The `max_position_embeddings` that `_context` reads back as the model's context."""
    if args.rope_scaling is not None and args.rope_scaling.kind == "dynamic":
        return args.rope_scaling.original_context_length
    return args.context


# ---- the tensors ------------------------------------------------------------------------------


def map_tensors(folder: Path) -> dict[str, Tensor]:
    """The memory-mapped tensors of the folder's `.safetensors` or `.bin` files, by Meta's names.

    Raises CheckpointError for a file that is missing, damaged, or outside the folder.
    """
    weights = weight_files(folder) or WEIGHTS[0]
    index = weights + ".index.json"
    if os.path.lexists(folder / index):
        weight_map = read_json(folder / index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / index} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(f"{folder / index} places {name} outside its folder: {file}")
        files = sorted(set(weight_map.values()))
    else:
        weight_map, files = None, [weights]
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = map_file(folder / file)
        wanted = found if weight_map is None else [n for n in weight_map if weight_map[n] == file]
        for name in wanted:
            if name not in found:
                raise CheckpointError(f"{folder / file} lacks {name}, which {index} places there")
            if IGNORED.fullmatch(name):
                continue
            if (ours := meta_name(name)) in tensors:
                raise CheckpointError(f"{folder / file} has {name} twice, under two names")
            tensors[ours] = found[name]
    if not tensors:
        raise CheckpointError(f"{folder} has no tensors in its {weights}")
    return tensors


def weight_files(folder: Path) -> str | None:
    """The name in WEIGHTS whose file the folder has, whole or in parts. None if it has neither."""
    for name in WEIGHTS:
        path = folder / name
        if any(folder.glob(f"{path.stem}*{path.suffix}")):
            return name
    return None


def map_file(path: Path) -> dict[str, Tensor]:
    """The memory-mapped tensors of one file, by their names in the file."""
    if path.suffix == ".bin":
        return read_pickled(path)
    if reason := why_unreadable(path):
        raise CheckpointError(f"cannot read {path}: {reason}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            _check_header(path)
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        raise unreadable(path, error) from error


def _check_header(path: Path) -> None:
    """Raise ValueError if a `.safetensors` file names a tensor twice, which its library accepts."""
    with path.open("rb") as file:
        parse_json(file.read(int.from_bytes(file.read(8), "little")))
