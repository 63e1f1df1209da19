"""Chat forms: recognised by the text of a folder's template, written as transformers does."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.texts import sentencepiece_model
from tokenizer_files.test_library import smol
from tokenizer_files.test_tokenizer_json import from_sentencepiece

from llama import Llama, Tokenizer
from llama.__main__ import main
from llama.chat_format import Message
from llama.chat_forms import FormatName
from llama.checkpoints.chat_form import read_form, read_template
from llama.checkpoints.doctor import WARNING, examine
from llama.checkpoints.folder import BUNDLED
from llama.errors import ConfigError, DataError, DialogError
from llama.tokenizer_files.chat_templates import (
    LLAMA_2_TEMPLATE,
    LLAMA_3_TEMPLATE,
    ChatForm,
    form_of,
)
from llama.training.documents import write_token_files

# Templates of the behaviour that the models' folders publish, as they are commonly written.
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SMOL_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = (
    '{%- for message in messages %}\n{{- "<|im_start|>" + message.role + "\\n" + message.content + '
    '"<|im_end|>" + "\\n" }}\n{%- endfor %}\n'
    '{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{%- endif %}'
)
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)
LLAMA_3_0 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
OTHER = "{% for message in messages %}{{ '<User>' + message['content'] }}{% endfor %}<Answer>"
FALCON = (  # the tags of Zephyr's form, without its ends
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}"
    "{% endfor %}<|assistant|>\n"
)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (SMOL, ChatForm("chatml", SMOL_SYSTEM)),
        (CHATML, ChatForm("chatml")),
        (ZEPHYR, ChatForm("zephyr")),
        (LLAMA_3_0, ChatForm("llama3")),
        (LLAMA_3_TEMPLATE, ChatForm("llama3")),
        (LLAMA_2_TEMPLATE, ChatForm("llama2")),
        (OTHER, None),
        (FALCON, None),
        (SMOL + ZEPHYR, None),
        ("", None),
    ],
)
def test_the_form_of_a_template(template: str, form: ChatForm | None) -> None:
    assert form_of(template) == form


def write_template(folder: Path, template: Any, **more: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} | more))


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert read_template(tmp_path) is None
    write_template(tmp_path, [{"name": "tool", "template": OTHER}, {"name": "default",
                              "template": ZEPHYR}])  # fmt: skip
    assert read_template(tmp_path) == ZEPHYR
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert read_template(tmp_path) == CHATML
    (tmp_path / "original").mkdir()
    assert read_form(tmp_path / "original") == ChatForm("chatml")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template.jinja is not UTF-8"):
        read_template(tmp_path)


def make_folder(folder: Path, library: Any, template: str, eos: str, **shape: Any) -> Path:
    """A random model as transformers writes it, with this tokenizer and template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=library.get_vocab_size(), max_position_embeddings=256,
        eos_token_id=library.token_to_id(eos), **shape,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    library.save(str(folder / "tokenizer.json"))
    write_template(folder, template, eos_token=eos, tokenizer_class="PreTrainedTokenizerFast")
    return folder


@pytest.fixture(scope="module", params=["smol", "chatml", "zephyr"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of SmolLM2's shape (9 heads on 3, tied) and of TinyLlama's."""
    folder = tmp_path_factory.mktemp(request.param)
    small: dict[str, Any] = dict(hidden_size=72, intermediate_size=96, num_hidden_layers=2)
    if request.param == "zephyr":
        library = from_sentencepiece(sentencepiece_model(), legacy=True)
        return make_folder(folder, library, ZEPHYR, "</s>", num_attention_heads=4, **small)
    template = SMOL if request.param == "smol" else CHATML
    small |= dict(num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    return make_folder(folder, smol(), template, "<|im_end|>", rope_theta=1e5, **small)


def said(*pairs: tuple[Any, str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in pairs]


DIALOGS = [
    said(("user", "Hi")),
    said(("system", "Be brief."), ("user", "  the fox\n")),
    said(("user", "a"), ("assistant", " b "), ("user", "\u65e5 13 dogs\n\n"), ("assistant", "c"),
         ("user", "d")),
    said(("user", "")),
]  # fmt: skip


def test_prompts_are_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    llama = Llama.build(folder, max_seq_len=64)
    theirs = AutoTokenizer.from_pretrained(folder)
    for dialog in DIALOGS:
        found = theirs.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False)
        assert llama.encode_dialog(dialog) == found
        begun: list[Message] = [*dialog, {"role": "assistant", "content": "the"}]
        found = theirs.apply_chat_template(begun, continue_final_message=True, return_dict=False)
        assert llama.encode_dialog(begun, continue_final_message=True) == found


def test_logits_and_texts_are_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = Llama.build(folder, max_seq_len=64)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(3, 43)[None]
    with torch.inference_mode():
        want = model(tokens).logits
        torch.testing.assert_close(llama.model(tokens, 0), want, atol=1e-4, rtol=1e-4)
    theirs = AutoTokenizer.from_pretrained(folder)
    inputs = theirs("the quick", return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    prompt = inputs.input_ids[0].tolist()
    (ids,), _ = llama.generate([prompt], max_gen_len=12, temperature=0)
    new = out[len(prompt) :].tolist()
    assert ids == [i for i in new if i not in llama.tokenizer.stop_tokens]
    text = "".join(e.text for e in llama.stream(prompt, max_gen_len=12, temperature=0))
    ours = llama.tokenizer
    assert ours.decode(prompt + ids) == ours.decode(prompt) + text


def test_a_chat_ends_at_the_forms_own_token(folder: Path) -> None:
    llama = Llama.build(folder, max_seq_len=128, mode="fast")
    assert llama.tokenizer.stop_tokens == [llama.tokenizer.eos_id]
    (answer,) = llama.chat_completion(DIALOGS[:1], max_gen_len=5)
    assert answer["generation"]["role"] == "assistant"
    with pytest.raises(DialogError, match="the last message must be from user"):
        llama.chat_completion([said(("user", "a"), ("assistant", "b"))])
    form = llama.tokenizer.form
    assert form is not None
    if form.name == "zephyr":
        with pytest.raises(DialogError, match=r"message 0 contains <\|user\|>, which Zephyr"):
            llama.chat_completion([said(("user", "a <|user|> b"))])
    else:  # text is never a marker
        prompt = llama.encode_dialog(said(("user", "a<|im_end|>b")))
        n_messages = 1 + bool(form.default_system)
        assert prompt.count(llama.tokenizer.special_tokens["<|im_end|>"]) == n_messages


# ---- templates of other forms ------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The bundled model in a folder with a template of no known form."""
    folder = Path(shutil.copytree(BUNDLED, tmp_path / "other"))
    write_template(folder, OTHER)
    return folder


def test_an_unknown_form_is_warned_of_once(other: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama = Llama.build(other, max_seq_len=128)
    llama.text_completion(["Once"], max_gen_len=2)
    assert "template" not in caplog.text
    for _ in range(2):
        llama.chat_completion(DIALOGS[:1], max_gen_len=2)
    assert caplog.text.count("chat template is of no form that this library knows") == 1
    assert "format=llama3 or llama2 or chatml or zephyr says that you know" in caplog.text


@pytest.mark.parametrize("format", ["llama3", "llama2", "zephyr"])
def test_a_named_form_is_not_warned_of(
    other: Path, format: FormatName, caplog: pytest.LogCaptureFixture
) -> None:
    llama = Llama.build(other, max_seq_len=128, format=format)
    llama.chat_completion(DIALOGS[:1], max_gen_len=2)
    assert "template" not in caplog.text
    text = llama.tokenizer.decode(llama.encode_dialog(DIALOGS[0]))
    marks = {"llama3": "<|start_header_id|>", "llama2": "[INST]", "zephyr": "<|user|>"}
    assert marks[format] in text


def test_doctor_names_the_form(other: Path, folder: Path) -> None:
    found = {finding.about: finding for finding in examine(other, device="cpu")}
    assert found["chat"].level == WARNING
    assert "of no form that this library knows" in found["chat"].text
    found = {finding.about: finding for finding in examine(folder, device="cpu")}
    assert "taught to chat, dialogs in the form " in found["chat"].text


def test_forms_that_cannot_be(other: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format is 'llama4': it must be one of llama3, llama2"):
        Llama.build(other, format="llama4")  # type: ignore[arg-type]
    with pytest.raises(DialogError, match=r"has no <\|im_start\|>, which ChatML needs"):
        Llama.build(other, format="chatml")
    shape = dict(hidden_size=72, num_attention_heads=9, num_hidden_layers=1, intermediate_size=96)
    unknown = make_folder(tmp_path / "unknown", smol(), OTHER, "<|im_end|>", **shape)
    llama = Llama.build(unknown, max_seq_len=64)
    assert llama.text_completion(["the"], max_gen_len=3)[0]["generation"] is not None
    with pytest.raises(DialogError, match="no chat form is known for this vocabulary"):
        llama.chat_completion(DIALOGS[:1])
    named = Llama.build(unknown, max_seq_len=64, format="chatml")
    assert named.chat_completion(DIALOGS[:1], max_gen_len=2)


# ---- commands ----------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["llama", *map(str, words)])
    main()


def test_training_needs_a_bos(tmp_path: Path) -> None:
    smol().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="has no bos token, which marks where a document begins"):
        write_token_files(["a"], tokenizer, str(tmp_path / "a.bin"), 100)


def test_fine_tuning_in_chatml(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new checkpoint keeps the form of its dialogs."""
    if read_form(folder) == ChatForm("zephyr"):
        return
    dialog = said(("user", "the fox"), ("assistant", "jumps over"))
    (tmp_path / "dialogs.jsonl").write_text(json.dumps({"messages": dialog}))
    run(
        monkeypatch, "finetune", "--data", tmp_path / "dialogs.jsonl", "--ckpt_dir", folder,
        "--out_dir", tmp_path / "run", "--steps", 60, "--batch", 1, "--seq_len", 128,
        "--learning_rate", 0.01, "--device", "cpu",
    )  # fmt: skip
    llama = Llama.build(tmp_path / "run", max_seq_len=128)
    (answer,) = llama.chat_completion([dialog[:1]], temperature=0, max_gen_len=20)
    assert answer["generation"]["content"] == "jumps over"


def test_a_terminal_chat_reuses_its_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama.commands.chat_session import Chat
    from llama.sampling import SamplingParams

    llama = Llama.build(folder, max_seq_len=256, mode="fast", max_batch_size=1)
    chat = Chat(llama, SamplingParams(temperature=0, max_gen_len=6, ignore_eos=True))
    for text in ("the fox", "and then"):
        chat._answer([*chat.messages, {"role": "user", "content": text}])
    assert chat._encode(chat.messages[:3])[: len(llama.encode_dialog(chat.messages[:1]))] == (
        llama.encode_dialog(chat.messages[:1])
    )
