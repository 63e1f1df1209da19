"""GGUF files, read and written: logits equal those of the folder and of llama.cpp; errors."""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers.folders import MODELS, TOKENS, VOCAB, logits_of, make_model, write_meta
from helpers.ranks import run_ranks
from make_checkpoint import demo_pieces, write_tokenizer

from llama import Llama
from llama.checkpoints.chat_form import read_template
from llama.checkpoints.convert import convert
from llama.checkpoints.doctor import examine
from llama.checkpoints.folder import BUNDLED, open_checkpoint
from llama.checkpoints.inspect import describe
from llama.checkpoints.verify import kind_of, verify
from llama.config import RopeScaling
from llama.errors import CheckpointError, ConfigError, LlamaError
from llama.fast.quantize import Int4Weight, dequantize

TYPES = gguf.GGMLQuantizationType
SHAPES: dict[str, dict[str, Any]] = MODELS | {
    "head width": dict(n_heads=4, n_kv_heads=2, head_width=48),
    "linear": dict(rope_scaling=RopeScaling(4.0, kind="linear")),
    "factor 32": dict(n_heads=4, rope_scaling=RopeScaling(32.0)),
    "biases": dict(n_kv_heads=4, attention_bias=True, mlp_bias=True),
}


def llama_cpp_model(path: Path) -> Any:
    """llama.cpp's model, with keys and values in float32."""
    import llama_cpp

    return llama_cpp.Llama(
        str(path), n_ctx=512, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
    )


def llama_cpp_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of rows of tokens, one row after the other."""
    model = llama_cpp_model(path)
    rows = []
    for row in tokens.tolist():
        model.reset()
        model.eval(row)
        rows.append(torch.tensor(model.scores[: len(row)]))
    return torch.stack(rows)


def rewritten(source: Path, path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]):
    """Write a file again with the package. change: changes its values and its tensors in place."""
    reader = gguf.GGUFReader(source)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    values = {key: (field.contents(), field.types) for key, field in fields.items()}
    tensors = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    change(values, tensors)
    writer = gguf.GGUFWriter(path, values.pop("general.architecture")[0])
    for key, (value, types) in values.items():
        writer.add_key_value(key, value, types[0], types[-1] if len(types) > 1 else None)
    for name, (data, type_) in tensors.items():
        writer.add_tensor(name, np.array(data), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in float32."""
    path = tmp_path_factory.mktemp("bundled") / "tales.gguf"
    return convert(BUNDLED, path, "gguf", dtype="float32")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    source = write_meta(root / "meta", make_model(n_layers=1, n_kv_heads=8), 1)
    return convert(source, root / "small.gguf", "gguf")


# ---- llama.cpp --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_the_folder(name: str, tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", make_model(**SHAPES[name]), 1)
    path = convert(source, tmp_path / "model.gguf", "gguf")
    opened, before = open_checkpoint(path).args, open_checkpoint(source).args
    for field in (
        "rope_scaling",
        "norm_eps",
        "rope_theta",
        "head_dim",
        "ffn_dim",
        "context",
        "tied",
    ):
        assert getattr(opened, field) == getattr(before, field), field
    logits = logits_of(path)
    assert torch.equal(logits, logits_of(source))


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", make_model(**SHAPES[name]), 1)
    path = convert(source, tmp_path / "model.gguf", "gguf")
    logits = llama_cpp_logits(path, TOKENS)
    torch.testing.assert_close(logits, logits_of(path), atol=2e-4, rtol=1e-4)


@pytest.mark.llama_cpp
def test_the_bundled_model_says_the_same_in_llama_cpp(bundled: Path) -> None:
    prompt = "Once upon a time"
    ours = Llama.build(bundled, dtype="float32")
    text = ours.text_completion([prompt], max_gen_len=100, temperature=0)[0]["generation"]
    answer = llama_cpp_model(bundled).create_completion(prompt, max_tokens=100, temperature=0)
    assert answer["usage"]["completion_tokens"] == 100
    assert text == answer["choices"][0]["text"]
    folder = Llama.build(dtype="float32")
    assert text == folder.text_completion([prompt], max_gen_len=100, temperature=0)[0]["generation"]


@pytest.mark.llama_cpp
def test_a_dialog_is_written_as_llama_cpp_writes_it(bundled: Path) -> None:
    """By the template in the file, which is run there and only recognized here."""
    ours, theirs = Llama.build(bundled), llama_cpp_model(bundled)
    dialog: Any = [
        {"role": "system", "content": "You tell tales."},
        {"role": "user", "content": "Tell one of a fox."},
    ]
    answer = theirs.create_chat_completion(dialog, max_tokens=1, temperature=0)
    ids = ours.encode_dialog(dialog)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert theirs.input_ids[: len(ids)].tolist() == ids


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    "width", "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K_M Q4_K_M Q5_K_M Q6_K IQ4_NL IQ4_XS".split()
)
def test_files_that_llama_cpp_quantizes(width: str, bundled: Path, tmp_path: Path) -> None:
    """llama.cpp rounds activations too, so its logits differ by about a hundredth."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = int(gguf.LlamaFileType[f"MOSTLY_{width}"])
    path = tmp_path / f"{width}.gguf"
    paths = str(bundled).encode(), str(path).encode()
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) == 0
    theirs = llama_cpp_logits(path, TOKENS)
    with torch.inference_mode():
        ours = Llama.build(path, dtype="float32").model(TOKENS, 0)
    assert (ours - theirs).norm() < 0.015 * theirs.norm()


# ---- quantized files --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0", "q4_0"])
def test_the_matrices_get_the_type_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    path = convert(BUNDLED, tmp_path / "a.gguf", "gguf", dtype=dtype)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    kind = {"float16": "F16", "bfloat16": "BF16"}.get(dtype, dtype.upper())
    assert {types[name] for name in types if "norm" not in name} == {kind}
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    source, opened = open_checkpoint(BUNDLED), open_checkpoint(path)
    assert opened.dtype == (torch.float16 if dtype == "float16" else torch.bfloat16)
    for name in source.args.parameter_shapes():
        weight, read = source.part(name, 1, 0), opened.part(name, 1, 0)
        if kind in ("Q8_0", "Q4_0") and weight.dim() == 2:
            packed = gguf.quantize(weight.float().numpy(), TYPES[kind])
            weight = torch.from_numpy(gguf.dequantize(packed, TYPES[kind]))
        assert torch.equal(read.float(), weight.to(read.dtype).float())


def logits_of_all(paths: list[Path]) -> list[torch.Tensor]:
    return [logits_of(path) for path in paths]


@pytest.mark.parametrize("ranks", [2, 4])
def test_quantized_files_on_ranks(ranks: int, tmp_path: Path) -> None:
    """The model has two key/value heads, so four ranks repeat them. A rank's columns of w2 are not
    whole blocks."""
    model = make_model(n_kv_heads=2, hidden_dim=320)
    source = write_meta(tmp_path / "meta", model, 1)
    paths = [
        convert(source, tmp_path / f"{dtype}.gguf", "gguf", dtype=dtype)
        for dtype in ("q8_0", "q4_0")
    ]
    whole = [Llama.build(path, max_seq_len=64, dtype="float32") for path in paths]
    for found in run_ranks(ranks, tmp_path, float32_logits_of_all, paths):
        for logits, llama in zip(found, whole, strict=True):
            with torch.inference_mode():
                want = llama.model(TOKENS, 0)
            torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


def float32_logits_of_all(paths: list[Path]) -> list[torch.Tensor]:
    models = [Llama.build(path, max_seq_len=64, dtype="float32").model for path in paths]
    with torch.inference_mode():
        return [model(TOKENS, 0).clone() for model in models]


@pytest.mark.parametrize("part", [(1, 0), (2, 1)])
def test_int4_keeps_the_numbers_of_q4_0(part: tuple[int, int], tmp_path: Path) -> None:
    """The scales of the file are multiples of a power of two here, so that bfloat16 holds them."""
    path = convert(BUNDLED, tmp_path / "a.gguf", "gguf", dtype="q4_0")

    def round_scales(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name, (data, type_) in tensors.items():
            if type_ == TYPES.Q4_0:
                blocks = np.array(data).reshape(-1, 18)
                scales = torch.from_numpy(blocks[:, :2].copy()).view(torch.float16)
                blocks[:, :2] = scales.bfloat16().half().view(torch.uint8).numpy()
                tensors[name] = (blocks.reshape(data.shape), type_)

    path = rewritten(path, tmp_path / "b.gguf", round_scales)
    opened = open_checkpoint(path)
    for name in (
        "layers.0.attention.wq.weight",
        "layers.1.feed_forward.w2.weight",
        "output.weight",
    ):
        weight = opened.quantized_part(name, *part, "int4")
        assert isinstance(weight, Int4Weight)
        want = opened.part(name, *part, torch.float32)
        assert torch.equal(dequantize(weight)[: len(want)], want)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "bfloat16"])
@pytest.mark.parametrize("width", ["int8", "int4"])
def test_a_file_is_rounded_while_loading(dtype: Any, width: Any, tmp_path: Path) -> None:
    path = convert(BUNDLED, tmp_path / "a.gguf", "gguf", dtype=dtype)
    whole = convert(path, tmp_path / "meta", "meta", dtype="float32")
    models = [
        Llama.build(place, mode="fast", quantize=width, dtype="float32").engine.model
        for place in (path, whole)
    ]
    with torch.inference_mode():
        one, two = (m.logits(m.features(TOKENS, 0, m.make_cache(2, 20))) for m in models)
    # From Q4_0, int4 keeps the numbers, and only the scales differ from rounding anew.
    assert (one - two).norm() < (0.02 if (dtype, width) == ("q4_0", "int4") else 1e-5) * two.norm()


def test_a_tied_model_is_quantized(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", make_model(n_kv_heads=4, tied=True), 1)
    path = convert(source, tmp_path / "a.gguf", "gguf", dtype="q8_0")
    opened = open_checkpoint(path)
    assert "output.weight" not in {t.name for t in gguf.GGUFReader(path).tensors}
    assert opened.args.tied
    model = Llama.build(path, max_seq_len=32).model
    assert model.output.weight is model.tok_embeddings.weight
    Llama.build(path, mode="fast", quantize="int8", max_seq_len=32)


# ---- from GGUF to a folder --------------------------------------------------------------------


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_a_folder_says_what_the_file_says(to: str, bundled: Path, tmp_path: Path) -> None:
    def add_sampling(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        values["general.sampling.temp"] = (0.25, [gguf.GGUFValueType.FLOAT32])

    path = rewritten(bundled, tmp_path / "a.gguf", add_sampling)
    folder = convert(path, tmp_path / "out", to, dtype="float32")
    one, two = Llama.build(path), Llama.build(folder)
    with torch.inference_mode():
        assert torch.equal(one.model(TOKENS, 0), two.model(TOKENS, 0))
    assert one.suggested_sampling == two.suggested_sampling == {"temperature": 0.25}
    assert read_template(path) == read_template(folder)
    for name in ("stop_tokens", "special_tokens", "bos_id", "eos_id", "form"):
        assert getattr(one.tokenizer, name) == getattr(two.tokenizer, name)
    text = "Once upon a time. <|eot_id|>"
    assert one.tokenizer.encode(text, True, True) == two.tokenizer.encode(text, True, True)
    again = convert(folder, tmp_path / "b.gguf", "gguf", dtype="float32")
    assert torch.equal(logits_of(again), logits_of(path))
    assert Llama.build(again).suggested_sampling == {"temperature": 0.25}


def test_a_metas_folder_gets_its_tokenizer_model(
    llama2_tokenizer_path: Path, tmp_path: Path
) -> None:
    source = write_meta(tmp_path / "meta", make_model(vocab_size=32000, n_layers=1), 1)
    (source / "tokenizer.model").write_bytes(llama2_tokenizer_path.read_bytes())
    path = convert(source, tmp_path / "a.gguf", "gguf")
    back = convert(path, tmp_path / "back")
    text = "  Größe 狐狸\n"
    ids = Llama.build(source).tokenizer.encode(text, True, True)
    assert Llama.build(back).tokenizer.encode(text, True, True) == ids
    assert (back / "tokenizer.model").exists()


def test_tuning_a_gguf_file_writes_a_folder(bundled: Path, tmp_path: Path) -> None:
    from llama.commands.train_config import FinetuneConfig
    from llama.commands.train_run import finetune

    dialog = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    data = tmp_path / "dialogs.jsonl"
    data.write_text(json.dumps({"messages": dialog}) + "\n")
    options: Any = dict(ckpt_dir=str(bundled), data=str(data), out_dir=str(tmp_path / "run"))
    folder = finetune(FinetuneConfig(**options, steps=1, batch=1, seq_len=32, warmup_steps=0))
    assert sum(path.stat().st_size for path in folder.glob("tokenizer*")) < 1e6
    tuned, before = Llama.build(folder).tokenizer, Llama.build(bundled).tokenizer
    assert tuned.encode("a fox", True, True) == before.encode("a fox", True, True)
    assert (tuned.stop_tokens, tuned.form) == (before.stop_tokens, before.form)


# ---- commands ---------------------------------------------------------------------------------


def test_a_file_is_described_and_checked(small: Path, tmp_path: Path) -> None:
    assert "n_layers" not in describe(str(small))
    title, problems = verify(small)
    assert title.startswith("a Llama of ")
    assert ", instruct, GGUF, float32, " in title
    assert problems == []
    assert not (small.parent / "SHA256SUMS").exists()
    findings = {found.about: found for found in examine(small)}
    assert findings["tokenizer"].text == "Llama 3's kind, 640 tokens, as many as the model's"
    assert "dialogs in the form llama3" in findings["chat"].text


def test_a_damaged_weight_is_a_problem(small: Path, tmp_path: Path) -> None:
    def damage(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        blocks = gguf.quantize(np.ones((640, 128), np.float32), TYPES.Q8_0)
        blocks[3, :2] = 0xFF  # a scale that is no number
        tensors["output.weight"] = (blocks, TYPES.Q8_0)

    _, problems = verify(rewritten(small, tmp_path / "a.gguf", damage))
    assert problems == [f"{tmp_path / 'a.gguf'}: output.weight has numbers that are not finite"]


def test_a_folder_with_one_model(small: Path, bundled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text("a model")
    (tmp_path / "0123").symlink_to(small)  # Hugging Face's cache has such links
    (folder / "a.gguf").symlink_to(tmp_path / "0123")
    assert torch.equal(logits_of(folder), logits_of(small))
    assert kind_of(folder / "a.gguf") == "instruct"
    (folder / "b.gguf").symlink_to(bundled)
    with pytest.raises(CheckpointError, match=r"several GGUF models: name one of a.gguf, b.gguf"):
        Llama.build(folder)


def test_a_file_in_parts(small: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(small)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=5)
    for key, field in reader.fields.items():
        if key != "general.architecture" and not key.startswith("GGUF."):
            last = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], last)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    for place in (parts[0], parts[2], tmp_path):
        assert torch.equal(logits_of(place), logits_of(small))


def test_a_file_without_a_vocabulary(small: Path, tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", make_model(n_layers=1), 1)
    (source / "tokenizer.model").unlink()
    path = convert(source, tmp_path / "a.gguf", "gguf")
    with pytest.raises(CheckpointError, match=r"a.gguf has no tokenizer.model or tokenizer.json"):
        Llama.build(path)
    write_tokenizer(tmp_path / "tokenizer.model", demo_pieces())
    assert Llama.build(path).tokenizer.n_words == VOCAB


@pytest.mark.llama_cpp
def test_llama_cpp_opens_a_file_without_a_vocabulary(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "meta", make_model(n_layers=1), 1)
    (source / "tokenizer.model").unlink()
    path = convert(source, tmp_path / "a.gguf", "gguf")
    assert len(llama_cpp_logits(path, TOKENS)) == 2


def test_a_file_replaces_a_file_only_if_told(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("precious")
    with pytest.raises(CheckpointError, match="exists: it is replaced only with --force"):
        convert(small, path, "gguf")
    assert path.read_text() == "precious"
    convert(small, path, "gguf", force=True)
    assert torch.equal(logits_of(path), logits_of(small))
    assert [place.name for place in tmp_path.iterdir()] == ["a.gguf"]


def test_the_keys_that_other_programs_read(bundled: Path) -> None:
    values = {key: f.contents() for key, f in gguf.GGUFReader(bundled).fields.items()}
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "tales",
        "general.size_label": "6.1M", "general.file_type": 0, "general.quantization_version": 2,
        "llama.block_count": 6, "llama.context_length": 1024, "llama.embedding_length": 256,
        "llama.feed_forward_length": 704, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": 6400,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 6144, "tokenizer.ggml.eos_token_id": 6145,
        "tokenizer.ggml.eot_token_id": 6153, "tokenizer.ggml.eom_token_id": 6152,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {key: values.get(key) for key in expected} == expected
    assert "<|start_header_id|>" in values["tokenizer.chat_template"]
    assert len(values["tokenizer.ggml.tokens"]) == len(values["tokenizer.ggml.token_type"]) == 6400


# ---- errors -----------------------------------------------------------------------------------

UINT32, STRING = [gguf.GGUFValueType.UINT32], [gguf.GGUFValueType.STRING]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": ("qwen2", STRING)}, "the architecture is 'qwen2', not 'llama'"),
        ({"general.type": ("adapter", STRING)}, "holds no model: general.type is 'adapter'"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.attention.head_count": (0, UINT32)}, "a.gguf: n_heads is 0: it must be a whole"),
        ({"llama.block_count": ("x", STRING)}, "llama.block_count is 'x', not of type int"),
        ({"llama.block_count": (3, UINT32)}, "lacks blk.1.attn_q.weight, blk.1.attn_k.weight"),
        ({"llama.vocab_size": (641, UINT32)}, r"token_embd.weight \(640, 128\) instead of \(641"),
        ({"llama.attention.key_length": (4, UINT32)}, "keys, values and RoPE must have the same"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms"),
        ({"llama.rope.scaling.type": ("yarn", STRING)}, "RoPE scaling is of type 'yarn'"),
        ({"llama.logit_scale": (1.5, [gguf.GGUFValueType.FLOAT32])}, "has logit_scale"),
        ({"llama.attention.causal": (False, [gguf.GGUFValueType.BOOL])}, "attention is not causal"),
        (
            {"llama.attention.head_count_kv": ([8, 4], [gguf.GGUFValueType.ARRAY, UINT32[0]])},
            "llama.attention.head_count_kv is not the same in all layers",
        ),
    ],
)
def test_keys_that_do_not_fit(
    keys: dict[str, Any], message: str, small: Path, tmp_path: Path
) -> None:
    def change(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        for key, value in keys.items():
            values.pop(key) if value is None else values.update({key: value})

    path = rewritten(small, tmp_path / "a.gguf", change)
    with pytest.raises(LlamaError, match=message) as caught:
        Llama.build(path)
    assert "a.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("output_norm.weight", None, "a.gguf lacks output_norm.weight"),
        ("blk.0.attn_q.weight", (96, 128), r"blk.0.attn_q.weight \(96, 128\) instead of"),
        ("blk.0.attn_rot.weight", (8,), "unexpected tensors: blk.0.attn_rot.weight"),
        ("blk.0.ffn_gate_exps.weight", (2, 8, 8), "mixture of experts is not opened: it has blk.0"),
        ("rope_freqs.weight", (4,), "rope_freqs.weight is not the scaling of Llama 3.1 and later"),
        ("rope_freqs.weight", (5,), r"rope_freqs.weight has the shape \(5,\)"),
    ],
)
def test_tensors_that_do_not_fit(
    name: str, shape: tuple[int, ...] | None, message: str, small: Path, tmp_path: Path
) -> None:
    def change(values: dict[str, Any], tensors: dict[str, Any]) -> None:
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = (
                np.arange(2, 2 + np.prod(shape), dtype=np.float32).reshape(shape),
                TYPES.F32,
            )

    path = rewritten(small, tmp_path / "a.gguf", change)
    with pytest.raises(LlamaError, match=message):
        Llama.build(path)


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    dynamic = RopeScaling(2.0, original_context_length=64, kind="dynamic")
    source = write_meta(tmp_path / "dynamic", make_model(rope_scaling=dynamic), 1)
    with pytest.raises(CheckpointError, match="kind dynamic cannot be stored in a GGUF file"):
        convert(source, tmp_path / "a.gguf", "gguf")
    odd = write_meta(tmp_path / "odd", make_model(hidden_dim=336), 1)
    with pytest.raises(
        ConfigError, match=r"a row of layers.0.feed_forward.w2.weight has 336 weights"
    ):
        convert(odd, tmp_path / "a.gguf", "gguf", dtype="q8_0")
    few = write_meta(tmp_path / "few", make_model(vocab_size=600), 1)
    with pytest.raises(CheckpointError, match="has 640 tokens, but the model's vocab_size is 600"):
        convert(few, tmp_path / "a.gguf", "gguf")
    assert not (tmp_path / "a.gguf").exists()
