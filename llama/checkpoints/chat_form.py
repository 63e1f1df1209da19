"""Find out which chat format a checkpoint needs, from the text of its chat template."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from llama.chat_forms import FormatName
from llama.checkpoints.generation_config import find_beside
from llama.checkpoints.verify import UNKNOWN, kind_of
from llama.errors import ConfigError, DataError
from llama.files import read_json, read_text
from llama.gguf_file import is_gguf, read_value
from llama.tokenizer_files.chat_templates import ChatForm, form_of

# A file that holds only the template, and files that hold it under a key. The first file that has a
# template takes precedence.
PLAIN = "chat_template.jinja"
WITH_KEY = ("chat_template.json", "tokenizer_config.json")


CHAT = {
    UNKNOWN: "the folder does not say whether the model was taught to chat",
    "instruct": "taught to chat",
    "base": "base model: complete text, do not chat",
}


def read_form(folder: Path, format: FormatName | None = None) -> ChatForm | None:
    """The chat form of a folder. None if the folder has no template, or if the template is of no
    known form. Then the kind of the vocabulary decides.

    format: the form that the user names; it needs no template.
    Raises ConfigError for an unknown format, or a template that cannot be read.
    """
    if format is not None and format not in get_args(FormatName):
        names = ", ".join(get_args(FormatName))
        raise ConfigError(f"format is {format!r}: it must be one of {names}")
    template = read_template(folder)
    form = None if template is None else form_of(template)
    if format is None or (form is not None and form.name == format):
        return form
    return ChatForm(format)


def chat_warning(folder: Path, format: FormatName | None = None) -> str | None:
    """A warning for a user who wants to chat: this is a base model, or dialogs may be written in
    another form than the model was taught. None if neither is the case."""
    if kind_of(folder) == "base":
        return CHAT["base"]
    if format is None and read_template(folder) is not None and read_form(folder) is None:
        return (
            "the folder's chat template is of no form that this library knows, so that dialogs may "
            f"not be written as the model was taught; format={' or '.join(get_args(FormatName))} "
            "says that you know the form"
        )
    return None


def read_template(folder: Path) -> str | None:
    """The chat template of a folder or a GGUF file: its text, or None if there is none."""
    for template in _templates(folder):
        if isinstance(template, list):  # several templates with names
            named = {entry.get("name"): entry for entry in template if isinstance(entry, dict)}
            template = named.get("default", {}).get("template")
        if isinstance(template, str):
            return template
    return None


def _templates(folder: Path) -> Iterator[Any]:
    if is_gguf(folder):
        yield read_value(folder, "tokenizer.chat_template", str)
        return
    if path := find_beside(folder, PLAIN):
        try:
            yield read_text(path)
        except DataError as error:
            raise ConfigError(str(error)) from error
    for name in WITH_KEY:
        if path := find_beside(folder, name):
            yield read_json(path).get("chat_template")
