"""Conversion keeps every bit and leaves no incomplete folder. The sizes of inspect add up."""

import json
import math
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import MODELS, TOKENS, logits_of, make_model, make_setup, write_meta
from helpers.ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.multiprocessing import ProcessExitedException

from llama import Llama, Transformer
from llama.checkpoints import shards
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import open_checkpoint
from llama.checkpoints.inspect import cache_bytes, describe, flops_per_token, weights_of
from llama.checkpoints.load import load_weights
from llama.checkpoints.params import read_params
from llama.checkpoints.shards import read_shard
from llama.checkpoints.verify import verify
from llama.config import PRESETS, ModelArgs
from llama.errors import CheckpointError, ConfigError, DataError
from llama.fast.quantize import Int4Weight, Int8Weight
from llama.files import lock, unlock


def tensors_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [read_shard(path) for path in shards.find_shards(folder)]


def assert_same(one: Path, two: Path) -> None:
    for first, second in zip(tensors_of(one), tensors_of(two), strict=True):
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert tensor.dtype == second[name].dtype
            assert torch.equal(tensor, second[name])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {
        name: write_meta(root / name, make_model(**changes).bfloat16(), 2)
        for name, changes in MODELS.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_equal(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """From Meta to Hugging Face and back to Meta, and from two shards to one and back to two."""
    convert(sources[name], tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "back", "meta", mp=1)
    back = convert(tmp_path / "back", tmp_path / "two", "meta", mp=2)
    if (
        name == "llama-2"
    ):  # Hugging Face's folder does not record which dimension of the embedding is split
        assert torch.equal(logits_of(back), logits_of(sources[name]))
    else:
        assert_same(back, sources[name])
    before = read_params(sources[name] / "params.json")
    after = read_params(back / "params.json")
    assert (after.ffn_dim, after.rope_scaling) == (before.ffn_dim, before.rope_scaling)


def test_eight_two_eight_is_equal(tmp_path: Path) -> None:
    model = make_model(n_kv_heads=8)
    eight = write_meta(tmp_path / "8", model, 8)
    two = convert(eight, tmp_path / "2", "meta", mp=2)
    assert_same(convert(two, tmp_path / "again", "meta", mp=8), eight)
    assert torch.equal(logits_of(two), logits_of(eight))


def test_more_shards_than_heads_repeat_them_and_come_back(tmp_path: Path) -> None:
    """Meta's 16-shard folder of the 405B model, with its eight key/value heads, is an example."""
    source = write_meta(tmp_path / "1", make_model(n_kv_heads=2), 1)
    wide = convert(source, tmp_path / "8", "meta", mp=8)
    assert read_params(wide / "params.json").n_kv_heads == 8
    torch.testing.assert_close(logits_of(wide), logits_of(source), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_opens_what_is_written(
    name: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(
        "llama.checkpoints.convert.HF_FILE_BYTES", 150_000
    )  # many files and an index
    convert(sources[name], tmp_path / "hf", "hf", dtype="float32")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    llama = Llama.build(sources[name], dtype="float32", max_seq_len=64)
    with torch.inference_mode():
        want = theirs(TOKENS).logits
        torch.testing.assert_close(llama.model(TOKENS, 0), want, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits_of(tmp_path / "hf"), llama.model(TOKENS, 0))


def test_metas_own_keys_say_any_width() -> None:
    for width in (100, 341, 342, 640, 1000, 5461):
        args = ModelArgs(dim=256, n_heads=4, vocab_size=10, hidden_dim=width)
        said: Any = args.metas_width()
        assert replace(args, hidden_dim=None, **said).ffn_dim == width
    eight_b = replace(PRESETS["llama-3-8b"], hidden_dim=14336, multiple_of=256)
    assert eight_b.metas_width() == {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}


def test_a_dtype_can_be_asked_for(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["mha"], tmp_path / "hf", "hf", dtype="float16")
    assert {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {
        torch.float16
    }


# ---- what may go wrong ------------------------------------------------------------------------


def test_nothing_is_replaced_unless_told(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="exists: it is replaced only with --force"):
        convert(sources["mha"], tmp_path / "mine", "hf")
    assert (tmp_path / "mine" / "file").read_text() == "precious"
    convert(sources["mha"], tmp_path / "mine", "hf", force=True)
    assert not (tmp_path / "mine" / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(to="gptq"), "to is 'gptq': it must be meta, hf or gguf"),
        (dict(to="hf", mp=2), "mp is 2"),
        (dict(to="gguf", mp=2), "to is gguf, mp is 2"),
        (dict(to="gguf", quantize="int8"), "to is 'gguf': with quantize it must be meta"),
        (dict(to="gguf", dtype="q4_k"), "dtype is q4_k: for a GGUF file it must be one of float32"),
        (dict(to="meta", mp=3), "cannot be split over 3 ranks, only over 1, 2, 4, 8, 16"),
        (dict(to="meta", dtype="int4"), "dtype is int4"),
        (dict(quantize="int3"), "quantize is 'int3': it must be int8 or int4"),
        (
            dict(to="hf", quantize="int8"),
            "to is 'hf': with quantize it must be meta",
        ),
        (dict(quantize="int4", mp=8), "wo.weight: a row of 16 weights cannot be quantized"),
    ],
)
def test_what_cannot_be_converted(
    options: dict[str, Any], message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    name = "out.gguf" if options.get("to") == "gguf" else "out"
    with pytest.raises(ConfigError, match=message):
        convert(sources["mha"], tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "source", make_model(), 1)
    state = torch.load(source / "consolidated.00.pth", weights_only=True)
    del state["norm.weight"]
    torch.save(state, source / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"lacks norm\.weight"):
        convert(source, tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def convert_on_a_full_disk(source: Path, out: Path, to: str) -> str:
    signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # writing beyond the limit is then an error, not a signal
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    with pytest.raises(ValueError, match="cannot write") as caught:
        convert(source, out, to)
    return str(caught.value)


@pytest.mark.parametrize("to", ["meta", "hf", "gguf"])
def test_a_full_disk_leaves_nothing(to: str, sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    arguments = (sources["mha"], folder / ("out.gguf" if to == "gguf" else "out"), to)
    (error,) = run_ranks(1, tmp_path, convert_on_a_full_disk, *arguments)
    assert "\n" not in error
    assert list(folder.iterdir()) == []
    convert(*arguments)


def convert_and_die(source: Path, out: Path) -> None:
    """Kill this process during the conversion, at the second tensor."""
    part = shards.Checkpoint.part
    parts = []

    def last_part(*args: Any) -> torch.Tensor:
        parts.append(part(*args))
        if len(parts) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return parts[-1]

    shards.Checkpoint.part = last_part  # type: ignore[method-assign]
    convert(source, out, "meta", mp=2)


def test_a_kill_leaves_no_folder_and_the_next_try_succeeds(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(1, tmp_path, convert_and_die, sources["mha"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(sources["mha"], tmp_path / "out", "meta", mp=2)
    assert_same(tmp_path / "out", sources["mha"])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_two_conversions_to_one_folder(sources: dict[str, Path], tmp_path: Path) -> None:
    held = lock(tmp_path / "out")
    with pytest.raises(DataError, match="another run is writing"):
        convert(sources["mha"], tmp_path / "out", "meta")
    unlock(held)
    convert(sources["mha"], tmp_path / "out", "meta")


# ---- quantized --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose matrices four ranks can share, and int8 and int4 can represent."""
    return write_meta(tmp_path_factory.mktemp("floats") / "1", make_model(**WIDE), 1)


WIDE = dict(dim=256, hidden_dim=512, n_kv_heads=4)


def rounded(folder: Path, **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors that fast mode computes with, and what it generates."""
    llama = Llama.build(folder, mode="fast", max_seq_len=64, **options)
    tensors = dict(llama.model.state_dict())
    for name, module in llama.model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), Int8Weight | Int4Weight):
            tensors |= {f"{name}.{field}": t for field, t in weight._asdict().items()}
    generated = llama.generate([[1, 2, 3], [4] * 20], max_gen_len=8, temperature=0, logprobs=True)
    return tensors, generated


def assert_equal(one: Any, two: Any) -> None:
    assert one[0].keys() == two[0].keys()
    assert all(torch.equal(tensor, two[0][name]) for name, tensor in one[0].items())
    assert one[1] == two[1]


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_saved_is_quantized_at_load(floats: Path, tmp_path: Path, width: Any) -> None:
    """A folder that is saved quantized, in any number of shards, gives the same weights to the
    bit."""
    saved = [convert(floats, tmp_path / f"saved{mp}", mp=mp, quantize=width) for mp in (1, 2, 4)]
    at_load = rounded(floats, quantize=width)
    assert any(
        name.endswith("wo.values" if width == "int8" else "wo.packed") for name in at_load[0]
    )
    for folder in saved:
        assert_equal(rounded(folder), at_load)
        assert_equal(rounded(folder, quantize=width), at_load)


def compare_on_rank(trials: list[tuple[Path, list[Path], Any]]) -> None:
    for source, saved, width in trials:
        at_load = rounded(source, quantize=width)
        for folder in saved:
            assert_equal(rounded(folder), at_load)


def test_saved_is_quantized_at_load_on_two_ranks(floats: Path, tmp_path: Path) -> None:
    """Also if both ranks have the same key/value head."""
    one_head = write_meta(tmp_path / "1", make_model(**WIDE | dict(n_kv_heads=1)), 1)
    trials = [
        (
            source,
            [convert(source, tmp_path / f"{i}-{mp}", mp=mp, quantize=width) for mp in sizes],
            width,
        )
        for i, (source, sizes, width) in enumerate(
            [(floats, (1, 2, 4), "int8"), (floats, (1, 4), "int4"), (one_head, (1, 2), "int8")]
        )
    ]
    run_ranks(2, tmp_path, compare_on_rank, trials)


@pytest.mark.parametrize("name", ["tied", "llama-2"])
def test_families_are_saved_quantized(name: str, tmp_path: Path) -> None:
    """In a tied model, the quantized output matrix is saved beside the embedding."""
    source = write_meta(tmp_path / "1", make_model(**MODELS[name] | dict(hidden_dim=512)), 1)
    at_load = rounded(source, quantize="int8")
    assert "output.values" in at_load[0]
    for mp in (1, 2):
        saved = convert(source, tmp_path / f"saved{mp}", quantize="int8", mp=mp)
        assert_equal(rounded(saved), at_load)


def test_saved_weights_are_mapped(floats: Path, tmp_path: Path) -> None:
    saved = convert(floats, tmp_path / "saved", quantize="int4")
    opened = open_checkpoint(saved)
    addresses = {tensor.data_ptr() for tensor in opened.shards[0].values()}
    model = Transformer(opened.args)
    load_weights(model, opened, torch.device("cpu"), None, "int4")
    for module in model.modules():
        weight = getattr(module, "weight", ())
        tensors = weight if isinstance(weight, tuple) else (weight,)
        assert {tensor.data_ptr() for tensor in tensors} <= addresses
    setup = make_setup(saved, mode="fast")
    assert setup.weight_bytes() == (0, sum(t.nbytes for t in opened.shards[0].values()))
    assert make_setup(floats, mode="fast", quantize="int4").weight_bytes()[0] > 0


def test_what_is_said_of_a_quantized_folder(floats: Path, tmp_path: Path) -> None:
    saved = convert(floats, tmp_path / "saved", quantize="int8", mp=2)
    title, problems = verify(saved)
    assert problems == []
    assert ", 2 shards, int8, " in title
    assert "in int8, embedding and norms in bfloat16" in describe(str(saved))
    with safe_open(saved / "consolidated.01.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["layers.0.attention.wo.weight.scale"][3] *= 2
    tensors["layers.0.attention.wq.weight.scale"][3] = math.nan
    save_file(tensors, saved / "consolidated.01.safetensors")
    (saved / "SHA256SUMS").unlink()
    one, two = verify(saved)[1]
    assert "wq.weight.scale has numbers that are not finite" in one
    assert "wo.weight.scale should be equal in all shards" in two


def test_what_a_quantized_folder_is_not_for(floats: Path, tmp_path: Path) -> None:
    saved = convert(floats, tmp_path / "saved", quantize="int8")
    for options, message in (
        (dict(), "saved is saved in int8, which needs mode fast"),
        (dict(mode="fast", quantize="int4"), "saved in int8 and cannot be loaded in int4"),
    ):
        with pytest.raises(ConfigError, match=message):
            Llama.build(saved, **options)
    with pytest.raises(CheckpointError, match="is quantized to int8: convert the original"):
        convert(saved, tmp_path / "hf", "hf")
    params = json.loads((saved / "params.json").read_text())
    params["quantization"]["layout"] += 1
    (saved / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match=": convert the model again"):
        Llama.build(saved, mode="fast")


def test_parts_that_cannot_be_cut(tmp_path: Path) -> None:
    """On four ranks, `w2` has 80 columns each, which is no multiple of a group of int4."""
    source = write_meta(tmp_path / "1", make_model(**WIDE | dict(hidden_dim=320)), 1)
    saved = convert(source, tmp_path / "saved", quantize="int4")
    opened = open_checkpoint(saved)
    name = "layers.0.feed_forward.w2.weight"
    with pytest.raises(
        ConfigError, match=f"{name}: cannot cut a quantized weight at 80 with 80 columns"
    ):
        opened.quantized_part(name, 4, 1, "int4")


# ---- inspect ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_inspect_adds_up(name: str) -> None:
    args = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(args)
    assert {n: tuple(w.shape) for n, w in model.state_dict().items()} == args.whole_shapes()
    total = sum(weight.numel() for weight in model.parameters())
    assert sum(weight.parameters for weight in weights_of(args, 1)) == total
    assert sum(weight.per_rank(1) for weight in weights_of(args, 1)) == total
    assert f"{total:,} parameters" in describe(name)


def test_sizes_of_llama_3_8b() -> None:
    args = PRESETS["llama-3-8b"]
    assert cache_bytes(args, 1, torch.bfloat16) == 131072
    assert cache_bytes(args, 8, torch.bfloat16) == 16384
    assert cache_bytes(args, 16, torch.bfloat16) == 16384  # each head is on two ranks
    output_and_layers = 8_030_261_248 - 128256 * 4096 - 65 * 4096
    assert flops_per_token(args, 0) == 2 * output_and_layers
    assert flops_per_token(args, 100) == 2 * output_and_layers + 4 * 32 * 4096 * 100


def test_inspect_opens_folders_and_names_what_it_cannot(sources: dict[str, Path]) -> None:
    assert "context 4,096" in describe(str(sources["llama-2"]))
    with pytest.raises(ConfigError, match=r"no such folder: .*published models are llama-2-7b"):
        describe("llama-9")
    with pytest.raises(ConfigError, match="cannot be split over 3 ranks"):
        describe("llama-3-8b", mp=3)
    with pytest.raises(ConfigError, match="max_seq_len is 8193: it must be 1 to the context, 8192"):
        describe("llama-3-8b", max_seq_len=8193)
