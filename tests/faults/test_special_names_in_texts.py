"""The name of a special token in a message's text is plain text: its id never comes from there."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers.fault_plan import Trials
from helpers.texts import sentencepiece_model
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama.chat_format import ChatFormat, Dialog, Llama2ChatFormat
from llama.chat_forms import AnyFormat, ChatMLFormat, ZephyrFormat
from llama.errors import DialogError
from llama.tokenizer import Tokenizer
from llama.tools import PYTHON_TAG

Encode = Callable[[Dialog], list[int]]
PLAIN = "word"
ZEPHYRS = ("<|system|>", "<|user|>", "<|assistant|>")


def dialog_with(role: str, text: str) -> Dialog:
    """A dialog in which a message of the role has the text."""
    if role == "system":
        return [{"role": "system", "content": text}, {"role": "user", "content": "Hi"}]
    if role == "user":
        return [{"role": "user", "content": text}]
    if role == "assistant":
        return [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "Go on"},
        ]
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "A call", "stop_reason": "end_of_message"},
        {"role": "ipython", "content": text},
    ]


def make_trials(
    trials: Trials,
    names: list[str],
    format: AnyFormat,
    encode: Encode,
    refused: Sequence[str] = (),
) -> None:
    """Put each name into a message of each role, between other text and alone.

    refused: the format's markers that are plain text, and that no message may have.
    """
    tokenizer = format.tokenizer
    special = {*tokenizer.special_tokens.values(), tokenizer.eos_id}  # type: ignore[attr-defined]

    def specials(role: str, text: str) -> list[int]:
        return [token for token in encode(dialog_with(role, text)) if token in special]

    for name in names:
        for role in format.roles:
            with trials.trial(f"{name} from {role}"):
                # A tag at the start of an assistant's message is a call that the model made.
                is_call = role == "assistant" and name == PYTHON_TAG
                texts = [f"a {name} b", f"a{name}", *([name, f"{name}x"] if not is_call else [])]
                if name in refused:
                    for text in texts:
                        with pytest.raises(DialogError, match=re.escape(name)):
                            encode(dialog_with(role, text))
                else:
                    found = [specials(role, text) for text in texts]
                    assert found == [specials(role, PLAIN)] * len(texts)


def chosen(trials: Trials, names: list[str]) -> list[str]:
    return names if trials.number(few=0, all=1) else [*names[:12], *names[12::32]]


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def others(llama3: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary of another kind. It has all names as special tokens, and Zephyr's and ChatML's
    markers."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    markers = ["<|im_start|>", "<|im_end|>", *ZEPHYRS, "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 256 + len(markers), special_tokens=[*markers, *llama3.special_tokens],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(["Hi there"], trainer)
    folder = tmp_path_factory.mktemp("others")
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer(folder / "tokenizer.json")


@pytest.mark.fault(10)
@pytest.mark.parametrize("date", [None, "26 Jul 2024"])
def test_llama_3s_format(trials: Trials, llama3: Tokenizer, date: str | None) -> None:
    """As Meta's code writes a dialog, and with a date, as the chat template writes it."""
    format = ChatFormat(llama3)
    names = chosen(trials, list(llama3.special_tokens))
    make_trials(
        trials, names, format, lambda dialog: format.encode_dialog_prompt(dialog, date=date)
    )


@pytest.mark.fault(10)
def test_llama_3s_format_from_a_tokenizer_json(
    trials: Trials, llama3: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama3.as_json()))
    format = ChatFormat(Tokenizer(tmp_path / "tokenizer.json"))
    names = chosen(trials, list(llama3.special_tokens))
    make_trials(trials, names, format, format.encode_dialog_prompt)


@pytest.mark.fault(10)
@pytest.mark.parametrize("kind", [ChatMLFormat, ZephyrFormat])
def test_formats_of_other_makers(
    trials: Trials, others: Tokenizer, kind: type[ChatMLFormat] | type[ZephyrFormat]
) -> None:
    format = kind(others)
    names = chosen(trials, list(others.special_tokens))
    refused = ZEPHYRS if kind is ZephyrFormat else ()
    make_trials(trials, names, format, format.encode_dialog_prompt, refused)


@pytest.mark.fault(10)
def test_llama_2s_format(trials: Trials, llama3: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    format = Llama2ChatFormat(Tokenizer(tmp_path / "tokenizer.model"))
    names = ["<s>", "</s>", "<unk>", "<0x0A>", *format.tags, *llama3.special_tokens]
    make_trials(trials, chosen(trials, names), format, format.encode_dialog_prompt, format.tags)


@pytest.mark.fault(10)
def test_a_role_with_the_name_of_a_special_token(trials: Trials, llama3: Tokenizer) -> None:
    format = ChatFormat(llama3)
    for name in chosen(trials, list(llama3.special_tokens)):
        with trials.trial(name):
            for role in (name, f"user{name}"):
                message = {"role": role, "content": "Hi"}
                with pytest.raises(DialogError, match="has the role"):
                    format.encode_dialog_prompt([message])  # type: ignore[list-item]
