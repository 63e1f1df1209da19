"""llama chat: talk with a model in a terminal."""

from typing import Any

from llama.commands.flags import MODEL, SPECULATION, SUGGESTED_SAMPLING, as_text, takes
from llama.errors import GenerationError


@as_text
@takes(MODEL, SPECULATION, SUGGESTED_SAMPLING, without=("n",))
def chat(*words: str, **flags: Any) -> None:
    """Talk with a model. /help lists what can be typed.

    Example: llama chat --ckpt_dir Llama3.2-1B-Instruct

    A turn computes only its own tokens, because the KV cache keeps the turns before. Under torchrun
    the first rank has the terminal, and Ctrl-C ends all ranks.
    """
    if words:
        raise GenerationError(f"unexpected {words[0]!r}: type messages when the chat has started")
    from llama.commands import terminal
    from llama.commands.chat_session import Chat
    from llama.generation import Llama

    build, params = terminal.read_flags(words, flags)
    llama = Llama.build(**build, max_batch_size=1)
    with terminal.owned(llama) as is_ours:
        if is_ours:
            Chat(llama, terminal.suggested(llama, params, flags)).run()
