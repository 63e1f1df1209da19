"""LoRA adapters: the logits are those of PEFT, and what is not plain LoRA is refused by name."""

import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import BASES, write_adapter, write_base
from helpers.folders import TOKENS, make_setup
from helpers.ranks import run_ranks
from safetensors.torch import load_file, save_file

from llama import Llama
from llama.checkpoints import patterns
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import adapter_warning, find_adapter, open_checkpoint
from llama.errors import LlamaError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "names": dict(target_modules=["q_proj", "v_proj"], lora_alpha=16),
    "all-linear": dict(target_modules="all-linear", r=4, lora_dropout=0.1),
    "regular-expression": dict(
        target_modules=r".*layers\.(0|1)\.(self_attn|mlp)\.(k|o|up|down)_proj", lora_alpha=3
    ),
    "rank-stabilized": dict(target_modules="all-linear", r=16, lora_alpha=32, use_rslora=True),
    "patterns": dict(
        target_modules=ATTENTION,
        rank_pattern={"q_proj": 3, r"^model\.layers\.1\..*(k|v)_proj": 5},
        alpha_pattern={"layers.0.self_attn.o_proj": 40, ".*o_proj": 10, "^k_proj": 1000},
    ),
    "layers": dict(target_modules=["up_proj", "q_proj"], layers_to_transform=[1]),
    "excluded": dict(target_modules=ATTENTION, exclude_modules=r".*\.1\..*q_proj"),
    "whole-weights": dict(
        target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "k_proj", "norm"]
    ),
    "embedding-and-output": dict(target_modules=["embed_tokens", "lm_head", "gate_proj"]),
    "output-in-a-list-of-whole-weights": dict(
        target_modules=["lm_head", "o_proj"], modules_to_save=["embed_tokens"]
    ),
}  # fmt: skip


def logits_of(base: Path, adapter: Path | None, **build: Any) -> torch.Tensor:
    with torch.inference_mode():
        return Llama.build(base, max_seq_len=64, adapter=adapter, **build).model(TOKENS, 0).clone()


def logits_of_all(pairs: list[tuple[Path, Path]]) -> list[torch.Tensor]:
    return [logits_of(*pair) for pair in pairs]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def merged_part(base: Path, adapter: Path, name: str, n_parts: int, index: int) -> torch.Tensor:
    checkpoint = open_checkpoint(base)
    checkpoint.merge(adapter)
    return checkpoint.part(name, n_parts, index)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_base(root / name, **changes) for name, changes in BASES.items()}


@pytest.fixture(scope="module")
def adapters(
    bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[Path, Path, torch.Tensor]]:
    """The base's folder, the adapter's folder and PEFT's logits of every adapter on two bases."""
    root = tmp_path_factory.mktemp("adapters")
    found = []
    for name, config in ADAPTERS.items():
        for base in ("untied", "tied"):
            folder = root / f"{name}-{base}"
            found.append((bases[base], folder, write_adapter(bases[base], folder, **config)))
    return found


# ---- the same logits ----------------------------------------------------------------------------


def test_logits_equal_pefts(adapters: list[tuple[Path, Path, torch.Tensor]]) -> None:
    for base, folder, expected in adapters:
        plain = logits_of(base, None)
        assert (expected - plain).abs().max() > 0.1, folder.name
        close(logits_of(base, folder), expected)


def test_a_model_with_biases(bases: dict[str, Path], tmp_path: Path) -> None:
    config = dict(target_modules="all-linear", modules_to_save=["v_proj"])
    expected = write_adapter(bases["biases"], tmp_path / "adapter", **config)
    close(logits_of(bases["biases"], tmp_path / "adapter"), expected)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks(ranks: int, adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path) -> None:
    """The models have two key/value heads, so four ranks repeat them."""
    pairs = [(base, folder) for base, folder, _ in adapters]
    for found in run_ranks(ranks, tmp_path, logits_of_all, pairs):
        for logits, (_, _, expected) in zip(found, adapters, strict=True):
            close(logits, expected)


def test_metas_layout_in_shards(
    adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    for base in {base for base, _, _ in adapters}:
        convert(base, tmp_path / base.name, mp=2)
    for base, folder, expected in adapters:
        close(logits_of(tmp_path / base.name, folder), expected)


def test_names_and_files_that_other_versions_write(
    adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    base, folder, expected = next(a for a in adapters if a[1].name == "whole-weights-tied")
    config = (folder / "adapter_config.json").read_text()
    tensors = load_file(folder / "adapter_model.safetensors")
    plain = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    named = {
        name.replace("_A.", "_A.mine.").replace("norm.", "norm.modules_to_save.mine."): tensor
        for name, tensor in tensors.items()
    }
    for i, state in enumerate((tensors, plain, named)):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "adapter_config.json").write_text(config)
        torch.save(state, tmp_path / str(i) / "adapter_model.bin")
        close(logits_of(base, tmp_path / str(i)), expected)


def test_a_change_in_another_dtype_is_added_in_float32(
    bases: dict[str, Path], adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    _, folder, _ = adapters[0]
    (tmp_path / "half").mkdir()
    config = (folder / "adapter_config.json").read_text()
    (tmp_path / "half" / "adapter_config.json").write_text(config)
    tensors = load_file(folder / "adapter_model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(halves, tmp_path / "half" / "adapter_model.safetensors")
    convert(bases["untied"], tmp_path / "base", dtype="bfloat16")
    name = "layers.0.attention.wv.weight"
    a, b = (
        halves[f"base_model.model.model.layers.0.self_attn.v_proj.lora_{x}.weight"] for x in "AB"
    )
    part = merged_part(tmp_path / "base", tmp_path / "half", name, 2, 1)
    whole = open_checkpoint(tmp_path / "base").part(name, 1, 0).float() + 2 * b.float() @ a.float()
    assert part.dtype == torch.float32
    close(part, whole.chunk(2)[1], 1e-6)
    model = Llama.build(tmp_path / "base", adapter=tmp_path / "half").model
    assert torch.equal(model.layers[0].attention.wv.weight, whole.bfloat16())


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_fast_mode_rounds_the_merged_weights(
    quantize: Any, adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    """The same numbers as from a folder that transformers merged."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    for base, folder, _ in adapters:
        if folder.name not in ("rank-stabilized-untied", "all-linear-tied"):
            continue
        adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder)
        merged = tmp_path / folder.name
        adapted.merge_and_unload().save_pretrained(merged)
        tokenizer = base / "tokenizer.model"
        options: dict[str, Any] = dict(mode="fast", quantize=quantize, max_seq_len=64)
        prompts = TOKENS.tolist()
        found, expected = (
            torch.tensor(Llama.build(path, tokenizer, **options, **more).score(prompts))
            for path, more in ((base, dict(adapter=folder)), (merged, {}))
        )
        # A weight on the edge between two steps may be rounded to the other one.
        close(found, expected, 1e-4 if quantize is None else 0.05)


def rounded_wo(base: Path, adapter: Path, width: str) -> torch.Tensor:
    return (
        Llama.build(base, adapter=adapter, mode="fast", quantize=width)
        .model.layers[0]
        .attention.wo.weight[0]
    )


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_rounded_weights_do_not_depend_on_the_number_of_ranks(
    width: str, adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    """wo is split along its rows, and an int8 scale is made from the whole row."""
    base, folder, _ = next(a for a in adapters if a[1].name == "all-linear-untied")
    whole = rounded_wo(base, folder, width)
    parts = run_ranks(2, tmp_path, rounded_wo, base, folder, width)
    assert torch.equal(torch.cat(parts, 1), whole)


# ---- a merged checkpoint ------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_a_merged_checkpoint(
    to: str, adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    """Its logits are those of the adapter merged at load, to the bit. transformers agrees."""
    from transformers import LlamaForCausalLM

    for base, folder, expected in adapters:
        merged = convert(base, tmp_path / folder.name, to, adapter=folder)
        assert torch.equal(logits_of(merged, None), logits_of(base, folder))
        if to == "hf":
            with torch.inference_mode():
                close(LlamaForCausalLM.from_pretrained(merged)(TOKENS).logits, expected)


def test_a_merged_checkpoint_keeps_the_dtypes_of_its_base(
    adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    base, folder, _ = next(a for a in adapters if a[1].name == "whole-weights-tied")
    half = convert(base, tmp_path / "half", dtype="bfloat16")
    merged = open_checkpoint(convert(half, tmp_path / "merged", mp=2, adapter=folder))
    assert {tensor.dtype for shard in merged.shards for tensor in shard.values()} == {
        torch.bfloat16
    }
    assert not merged.args.tied


@pytest.mark.parametrize("width", ["int8", "int4"])
def test_a_merged_checkpoint_is_rounded_from_float32(
    width: Any, adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    base, folder, _ = next(a for a in adapters if a[1].name == "all-linear-untied")
    at_once = convert(base, tmp_path / "at-once", quantize=width, adapter=folder)
    merged = convert(base, tmp_path / "merged", adapter=folder)
    later = convert(merged, tmp_path / "later", quantize=width)
    shard = "consolidated.00.safetensors"
    first, second = load_file(at_once / shard), load_file(later / shard)
    assert all(torch.equal(first[name], second[name]) for name in first | second)


# ---- GGUF files ---------------------------------------------------------------------------------


def test_a_gguf_file_as_the_base(
    adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    for base, folder, expected in adapters:
        file = tmp_path / f"{folder.name}.gguf"
        convert(base, file, "gguf", dtype="float32")
        close(logits_of(file, folder), expected)
        merged = convert(file, tmp_path / f"{folder.name}-merged.gguf", "gguf", adapter=folder)
        assert torch.equal(logits_of(merged, None), logits_of(file, folder))


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_quantized_gguf_file_is_unpacked_before_the_sum(
    kind: str, adapters: list[tuple[Path, Path, torch.Tensor]], tmp_path: Path
) -> None:
    """A changed matrix keeps no four-bit numbers of the file; the others do."""
    base, folder, _ = next(a for a in adapters if a[1].name == "names-untied")
    file = convert(base, tmp_path / "base.gguf", "gguf", dtype=kind)
    unpacked = convert(file, tmp_path / "unpacked", dtype="float32")
    for name in ("layers.0.attention.wq.weight", "layers.0.attention.wo.weight"):
        for place in ((1, 0), (2, 1)):
            found = merged_part(file, folder, name, *place)
            assert torch.equal(found, merged_part(unpacked, folder, name, *place))
    options: dict[str, Any] = dict(mode="fast", quantize="int4", max_seq_len=64)
    found = Llama.build(file, adapter=folder, **options).model.layers[0].attention
    expected = Llama.build(unpacked, adapter=folder, **options).model.layers[0].attention
    plain = Llama.build(file, **options).model.layers[0].attention
    for field in range(2):
        assert torch.equal(found.wq.weight[field], expected.wq.weight[field])
        assert torch.equal(found.wo.weight[field], plain.wo.weight[field])


def test_names_of_gguf_files(bases: dict[str, Path], small: Path, tmp_path: Path) -> None:
    """The base's name is the beginning of the file's."""
    checkpoint = open_checkpoint(bases["untied"])
    adapter = checkpoint.merge(small)
    for name, is_same in (("untied-Q8_0.gguf", True), ("Untied.gguf", True), ("x.gguf", False)):
        file = convert(bases["untied"], tmp_path / name, "gguf")
        assert (adapter_warning(adapter, file) is None) == is_same


# ---- folders, names and memory ------------------------------------------------------------------


def test_only_the_changed_weights_are_copied(bases: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    convert(bases["untied"], base)
    write_adapter(bases["untied"], tmp_path / "adapter", target_modules=["gate_proj"])
    plain = make_setup(base).weight_bytes()
    changed = open_checkpoint(base)
    changed.merge(tmp_path / "adapter")
    own, mapped = replace(make_setup(base), opened=changed).weight_bytes()
    gates = 2 * 256 * 128 * 4
    assert (own, mapped) == (plain[0] + gates, plain[1] - gates)


def test_a_warning_if_the_base_has_another_name(
    bases: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(bases["untied"], tmp_path / "adapter", target_modules=["q_proj"])
    with caplog.at_level(logging.WARNING):
        Llama.build(bases["untied"], adapter=tmp_path / "adapter")
        assert not caplog.messages
        Llama.build(bases["tied"], adapter=tmp_path / "adapter")
    assert f"was trained on {bases['untied']}, and is used on {bases['tied']}" in caplog.text


# ---- errors -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "adapter"
    write_adapter(bases["untied"], folder, target_modules=["q_proj", "up_proj"], r=4)
    return folder


def rewritten(
    source: Path, folder: Path, settings: dict[str, Any], tensors: dict[str, Any] | None = None
) -> Path:
    """A copy of an adapter with other settings and tensors. None removes a tensor."""
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    state = load_file(source / "adapter_model.safetensors") | (tensors or {})
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, folder / "adapter_model.safetensors")
    return folder


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3': only LORA is supported"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"use_dora": True}, "use_dora is True, DoRA: only plain LoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True, matrices that are stored transposed"),
        ({"bias": "all"}, "bias is 'all', trained biases"),
        ({"lora_bias": True}, "lora_bias is True, trained biases"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is [5], single trained tokens"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying is True, one change for embedding"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]], repeated layers"),
        ({"use_qalora": True}, "use_qalora is True, an unknown setting"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"init_lora_weights": []}, "init_lora_weights is []"),
        ({"r": 0}, "r is 0: it must be a whole number above 0"),
        ({"r": 8}, "q_proj.lora_A is (4, 128), but the base model and adapter_config.json need (8"),
        ({"lora_alpha": "8"}, "lora_alpha is '8': it must be a number"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan: it must be a number"),
        ({"use_rslora": "no"}, "use_rslora is 'no': it must be true or false"),
        ({"target_modules": 5}, "target_modules is 5: it must be a list of names"),
        ({"target_modules": [["q_proj"]]}, "target_modules is [['q_proj']]: it must be a list"),
        ({"target_modules": "("}, "'(' is no regular expression: missing )"),
        ({"target_modules": ["q_proj"]}, "up_proj.lora_A does not belong to adapter_config.json"),
        ({"target_modules": None}, "does not belong to adapter_config.json"),
        ({"target_modules": "all-linear"}, "lacks model.layers.0.self_attn.k_proj.lora_A"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1': it must be whole numbers"),
        ({"layers_pattern": "blocks"}, "layers_pattern is 'blocks', an unknown setting"),
        ({"rank_pattern": [1]}, "rank_pattern is [1]: it must be an object"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern of q_proj is -1: it must be a whole"),
        ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of q_proj is None: it must be a"),
        ({"modules_to_save": ["lm_head"]}, "lacks lm_head, which is in modules_to_save"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path is 7: it must be a text"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(
    settings: dict[str, Any], message: str, bases: dict[str, Path], small: Path, tmp_path: Path
) -> None:
    folder = rewritten(small, tmp_path / "adapter", settings)
    with pytest.raises(LlamaError) as error:
        Llama.build(bases["untied"], adapter=folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({Q_A: None}, "lacks model.layers.0.self_attn.q_proj.lora_A"),
        ({Q_A: torch.zeros(4, 64)}, "q_proj.lora_A is (4, 64), but the base model and"),
        ({Q_A: torch.zeros(4)}, "q_proj.lora_A is (4,), but"),
        ({Q_A: torch.full((4, 128), math.inf)}, "q_proj has numbers that are not finite"),
        ({Q_A: torch.zeros(4, 128, dtype=torch.int8)}, "is torch.int8, not a tensor of floating"),
        ({"extra": torch.zeros(2)}, "extra does not belong to adapter_config.json and model"),
        ({Q_A.replace("0", "9"): torch.zeros(4, 128)}, "model.layers.9.self_attn.q_proj.lora_A"),
        ({Q_A.replace("lora_A", "lora_magnitude_vector"): torch.zeros(4)}, "lora_magnitude"),
        (
            {Q_A.removeprefix("base_model.model."): torch.zeros(4, 128)},
            "model.layers.0.self_attn.q_proj.lora_A twice, under two names",
        ),
        (
            {"base_model.model.lm_head.weight": torch.zeros(700, 128)},
            "lm_head.weight is (700, 128), but the base model and adapter_config.json need (640",
        ),
    ],
)
def test_tensors_that_are_refused(
    tensors: dict[str, Any], message: str, bases: dict[str, Path], small: Path, tmp_path: Path
) -> None:
    folder = rewritten(small, tmp_path / "adapter", {}, tensors)
    with pytest.raises(LlamaError) as error:
        Llama.build(bases["untied"], adapter=folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)


def test_folders_that_are_refused(bases: dict[str, Path], small: Path, tmp_path: Path) -> None:
    base = bases["untied"]
    with pytest.raises(LlamaError, match=r"no such folder: .*/nowhere"):
        Llama.build(base, adapter=tmp_path / "nowhere")
    with pytest.raises(LlamaError, match=r"cannot read .*adapter_config.json: No such file"):
        Llama.build(base, adapter=base)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_bytes(
        (small / "adapter_config.json").read_bytes()
    )
    with pytest.raises(LlamaError, match=r"has no adapter_model.safetensors or adapter_model.bin"):
        Llama.build(base, adapter=tmp_path / "adapter")
    with pytest.raises(LlamaError, match=r"this is a LoRA adapter: open its base model, and name"):
        Llama.build(small)
    convert(base, tmp_path / "int8", quantize="int8")
    with pytest.raises(LlamaError, match=r"int8: .* can only be merged into the original"):
        Llama.build(tmp_path / "int8", adapter=small, mode="fast")


def test_an_expression_that_runs_for_years_is_stopped(
    bases: dict[str, Path], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 2)
    endless = {"target_modules": r"(.|.)*(\w|\w)*!"}
    folder = rewritten(small, tmp_path / "adapter", endless)
    with pytest.raises(LlamaError, match="matching takes more than 2 seconds"):
        Llama.build(bases["untied"], adapter=folder)


class Code:
    """Something that runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_code_in_a_bin_file_is_not_run(bases: dict[str, Path], small: Path, tmp_path: Path) -> None:
    folder = rewritten(small, tmp_path / "adapter", {})
    (folder / "adapter_model.safetensors").unlink()
    torch.save({Q_A: Code(tmp_path / "mark")}, folder / "adapter_model.bin")
    with pytest.raises(LlamaError, match="is not a file of plain tensors: its code was not run"):
        Llama.build(bases["untied"], adapter=folder)
    assert not (tmp_path / "mark").exists()


def test_mutated_folders_are_opened_or_refused_in_one_line(
    bases: dict[str, Path], small: Path, tmp_path: Path
) -> None:
    """Bytes of both files are changed, removed or added; and values of the settings replaced."""
    draw = random.Random(0)
    settings = json.loads((small / "adapter_config.json").read_text())
    values = [None, True, -1, 0, 1e300, "", "a\0b", "\ud800", "[", [], [1], ["x"], {}, {"q": 1}]
    weights = (small / "adapter_model.safetensors").read_bytes()
    refused: list[str] = []
    for i in range(300):
        changed = dict(settings)
        text, data = json.dumps(changed).encode(), bytearray(weights)
        if i % 3 == 0:
            changed[draw.choice(list(settings))] = draw.choice(values)
            text = json.dumps(changed).encode()
        elif i % 3 == 1:
            place = draw.randrange(len(text))
            text = text[:place] + draw.randbytes(draw.randrange(3)) + text[place + 1 :]
        else:
            place = draw.randrange(1200)  # in the header
            data[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes(text)
        (folder / "adapter_model.safetensors").write_bytes(data)
        checkpoint = open_checkpoint(bases["untied"])
        try:
            adapter_warning(checkpoint.merge(find_adapter(folder)), checkpoint.folder)
        except LlamaError as error:
            refused.append(str(error))
    assert len(refused) > 150
    assert all(message.isprintable() for message in refused)
