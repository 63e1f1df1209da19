"""adapter_config.json: which modules a LoRA adapter in PEFT's format changes, and how strongly.

Names of modules are Hugging Face's, such as model.layers.0.self_attn.q_proj.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.checkpoints.patterns import matching
from llama.errors import ConfigError
from llama.files import read_json

CONFIG = "adapter_config.json"
# The keys of plain LoRA.
MEANT = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights",
    "base_model_name_or_path",
}  # fmt: skip
# Keys that do not change what a trained adapter computes.
WITHOUT_EFFECT = {
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
# Values of other keys that have no effect, besides false, null and empty ones.
USUAL: dict[str, tuple[Any, ...]] = {"bias": ("none",), "layers_pattern": ("layers", ["layers"])}
# What any other value of these keys stands for.
METHODS = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "matrices that are stored transposed",
    "bias": "trained biases",
    "lora_bias": "trained biases",
    "ensure_weight_tying": "one change for embedding and output",
    "trainable_token_indices": "single trained tokens",
    "target_parameters": "experts",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activated LoRA",
}
# The initial values of A and B that leave the base model as it is. Others, such as PiSSA's, change
# the base model when training begins. The adapter fits only the changed one.
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
ALL_LINEAR = "all-linear"  # a value of target_modules: all matrices but embedding and output
NOT_LINEAR = ("model.embed_tokens", "lm_head")


@dataclass(frozen=True)
class LoraConfig:
    """What a LoRA adapter changes in a model.

    ranks: r of each module that has a change scale * B A, with A (r, K) and B (N, r).
    scales: alpha / r, or alpha / sqrt(r), of each of these modules.
    replaced: names of modules, or the ends of their names, whose weights the adapter stores whole.
    base: the name or folder of the model that the adapter was trained on.
    """

    ranks: dict[str, int]
    scales: dict[str, float]
    replaced: list[str]
    base: str | None


def read_lora_config(path: Path, modules: Sequence[str]) -> LoraConfig:
    """Read an `adapter_config.json` for a model whose matrices belong to these modules.

    Raises ConfigError for a file that is damaged or does not describe plain LoRA.
    """
    content = read_json(path)
    try:
        _check_is_plain_lora(content)
        replaced = _names(content, "modules_to_save")
        targets = [name for name in _targets(content, modules) if not _is_in(name, replaced)]
        r, alpha = _rank("r", content.get("r")), _number("lora_alpha", content.get("lora_alpha"))
        ranks = _by_pattern(content, "rank_pattern", targets, r, _rank)
        alphas = _by_pattern(content, "alpha_pattern", targets, alpha, _number)
        is_rank_stabilized = _flag(content, "use_rslora")
        scales = {
            name: alphas[name] / (math.sqrt(ranks[name]) if is_rank_stabilized else ranks[name])
            for name in targets
        }
        base = content.get("base_model_name_or_path")
        if not isinstance(base, str | None):
            raise ConfigError(f"base_model_name_or_path is {base!r}: it must be a text")
        return LoraConfig(ranks, scales, replaced, base)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def lora_settings(
    r: int, alpha: float, dropout: float, targets: Sequence[str], base: str | None
) -> dict[str, Any]:
    """The content of an `adapter_config.json`. targets: the ends of the changed modules' names."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _check_is_plain_lora(content: dict[str, Any]) -> None:
    """Raise a ConfigError that names the method or the key, if this is not plain LoRA."""
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ConfigError(f"peft_type is {kind!r}: only LORA is supported")
    start = content.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        raise ConfigError(
            f"init_lora_weights is {start!r}, which changes the base model before the training: "
            "save the adapter as plain LoRA, by path_initial_model_for_weight_conversion of PEFT"
        )
    for key, value in content.items():
        if key in MEANT | WITHOUT_EFFECT or not value or value in USUAL.get(key, ()):
            continue
        what = METHODS.get(key, "an unknown setting")
        raise ConfigError(f"{key} is {value!r}, {what}: only plain LoRA is supported")


# ---- names of modules ---------------------------------------------------------------------------


def _targets(content: dict[str, Any], modules: Sequence[str]) -> list[str]:
    """The modules that have a change B A, before `modules_to_save` is considered."""
    value = content.get("target_modules")
    if isinstance(value, str) and value.lower() == ALL_LINEAR:
        targets = [name for name in modules if name not in NOT_LINEAR]
    else:
        targets = _named(content, "target_modules", modules)
    layers = content.get("layers_to_transform")
    if layers is not None and layers != []:
        numbers = layers if isinstance(layers, list) else [layers]
        if not all(type(number) is int for number in numbers):
            raise ConfigError(f"layers_to_transform is {layers!r}: it must be whole numbers")
        beginnings = tuple(f"model.layers.{number}." for number in numbers)
        targets = [name for name in targets if name.startswith(beginnings)]
    excluded = _named(content, "exclude_modules", modules)
    return [name for name in targets if name not in excluded]


def _named(content: dict[str, Any], key: str, modules: Sequence[str]) -> list[str]:
    """The modules that a key names: by a regular expression, or by the ends of their names."""
    value = content.get(key)
    if isinstance(value, str):
        return matching([value], modules)[0]
    names = _names(content, key)
    return [module for module in modules if _is_one_of(module, names)]


def _is_one_of(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_in(module: str, names: Sequence[str]) -> bool:
    """Whether the module is one of `names`, or inside one."""
    parts = module.split(".")
    return any(_is_one_of(".".join(parts[: i + 1]), names) for i in range(len(parts)))


def _by_pattern(
    content: dict[str, Any],
    key: str,
    modules: Sequence[str],
    usual: float,
    check: Callable[[str, Any], Any],
) -> dict[str, Any]:
    """The number of each module: that of the first pattern which matches the module's name, or the
    end of its name after a dot; else the usual number."""
    table = content.get(key) or {}
    if not isinstance(table, dict):
        raise ConfigError(f"{key} is {table!r}: it must be an object with module names as keys")
    numbers: dict[str, Any] = dict.fromkeys(modules, usual)
    # A pattern overwrites the numbers of the patterns after it.
    found = matching([rf"(.*\.)?({pattern})" for pattern in table], modules)
    for (pattern, value), names in reversed(list(zip(table.items(), found, strict=True))):
        numbers |= dict.fromkeys(names, check(f"{key} of {pattern}", value))
    return numbers


# ---- values -------------------------------------------------------------------------------------


def _rank(name: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        raise ConfigError(f"{name} is {value!r}: it must be a whole number above 0")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e18:
        raise ConfigError(f"{name} is {value!r}: it must be a number")
    return float(value)


def _flag(content: dict[str, Any], name: str) -> bool:
    value = content.get(name)
    if value not in (True, False, None):
        raise ConfigError(f"{name} is {value!r}: it must be true or false")
    return bool(value)


def _names(content: dict[str, Any], key: str) -> list[str]:
    value = content.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{key} is {value!r}: it must be a list of names")
    return value
