"""Which implementations there are, what they can run, and where their weights come from."""

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.folders import CPU, make_model, write_meta

from llama.checkpoints.convert import convert
from llama.checkpoints.folder import open_checkpoint
from llama.checkpoints.setup import Setup
from llama.config import RopeScaling
from llama.errors import ConfigError
from llama.explain.oracles import (
    META_FILES,
    META_RESHARDED,
    OURS,
    OWN_FILES,
    LlamaModels,
    Transformers,
    find_oracle,
)


def setup_of(folder: Path, mp_size: int = 1, rope_factor: float | None = None) -> Setup:
    opened = open_checkpoint(folder, rope_factor)
    return Setup.make(opened, mp_size, mp_size, 64, 1, CPU, None)


def test_an_unknown_name() -> None:
    with pytest.raises(ConfigError) as error:
        find_oracle("llama.cpp")
    assert (
        str(error.value) == "against is 'llama.cpp': it must be one of llama-models, transformers"
    )


@pytest.mark.parametrize(
    ("name", "module"), [("llama-models", "llama_models"), ("transformers", "transformers")]
)
def test_a_missing_package(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=f"^{name} is missing .*: pip install 'llama-ref.*parity]"
    ):
        find_oracle(name)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(attention_bias=True), "has biases"),
        (dict(head_width=16), "has heads of 16 features"),
        (dict(rope_scaling=RopeScaling(2.0, kind="linear")), "has RoPE scaled by other constants"),
    ],
)
def test_what_llama_models_cannot_run(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    setup = setup_of(write_meta(tmp_path / "m", make_model(**changes), 1))
    with pytest.raises(ConfigError, match=f"which {reason}: take --against transformers"):
        LlamaModels.check(setup)
    Transformers.check(setup)


def test_llama_models_scales_rope_by_8(tmp_path: Path) -> None:
    model = make_model(rope_scaling=RopeScaling(32.0))
    folder = write_meta(tmp_path / "m", model, 1)
    with pytest.raises(ConfigError, match="RoPE scaled by other constants"):
        LlamaModels.check(setup_of(folder))
    LlamaModels.check(setup_of(folder, rope_factor=LlamaModels.rope_factor))


def test_transformers_runs_on_one_rank(tmp_path: Path) -> None:
    setup = setup_of(write_meta(tmp_path / "m", make_model(), 1), mp_size=2)
    with pytest.raises(ConfigError, match="on one rank, and 2 are started"):
        Transformers.check(setup)


@pytest.mark.parametrize(
    ("changes", "n_shards", "n_ranks", "source"),
    [
        ({}, 2, 2, META_FILES),
        ({}, 4, 2, META_RESHARDED),
        ({}, 2, 4, META_RESHARDED),
        (dict(n_kv_heads=2), 2, 4, OURS),  # Meta's code repeats key/value heads in another order
        (dict(embedding_shard_dim=1), 2, 2, META_FILES),
        (dict(embedding_shard_dim=1), 2, 1, OURS),  # Meta's code joins the embedding wrongly
    ],
)
def test_where_weights_come_from(
    changes: dict[str, Any], n_shards: int, n_ranks: int, source: str, tmp_path: Path
) -> None:
    setup = setup_of(write_meta(tmp_path / "m", make_model(**changes), n_shards), n_ranks)
    assert LlamaModels.weights_from(setup) == source
    assert Transformers.weights_from(setup) == OURS


def test_where_weights_of_a_hugging_face_folder_come_from(tmp_path: Path) -> None:
    folder = convert(write_meta(tmp_path / "m", make_model(), 1), tmp_path / "hf", "hf")
    setup = setup_of(folder)
    assert LlamaModels.weights_from(setup) == OURS
    assert Transformers.weights_from(setup) == OWN_FILES


def test_where_weights_of_a_gguf_file_come_from(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", make_model(n_kv_heads=8), 1)
    setup = setup_of(convert(source, tmp_path / "model.gguf", "gguf"))
    assert [oracle.weights_from(setup) for oracle in (LlamaModels, Transformers)] == [OURS, OURS]
