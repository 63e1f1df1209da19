"""Run a command with the words of a command line. This file checks the words. The library fire
converts them to the command's arguments.
"""

import difflib
import re
from collections.abc import Iterable, Sequence

import fire

from llama.commands.flags import Command, Flag, all_flags, own_flags, takes_more_words
from llama.commands.help_page import help_text
from llama.errors import LlamaError

SWITCH_VALUES = {"yes": True, "true": True, "no": False, "false": False}
ARGUMENTS = ("model", "folder", "src")  # that name a model
IS_FLAG = re.compile(r"--?([A-Za-z][\w-]*)(=.*)?", re.DOTALL)


def run(command: Command, words: Sequence[str], usage: str) -> None:
    """Run a command, or print its help if `--help` or `-h` is among the words.

    usage: what a user types before the words, such as "llama chat".
    Raises LlamaError for an unknown flag, a flag without its value and a missing argument.
    """
    if "--help" in words or "-h" in words:
        print(help_text(command, usage))
        return
    fire.Fire(command, checked(command, words, usage), name=usage)


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The suggestion ", did you mean …?" if a known name is similar, else ""."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {prefix}{found[0]}?" if found else ""


def checked(command: Command, words: Sequence[str], usage: str) -> list[str]:
    """Check the words, and return them in the form that fire reads.

    This check comes before fire, because fire reports a wrong word only after it has run the
    command.
    """
    flags = all_flags(command)
    arguments, own = own_flags(command)
    result: list[str] = []
    given: set[str] = set()
    n_plain = 0
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        match = IS_FLAG.fullmatch(word)
        if match is None:
            argument = arguments[n_plain].name if n_plain < len(arguments) else None
            n_plain += 1
            if argument is None and (word.startswith("-") or not takes_more_words(command)):
                # fire would take the word for a flag, or for the value of the next parameter.
                raise LlamaError(_unexpected(word, len(arguments), flags, usage))
            # fire would read a text such as "-- he said" as a flag. So fire gets the text as the
            # value of a flag.
            result.append(f"--{argument}={word}" if argument and word.startswith("-") else word)
            continue
        name = match[1].replace("-", "_")
        flag = _find(name, flags, usage)
        if flag.name in given:
            raise LlamaError(f"--{flag.name} is given twice; see {usage} --help")
        given.add(flag.name)
        following = words[index : index + 1]
        if match[2] is not None:
            value = match[2][1:]
        elif flag.is_switch and " ".join(following).lower() not in SWITCH_VALUES:
            value = "yes"  # a text after the switch, as in --chat "Hello", is not its value
        elif following and not IS_FLAG.fullmatch(following[0]):
            value = following[0]
            index += 1
        else:
            raise LlamaError(f"--{flag.name} needs a value ({flag.kind}); see {usage} --help")
        if flag.is_switch:
            is_on = _is_on(flag, value)
            is_negated = name != flag.name and name.startswith("no")  # --noforce
            value = str(is_on != is_negated)
        else:
            _check_number(flag, value)
        result.append(f"--{flag.name}={value}")
    by_position = {flag.name for flag in arguments[:n_plain]}
    # Flags of a group are not checked here, because a configuration file may hold them.
    for flag in (*arguments, *own):
        if flag.default is None and flag.name not in given | by_position:
            shown = f"--{flag.name}" if flag not in arguments else flag.name.upper()
            raise LlamaError(f"{shown} is missing: {flag.meaning}; see {usage} --help")
    return result


def _unexpected(word: str, n_arguments: int, flags: dict[str, Flag], usage: str) -> str:
    """The message for a word that is neither an argument nor the value of a flag."""
    if word.startswith("-"):
        return f"unexpected {word!r}: put a text in quotes; see {usage} --help"
    if n_arguments == 0 and "ckpt_dir" in flags:
        return f"unexpected {word!r}, did you mean --ckpt_dir {word}? See {usage} --help"
    most = {0: "no argument", 1: "one argument"}.get(n_arguments, f"{n_arguments} arguments")
    return f"unexpected {word!r}: {usage} takes {most}; see {usage} --help"


def _is_on(flag: Flag, value: str) -> bool:
    """The value of a switch. Raises LlamaError if it is neither yes nor no."""
    if value.lower() not in SWITCH_VALUES:
        raise LlamaError(f"--{flag.name} is {value!r}: it must be yes or no")
    return SWITCH_VALUES[value.lower()]


def _check_number(flag: Flag, value: str) -> None:
    """Raise LlamaError if the flag takes a number and the value is none."""
    kinds = {"whole number": int, "number": float}
    if flag.kind in kinds:
        try:
            kinds[flag.kind](value)
        except ValueError:
            raise LlamaError(f"--{flag.name} is {value!r}: it must be a {flag.kind}") from None


def _find(name: str, flags: dict[str, Flag], usage: str) -> Flag:
    """The flag of that name. Also accepted are --noforce for --force, and -f for --force if no
    other flag begins with f. Raises LlamaError for an unknown name."""
    if name in flags:
        return flags[name]
    switch = flags.get(name.removeprefix("no"))
    if name.startswith("no") and switch is not None and switch.is_switch:
        return switch
    matches = [flag for flag in flags.values() if flag.name.startswith(name)]
    if len(name) == 1 and len(matches) == 1:
        return matches[0]
    hint = nearest(name, flags, "--")
    if name == "ckpt_dir":  # in these commands the model is an argument
        hint = next((f": the model is {arg.upper()}" for arg in ARGUMENTS if arg in flags), hint)
    raise LlamaError(f"unknown option --{name}{hint}; see {usage} --help")
