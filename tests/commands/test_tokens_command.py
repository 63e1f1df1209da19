"""`llama tokens`: what it prints for texts and dialogs, in a pipe and in a terminal."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from make_checkpoint import demo_pieces, write_tokenizer

from llama import ChatFormat, Tokenizer
from llama.checkpoints.folder import BUNDLED

Run = Callable[..., str]
MAGENTA = "\033[35m"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, run: Run) -> Run:
    """Run `llama tokens` in this process. Returns its standard output."""
    monkeypatch.setenv("COLUMNS", "100")
    return functools.partial(run, "tokens")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A tokenizer with far fewer tokens."""
    write_tokenizer(tmp_path / "tokenizer.model", demo_pieces())
    return tmp_path / "tokenizer.model"


def test_a_table(run: Run) -> None:
    assert run("Once upon\n\N{GRINNING FACE}").splitlines() == [
        "index    id  bytes",
        "    0  6144  <|begin_of_text|>",
        "    1  3094  'Once'",
        "    2   673  ' upon'",
        r"    3   198  '\n'=0A",
        "    4   172  F0",
        "    5   253  9F",
        "    6   246  98",
        "    7   222  80",
        "",
        "8 tokens, 1 of them special. "
        "The others: 11 characters, 14 bytes, 1.57 characters a token.",
    ]


def test_tokens_one_after_the_other(run: Run) -> None:
    printed = run("Once upon\na \x1b \N{GRINNING FACE}", "--flow")
    assert printed.splitlines()[:3] == [
        r"|<|begin_of_text|>|Once| upon|\n|",
        r"|a| |\x1b| |F0|9F|98|80|",
        "",
    ]


def test_the_name_of_a_special_token_is_plain_text(run: Run) -> None:
    printed = run("a<|eot_id|>")
    eot = Tokenizer(BUNDLED / "tokenizer.model").special_tokens["<|eot_id|>"]
    assert f" {eot} " not in printed
    assert f"Tokens 2 to 9 spell <|eot_id|> as plain text. The special token is {eot}." in printed


def ids_of(printed: str) -> list[int]:
    return [int(line.split()[1]) for line in printed.split("\n\n")[0].splitlines()[1:]]


def test_a_message_and_a_dialog(run: Run) -> None:
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    encode = ChatFormat(tokenizer).encode_dialog_prompt
    message = {"role": "user", "content": "Tell me a tale."}
    assert ids_of(run("Tell me a tale.", "--chat")) == encode([message])
    assert ids_of(run("--chat", "Tell me a tale.")) == encode([message])
    dialog = [{"role": "system", "content": "Be brief."}, message]
    assert ids_of(run(json.dumps(dialog), "--chat")) == encode(dialog)
    dialog.append({"role": "assistant", "content": "There was once"})
    begun = ids_of(run(json.dumps({"messages": dialog}), "--chat"))
    assert begun == encode(dialog, continue_final_message=True)
    # JSON that is no dialog is a message. Without --chat a dialog is a text.
    assert ids_of(run("[1, 2]", "--chat")) == encode([{"role": "user", "content": "[1, 2]"}])
    text = json.dumps(dialog)
    assert ids_of(run(text)) == tokenizer.encode(text, bos=True, eos=False)


def test_texts_that_look_like_numbers_and_flags(run: Run) -> None:
    assert ids_of(run("1.50")) == ids_of(run("--text=1.50"))
    assert "'-'\n    2    12  '-'" in run("-- he said")


def test_standard_input() -> None:
    command = [sys.executable, "-m", "llama", "tokens"]
    direct = subprocess.run([*command, "two\nlines"], capture_output=True, text=True, check=True)
    for words in ([], ["-"]):
        piped = subprocess.run(
            [*command, *words], input="two\nlines\n", capture_output=True, text=True, check=True
        )
        assert piped.stdout == direct.stdout
    wrong = subprocess.run(command, input=b"\xff", capture_output=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr == b"error: the input is not UTF-8 text: byte 0 is wrong\n"


@pytest.mark.parametrize(("no_color", "has_colour"), [(None, True), ("", True), ("1", False)])
def test_colours_in_a_terminal(no_color: str | None, has_colour: bool) -> None:
    ours, its = os.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {} if no_color is None else {"NO_COLOR": no_color}
    subprocess.run(
        [sys.executable, "-m", "llama", "tokens", "Once", "--flow"],
        stdout=its, env=environment, check=True,
    )  # fmt: skip
    os.close(its)
    shown = os.read(ours, 10_000).decode()
    assert (f"{MAGENTA}<|begin_of_text|>\033[0m" in shown) is has_colour
    assert ("\033" in shown) is has_colour


# ---- comparisons --------------------------------------------------------------------------------


def test_a_comparison_with_a_file(run: Run, other: Path) -> None:
    printed = run("the word \u65e5", "--diff", other)
    assert printed.splitlines() == [
        "   index  bundled/tokenizer.model                   index  " + "/".join(other.parts[-2:]),
        "       0  <|begin_of_text|>                             0  1 token alike",
        "!      1  'the'                                         1  't' 'h' 'e'",
        "       2  ' word' ' ' E6 97 A5                          4  5 tokens alike",
        "",
        "7 tokens on the left, 9 on the right",
        "!  spans with the same characters in other tokens: 1",
        "~  spans with other characters: 0",
    ]


def test_a_comparison_of_chat_formats(run: Run) -> None:
    lines = run("Once upon a time", "--chat", "--diff", "llama2").splitlines()
    assert lines[0].split() == ["index", "bundled/tokenizer.model", "index", "format", "llama2"]
    assert lines[1].startswith("~      0  <|begin_of_text|> <|start_header_id|>")
    assert "       7  ' upon' ' a' ' time'                          6  3 tokens alike" in lines
    assert lines[-2:] == [
        "!  spans with the same characters in other tokens: 0",
        "~  spans with other characters: 2",
    ]


def test_a_comparison_with_a_folder(run: Run) -> None:
    lines = run("Once upon", "--diff", BUNDLED).splitlines()
    assert lines[1:] == [
        "       0  <|begin_of_text|> 'Once' ' upon'              0  3 tokens alike",
        "",
        "3 tokens on the left, 3 on the right",
        "!  spans with the same characters in other tokens: 0",
        "~  spans with other characters: 0",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b"], "unexpected 'b': put a text in quotes"),
        (["a", "--flow", "--diff", "x"],
         "--flow shows one list of tokens, and --diff two: give one of them"),
        (["a", "--diff", "llama2"], "--diff llama2 is a chat format, which needs --chat"),
        (["a", "--diff", "nowhere"], "no such folder: nowhere"),
        (["a", "--ckpt_dir", "nowhere"], "no such folder: nowhere"),
        (["a", "--tokenizer_path", "nowhere"],
         "nowhere: cannot read the tokenizer: No such file or directory"),
        (["a", "--format", "chatml"], "--format is a chat format, which needs --chat"),
        (["a", "--chat", "--diff", "lama2"],
         "--diff lama2 is no folder and no chat format, did you mean llama2?"),
        (['{"messages": 5}', "--chat"],
         "messages is no list of messages, each with a role and a content"),
        (["a", "--chat=maybe"], "--chat is 'maybe': it must be yes or no"),
        (["a", "--chat", "--format", "x"],
         "format is 'x': it must be one of llama3, llama2, chatml, zephyr"),
        (["a", "--chat", "--format", "chatml"],
         f"{BUNDLED / 'tokenizer.model'} has no <|im_start|>, which ChatML needs"),
        (['[{"role": "king", "content": "a"}]', "--chat"],
         "message 0 has the role 'king', but it must be one of system, user, assistant, ipython"),
        (['[{"role": "user", "content": "a"}, 1]', "--chat"],
         "message 1 must be a mapping with role and content, not int"),
    ],
)  # fmt: skip
def test_mistakes(words: list[str], message: str, fail: Run) -> None:
    assert fail(*words).startswith(f"error: {message}")
