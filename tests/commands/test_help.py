"""The flags that commands share are those of the code. An error suggests the nearest name."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.__main__ import COMMANDS
from llama.commands import flags
from llama.commands.command_line import checked
from llama.commands.flags import Command, Flag, all_flags
from llama.commands.help_page import help_text
from llama.commands.train_config import FinetuneConfig, PretrainConfig
from llama.errors import LlamaError
from llama.sampling import SamplingParams

Run = Callable[..., str]


def command_named(name: str) -> Command:
    module = importlib.import_module(f"llama.commands.{COMMANDS[name][0]}")
    command: Command = getattr(module, name)
    return command


def fields_of(config: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(config)}


def agree(listed: dict[str, Flag], defaults: dict[str, Any]) -> None:
    """Check that the names are equal, and that the help shows each default that is not None."""
    assert listed.keys() == defaults.keys()
    for name, default in defaults.items():
        if default is dataclasses.MISSING:
            assert listed[name].default is None, name
        elif isinstance(default, bool):
            assert listed[name].default == ("yes" if default else "no"), name
        elif isinstance(default, int | float | str):
            assert listed[name].default == str(default), name


@pytest.mark.parametrize(
    ("name", "config"), [("train", PretrainConfig), ("finetune", FinetuneConfig)]
)
def test_flags_of_training_are_the_configurations(name: str, config: Any) -> None:
    listed = all_flags(command_named(name))
    del listed["config"]
    agree(listed, fields_of(config))


def test_flags_of_sampling_are_the_parameters() -> None:
    listed = {f.name: f for group in (flags.SAMPLING, flags.REPORTING) for f in group.flags}
    defaults = fields_of(SamplingParams)
    del defaults["logits_processor"]  # a function
    del defaults["adapter"]  # the flag of this name is an argument of `Llama.build`
    del defaults["seed"]  # `batch` has its own, and the others give it to `Llama.build`
    defaults["logit_bias"] = "none"
    agree(listed, defaults)


def test_flags_of_the_model_are_those_of_build() -> None:
    from llama.commands.terminal import BUILD_FLAGS

    listed = {f.name: f for group in (flags.MODEL, flags.SPECULATION) for f in group.flags}
    assert listed.keys() == set(BUILD_FLAGS)
    parameters = inspect.signature(Llama.build).parameters
    assert listed.keys() <= parameters.keys()
    assert listed["seed"].default == str(parameters["seed"].default)


def test_the_overview_names_every_command(run: Run) -> None:
    shown = run("--help")
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("command", [["llama"], [sys.executable, "-m", "llama"]], ids=str)
def test_the_console_script_and_the_module(command: list[str]) -> None:
    program = Path(sys.executable).parent / "llama" if command == ["llama"] else command[0]
    shown = subprocess.run(
        [program, *command[1:], "convert"], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 2
    assert "SRC is missing" in shown.stderr


def test_the_version(run: Run) -> None:
    assert run("--version").startswith("llama-reference 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chatt"], "unknown command 'chatt', did you mean chat?; see llama --help"),
        (["zzz"], "unknown command 'zzz'; see llama --help"),
        (["chat", "--ckpt_dri", "x"],
         "unknown option --ckpt_dri, did you mean --ckpt_dir?; see llama chat --help"),
        (["complete", "--temprature=1"],
         "unknown option --temprature, did you mean --temperature?; see llama complete --help"),
        (["bench", "--ckpt_dir", "--rounds", "3"],
         "--ckpt_dir needs a value (text); see llama bench --help"),
        (["convert", "a"],
         "DST is missing: the folder or GGUF file to write; see llama convert --help"),
        (["tokenize", "a.txt", "--out=b"],
         "--tokenizer is missing: the tokenizer.model; see llama tokenize --help"),
        (["chat", "Hello"],
         "'Hello' is no folder and no id on the Hub: type messages after the chat has started"),
        (["train", "--out_dirr=x"],
         "unknown option --out_dirr, did you mean --out_dir?; see llama train --help"),
        (["batch", "a", "b", "--temprature", "1"],
         "unknown option --temprature, did you mean --temperature?; see llama batch --help"),
    ],
)  # fmt: skip
def test_mistakes(words: list[str], message: str, fail: Run) -> None:
    assert fail(*words) == f"error: {message}"


def test_a_text_may_begin_with_dashes() -> None:
    command = command_named("complete")
    assert checked(command, ["-- he said"], "llama complete") == ["--prompt=-- he said"]
    assert checked(command, ["--n", "2", "-5 degrees"], "")[-1] == "--prompt=-5 degrees"


def test_a_switch_leaves_the_next_word_alone() -> None:
    command = command_named("tokens")
    assert checked(command, ["--chat", "Hello"], "") == ["--chat=True", "Hello"]
    assert checked(command, ["--nochat", "Hello"], "") == ["--chat=False", "Hello"]
    assert checked(command, ["--chat", "false", "Hello"], "") == ["--chat=False", "Hello"]
    assert checked(command, ["--chat=no", "Hello"], "") == ["--chat=False", "Hello"]
    assert checked(command, ["--nochat=no", "Hello"], "") == ["--chat=True", "Hello"]
    with pytest.raises(LlamaError, match="--chat is 'maybe': it must be yes or no"):
        checked(command, ["--chat=maybe"], "")


def test_a_number_is_checked_before_the_command_runs() -> None:
    command = command_named("explain")
    assert checked(command, ["fox", "--mp", "2"], "") == ["fox", "--mp=2"]
    for words in (["--mp", "two"], ["--mp=two"], ["--mp=1.5"], ["--mp="]):
        with pytest.raises(LlamaError, match="it must be a whole number"):
            checked(command, words, "")
    with pytest.raises(LlamaError, match="--rope_factor is 'x': it must be a number"):
        checked(command, ["--rope_factor", "x"], "")
    assert checked(command, ["-o", "a=b.html"], "") == ["--out=a=b.html"]


def test_values_may_be_negative() -> None:
    assert checked(command_named("train"), ["--learning_rate", "-1"], "")
    with pytest.raises(LlamaError, match="needs a value"):
        checked(command_named("train"), ["--learning_rate"], "")


def test_usage_shows_what_must_be_given() -> None:
    assert help_text(command_named("convert"), "llama convert").startswith(
        "usage: llama convert SRC DST [--FLAG VALUE …]"
    )
    assert help_text(command_named("complete"), "llama complete").startswith(
        "usage: llama complete [PROMPT] [--FLAG VALUE …]"
    )
