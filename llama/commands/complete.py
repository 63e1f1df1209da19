"""llama complete: continue a text."""

import sys
from typing import Any

from llama.commands.flags import MODEL, SPECULATION, SUGGESTED_SAMPLING, as_text, takes
from llama.errors import GenerationError


@as_text
@takes(MODEL, SPECULATION, SUGGESTED_SAMPLING, without=("format",))
def complete(prompt: str | None = None, *words: str, **flags: Any) -> None:
    """Continue a text. The continuation is shown while it is generated. Ctrl-C stops it.

    Reads:
        PROMPT, or standard input up to its end if there is no PROMPT: UTF-8 text, such as
            Once upon a time there was a fox who

    Writes:
        Standard output: PROMPT and the generated texts; in a pipe only the generated texts.
        Standard error: the number of tokens, and the speed.

    Examples:
        llama complete "Once upon a time" --max_gen_len 100
        llama complete "The sea is" --ckpt_dir Llama3.2-1B --temperature 0 --n 1 --stop .

    Args:
        prompt: the text, in quotes; by default standard input.
    """
    from llama.commands import terminal
    from llama.generation import Llama

    build, params = terminal.read_flags(words, flags)
    if prompt is None and sys.stdin.isatty():
        raise GenerationError("no prompt: give a text in quotes, or pipe one to standard input")
    llama = Llama.build(**build, max_batch_size=min(params.n, 4))
    terminal.complete(llama, prompt, terminal.suggested(llama, params, flags))
