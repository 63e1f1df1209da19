"""llama complete: continue a text."""

import sys
from typing import Any

from llama.commands.flags import MODEL, SPECULATION, SUGGESTED_SAMPLING, as_text, takes
from llama.errors import GenerationError


@as_text
@takes(MODEL, SPECULATION, SUGGESTED_SAMPLING, without=("format",))
def complete(prompt: str | None = None, *words: str, **flags: Any) -> None:
    """Continue a text. The continuation is shown while it is generated. Ctrl-C stops it.

    Example: llama complete "Once upon a time" --max_gen_len 100

    In a pipe, standard output gets only the generated texts.

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
