"""params.json: Meta's description of a model, read and written."""

from dataclasses import asdict, replace
from pathlib import Path

from llama.config import LLAMA_2_THETA, PRESETS, ModelArgs
from llama.errors import ConfigError
from llama.fast.quantize import LAYOUT, Width
from llama.files import read_json, write_json
from llama.rope_scaling import RopeScaling

REQUIRED_KEYS = ("dim", "n_layers", "n_heads", "norm_eps")
KNOWN_KEYS = frozenset(REQUIRED_KEYS) | {
    "vocab_size",  # Code Llama's files lack it
    "n_kv_heads",
    "multiple_of",
    "ffn_dim_multiplier",
    "rope_theta",
    "use_scaled_rope",
    "hidden_dim",  # this and the next keys are not in Meta's files
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "context_length",
    "rope_scaling",
    "quantization",
}
# If a key in Meta's file begins with one of these, the model is not a plain text model.
OTHER_MODELS = {
    "vision_": "a vision model",
    "quantization_args": "a quantized model",
    "lora_args": "a LoRA adapter",
}


def read_params(path: str | Path, rope_factor: float | None = None) -> ModelArgs:
    """Read a `params.json` as Meta ships it.

    rope_factor: factor of scaled RoPE, which Meta's files do not give. None: the factor in the
        file's `rope_scaling`. If the file has none, it is the published factor: 32 for the two
        Llama 3.2 shapes, and 8 for all other shapes. Meta's own code always uses 8.
    Raises ConfigError for a file that is missing, is not JSON, has an unknown key, lacks a required
    key, or does not describe a plain Llama text model.
    """
    path = Path(path)
    params = read_json(path)
    for key in params:
        for prefix, what in OTHER_MODELS.items():
            if key.startswith(prefix) and params[key] is not None:
                raise ConfigError(f"{path} has {key}: this is {what}, not a plain text model")
    if unknown := sorted(params.keys() - KNOWN_KEYS - OTHER_MODELS.keys()):
        raise ConfigError(f"{path} has unknown keys: {', '.join(unknown)}")
    if missing := [key for key in REQUIRED_KEYS if key not in params]:
        raise ConfigError(f"{path} lacks the keys: {', '.join(missing)}")

    known = {key: params[key] for key in params.keys() & KNOWN_KEYS}
    known.pop("quantization", None)  # see `folder.read_quantization`
    known["head_width"] = known.pop("head_dim", None)
    scaling = known.pop("rope_scaling", None)
    # Llama 2's files have no rope_theta. Its value there is 10000, not the default of ModelArgs.
    known.setdefault("rope_theta", LLAMA_2_THETA)
    try:
        args = ModelArgs(**known)
        if scaling is not None:
            args.rope_scaling = RopeScaling(**scaling)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"{path}: rope_scaling is {scaling!r}") from error
    if args.vocab_size == -1:  # Llama 1, 2 and Code Llama leave it to the tokenizer
        args.embedding_shard_dim = 1
    if args.rope_scaling is not None and (scaling is None or rope_factor is not None):
        is_3_2 = any(args.same_shape(PRESETS[n]) for n in ("llama-3.2-1b", "llama-3.2-3b"))
        factor = (32.0 if is_3_2 else 8.0) if rope_factor is None else rope_factor
        args.rope_scaling = replace(args.rope_scaling, factor=factor)
    return args


def says_the_same(path: Path, args: ModelArgs) -> bool:
    """Whether a `params.json` describes the model of `args`."""
    try:
        read = read_params(path)
    except ConfigError:
        return False
    others = ("norm_eps", "rope_scaling", "context", "attention_bias", "mlp_bias")
    return read.same_shape(args) and all(getattr(read, n) == getattr(args, n) for n in others)


def write_params(path: Path, args: ModelArgs, quantization: Width | None = None) -> None:
    """Write a `params.json` that `read_params` reads back as the same model.

    quantization: the width of the weights in the same folder; None: they are unquantized."""
    keys = "dim n_layers n_heads n_kv_heads vocab_size norm_eps rope_theta use_scaled_rope".split()
    params = {key: getattr(args, key) for key in keys} | args.metas_width()
    if args.head_width is not None:
        params["head_dim"] = args.head_width
    params |= {key: True for key in ("attention_bias", "mlp_bias") if getattr(args, key)}
    if args.context_length is not None:
        params["context_length"] = args.context_length
    if args.rope_scaling is not None:
        params["rope_scaling"] = asdict(args.rope_scaling)
    if quantization is not None:
        params["quantization"] = {"width": quantization, "layout": LAYOUT}
    write_json(path, params)
