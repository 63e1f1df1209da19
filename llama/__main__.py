"""The `llama` command, also `python -m llama`, and the table of its commands."""

import faulthandler
import importlib
import importlib.metadata
import logging
import sys

from llama.commands.command_line import nearest, run
from llama.errors import LlamaError, one_line
from llama.terminal_text import PrintableFormatter

# For each command: its file in `commands/`, and its line in `llama --help`. A file is imported only
# when its command runs, so that a command does not wait for the imports of another.
COMMANDS: dict[str, tuple[str, str]] = {
    "complete": ("complete", "continue a text"),
    "chat": ("chat", "talk with a model"),
    "batch": ("batch", "run a file of prompts"),
    "serve": ("serve", "serve OpenAI's API and a chat page"),
    "doctor": ("checkpoints", "check whether a checkpoint runs here: memory, tokenizer, device"),
    "bench": ("bench", "measure how fast a model runs here"),
    "explain": ("explain", "write a page that shows every tensor of a prompt"),
    "inspect": ("checkpoints", "describe a model: sizes, split, KV cache, FLOPs"),
    "convert": (
        "checkpoints",
        "write a checkpoint in another layout, split or width, or with an adapter",
    ),
    "parity": ("parity", "compare with another implementation, layer by layer"),
    "verify": ("checkpoints", "check that a checkpoint is complete: tensors, numbers, checksums"),
    "tokens": ("tokens", "show the tokens of a text, and where two tokenizers differ"),
    "vocab": ("data", "train a vocabulary"),
    "tokenize": ("data", "write token files for training"),
    "train": ("train", "train a new model from token files"),
    "finetune": ("train", "fine-tune a checkpoint on dialogs"),
    "perplexity": ("evaluate", "score a text"),
    "evaluate": ("evaluate", "run tasks of the lm-evaluation-harness"),
}


def overview() -> str:
    rows = [f"  {name:<12} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: llama COMMAND …",
            "",
            "Run, check, convert, train and measure Meta's Llama text models.",
            "",
            "Commands:",
            *rows,
            "",
            "llama COMMAND --help shows a command's arguments and flags.",
            "llama --version shows the version.",
        ]
    )


def main() -> None:
    with one_line():
        # A weight file that is cut within a step of the model ends the process by SIGBUS, which
        # Python cannot turn into an error. This at least prints "Bus error" and the line of code.
        faulthandler.enable(sys.__stderr__ or sys.stderr)
        # Other libraries' messages are shown from warnings on.
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(PrintableFormatter("%(message)s"))
        logging.basicConfig(handlers=[handler])
        logging.getLogger("llama").setLevel(logging.INFO)
        dispatch(sys.argv[1:])


def dispatch(words: list[str]) -> None:
    """Run the command that the first word names."""
    if not words or words[0] in ("--help", "-h", "help"):
        print(overview())
        return
    name, *rest = words
    if name == "--version":
        print(f"llama-reference {importlib.metadata.version('llama-reference')}")
        return
    if name not in COMMANDS:
        raise LlamaError(f"unknown command {name!r}{nearest(name, COMMANDS)}; see llama --help")
    module = importlib.import_module(f"llama.commands.{COMMANDS[name][0]}")
    run(getattr(module, name), rest, f"llama {name}")


if __name__ == "__main__":
    main()
