"""llama chat: talk with a model in a terminal."""

import os
import sys
from typing import Any

from llama.commands.flags import MODEL, SPECULATION, SUGGESTED_SAMPLING, as_text, takes
from llama.errors import GenerationError


@as_text
@takes(MODEL, SPECULATION, SUGGESTED_SAMPLING, without=("n",))
def chat(model: str | None = None, *words: str, **flags: Any) -> None:
    """Talk with a model. In the chat, /help lists the commands.

    A turn computes only its own tokens, because the KV cache keeps the earlier turns. Under
    torchrun the first rank reads and writes the terminal, and Ctrl-C ends all ranks.

    Reads:
        Standard input: a message or a command of the chat on each line, such as
            Tell me a story about a fox and a king.
            /save dialog.jsonl

    Writes:
        Standard output: the answers.
        Standard error: speed, warnings and errors.
        /save FILE: a line of JSON with the dialog, which `llama finetune` reads.

    Examples:
        llama chat
        llama chat HuggingFaceTB/SmolLM2-360M-Instruct --max_seq_len 4096

    Exit codes:
        2: a mistake in the command or in a file, or in a line from a pipe; one line on standard
            error says which

    Args:
        model: a checkpoint folder, GGUF file or id on the Hub; by default --ckpt_dir.
    """
    if words:
        raise GenerationError(f"unexpected {words[0]!r}: type messages after the chat has started")
    from llama.checkpoints.hub import ID
    from llama.commands import terminal
    from llama.commands.chat_session import Chat
    from llama.generation import Llama

    if model is not None and not os.path.exists(model) and not ID.fullmatch(model):
        raise GenerationError(
            f"{model!r} is no folder and no id on the Hub: type messages after the chat has started"
        )
    terminal.name_model(model, flags)
    build, params = terminal.read_flags(words, flags)
    llama = Llama.build(**build, max_batch_size=1)
    with terminal.on_first_rank(llama) as is_first_rank:
        if is_first_rank:
            is_well = Chat(llama, terminal.suggested(llama, params, flags)).run()
            if not is_well:
                sys.exit(2)
