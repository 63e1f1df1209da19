"""A folder gives the logits of the whole model, with any number of shards and ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import MODELS, TOKENS, VOCAB, logits_of, make_model, write_meta
from helpers.ranks import run_ranks
from make_checkpoint import demo_pieces, write_tokenizer
from safetensors.torch import load_file

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.verify import verify
from llama.errors import CheckpointError, ConfigError


def logits_of_all(folders: list[Path]) -> list[torch.Tensor]:
    return [logits_of(folder) for folder in folders]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, list[Path]]]:
    """For each model its logits, and its folders with 1, 2, 4, 8 and 16 shards, as far as its
    key/value heads can be split, and a GGUF file."""
    made = {}
    for name, changes in MODELS.items():
        model = make_model(**changes)
        root = tmp_path_factory.mktemp(name)
        # Meta's 16-shard folder has more shards than key/value heads, and they repeat the heads.
        # Such folders are not written here.
        counts = [n for n in (1, 2, 4, 8, 16) if model.params.local_kv_heads(1) % n == 0]
        paths = [write_meta(root / str(n), model, n) for n in counts]
        paths.append(convert(paths[0], root / "model.gguf", "gguf"))
        with torch.inference_mode():
            made[name] = model(TOKENS, 0).clone(), paths
    return made


@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_shards_on_one_rank_is_bit_equal(
    name: str, folders: dict[str, tuple[torch.Tensor, list[Path]]]
) -> None:
    whole, paths = folders[name]
    for logits in logits_of_all(paths):
        assert torch.equal(logits, whole)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_shards_on_ranks(
    ranks: int, folders: dict[str, tuple[torch.Tensor, list[Path]]], tmp_path: Path
) -> None:
    """The model gqa-2 has two key/value heads, so four ranks repeat them."""
    paths = [path for _, paths in folders.values() for path in paths]
    expected = [whole for whole, paths in folders.values() for _ in paths]
    for found in run_ranks(ranks, tmp_path, logits_of_all, paths):
        for logits, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


def test_three_ranks_and_two_or_six_shards(tmp_path: Path) -> None:
    """Neither number is a multiple of the other."""
    shape = dict(dim=96, n_heads=12, n_kv_heads=6, hidden_dim=192, vocab_size=648)
    model = make_model(**shape)
    paths = [write_meta(tmp_path / str(n), model, n) for n in (2, 6)]
    with torch.inference_mode():
        whole = model(TOKENS, 0)
    for found in run_ranks(3, tmp_path, logits_of_all, paths):
        for logits in found:
            torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


def error_of(folder: Path) -> str:
    try:
        Llama.build(folder)
    except ConfigError as error:
        return str(error)
    return "built"


def test_ranks_that_do_not_divide_are_told_what_does(
    folders: dict[str, tuple[torch.Tensor, list[Path]]], tmp_path: Path
) -> None:
    _, paths = folders["gqa-2"]
    for error in run_ranks(3, tmp_path, error_of, paths[0]):
        assert "cannot be split over 3 ranks, only over 1, 2, 4, 8, 16: they must divide" in error


# ---- Hugging Face's folders ---------------------------------------------------------------------


def write_hugging_face(folder: Path, changes: dict[str, Any], max_shard_size: str) -> Any:
    """Write a random model with transformers. Returns that model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = changes.pop("rope_scaling", None)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=16,
        vocab_size=VOCAB, bos_token_id=384, eos_token_id=[5, 7],
        **{"num_key_value_heads": 16, "max_position_embeddings": 16384} | changes,
    )  # fmt: skip
    if scaling is not None:
        config.rope_parameters = {"rope_theta": 500000.0, **scaling}
    torch.manual_seed(6)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, float(weight.dim() == 1), 0.08)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder / "tokenizer.model", demo_pieces())
    return model


def llama3_scaling(factor: float) -> dict[str, Any]:
    return dict(
        rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip


HF_MODELS: dict[str, dict[str, Any]] = {
    "llama-2": dict(rope_theta=10000.0),
    "llama-3": dict(num_key_value_heads=8, rope_theta=500000.0),
    "llama-3.1": dict(num_key_value_heads=2, rope_scaling=llama3_scaling(8.0)),
    "llama-3.2": dict(
        num_key_value_heads=4, tie_word_embeddings=True, rope_scaling=llama3_scaling(32.0)
    ),
    "linear": dict(rope_scaling=dict(rope_type="linear", factor=4.0)),
    "pruned": dict(num_key_value_heads=4, head_dim=12, rope_theta=500000.0),
    "attention-bias": dict(num_key_value_heads=2, attention_bias=True),
    "biases": dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True),
    "dynamic": dict(num_key_value_heads=4, rope_scaling=dict(rope_type="dynamic", factor=4.0)),
}


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("hf")
    sizes = ["1GB", "200KB", "300KB", *["1GB"] * 6]  # one file, or several with an index
    return [
        (root / name, write_hugging_face(root / name, dict(changes), size))
        for (name, changes), size in zip(HF_MODELS.items(), sizes, strict=True)
    ]


def test_logits_equal_transformers(hf_folders: list[tuple[Path, Any]]) -> None:
    for folder, theirs in hf_folders:
        with torch.inference_mode():
            want = theirs(TOKENS).logits
        torch.testing.assert_close(logits_of(folder), want, atol=1e-4, rtol=1e-4)


def test_logits_equal_transformers_past_position_8192(hf_folders: list[tuple[Path, Any]]) -> None:
    for folder, theirs in hf_folders:
        model = Llama.build(folder, max_seq_len=9020, max_batch_size=1).model
        start = 9000
        positions = torch.arange(start, start + 20)[None]
        # The tokens see only each other. The test is about rotations at high positions.
        with torch.inference_mode():
            want = theirs(TOKENS[:1], position_ids=positions).logits
            table = model.freqs_cis
            model.freqs_cis = table[start:]
            got = model(TOKENS[:1])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_hugging_face_folders_on_ranks(
    ranks: int, hf_folders: list[tuple[Path, Any]], tmp_path: Path
) -> None:
    paths = [folder for folder, _ in hf_folders]
    alone = logits_of_all(paths)
    for found in run_ranks(ranks, tmp_path, logits_of_all, paths):
        for logits, whole in zip(found, alone, strict=True):
            torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


def test_what_a_hugging_face_folder_says(hf_folders: list[tuple[Path, Any]]) -> None:
    llama = Llama.build(hf_folders[3][0])
    assert llama.tokenizer.stop_tokens == [5, 7]
    params = llama.model.params
    assert params.context == 16384
    assert params.rope_scaling is not None
    assert params.rope_scaling.factor == 32.0
    assert llama.model.output.weight is llama.model.tok_embeddings.weight
    meta_factor = Llama.build(hf_folders[3][0], rope_factor=8).model.params.rope_scaling
    assert meta_factor is not None
    assert meta_factor.factor == 8.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral': not a plain Llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias"),
        ({"mlp_bias": "yes"}, "mlp_bias is 'yes': it must be true or false"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': it must be true"),
        ({"quantization_config": {"bits": 4}}, "it is quantized .by an unknown method.: take the"),
        ({"quantization_config": {"quant_method": "gptq"}}, "it is quantized .gptq.: take the"),
        ({"quantization_config": {"quant_method": "awq"}}, "it is quantized .awq."),
        ({"quantization_config": {"quant_method": "fp8"}}, "it is quantized .fp8."),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantized .bitsandbytes.",
        ),
        ({"model_type": "mllama"}, "this is Llama 3.2 Vision: its text model is"),
        ({"model_type": "llama4"}, "this is Llama 4, another architecture"),
        ({"vision_config": {}}, "vision_config is {}"),
        ({"head_dim": 64}, "self_attn.q_proj.weight"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
        ({"head_dim": "x"}, "head_width is 'x'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "RoPE of type 'yarn'"),
        ({"rope_parameters": {"type": "dynamic"}}, "RoPE of type 'dynamic'"),
        ({"rope_parameters": {"type": "dynamic", "factor": 0}}, "factor is 0"),
        (
            {
                "rope_parameters": {"type": "dynamic", "factor": 2},
                "max_position_embeddings": None,
            },
            "original_context_length is None",
        ),
        ({"rope_parameters": {"type": "linear"}}, "RoPE of type 'linear'"),
        ({"rope_parameters": {"type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "settings lack low_freq"),
        ({"rope_parameters": [1]}, r"RoPE settings are \[1\]"),
        ({"hidden_size": None}, "dim is None"),
        ({"num_hidden_layers": 3}, r"lacks model.layers.2.self_attn.q_proj.weight"),
        ({"num_hidden_layers": 1}, "has unexpected tensors: layers.1"),
        ({"intermediate_size": 321}, r"model.layers.0.mlp.gate_proj.weight \(320, 128\) instead"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused_by_name(
    change: dict[str, Any], message: str, hf_folders: list[tuple[Path, Any]], tmp_path: Path
) -> None:
    source = hf_folders[0][0]
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text()) | change
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        Llama.build(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stated", [False, None])
def test_a_missing_output_matrix(
    stated: bool | None, hf_folders: list[tuple[Path, Any]], tmp_path: Path
) -> None:
    """config.json must say that the model is tied."""
    source = hf_folders[3][0]  # a tied model
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    del config["tie_word_embeddings"]
    config |= {} if stated is None else {"tie_word_embeddings": stated}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        Llama.build(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "this is a LoRA adapter: open its base model, and name"),
    ],
)
def test_folders_of_other_kinds(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
        Llama.build(tmp_path)


def fast_logits_of_all(folders: list[Path]) -> list[torch.Tensor]:
    """Mode fast computes in chunks and in company."""
    found = []
    for folder in folders:
        model = Llama.build(folder, max_seq_len=64, mode="fast").engine.model
        with torch.inference_mode():
            cache = model.make_cache(2, 20)
            parts = [model.features(TOKENS[:, i : i + 7], i, cache) for i in range(0, 20, 7)]
            found.append(model.logits(torch.cat(parts, 1)))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_hugging_face_folders_in_fast_mode(
    ranks: int, hf_folders: list[tuple[Path, Any]], tmp_path: Path
) -> None:
    with torch.inference_mode():
        want = [theirs(TOKENS).logits for _, theirs in hf_folders]
    paths = [folder for folder, _ in hf_folders]
    results = [fast_logits_of_all(paths)] if ranks == 1 else []
    for found in results or run_ranks(ranks, tmp_path, fast_logits_of_all, paths):
        for logits, expected in zip(found, want, strict=True):
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_heads_of_their_own_width_with_an_int8_cache(hf_folders: list[tuple[Path, Any]]) -> None:
    folder = hf_folders[5][0]
    prompts = [TOKENS[0].tolist(), TOKENS[1, :5].tolist()]
    want = Llama.build(folder).score(prompts)
    got = Llama.build(folder, mode="fast", kv_cache="int8").score(prompts)
    for row, expected in zip(got, want, strict=True):
        assert row == pytest.approx(expected, abs=0.05)


def test_heads_of_their_own_width_there_and_back(
    hf_folders: list[tuple[Path, Any]], tmp_path: Path
) -> None:
    folder = hf_folders[5][0]
    convert(folder, tmp_path / "meta", "meta", mp=2)
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["head_dim"] == 12
    for kind in ("meta", "hf"):
        assert torch.equal(logits_of(tmp_path / kind), logits_of(folder))


# ---- biases -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(dtype="bfloat16"), dict(quantize="int8")], ids=str)
def test_biases_in_fast_mode(
    options: dict[str, Any], hf_folders: list[tuple[Path, Any]], tmp_path: Path
) -> None:
    """Alone, in company and on ranks."""
    prompts = [TOKENS[0].tolist(), TOKENS[1, :5].tolist()]
    folders = [folder for folder, _ in hf_folders[6:8]]
    alone = scores_in_fast_mode(folders, prompts, options)
    for folder, found in zip(folders, alone, strict=True):
        want = Llama.build(folder, dtype=options.get("dtype")).score(prompts)
        tolerance = 0.1 if options else 1e-4
        for row, expected in zip(found, want, strict=True):
            assert row == pytest.approx(expected, abs=tolerance)
        for prompt, row in zip(prompts, found, strict=True):
            assert scores_in_fast_mode([folder], [prompt], options)[0] == [row]
    if "dtype" in options:
        return
    for ranks in (2,) if options else (2, 4):  # int8 needs groups of 32 columns
        for found in run_ranks(ranks, tmp_path, scores_in_fast_mode, folders, prompts, options):
            for rows, expected_rows in zip(found, alone, strict=True):
                for row, expected in zip(rows, expected_rows, strict=True):
                    assert row == pytest.approx(expected, abs=0.1 if options else 1e-4)


def scores_in_fast_mode(
    folders: list[Path], prompts: list[list[int]], options: dict[str, Any]
) -> list[list[list[float]]]:
    return [Llama.build(folder, mode="fast", **options).score(prompts) for folder in folders]


def test_biases_there_and_back(hf_folders: list[tuple[Path, Any]], tmp_path: Path) -> None:
    for folder, _ in hf_folders[6:8]:
        name = folder.name
        convert(folder, tmp_path / name / "meta", "meta", mp=2)
        convert(tmp_path / name / "meta", tmp_path / name / "hf", "hf")
        before, after = (
            load_file(f / "model.safetensors") for f in (folder, tmp_path / name / "hf")
        )
        assert before.keys() == after.keys()
        assert any(key.endswith("self_attn.k_proj.bias") for key in after)
        assert all(torch.equal(before[key], after[key]) for key in before)
        for kind in ("meta", "hf"):
            assert torch.equal(logits_of(tmp_path / name / kind), logits_of(folder))
        saved = convert(folder, tmp_path / name / "int8", quantize="int8")
        assert len(Llama.build(saved, mode="fast").score([[1, 2, 3]])[0]) == 3
        assert verify(tmp_path / name / "meta")[1] == []


@pytest.mark.parametrize("n_files", [1, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_model_bin(
    n_files: int, zipped: bool, hf_folders: list[tuple[Path, Any]], tmp_path: Path
) -> None:
    """Files that transformers wrote before .safetensors: one, or several with an index."""
    for source, theirs in hf_folders[1::2]:
        folder = tmp_path / source.name
        folder.mkdir()
        for name in ("config.json", "tokenizer.model"):
            (folder / name).symlink_to(source / name)
        state = theirs.state_dict()
        names = sorted(state)
        files = [f"pytorch_model-{i + 1:05d}-of-{n_files:05d}.bin" for i in range(n_files)]
        files = ["pytorch_model.bin"] if n_files == 1 else files
        places = {name: files[i % n_files] for i, name in enumerate(names)}
        for file in files:
            part = {name: state[name] for name in names if places[name] == file}
            torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
        if n_files > 1:
            index = {"metadata": {}, "weight_map": places}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert torch.equal(logits_of(folder), logits_of(source))


class Harmful:
    """An object whose pickle would run code when it is loaded."""

    def __reduce__(self) -> Any:
        return print, ("code ran",)


def test_a_harmful_pytorch_model_bin(
    hf_folders: list[tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").symlink_to(hf_folders[0][0] / "config.json")
    (tmp_path / "tokenizer.model").symlink_to(hf_folders[0][0] / "tokenizer.model")
    torch.save({"model.norm.weight": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a file of plain tensors: its code was not"):
        Llama.build(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_linear_scaling_there_and_back(hf_folders: list[tuple[Path, Any]], tmp_path: Path) -> None:
    folder = hf_folders[4][0]
    convert(folder, tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    for kind in ("meta", "hf"):
        assert torch.equal(logits_of(tmp_path / kind), logits_of(folder))


# ---- dynamic RoPE -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model that was trained on 24 tokens, for texts of up to 96."""
    folder = tmp_path_factory.mktemp("dynamic") / "model"
    scaling = dict(rope_type="dynamic", factor=4.0)
    changes = dict(num_key_value_heads=4, rope_scaling=scaling, max_position_embeddings=24)
    return folder, write_hugging_face(folder, changes, "1GB")


def logits_of_length(folder: Path, length: int, mode: Any) -> torch.Tensor:
    """Of one text in one prefill; max_seq_len is its length."""
    llama = Llama.build(folder, max_seq_len=length, mode=mode)
    tokens = (torch.arange(2 * length) * 7 % VOCAB).view(2, length)
    cache = llama.engine.model.make_cache(2, length)
    with torch.inference_mode():
        return llama.engine.model.logits(llama.engine.model.features(tokens, 0, cache))


@pytest.mark.parametrize("length", [10, 24, 25, 60, 96])
def test_dynamic_scaling_equals_transformers(
    length: int, dynamic: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, theirs = dynamic
    tokens = (torch.arange(2 * length) * 7 % VOCAB).view(2, length)
    with torch.inference_mode():
        want = theirs(tokens).logits
    for mode in ("reference", "fast"):
        got = logits_of_length(folder, length, mode)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    if length == 60:
        for ranks in (2, 4):
            for got in run_ranks(ranks, tmp_path, logits_of_length, folder, length, "fast"):
                torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_dynamic_scaling_depends_on_max_seq_len_alone(dynamic: tuple[Path, Any]) -> None:
    """Not on the length of a text or of those beside it, nor on the pieces of its prompt."""
    folder, _ = dynamic
    model = Llama.build(folder, max_seq_len=96).model
    whole = (torch.arange(96) * 7 % VOCAB)[None]
    with torch.inference_mode():
        want = model(whole, 0)
        torch.testing.assert_close(model(whole[:, :10], 0), want[:, :10], atol=1e-5, rtol=1e-5)
        model(whole[:, :20], 0)
        got = model(whole[:, 20:], 20)
        short = Llama.build(folder, max_seq_len=24).model(whole[:, :10], 0)  # theta as trained
    torch.testing.assert_close(got, want[:, 20:], atol=1e-5, rtol=1e-5)
    assert (short - want[:, :10]).abs().max() > 0.01


def test_dynamic_scaling_there_and_back(dynamic: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = dynamic
    convert(folder, tmp_path / "meta", "meta", mp=2)
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "dynamic", "factor": 4.0}
    assert config["max_position_embeddings"] == 24
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for kind in ("meta", "hf"):
        assert Llama.build(tmp_path / kind, max_seq_len=96).model.params.context == 96
        assert torch.equal(logits_of(tmp_path / kind), logits_of(folder))
    with pytest.raises(ConfigError, match="max_seq_len 97 is above the model's context, 96"):
        Llama.build(folder, max_seq_len=97)


@pytest.mark.parametrize(
    ("kind", "length", "context"),
    [("linear", 4096, 16384), ("linear", 32768, 32768), ("dynamic", 32768, 131072)],
)
def test_the_context_of_a_scaled_model(
    kind: str, length: int, context: int, tmp_path: Path
) -> None:
    scaling = dict(rope_type=kind, factor=4.0)
    changes = dict(rope_scaling=scaling, max_position_embeddings=length)
    write_hugging_face(tmp_path / "a", changes, "1GB")
    assert Llama.build(tmp_path / "a").model.params.context == context


def test_biases_are_trained_and_do_not_decay(hf_folders: list[tuple[Path, Any]]) -> None:
    model = make_model(attention_bias=True, mlp_bias=True)
    model.init_weights()
    biases = [w for name, w in model.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 14
    assert not any(bias.any() for bias in biases)
    optimizer = model.configure_optimizers(0.1)
    _, constant = (group["params"] for group in optimizer.param_groups)
    assert all(any(bias is w for w in constant) for bias in biases)
    model.forward_loss(TOKENS, TOKENS).backward()
    assert all(bias.grad is not None for bias in biases)
    model.configure_optimizers(0.1, train="norms")
    assert not any(bias.requires_grad for bias in biases)
