"""llama explain: write a page that shows every tensor of a prompt."""

import sys
from typing import Any

from llama.commands.flags import MODEL, as_text, takes
from llama.errors import ExplainError
from llama.terminal_text import say


@as_text
@takes(MODEL, without=("max_seq_len", "seed", "mode", "quantize", "kv_cache"))
def explain(
    prompt: str | None = None,
    *words: str,
    out: str = "explain.html",
    mp: int = 1,
    chat: bool = False,
    force: bool = False,
    **flags: Any,
) -> None:
    """Write a page that follows a prompt through every tensor of the model.

    The page is one HTML file, which a browser opens from the disk. It shows the tokens, each tensor
    of each layer with its formula and its line of code, attention, predictions, sampling, and what
    the KV cache saves for the next token. The model runs as in mode reference, on one rank.

    Reads:
        PROMPT, or standard input up to its end: UTF-8 text, such as
            Once upon a time there was a fox

    Writes:
        OUT: the page.

    Examples:
        llama explain "Once upon a time there was a fox" --mp 2 --out fox.html
        llama explain "Who are you?" --chat --ckpt_dir Llama3.2-1B-Instruct

    Args:
        prompt: the text, in quotes; - stands for standard input; by default standard input.
        out: the file to write.
        mp (ranks): the page shows which of so many ranks has which part of each tensor.
        chat: the text is a user's message, in the model's chat format.
        force: replace OUT if it exists.
    """
    from llama.checkpoints.folder import BUNDLED
    from llama.checkpoints.inspect import resolve
    from llama.commands.terminal import read_input
    from llama.explain.page import write_page
    from llama.files import check_can_write
    from llama.generation import Llama

    if words:
        raise ExplainError(f"unexpected {words[0]!r}: put the prompt in quotes")
    if "format" in flags and not chat:
        raise ExplainError("--format is a chat format, which needs --chat")
    if prompt is None and sys.stdin.isatty():
        raise ExplainError("no prompt: give a text in quotes, or pipe one to standard input")
    check_can_write(out, force)
    resolve(flags.get("ckpt_dir", str(BUNDLED)))[1].check_split(mp)
    prompt = read_input() if prompt is None or prompt == "-" else prompt
    llama = Llama.build(**flags, max_batch_size=1)
    text_or_dialog: Any = [{"role": "user", "content": prompt}] if chat else prompt
    size = write_page(llama, text_or_dialog, out, mp)
    say(f"Written to {out} ({size / 1e6:.1f} MB)", to_stderr=True)
