"""Building from a folder: Meta's files give their model, and anything else gives a clear error."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer

from llama import Llama, config
from llama.checkpoints import shards
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import read_args
from llama.errors import CheckpointError, ConfigError, LlamaError, TokenizerError

VOCAB = len(demo_pieces()) + 256
PARAMS: dict[str, Any] = dict(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=32,
    norm_eps=1e-5, rope_theta=500000.0,
)  # fmt: skip
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8]]


def make_folder(folder: Path, mp_size: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    make_checkpoint(folder, PARAMS, mp_size, dtype)
    write_tokenizer(folder / "tokenizer.model", demo_pieces())
    return folder


def remake(folder: Path, **changes: Any) -> None:
    """Replace the model in the folder."""
    (folder / "consolidated.00.pth").unlink()
    make_checkpoint(folder, PARAMS | changes, dtype=torch.float32)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the folder, which the test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoint"))


def greedy(llama: Llama) -> list[list[int]]:
    return llama.generate(PROMPTS, max_gen_len=10, temperature=0)[0]


def test_the_weights_are_the_files(folder: Path) -> None:
    llama = Llama.build(folder)
    stored = torch.load(folder / "consolidated.00.pth", weights_only=True)
    loaded = llama.model.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)


def test_defaults_of_build(folder: Path) -> None:
    params = Llama.build(folder).model.params
    assert (params.max_seq_len, params.max_batch_size) == (2048, 4)
    long = Llama.build(folder, max_seq_len=8192).model.params
    assert long.max_seq_len == 8192


def test_metas_positional_arguments(folder: Path) -> None:
    llama = Llama.build(str(folder), str(folder / "tokenizer.model"), 128, 2, 1, 7)
    assert (llama.model.params.max_seq_len, llama.model.params.max_batch_size) == (128, 2)


def test_an_original_subfolder_is_found(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine, tmp_path / "original")
    assert greedy(Llama.build(tmp_path)) == greedy(Llama.build(pristine))


def test_a_tokenizer_beside_the_models_is_found(folder: Path) -> None:
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    assert Llama.build(folder).tokenizer.n_words == VOCAB


@pytest.mark.parametrize(
    ("dtype", "meant"),
    [
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_the_dtype_can_be_chosen(folder: Path, dtype: Any, meant: torch.dtype) -> None:
    llama = Llama.build(folder, dtype=dtype)
    assert {weight.dtype for weight in llama.model.parameters()} == {meant}
    greedy(llama)
    assert llama.engine.cache.k.dtype == meant


def test_the_checkpoints_own_dtype_on_the_cpu(tmp_path: Path) -> None:
    llama = Llama.build(make_folder(tmp_path, dtype=torch.bfloat16))
    assert {weight.dtype for weight in llama.model.parameters()} == {torch.bfloat16}


def test_weights_of_mixed_dtype_follow_the_output_matrix(folder: Path) -> None:
    edit(folder, lambda state: state.update({"norm.weight": state["norm.weight"].bfloat16()}))
    llama = Llama.build(folder)
    assert llama.model.norm.weight.dtype == torch.float32
    greedy(llama)


def test_several_models_in_one_process(folder: Path) -> None:
    one, two = Llama.build(folder), Llama.build(folder, dtype="bfloat16", max_batch_size=2)
    before = greedy(one)
    greedy(two)
    assert greedy(one) == before


def test_nothing_global_changes(folder: Path) -> None:
    before = (torch.get_default_dtype(), torch.get_default_device(), sys.stdout)
    state = torch.get_rng_state()
    greedy(Llama.build(folder, seed=5))
    assert (torch.get_default_dtype(), torch.get_default_device(), sys.stdout) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_build_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Llama.build(folder)
    assert capfd.readouterr().out == ""


def test_rope_freqs_of_old_files_are_ignored(folder: Path) -> None:
    edit(folder, lambda state: state.update({"rope.freqs": torch.ones(8)}))
    Llama.build(folder)


def test_files_from_before_the_zip_format(folder: Path, pristine: Path) -> None:
    path = folder / "consolidated.00.pth"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert greedy(Llama.build(folder)) == greedy(Llama.build(pristine))


def test_vocab_size_minus_one_is_the_tokenizers(folder: Path) -> None:
    set_params(folder, vocab_size=-1)
    llama = Llama.build(folder)
    assert llama.model.vocab_size == VOCAB
    assert "ParallelEmbedding()" in str(llama.model)


def test_a_larger_vocabulary_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    remake(folder, vocab_size=VOCAB + 8)
    greedy(Llama.build(folder))
    assert f"vocab_size {VOCAB + 8} is larger than the tokenizer's {VOCAB}" in caplog.text


# ---- on ranks ----------------------------------------------------------------------------------


def build_on_rank(folder: Path) -> Any:
    llama = Llama.build(folder)
    names = [type(llama.model.tok_embeddings).__name__, llama.model.output.weight.shape[0]]
    return names, greedy(llama), llama.generate(PROMPTS, max_gen_len=10, temperature=1.0)[0]


@pytest.mark.parametrize("embedding_dim", [0, 1])
def test_two_shards_on_two_ranks(pristine: Path, tmp_path: Path, embedding_dim: int) -> None:
    folder = tmp_path / "two"
    make_checkpoint(folder, PARAMS, 2, torch.float32, embedding_dim=embedding_dim)
    write_tokenizer(folder / "tokenizer.model", demo_pieces())
    (first, *rest) = run_ranks(2, tmp_path, build_on_rank, folder)
    embedding = "ParallelEmbedding" if embedding_dim else "VocabParallelEmbedding"
    assert first[0] == [embedding, VOCAB // 2]
    assert first[1] == greedy(Llama.build(pristine))
    assert rest == [first]  # also the sampled tokens, which the first rank draws


def test_a_tied_matrix_is_written_once(tmp_path: Path) -> None:
    matrix = torch.randn(64, 32)
    state = {"tok_embeddings.weight": matrix, "output.weight": matrix}
    shards.write_shard(tmp_path / "shard.pth", state)
    assert (tmp_path / "shard.pth").stat().st_size < 1.6 * matrix.nbytes
    assert torch.equal(shards.read_shard(tmp_path / "shard.pth")["output.weight"], matrix)


@pytest.mark.parametrize("n_shards", [1, 2])
def test_equal_matrices_of_a_shape_that_is_published_tied_are_one(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_shards: int
) -> None:
    """Meta's files of Llama 3.2 are an example: they hold the matrix twice."""
    folder = convert(pristine, tmp_path / "model", "meta", mp=n_shards)
    shape = read_args(folder)
    for rank in range(n_shards):
        path = folder / shards.shard_name(rank)
        state = torch.load(path, weights_only=True)
        state["output.weight"] = state["tok_embeddings.weight"].clone()
        torch.save(state, path)
    assert not Llama.build(folder).model.params.tied
    monkeypatch.setitem(config.PRESETS, "tied", replace(shape, tied=True))
    model = Llama.build(folder).model
    assert model.output.weight is model.tok_embeddings.weight
    assert not Llama.build(pristine).model.params.tied


def failures_on_rank(trials: list[list[Path]]) -> list[str]:
    """Build from each trial's folders and return the errors. Each rank reads its own folder, as
    machines without a shared disk do."""
    failures = []
    for folders in trials:
        try:
            Llama.build(folders[int(os.environ["RANK"])])
            failures.append("built")
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}")
    return failures


def test_one_rank_that_cannot_read_fails_all(pristine: Path, tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(pristine, tmp_path / f"checkpoint{i}")) for i in range(3)]
    truncate(copies[0], 5000)
    (copies[1] / "consolidated.00.pth").unlink()
    os.mkfifo(copies[1] / "consolidated.00.pth")
    set_params(copies[2], dim=10**8)
    trials = [[pristine, copy] for copy in copies] + [[pristine, pristine]]
    first, second = run_ranks(2, tmp_path, failures_on_rank, trials)
    assert first[:3] == [
        f"ParallelError: rank 1: {message.partition(': ')[2]}" for message in second[:3]
    ]
    assert first[3] == "built"
    for message, expected in zip(
        second,
        ("is damaged", "Not a regular file", "does not fit its configuration", "built"),
        strict=True,
    ):
        assert expected in message


# ---- bad folders -------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def set_params(folder: Path, **changes: Any) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | changes))


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def write_malicious(folder: Path) -> None:
    torch.save({"norm.weight": Malicious()}, folder / "consolidated.00.pth")


def write_bare_pickle(folder: Path) -> None:
    (folder / "consolidated.00.pth").write_bytes(pickle.dumps({"norm.weight": Malicious()}))


def drop_layer_1(state: dict[str, Any]) -> None:
    for name in [name for name in state if name.startswith("layers.1.")]:
        del state[name]


def truncate(folder: Path, size: int) -> None:
    path = folder / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:size])


def second_shard(folder: Path, name: str = "consolidated.01.pth") -> None:
    shutil.copy(folder / "consolidated.00.pth", folder / name)


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], type[LlamaError], str]] = {
    "no folder": (shutil.rmtree, CheckpointError, "no such checkpoint folder"),
    "no params": (lambda f: (f / "params.json").unlink(), CheckpointError, "no params.json"),
    "no shards": (
        lambda f: (f / "consolidated.00.pth").unlink(),
        CheckpointError,
        "has no shards",
    ),
    "no tokenizer": (
        lambda f: (f / "tokenizer.model").unlink(),
        CheckpointError,
        "has no tokenizer.model or tokenizer.json: name one with tokenizer_path",
    ),
    "two shards that are whole": (
        second_shard,
        CheckpointError,
        r"consolidated.00.pth: tok_embeddings.weight \(640, 64\) instead of \(320, 64\)",
    ),
    "a gap in the shards": (
        lambda f: second_shard(f, "consolidated.02.pth"),
        CheckpointError,
        "consolidated.02.pth where consolidated.01.pth is expected",
    ),
    "a missing tensor": (
        lambda f: edit(f, lambda state: state.pop("norm.weight")),
        CheckpointError,
        "consolidated.00.pth lacks norm.weight$",
    ),
    "more than ten missing": (
        lambda f: edit(f, lambda state: [state.pop(name) for name in list(state)[:14]]),
        CheckpointError,
        "lacks tok_embeddings.weight, .* and 4 more$",
    ),
    "a layer missing": (
        lambda f: edit(f, drop_layer_1),
        CheckpointError,
        "lacks layers.1.attention.wq.weight, .*layers.1.ffn_norm.weight$",
    ),
    "an extra tensor": (
        lambda f: edit(f, lambda state: state.update(bias=torch.zeros(3))),
        CheckpointError,
        "has unexpected tensors: bias",
    ),
    "a misshapen tensor": (
        lambda f: edit(f, lambda state: state.update({"norm.weight": torch.ones(63)})),
        CheckpointError,
        r"norm.weight \(63,\) instead of \(64,\)",
    ),
    "a quantized tensor": (
        lambda f: edit(
            f, lambda state: state.update({"norm.weight": torch.ones(64, dtype=torch.int8)})
        ),
        CheckpointError,
        "norm.weight is torch.int8, not a tensor of floating point",
    ),
    "params that do not fit": (
        lambda f: set_params(f, n_kv_heads=4),
        CheckpointError,
        r"attention.wk.weight \(32, 64\) instead of \(64, 64\)",
    ),
    "not tensors": (
        lambda f: torch.save([1, 2], f / "consolidated.00.pth"),
        CheckpointError,
        "does not hold named tensors",
    ),
    "code": (write_malicious, CheckpointError, "plain tensors: its code was not run"),
    "a bare pickle": (write_bare_pickle, CheckpointError, "is not a file of plain tensors"),
    "an empty file": (lambda f: truncate(f, 0), CheckpointError, "is damaged or incomplete"),
    "text": (
        lambda f: (f / "consolidated.00.pth").write_text("not a checkpoint"),
        CheckpointError,
        "consolidated.00.pth is",
    ),
    "a vocabulary too small": (
        lambda f: remake(f, vocab_size=VOCAB - 2),
        ConfigError,
        f"vocab_size {VOCAB - 2} is smaller than the tokenizer's {VOCAB}",
    ),
    "a corrupt tokenizer": (
        lambda f: (f / "tokenizer.model").write_text("IQ== 0\n???\n"),
        TokenizerError,
        "line 2",
    ),
    "a vision model": (
        lambda f: set_params(f, vision_chunk_size=448),
        ConfigError,
        "a vision model, not a plain text model",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_clear_line(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, kind, message = BAD_FOLDERS[case]
    monkeypatch.chdir(folder.parent)
    spoil(folder)
    with pytest.raises(kind, match=message) as caught:
        Llama.build(folder)
    assert "\n" not in str(caught.value)
    assert "checkpoint" in str(caught.value)  # the message names the folder or a file in it
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 8193}, "max_seq_len 8193 is above the model's context, 8192"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"max_seq_len": "long"}, "max_seq_len is 'long'"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"model_parallel_size": 2}, "model_parallel_size is 2"),
        ({"dtype": "int8"}, "dtype is int8"),
        ({"dtype": "bf17"}, "dtype is bf17: it must be float32, bfloat16 or float16"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"tokenizer_path": "nowhere"}, "nowhere"),
    ],
)
def test_bad_options_of_build(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        Llama.build(folder, **options)


def test_extended_context_is_allowed(folder: Path) -> None:
    set_params(folder, use_scaled_rope=True)
    llama = Llama.build(folder, max_seq_len=131072, max_batch_size=1)
    assert llama.model.params.max_seq_len == 131072


def test_the_mapped_shard_is_not_written_to(folder: Path) -> None:
    before = (folder / "consolidated.00.pth").read_bytes()
    llama = Llama.build(folder)
    with torch.no_grad():
        llama.model.norm.weight.fill_(3.0)
    assert (folder / "consolidated.00.pth").read_bytes() == before
    assert shards.read_shard(folder / "consolidated.00.pth")["norm.weight"].max() < 3.0
