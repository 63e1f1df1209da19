"""llama tokens: show the tokens of a text or of a dialog, and where two tokenizers differ."""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

from llama.chat_format import Dialog
from llama.chat_forms import AnyFormat
from llama.commands.flags import as_text
from llama.errors import DialogError, GenerationError
from llama.explain.tokens import Token, read_tokens
from llama.prompts import is_dialog
from llama.tokenizer import Tokenizer


@as_text
def tokens(
    text: str | None = None,
    *words: str,
    chat: bool = False,
    flow: bool = False,
    diff: str | None = None,
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    format: str | None = None,
) -> None:
    """Show the tokens of a text: index, id and bytes. Bytes are text in quotes, or hex if they are
    not printable.

    The tokens are those of a prompt, which begins with bos. A special token is shown by its name,
    without quotes. A name of a special token in the text is plain text; a line after the table says
    so.

    Reads:
        TEXT, or standard input up to its end: UTF-8 text, or with --chat a dialog, such as
            [{"role": "user", "content": "Who are you?"}]

    Writes:
        Standard output: a line for each token, such as
            2    673  ' upon'

    Examples:
        llama tokens "Once upon a time" --diff Meta-Llama-3-8B
        llama tokens "Who are you?" --chat --ckpt_dir Llama3.2-1B-Instruct

    Args:
        text: the text, in quotes; - stands for standard input; by default standard input.
        chat: encode the text as a user's message in the chat format. A list of messages in JSON, or
            an object with such a list as "messages", is encoded as a dialog. If it ends with a
            message of the assistant, the prompt continues that message.
        flow: print the tokens one after the other, with | between them, not as a table.
        diff: another tokenizer, which is compared: the output shows where it cuts the same
            characters differently; a tokenizer's file, a checkpoint folder, or, with --chat, the
            name of another chat format.
        ckpt_dir: a checkpoint folder, GGUF file or id on the Hub; by default the bundled model.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in ckpt_dir.
        format: chat format: llama3, llama2, chatml or zephyr; by default the folder's, else the
            vocabulary's.
    """
    from llama.chat_forms import FormatName, make_format
    from llama.commands import token_views
    from llama.commands.command_line import nearest
    from llama.commands.terminal import read_input
    from llama.explain.tokens import align

    if words:
        raise GenerationError(f"unexpected {words[0]!r}: put a text in quotes")
    if flow and diff is not None:
        raise GenerationError("--flow shows one list of tokens, and --diff two: give one of them")
    if format is not None and not chat:
        raise GenerationError("--format is a chat format, which needs --chat")
    if text is None and sys.stdin.isatty():
        raise GenerationError("no text: give a text in quotes, or pipe one to standard input")
    text = read_input() if text is None or text == "-" else text
    dialog = _as_dialog(text) if chat else None
    tokenizer = _open(ckpt_dir, tokenizer_path, format)
    left = _tokens(tokenizer, text, dialog)
    if diff is None:
        _print(token_views.flow(left) if flow else token_views.table(left))
        print()
        _print(token_views.notes(left, tokenizer.special_tokens))
        return
    other, formatter = tokenizer, None
    formats = get_args(FormatName)
    is_format = diff in formats and not os.path.exists(diff)
    if not is_format and not os.path.exists(diff) and (hint := nearest(diff, formats)):
        raise GenerationError(f"--diff {diff} is no folder and no chat format{hint}")
    if is_format:
        if not chat:
            raise GenerationError(f"--diff {diff} is a chat format, which needs --chat")
        formatter = make_format(diff, tokenizer)  # type: ignore[arg-type]
    else:
        other = _open(None, diff) if os.path.isfile(diff) else _open(diff)
    right = _tokens(other, text, dialog, formatter)
    titles = _title(tokenizer), _title(other) if formatter is None else f"format {diff}"
    shared = [text] if dialog is None else [message["content"].strip() for message in dialog]
    _print(token_views.comparison(align(left, right, shared), titles))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _as_dialog(text: str) -> Dialog:
    """The dialog that the text is in JSON, or else a dialog with the text as the user's message."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and "messages" in content:
        content = content["messages"]
        if not is_dialog(content):
            raise DialogError("messages is no list of messages, each with a role and a content")
    return content if is_dialog(content) else [{"role": "user", "content": text}]


def _open(
    ckpt_dir: str | None, tokenizer_path: str | None = None, format: str | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or the one in a file. A file that is given without a
    folder has the chat form of the files beside it."""
    from llama.checkpoints.build import open_tokenizer
    from llama.checkpoints.folder import BUNDLED, find_folder
    from llama.checkpoints.hub import local_folder

    if tokenizer_path is not None and ckpt_dir is None:
        folder = weights = Path(tokenizer_path).parent
    else:
        folder = local_folder(ckpt_dir or BUNDLED)
        weights = find_folder(folder)
    return open_tokenizer(tokenizer_path, weights, folder, format)  # type: ignore[arg-type]


def _tokens(
    tokenizer: Tokenizer, text: str, dialog: Dialog | None, formatter: AnyFormat | None = None
) -> list[Token]:
    """The tokens of a text, or of a dialog in the format. None: the tokenizer's chat format."""
    if dialog is None:
        return read_tokens(tokenizer, tokenizer.encode(text, bos=True, eos=False))
    last = dialog[-1]
    continues = isinstance(last, Mapping) and last.get("role") == "assistant"
    formatter = tokenizer.chat_format() if formatter is None else formatter
    return read_tokens(tokenizer, formatter.encode_dialog_prompt(dialog, continues))


def _title(tokenizer: Tokenizer) -> str:
    return "/".join(tokenizer.model_path.parts[-2:])
