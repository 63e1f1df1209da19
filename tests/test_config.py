"""ModelArgs and params.json: published shapes are read, and an error names anything else."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llama.checkpoints.params import read_params
from llama.config import PRESETS, ModelArgs
from llama.errors import ConfigError
from llama.rope_scaling import RopeScaling

# The params.json of Meta's downloads.
LLAMA_2_7B = dict(dim=4096, multiple_of=256, n_heads=32, n_layers=32, norm_eps=1e-05, vocab_size=-1)
LLAMA_3_8B = dict(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=1024,
    ffn_dim_multiplier=1.3, norm_eps=1e-05, rope_theta=500000.0,
)  # fmt: skip
LLAMA_32_1B = dict(
    dim=2048, ffn_dim_multiplier=1.5, multiple_of=256, n_heads=32, n_kv_heads=8, n_layers=16,
    norm_eps=1e-05, rope_theta=500000.0, use_scaled_rope=True, vocab_size=128256,
)  # fmt: skip


def write(folder: Path, params: Any) -> Path:
    path = folder / "params.json"
    path.write_text(params if isinstance(params, str) else json.dumps(params))
    return path


def test_llama_2(tmp_path: Path) -> None:
    args = read_params(write(tmp_path, LLAMA_2_7B))
    assert (args.rope_theta, args.n_kv_heads, args.ffn_dim) == (10000.0, 32, 11008)
    assert args.embedding_shard_dim == 1
    assert args.context == 4096


def test_code_llama(tmp_path: Path) -> None:
    """Its files have no vocab_size."""
    params = dict(
        dim=4096, n_layers=32, n_heads=32, multiple_of=256, ffn_dim_multiplier=1.0, norm_eps=1e-5,
        rope_theta=1000000,
    )  # fmt: skip
    args = read_params(write(tmp_path, params))
    assert (args.vocab_size, args.ffn_dim, args.context) == (-1, 11008, 16384)
    assert args.published() == ["codellama-7b"]
    args = read_params(write(tmp_path, params | {"vocab_size": 32000}))  # 7B for Python
    assert (args.published(), args.context) == ([], 16384)


@pytest.mark.parametrize(
    ("eps", "names"), [(1e-6, ["llama-2-7b", "llama-1-7b"]), (1e-5, ["llama-2-7b"])]
)
def test_llama_1(tmp_path: Path, eps: float, names: list[str]) -> None:
    assert read_params(write(tmp_path, LLAMA_2_7B | {"norm_eps": eps})).published() == names
    large = LLAMA_2_7B | dict(dim=8192, n_layers=80, n_heads=64, norm_eps=eps)
    args = read_params(write(tmp_path, large))
    assert (args.published(), args.context) == (["llama-1-65b"], 2048)


def test_llama_3(tmp_path: Path) -> None:
    args = read_params(write(tmp_path, LLAMA_3_8B))
    assert (args.rope_theta, args.ffn_dim, args.context) == (500000.0, 14336, 8192)
    assert args.embedding_shard_dim == 0
    assert args.rope_scaling is None


def test_llama_3_1(tmp_path: Path) -> None:
    args = read_params(write(tmp_path, LLAMA_3_8B | {"use_scaled_rope": True}))
    assert args.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert args.context == 131072


def test_llama_3_2_has_the_published_factor_and_a_switch_for_metas(tmp_path: Path) -> None:
    path = write(tmp_path, LLAMA_32_1B)
    assert read_params(path).rope_scaling == RopeScaling(factor=32.0)
    assert read_params(path, rope_factor=8).rope_scaling == RopeScaling(factor=8.0)


def test_an_unknown_shape_has_its_familys_context(tmp_path: Path) -> None:
    assert read_params(write(tmp_path, LLAMA_3_8B | {"n_layers": 3})).context == 8192
    scaled = {"n_layers": 3, "use_scaled_rope": True}
    assert read_params(write(tmp_path, LLAMA_3_8B | scaled)).context == 131072
    assert read_params(write(tmp_path, LLAMA_3_8B | {"context_length": 512})).context == 512


def test_a_fine_tune_of_llama_2_with_one_more_token_keeps_its_context(tmp_path: Path) -> None:
    assert read_params(write(tmp_path, LLAMA_2_7B | {"vocab_size": 32001})).context == 4096


def test_presets_know_their_own_context() -> None:
    for name, preset in PRESETS.items():
        # The shape of Llama 1 7B and 13B is also that of early files of Llama 2.
        context = 4096 if name in ("llama-1-7b", "llama-1-13b") else preset.context_length
        assert dataclasses.replace(preset, context_length=None).context == context


def test_metas_defaults() -> None:
    args = ModelArgs()
    assert (args.dim, args.n_layers, args.n_heads, args.n_kv_heads) == (4096, 32, 32, 32)
    assert (args.max_batch_size, args.max_seq_len, args.rope_theta) == (32, 2048, 500000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_experts": 8}, "unknown keys: n_experts"),
        ({"vision_chunk_size": 448}, "vision_chunk_size: this is a vision model"),
        ({"quantization_args": {"group_size": 32}}, "this is a quantized model"),
        ({"lora_args": {"rank": 16}}, "this is a LoRA adapter"),
        ({"dim": "4096"}, "dim is '4096': it must be a whole number above 0"),
        ({"dim": 4096.5}, "dim is 4096.5"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_layers": True}, "n_layers is True"),
        ({"n_heads": 33}, "dim 4096 is not a multiple of n_heads 33"),
        ({"n_kv_heads": 5}, "n_heads 32 is not a multiple of n_kv_heads 5"),
        ({"dim": 4128}, "head_dim 129 must be even"),
        ({"norm_eps": -1e-5}, "norm_eps is -1e-05"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"vocab_size": -2}, "vocab_size is -2"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"ffn_dim_multiplier": 0}, "ffn_dim_multiplier is 0"),
    ],
)
def test_bad_values_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, LLAMA_3_8B | change)
    with pytest.raises(ConfigError, match=message) as caught:
        read_params(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "norm_eps"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    params = {name: value for name, value in LLAMA_3_8B.items() if name != key}
    with pytest.raises(ConfigError, match=f"lacks the keys: {key}"):
        read_params(write(tmp_path, params))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff", "[" * 100000])
def test_what_is_not_an_object_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not JSON|holds a list"):
        read_params(write(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_params(tmp_path / "params.json")


def test_rope_scaling_is_checked() -> None:
    with pytest.raises(ConfigError, match="factor is 0"):
        RopeScaling(factor=0)
    with pytest.raises(ConfigError, match="must be above low_freq_factor"):
        RopeScaling(low_freq_factor=4.0)
