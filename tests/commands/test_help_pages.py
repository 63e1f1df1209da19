"""The help of every command and of both examples is a page to work from: it says what is read and
written, each flag's default and unit, examples that run, and exit codes.
"""

import importlib
import inspect
import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.stand_ins import write_stand_ins
from helpers.tales import made_up_tale
from test_docs import DOCUMENTS

from llama.__main__ import COMMANDS, overview
from llama.commands.command_line import checked
from llama.commands.flags import Command, all_flags, own_flags, sections
from llama.commands.help_page import EXIT_CODES, exit_codes, help_text

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ("example_text_completion.py", "example_chat_completion.py")
# Numbers that count or measure nothing that has a name.
WITHOUT_UNIT = set(
    "seed rope_factor temperature top_p min_p repetition_penalty presence_penalty"
    " frequency_penalty learning_rate final_lr weight_decay beta1 beta2 clip rope_theta port"
    " lora_r lora_alpha lora_dropout".split()
)
# What is not run below, and why.
NOT_RUN = {
    "chat": "waits for a terminal, or needs a network",
    "serve": "listens until it is stopped",
    "bench": "takes a minute; test_bench.py runs it with small numbers",
    "parity": "takes a minute; test_parity.py runs it with few tokens",
    "train": "trains for minutes; test_commands.py runs it with few steps",
    "finetune": "trains for minutes; test_commands.py runs it with few steps",
    "evaluate": "needs a network; tests/evaluation has a task of its own",
}


def command_of(usage: str) -> Command:
    """The function that a command line beginning with these words runs."""
    program, name = usage.split()
    if program == "python":
        return runpy.run_path(str(ROOT / name))["main"]
    return getattr(importlib.import_module(f"llama.commands.{COMMANDS[name][0]}"), name)


USAGES = [*(f"llama {name}" for name in COMMANDS), *(f"python {name}" for name in EXAMPLES)]
PAGES = {usage: command_of(usage) for usage in USAGES}


@pytest.mark.parametrize("usage", PAGES)
def test_the_page_has_its_sections_in_order(usage: str) -> None:
    page = help_text(PAGES[usage], usage)
    assert page.startswith(f"usage: {usage}")
    titles = re.findall(r"^(Reads|Writes|Arguments|Flags|Examples|Exit codes):$", page, re.M)
    arguments, flags = own_flags(PAGES[usage])
    optional = ["Arguments"] * bool(arguments) + ["Flags"] * bool(flags)
    assert titles == ["Reads", "Writes", *optional, "Examples", "Exit codes"]
    assert max(map(len, page.splitlines())) <= 100


@pytest.mark.parametrize("usage", PAGES)
def test_every_flag_is_there_with_its_default_and_unit(usage: str) -> None:
    command = PAGES[usage]
    words = " ".join(help_text(command, usage).split())
    for flag in all_flags(command).values():
        assert flag.meaning, flag.name
        is_number = flag.kind in ("whole number", "number")
        assert is_number or not flag.unit
        assert not is_number or bool(flag.unit) != (flag.name in WITHOUT_UNIT), flag.name
        kind = f"{flag.kind} of {flag.unit}" if flag.unit else flag.kind
        default = "required" if flag.default is None else f"default: {flag.default}"
        names = f"(--{flag.name}|{flag.name.upper()})"
        row = f"{flag.meaning} ({kind}; {default})"
        assert len(re.findall(f"{names} {re.escape(' '.join(row.split()))}", words)) == 1, flag.name


@pytest.mark.parametrize("usage", PAGES)
def test_flags_have_the_default_of_the_function(usage: str) -> None:
    flags = all_flags(PAGES[usage])
    for parameter in inspect.signature(PAGES[usage]).parameters.values():
        default = parameter.default
        if parameter.name in flags and isinstance(default, int | float | str):
            shown = {True: "yes", False: "no", "": "none"}.get(default, str(default))
            is_switch = isinstance(default, bool | str)
            assert flags[parameter.name].default == (shown if is_switch else str(default))


def examples(usage: str) -> list[str]:
    return sections(PAGES[usage])["Examples"].splitlines()


@pytest.mark.parametrize("usage", PAGES)
def test_two_examples_have_flags_that_exist(usage: str) -> None:
    assert len(examples(usage)) == 2
    for line in examples(usage):
        words = shlex.split(line)
        assert words[:2] == usage.split()
        checked(PAGES[usage], words[2:], usage)


@pytest.mark.parametrize("usage", PAGES)
def test_lines_of_json_are_json(usage: str) -> None:
    texts = sections(PAGES[usage])
    shown = f"{texts['Reads']}\n{texts['Writes']}".replace(", …", "")
    for text in re.findall(r"^ +([{\[](?:.|\n)*?[}\]])$", shown, re.MULTILINE):
        json.loads(text)


def test_the_overview_is_such_a_page_too() -> None:
    page = overview()
    assert "Names of models" in page
    for line in re.findall(r"^  (llama .*)$", page, re.MULTILINE):
        program, name, *words = shlex.split(line)
        checked(PAGES[f"{program} {name}"], words, "")
    assert all(f"  {code} " in page for code in EXIT_CODES)
    assert max(map(len, page.splitlines())) <= 100


def test_a_command_adds_to_the_exit_codes() -> None:
    table = exit_codes("1: a line\n    failed.\n3: it is full").splitlines()
    assert table[2].split(maxsplit=1) == ["1", f"a line failed; {EXIT_CODES[1]}"]
    assert [line.split()[0] for line in table[1:]] == ["0", "1", "2", "3", "130", "141"]


# ---- the examples run ----------------------------------------------------------------------------


def write_texts() -> None:
    Path("tale.txt").write_text(made_up_tale(1000))
    lines = [{"text": page.read_text(encoding="utf-8")} for page in DOCUMENTS]
    Path("tales.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (batch,) = re.findall(r"^ +(\{.*)\n +(\{.*)", sections(PAGES["llama batch"])["Reads"], re.M)
    Path("prompts.jsonl").write_text("\n".join(batch))


def test_the_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]
) -> None:
    """The commands run in one folder, in the order of the overview. So a later one reads what an
    earlier one wrote."""
    monkeypatch.chdir(tmp_path)
    write_stand_ins(tmp_path)
    write_texts()
    for name in COMMANDS:
        for line in [] if name in NOT_RUN else examples(f"llama {name}"):
            try:
                run(*shlex.split(line)[1:])
            except SystemExit as end:
                raise AssertionError(line) from end
