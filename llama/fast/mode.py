"""The rules for fast mode: which combinations of mode, width, device and dtype can run."""

from typing import Literal, get_args

import torch

from llama.config import ModelArgs
from llama.errors import ConfigError
from llama.fast.cpu.kernels.product import FLOATS, has_dot, is_installed
from llama.fast.quantize import Width

# "reference": a prompt that runs alone gets exactly what Meta's code computes. "fast": the last
# bits may differ, because prompts are prefilled in chunks, prefixes are reused, and a CPU computes
# with kernels of our own.
Mode = Literal["reference", "fast"]
CacheWidth = Literal["int8"]


def check_mode(
    mode: Mode,
    quantize: Width | None,
    device: torch.device,
    dtype: torch.dtype,
    has_biases: bool = False,
) -> bool:
    """Whether the model becomes a `FastTransformer`, which is for CPUs.

    has_biases: whether layers of the model add a bias.
    Raises ConfigError for an unknown mode or width, and where the width cannot run here.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode is {mode!r}: it must be {' or '.join(get_args(Mode))}")
    if quantize not in (None, *get_args(Width)):
        raise ConfigError(f"quantize is {quantize!r}: it must be {' or '.join(get_args(Width))}")
    can = device.type == "cpu" and dtype in FLOATS and is_installed()
    if quantize is not None and (mode != "fast" or device.type not in ("cpu", "cuda")):
        raise ConfigError("quantized weights are for mode fast on the CPU or a CUDA GPU")
    if quantize is not None and has_biases and device.type != "cpu":
        raise ConfigError("a model with biases is quantized on a CPU only: leave quantize out")
    if quantize == "fp8" and not has_fp8(device):
        raise ConfigError(f"quantize is 'fp8': it needs an Ada, Hopper or newer GPU, not {device}")
    if quantize is not None and device.type == "cpu" and not is_installed():
        raise ConfigError("quantized weights need numba: pip install 'llama-reference[fast]'")
    return mode == "fast" and (can or (quantize is not None and device.type == "cpu"))


def drawback(
    mode: Mode,
    quantize: Width | None,
    device: torch.device,
    dtype: torch.dtype,
    has_biases: bool = False,
) -> str | None:
    """The reason why fast mode is slower here than it could be, for the log."""
    if mode == "fast" and device.type == "cuda" and has_biases:
        return "fast mode has no GPU kernels for biases: the model runs as in mode reference"
    if mode != "fast" or device.type != "cpu":
        return None
    if not is_installed():
        return "fast mode without numba is slower: pip install 'llama-reference[fast]'"
    if dtype not in FLOATS:
        return f"fast mode has kernels for float32 and bfloat16: with {dtype} it is slower"
    if quantize is not None and not has_dot():
        return f"without VNNI (x86) or dot product (ARM) fast mode is slower in {quantize}"
    return None


def has_fp8(device: torch.device) -> bool:
    """Whether the device is a GPU with instructions that convert e4m3: Ada, Hopper or newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def cache_dtype(mode: Mode, kv_cache: CacheWidth | None) -> torch.dtype | None:
    """The dtype of the KV cache; None: the dtype of the activations. Raises ConfigError for an int8
    cache in mode reference."""
    if kv_cache not in (None, *get_args(CacheWidth)):
        known = " or ".join(get_args(CacheWidth))
        raise ConfigError(f"kv_cache is {kv_cache!r}: it must be {known}")
    if kv_cache is not None and mode != "fast":
        raise ConfigError(f"a KV cache in {kv_cache} is for mode fast")
    return None if kv_cache is None else torch.int8


def check_proposing(mode: str, drafts: bool, lookup: bool) -> None:
    """Raise ConfigError where the options `draft` and `lookup` do not fit."""
    if (drafts or lookup) and mode != "fast":
        raise ConfigError(f"draft and lookup are for mode fast, but mode is {mode}")
    if drafts and lookup:
        raise ConfigError("draft and lookup exclude each other: give one of them")


def check_invariant(mode: str, invariant: bool) -> None:
    """Raise ConfigError where the option `invariant` does not fit."""
    if invariant and mode != "fast":
        raise ConfigError(f"invariant is for mode fast, but mode is {mode}")


def check_draft(draft: ModelArgs, vocab_size: int, max_seq_len: int) -> None:
    """Raise ConfigError where a draft model does not fit the vocabulary or the length of texts."""
    if draft.vocab_size != vocab_size:
        raise ConfigError(
            f"the draft model's vocab_size is {draft.vocab_size}, the model's {vocab_size}: they "
            "must have the same vocabulary"
        )
    if draft.max_seq_len < max_seq_len:
        raise ConfigError(
            f"the draft model's max_seq_len is {draft.max_seq_len}: it must be {max_seq_len}, the "
            "model's, or above"
        )
