"""A folder that `convert --to hf` writes opens in transformers with nothing guessed: the same ids,
prompts and texts. Back in Meta's layout every file is as it was."""

import json
import logging
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import make_model, write_meta
from helpers.texts import sentencepiece_model

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import BUNDLED
from llama.checkpoints.verify import kind_of
from llama.errors import CheckpointError
from llama.tokenizer import Tokenizer
from llama.tokenizer_files.meta import INFILLING_TOKENS

N_TEXTS, N_DIALOGS = 500, 200
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
RANGES = [(32, 127), (160, 0x250), (0x370, 0x600), (0x900, 0xA00), (0x3000, 0x3100)]
RANGES += [(0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0, 32), (0x2000, 0x2070), (0xAC00, 0xD7A3)]
PARTS = ["aaaaaaa", "hahaha", "=====", "...", "'ll", "I'VE", "[INST", "<<", "▁▁", "<0x41>", " the"]
BLANKS = [" ", "  ", " " * 17, "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000"]


def random_texts(tokenizer: Tokenizer, n: int, seed: int) -> list[str]:
    """Texts of tokens, blanks, numbers and characters of many scripts, without names of special
    tokens, which transformers takes for the tokens."""
    rng = random.Random(seed)
    texts: list[str] = []
    while len(texts) < n:
        parts = []
        for _ in range(rng.randrange(1, 12)):
            low, high = rng.choice(RANGES)
            tokens = rng.choices(range(3, tokenizer.n_words - 256), k=rng.randrange(1, 5))
            parts += [
                rng.choice([tokenizer.decode(tokens), rng.choice(BLANKS), rng.choice(PARTS)]),
                rng.choice(["", chr(rng.randrange(low, high)), str(rng.randrange(10**6))]),
            ]
        text = "".join(parts)
        if not any(name in text for name in (*tokenizer.special_tokens, *TAGS, "\ufffd")):
            texts.append(text)
    return texts


def random_dialogs(tokenizer: Tokenizer, n: int) -> list[list[dict[str, str]]]:
    """With a system message or none, of up to four turns, and calls of tools in Llama 3's form."""
    texts = random_texts(tokenizer, 200, seed=2)
    rng = random.Random(3)
    dialogs = []
    for _ in range(n):
        roles = ["system"] * rng.randrange(2) + ["user", "assistant"] * rng.randrange(4) + ["user"]
        dialog = [{"role": role, "content": rng.choice(texts)} for role in roles]
        if not tokenizer.is_llama_2 and rng.random() < 0.4:
            call = rng.choice(["", "<|python_tag|>"]) + rng.choice(texts)
            dialog += [
                {"role": "assistant", "content": call, "stop_reason": "end_of_message"},
                {"role": "ipython", "content": rng.choice(texts)},
            ]
        dialogs.append(dialog)
    return dialogs


def meta_folder(folder: Path, tokenizer: bytes, n_shards: int = 1, **changes: Any) -> Path:
    """A random model for a `tokenizer.model` with this content."""
    folder.parent.mkdir(exist_ok=True)
    place = folder.parent / f"{folder.name}.model"
    place.write_bytes(tokenizer)
    shape = dict(dim=32, n_heads=2, hidden_dim=64, vocab_size=Tokenizer(place).n_words)
    write_meta(folder, make_model(**shape | changes), n_shards)
    place.replace(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module", params=["bundled", "trained pieces", "code", "llama-3", "llama-2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Meta folder, with a vocabulary of each kind."""
    root = tmp_path_factory.mktemp("meta")
    if request.param == "bundled":
        return Path(shutil.copytree(BUNDLED, root / "bundled"))
    if request.param == "trained pieces":
        return meta_folder(root / "pieces", sentencepiece_model())
    if request.param == "code":
        markers = ",".join(INFILLING_TOKENS)
        return meta_folder(root / "code", sentencepiece_model(control_symbols=markers))
    fixture = "llama3_tokenizer_path" if request.param == "llama-3" else "llama2_tokenizer_path"
    return meta_folder(root / "real", request.getfixturevalue(fixture).read_bytes())


@pytest.fixture(scope="module")
def ours(source: Path) -> Tokenizer:
    return Tokenizer(source / "tokenizer.model")


@pytest.fixture(scope="module")
def written(source: Path) -> Path:
    return convert(source, source.parent / "hf", "hf")


@pytest.fixture(scope="module")
def theirs(written: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(written)


# ---- what transformers makes of it ------------------------------------------------------------


def test_ids_and_texts_are_ours(ours: Tokenizer, theirs: Any, written: Path) -> None:
    read_back = Tokenizer(written / "tokenizer.json")
    assert read_back.special_tokens == ours.special_tokens
    assert read_back.stop_tokens == ours.stop_tokens
    for text in ("", " ", *random_texts(ours, N_TEXTS, seed=1)):
        ids = ours.encode(text, bos=True, eos=False)
        assert theirs(text).input_ids == ids == read_back.encode(text, bos=True, eos=False)
        assert theirs.decode(ids[1:]) == ours.decode(ids[1:]) == read_back.decode(ids[1:])
    pair = theirs("one", "two").input_ids
    assert pair == ours.encode("one", True, False) + ours.encode("two", True, False)


def test_prompts_are_ours(ours: Tokenizer, theirs: Any) -> None:
    chat_format = ours.chat_format()
    for dialog in random_dialogs(ours, N_DIALOGS):
        prompt = chat_format.encode_dialog_prompt(dialog)
        assert theirs.apply_chat_template(dialog, add_generation_prompt=True).input_ids == prompt
        begun: Any = [*dialog, {"role": "assistant", "content": "So it"}]
        prompt = chat_format.encode_dialog_prompt(begun, continue_final_message=True)
        assert theirs.apply_chat_template(begun, continue_final_message=True).input_ids == prompt


def said(*roles: str, content: Any = "x") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role in roles]


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        (said("tool"), "the role must be|take turns|last message"),
        (said("user", "system", "user"), "only the first message|take turns"),
        (said("user", "assistant"), "the last message must be from user"),
        (said("system"), "the last message must be from user"),
        (said("user", content=None), "the content must be a string"),
    ],
)
def test_templates_refuse_what_we_refuse(
    ours: Tokenizer, theirs: Any, dialog: Any, message: str
) -> None:
    with pytest.raises(ValueError):
        ours.chat_format().encode_dialog_prompt(dialog)
    with pytest.raises(Exception, match=message):
        theirs.apply_chat_template(dialog, add_generation_prompt=True)


def test_templates_of_one_kind_only(ours: Tokenizer, theirs: Any) -> None:
    with pytest.raises(Exception, match="knows no tools"):
        theirs.apply_chat_template(said("user"), tools=[{"type": "function", "function": {}}])
    if ours.is_llama_2:
        for dialog, message in (
            (said("user", "user"), "must take turns"),
            (said("user", content="a [/INST] b"), r"contains \[/INST\]"),
        ):
            with pytest.raises(Exception, match=message):
                theirs.apply_chat_template(dialog)


def test_ids_in_the_settings(ours: Tokenizer, theirs: Any, written: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    configs = (AutoConfig.from_pretrained(written), GenerationConfig.from_pretrained(written))
    for config in configs:
        assert config.bos_token_id == theirs.bos_token_id == ours.bos_id
        assert config.eos_token_id == ours.stop_tokens
        assert config.pad_token_id == theirs.pad_token_id is not None
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.model_max_length == configs[0].max_position_embeddings
    assert Llama.build(written).tokenizer.stop_tokens == ours.stop_tokens


def test_the_bundled_model_says_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = convert(BUNDLED, tmp_path / "hf", "hf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def generated(inputs: Any) -> str:
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
        return tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    options: dict[str, Any] = dict(temperature=0, max_gen_len=60)
    llama = Llama.build(dtype="float32", device="cpu")
    for prompt in ("Once upon a time", "The king said"):
        (ours,) = llama.text_completion([prompt], **options)
        assert generated(tokenizer(prompt, return_tensors="pt")) == ours["generation"]
    for request in ("Who are you?", "Tell me a story about a fox"):
        dialog: Any = [{"role": "user", "content": request}]
        (answer,) = llama.chat_completion([dialog], **options)
        prompt_ids = tokenizer.apply_chat_template(
            dialog, add_generation_prompt=True, return_tensors="pt"
        )
        assert generated(prompt_ids) == answer["generation"]["content"]


# ---- and back ---------------------------------------------------------------------------------


def assert_all_files_are_in(source: Path, back: Path) -> None:
    for path in source.iterdir():
        if path.name != "README.md":  # which becomes part of the card
            assert (back / path.name).read_bytes() == path.read_bytes(), path.name


def test_there_and_back_is_byte_equal(source: Path, written: Path, tmp_path: Path) -> None:
    n_shards = len(list(source.glob("*.pth")))
    assert_all_files_are_in(source, convert(written, tmp_path / "back", "meta", mp=n_shards))


def test_metas_own_params_come_back(tmp_path: Path) -> None:
    """Also keys that are written otherwise, a vocab_size of -1, and an embedding split by
    features, of which config.json says nothing."""
    model = sentencepiece_model()
    source = meta_folder(
        tmp_path / "llama-2", model, 2, rope_theta=1e4, embedding_shard_dim=1, vocab_size=380
    )
    params = json.loads((source / "params.json").read_text()) | {"vocab_size": -1}
    del params["rope_theta"], params["use_scaled_rope"]
    (source / "params.json").write_text(json.dumps(params, sort_keys=True))
    hf = convert(source, tmp_path / "hf", "hf")
    assert_all_files_are_in(source, convert(hf, tmp_path / "back", "meta", mp=2))
    assert_all_files_are_in(source, convert(source, tmp_path / "again", "meta", mp=2))
    one = convert(hf, tmp_path / "one", "meta", mp=1)  # shows no split of the embedding
    assert_all_files_are_in(source, convert(one, tmp_path / "two", "meta", mp=2))

    config = json.loads((hf / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (hf / "config.json").write_text(json.dumps(config))
    changed = json.loads((convert(hf, tmp_path / "changed") / "params.json").read_text())
    assert changed["norm_eps"] == 1e-3


def test_tokenizer_model_from_tokenizer_json(source: Path, written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "hf"))
    for path in folder.rglob("tokenizer.model"):
        path.unlink()
    back = convert(folder, tmp_path / "back", "meta")
    made = back / "tokenizer.model"
    if Tokenizer(source / "tokenizer.model").is_llama_2:
        assert not made.exists()
        assert (back / "tokenizer.json").exists()
    else:
        assert made.read_bytes() == (source / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("<|im_start|>", {}, "its token 6146 is '<|im_start|>', not <|reserved_special_token_0|>"),
        ("<|reserved_special_token_0|>", {"special": False}, "is not special"),
        ("<|reserved_special_token_250|>", {}, None),  # Llama 3.0 numbers them otherwise
    ],
)
def test_names_that_tokenizer_model_lacks(
    name: str, changes: Any, message: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = convert(BUNDLED, tmp_path / "hf", "hf")
    (folder / "original" / "tokenizer.model").unlink()
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][2] |= {"content": name, **changes}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING, "llama"):
        back = convert(folder, tmp_path / "back", "meta")
    assert (back / "tokenizer.model").exists() == (message is None)
    if message is None:
        assert caplog.text == ""
    else:
        assert message in caplog.text
        assert name in Llama.build(back).tokenizer.special_tokens


# ---- which files ------------------------------------------------------------------------------


def test_where_tokenizer_model_lies(written: Path, ours: Tokenizer) -> None:
    """Other programs take the one in the folder itself for a SentencePiece model."""
    place = written if ours.is_llama_2 else written / "original"
    assert [path.parent for path in written.rglob("tokenizer.model")] == [place]


def test_a_base_model_gets_no_template(tmp_path: Path) -> None:
    base = Path(shutil.copytree(BUNDLED, tmp_path / "Llama-3.2-1B"))
    assert kind_of(convert(base, tmp_path / "a", "hf")) == "base"
    assert kind_of(convert(BUNDLED, tmp_path / "b", "hf")) == "instruct"


def test_files_of_a_hugging_face_folder_are_kept(tmp_path: Path) -> None:
    source = convert(BUNDLED, tmp_path / "a", "hf")
    card = (source / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert card.endswith((BUNDLED / "README.md").read_text())
    (source / "README.md").write_text("---\nlicense: llama3\n---\n")
    (source / "LICENSE").write_text("a licence")
    generation = {"eos_token_id": [6153], "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    again = convert(source, tmp_path / "b", "hf")
    for path in source.rglob("*"):
        if path.is_file():
            copy = again / path.relative_to(source)
            assert copy.read_bytes() == path.read_bytes(), path.name


def test_a_foreign_tokenizer_json_is_copied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the library that reads it is not installed."""
    source = convert(BUNDLED, tmp_path / "a", "hf")
    (source / "original" / "tokenizer.model").unlink()
    content = json.loads((source / "tokenizer.json").read_text()) | {"pre_tokenizer": None}
    (source / "tokenizer.json").write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for to in ("hf", "meta"):
        caplog.clear()
        again = convert(source, tmp_path / to, to)
        assert "; the file is copied as it is" in caplog.text
        assert (again / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        assert not (again / "tokenizer.model").exists()


def test_biases_are_not_lost_to_an_older_params_json(tmp_path: Path) -> None:
    """Where `original/` describes a model without them."""
    source = write_meta(tmp_path / "source", make_model(attention_bias=True), 1)
    hf = convert(source, tmp_path / "hf", "hf")
    params = json.loads((hf / "original" / "params.json").read_text())
    del params["attention_bias"]
    (hf / "original" / "params.json").write_text(json.dumps(params))
    again = json.loads((convert(hf, tmp_path / "again") / "params.json").read_text())
    assert again["attention_bias"] is True


def test_a_folder_without_a_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoConfig

    source = write_meta(tmp_path / "model" / "source", make_model(), 1)
    (source / "tokenizer.model").unlink()
    hf = convert(source, tmp_path / "hf", "hf")
    assert f"{source} has no tokenizer: none is written" in caplog.text
    config = AutoConfig.from_pretrained(hf)
    assert (config.bos_token_id, config.eos_token_id) == (None, None)  # not 1 and 2


def test_the_tokenizer_of_the_parent_folder(tmp_path: Path) -> None:
    """Meta's download of Llama 2 keeps it there."""
    source = meta_folder(tmp_path / "download" / "llama-2", sentencepiece_model())
    place = (source / "tokenizer.model").rename(source.parent / "tokenizer.model")
    for to in ("hf", "meta"):
        again = convert(source, tmp_path / to / "model", to)
        assert (again / "tokenizer.model").read_bytes() == place.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model_type="unigram", vocab_size=300), "it is not BPE"),
        (dict(byte_fallback=False, vocab_size=100), "it has no byte fallback"),
        (dict(treat_whitespace_as_suffix=True), "it puts blanks after words"),
        (dict(normalization_rule_name="nmt_nfkc"), "it changes characters"),
        (dict(add_dummy_prefix=False), "it puts no blank before a text"),
        (dict(remove_extra_whitespaces=True), "it removes blanks"),
        (dict(user_defined_symbols="<tool>"), "the piece '<tool>' is user-defined or unused"),
    ],
)
def test_sentencepiece_models_of_other_kinds(options: Any, message: str, tmp_path: Path) -> None:
    """No tokenizer.json could give their ids."""
    source = meta_folder(tmp_path / "source", sentencepiece_model(**options))
    with pytest.raises(
        CheckpointError, match=f"{message}; move the file away to convert the weights"
    ):
        convert(source, tmp_path / "hf", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_infilling_markers_may_be_user_defined(tmp_path: Path) -> None:
    markers = ",".join(INFILLING_TOKENS)
    source = meta_folder(tmp_path / "source", sentencepiece_model(user_defined_symbols=markers))
    tokenizer = Tokenizer(convert(source, tmp_path / "hf", "hf") / "tokenizer.json")
    assert tokenizer.special_tokens.keys() >= set(INFILLING_TOKENS)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    source = write_meta(tmp_path / "source", make_model(), 1)
    shutil.copyfile(BUNDLED / "tokenizer.model", source / "tokenizer.model")
    with pytest.raises(CheckpointError, match="has 6400 tokens, but the model's vocab_size is 640"):
        convert(source, tmp_path / "hf", "hf")
