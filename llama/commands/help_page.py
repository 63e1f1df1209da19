"""The help of a command: a page that is made from its signature, its docstring and its flags."""

import inspect
import re
import textwrap

from llama.commands.flags import Command, Flag, groups_of, own_flags, sections

WIDTH = 100
# What an exit code means. The section "Exit codes" of a docstring says what a command adds.
EXIT_CODES = {
    0: "done",
    1: "under torchrun: a rank failed, for any reason",
    2: "a mistake in the command or in a file; one line on standard error says which",
    130: "stopped by Ctrl-C",
    141: "the program that reads the output through a pipe has stopped",
}

# What may name a model, in the order of `llama.checkpoints.folder.find_folder`. This file does not
# import it, because that would import PyTorch.
NAMES = (
    "a GGUF file, NAME.gguf; of a model in several files, any of them",
    "a folder of Meta's layout: params.json and consolidated.NN.pth",
    "a folder of Hugging Face's layout: config.json, and .safetensors or pytorch_model.bin",
    "a folder that has Meta's layout in original/",
    "a training run, OUT_DIR of `llama train`: its newest checkpoint",
    "a folder with one GGUF model",
    "OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face Hub, if there is no such path",
)


def help_text(command: Command, usage: str) -> str:
    """What a command does, reads and writes, every flag with its type, unit and default, examples
    and exit codes.

    usage: what a user types before the words, such as "llama chat".
    """
    arguments, flags = own_flags(command)
    texts = sections(command)
    shown = [_argument(flag, command) for flag in arguments]
    has_flags = bool(flags or groups_of(command))
    parts = [" ".join(["usage:", usage, *shown, *["[--FLAG VALUE …]"] * has_flags]), texts[""]]
    parts += [_titled(title, texts[title]) for title in ("Reads", "Writes") if title in texts]
    if arguments:
        parts.append("\n".join(["Arguments:", *(_row(f.name.upper(), f) for f in arguments)]))
    groups = [("Flags", flags), *((group.title, group.flags) for group in groups_of(command))]
    for title, members in groups:
        if members:
            parts.append("\n".join([f"{title}:", *(_row(f"--{f.name}", f) for f in members)]))
    if "Examples" in texts:
        parts.append(_titled("Examples", texts["Examples"]))
    parts.append(exit_codes(texts.get("Exit codes", "")))
    return "\n\n".join(parts)


def exit_codes(own: str = "") -> str:
    """The table of exit codes; own: lines such as "1: a line failed", which replace the usual
    meaning of a code, and come before it for the code 1."""
    meanings = dict(EXIT_CODES)
    for code, meaning in re.findall(r"^(\d+): (.*(?:\n +.*)*)", own, re.MULTILINE):
        text = " ".join(meaning.split()).rstrip(".")
        meanings[int(code)] = f"{text}; {EXIT_CODES[1]}" if code == "1" else text
    rows = (_wrapped(str(code), meaning, 6) for code, meaning in sorted(meanings.items()))
    return "\n".join(["Exit codes:", *rows])


def _titled(title: str, text: str) -> str:
    return f"{title}:\n" + textwrap.indent(text, "  ")


def _argument(flag: Flag, command: Command) -> str:
    """An argument in the usage line: in brackets if optional, and with … if it may be repeated."""
    kind = inspect.signature(command).parameters[flag.name].kind
    name = flag.name.upper() + (" …" if kind is inspect.Parameter.VAR_POSITIONAL else "")
    return name if flag.default is None else f"[{name}]"


def _row(name: str, flag: Flag) -> str:
    """A flag's lines in the help: its name, meaning, type, unit and default."""
    kind = f"{flag.kind} of {flag.unit}" if flag.unit else flag.kind
    default = "required" if flag.default is None else f"default: {flag.default}"
    return _wrapped(name, f"{flag.meaning} ({kind}; {default})", 23)


def _wrapped(name: str, text: str, width: int) -> str:
    """A name of at most `width` columns, and the text beside it. After a longer name the text
    begins in the next line."""
    indent = " " * (width + 3)
    first, *rest = textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False)
    gap = f"  {name:<{width}} " if len(name) <= width else f"  {name}\n{indent}"
    return "\n".join([gap + first, *(indent + line for line in rest)])
