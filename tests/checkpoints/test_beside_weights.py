"""`convert --to hf` writes a folder that transformers opens as it is: the same ids, prompts, texts;
and back in Meta's layout everything is as before."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import make_model, write_meta
from helpers.texts import sentencepiece_model

from llama import Llama, Tokenizer
from llama.chat_format import Message
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import BUNDLED
from llama.checkpoints.verify import kind_of
from llama.tokenizer_files.meta import INFILLING_TOKENS

N_TEXTS, N_DIALOGS = 400, 200
CHARACTERS = " \n\t abcdefgXYZ0123456789.,!?'’\"()éäßжд日本한😀👩‍👩‍👧ﷺ\u00a0\u200b"


def to_hugging_face(root: Path, tokenizer: bytes, name: str = "Some-Llama") -> Path:
    """A small model with this tokenizer, in Hugging Face's layout."""
    (root / "tokenizer.model").write_bytes(tokenizer)
    n_words = Tokenizer(root / "tokenizer.model").n_words
    model = make_model(vocab_size=n_words, dim=32, n_heads=2, hidden_dim=64)
    source = write_meta(root / name, model, 1)
    (root / "tokenizer.model").replace(source / "tokenizer.model")
    return convert(source, root / "hf", "hf")


@pytest.fixture(scope="module", params=["bundled", "llama-3", "trained", "code", "llama-2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face's layout for each kind of `tokenizer.model`."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "bundled":
        return convert(BUNDLED, root / "hf", "hf")
    if request.param == "trained":
        return to_hugging_face(root, sentencepiece_model())
    if request.param == "code":
        markers = ",".join(INFILLING_TOKENS)
        return to_hugging_face(root, sentencepiece_model(control_symbols=markers))
    fixture = "llama3_tokenizer_path" if request.param == "llama-3" else "llama2_tokenizer_path"
    return to_hugging_face(root, request.getfixturevalue(fixture).read_bytes())


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def random_text(rng: random.Random) -> str:
    words = ["Once", " upon", "the fox", "\n\n", "  ", "<s>", "[INST]", "I'll", "1234567", "né"]
    if rng.random() < 0.5:
        return "".join(rng.choices(words, k=rng.randrange(12)))
    return "".join(rng.choices(CHARACTERS, k=rng.randrange(40)))


def test_ids_are_ours(folder: Path) -> None:
    ours, their = Tokenizer(folder / "tokenizer.model"), theirs(folder)
    rng = random.Random(0)
    for _ in range(N_TEXTS):
        text = random_text(rng).replace("<s>", "")  # transformers makes it a special token
        ids = ours.encode(text, bos=True, eos=False)
        assert their(text).input_ids == ids, text
        assert their.decode(ids[1:]) == ours.decode(ids[1:])


def test_ids_of_the_written_file_are_ours(folder: Path, tmp_path: Path) -> None:
    ours = Tokenizer(folder / "tokenizer.model")
    written = Tokenizer(folder / "tokenizer.json")
    assert written.special_tokens.items() >= ours.special_tokens.items()
    rng = random.Random(1)
    for _ in range(N_TEXTS):
        text = random_text(rng)
        assert written.encode(text, True, False) == ours.encode(text, True, False)


def dialog(rng: random.Random, is_llama_2: bool) -> list[Message]:
    def said(role: Any) -> Message:
        content = random_text(rng).replace("<s>", "").replace("[INST]", "") or "x"
        return {"role": role, "content": content}

    messages = [said("system")] if rng.random() < 0.5 else []
    for _ in range(rng.randrange(3)):
        messages += [said("user"), said("assistant")]
    messages.append(said("user"))
    if not is_llama_2 and rng.random() < 0.3:
        call: Message = {**said("assistant"), "stop_reason": "end_of_message"}
        messages += [call, said("ipython")]
    return messages


def test_prompts_of_dialogs_are_ours(folder: Path) -> None:
    tokenizer, their = Tokenizer(folder / "tokenizer.model"), theirs(folder)
    ours = tokenizer.chat_format()
    rng = random.Random(2)
    for _ in range(N_DIALOGS):
        messages = dialog(rng, tokenizer.is_llama_2)
        found = their.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert found == ours.encode_dialog_prompt(messages), messages
        begun: list[Message] = [*messages, {"role": "assistant", "content": "So it"}]
        found = their.apply_chat_template(begun, continue_final_message=True, return_dict=False)
        assert found == ours.encode_dialog_prompt(begun, continue_final_message=True)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
    ],
)
def test_templates_refuse_what_we_refuse(folder: Path, messages: Any) -> None:
    with pytest.raises(Exception, match=r"the role must be|only the first|take turns"):
        theirs(folder).apply_chat_template(messages)


def test_the_bundled_model_says_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = convert(BUNDLED, tmp_path / "hf", "hf", dtype="float32")
    model, their = AutoModelForCausalLM.from_pretrained(folder), theirs(folder)
    llama = Llama.build(max_seq_len=128, max_batch_size=1, device="cpu")
    for prompt in ("Once upon a time", "The king said"):
        inputs = their(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
        (ours,) = llama.text_completion([prompt], temperature=0, max_gen_len=60)
        new = out[inputs.input_ids.shape[1] :].tolist()
        new = new[:-1] if new[-1] in llama.tokenizer.stop_tokens else new
        assert their.decode(new) == ours["generation"]
    messages: list[Message] = [{"role": "user", "content": "Tell me a tale of a fox."}]
    inputs = their.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    (answer,) = llama.chat_completion([messages], temperature=0, max_gen_len=60)
    said = their.decode(out[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == answer["generation"]["content"]


def test_there_and_back_is_byte_equal(tmp_path: Path) -> None:
    folder = convert(BUNDLED, tmp_path / "hf", "hf")
    (folder / "tokenizer.model").unlink()  # it is made from tokenizer.json
    back = convert(folder, tmp_path / "back", "meta", mp=2)
    for path in BUNDLED.glob("*.model"):
        assert (back / path.name).read_bytes() == path.read_bytes()
    assert (back / "params.json").read_bytes() == (BUNDLED / "params.json").read_bytes()
    for path in BUNDLED.glob("consolidated.*"):
        one, two = (torch.load(p, weights_only=True) for p in (path, back / path.name))
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_metas_own_params_come_back(tmp_path: Path) -> None:
    """Also where they do not say the size of the vocabulary, and in another order of keys."""
    source = write_meta(tmp_path / "a", make_model(rope_theta=1e4, embedding_shard_dim=1), 2)
    params = json.loads((source / "params.json").read_text())
    text = json.dumps({"vocab_size": -1} | {k: v for k, v in params.items() if k != "vocab_size"})
    (source / "params.json").write_text(text)
    hf = convert(source, tmp_path / "hf", "hf")
    assert (convert(hf, tmp_path / "b", "meta") / "params.json").read_text() == text
    other = json.loads((hf / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (hf / "config.json").write_text(json.dumps(other))
    changed = json.loads((convert(hf, tmp_path / "c", "meta") / "params.json").read_text())
    assert changed["norm_eps"] == 1e-3


def test_the_files_of_a_folder(tmp_path: Path) -> None:
    hf = convert(BUNDLED, tmp_path / "hf", "hf")
    llama = Llama.build(hf)
    config = json.loads((hf / "generation_config.json").read_text())
    assert config["eos_token_id"] == sorted(llama.tokenizer.stop_tokens)
    assert "pipeline_tag: text-generation" in (hf / "README.md").read_text()
    assert kind_of(hf) == "instruct"
    (tmp_path / "base").mkdir()
    vocabulary = (BUNDLED / "tokenizer.model").read_bytes()
    base = to_hugging_face(tmp_path / "base", vocabulary, "Llama-3.2-1B")
    assert kind_of(base) == "base"
    again = convert(hf, tmp_path / "again", "hf")  # what is there is copied
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (again / name).read_bytes() == (hf / name).read_bytes()


def test_a_vocabulary_that_cannot_be_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A SentencePiece model that normalizes: the folder is written without tokenizer.json."""
    model = sentencepiece_model(normalization_rule_name="nmt_nfkc")
    folder = to_hugging_face(tmp_path, model)
    assert "no tokenizer.json is written, because the SentencePiece model" in caplog.text
    assert not (folder / "tokenizer.json").exists()
