"""One rule for the names of models: the order of the tries, and one message for all commands."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama.__main__ import main
from llama.checkpoints.folder import find_folder
from llama.commands.help_page import NAMES
from llama.errors import CheckpointError

Run = Callable[..., str]


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_the_order_of_the_tries(tmp_path: Path) -> None:
    """A folder has all at once. What is found is removed, and the next is found."""
    place = tmp_path / "all"
    steps = [place / "step_00000001", place / "step_00000002"]
    write(place / "params.json", place / "config.json", place / "model.safetensors")
    write(place / "original" / "params.json", *(step / "params.json" for step in steps))
    write(place / "only.gguf")
    assert find_folder(place / "only.gguf") == place / "only.gguf"
    for found, removed in (
        (place, place / "params.json"),
        (place, place / "config.json"),
        (place / "original", place / "original"),
        (steps[1], steps[1]),
        (steps[0], steps[0]),
        (place / "only.gguf", place / "only.gguf"),
    ):
        assert find_folder(place) == found
        shutil.rmtree(removed) if removed.is_dir() else removed.unlink()
    with pytest.raises(CheckpointError, match=r"has no params\.json, no config\.json"):
        find_folder(place)


def test_a_path_comes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder: owner/name; as an id on the Hugg"):
        find_folder("owner/name")
    write(Path("owner/name/params.json"))
    assert find_folder("owner/name") == Path("owner/name")


def test_the_overview_and_the_docstring_tell_the_same_order() -> None:
    stated = re.findall(r"^ +(\d)\. ", find_folder.__doc__ or "", re.MULTILINE)
    assert stated == [str(number) for number in range(1, len(NAMES) + 1)]


COMMANDS = [
    "complete Hi --ckpt_dir {}", "chat --ckpt_dir {}", "serve {}", "doctor {}", "inspect {}",
    "bench --ckpt_dir {}", "explain Hi --ckpt_dir {}", "convert {} new", "verify {}",
    "parity --ckpt_dir {}", "tokens Hi --ckpt_dir {}", "perplexity text --ckpt_dir {}",
    "batch prompts out --ckpt_dir {}", "finetune --data dialogs --out_dir new --ckpt_dir {}",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("a text")
    Path("prompts").write_text('{"prompt": "a"}\n')
    Path("dialogs").write_text("{}\n")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_every_command_has_the_same_message(
    command: str, folder: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, message in {
        "nowhere": "no such folder: nowhere; nor is it an id on the Hugging Face Hub, OWNER/NAME",
        "no/where": "no such folder: no/where; as an id on the Hugging Face Hub it is not in the",
        "none.gguf": "cannot read none.gguf: No such file or directory",
        "text": "text is neither a folder nor a GGUF file, NAME.gguf",
    }.items():
        monkeypatch.setattr("sys.argv", ["llama", *command.format(name).split()])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        assert f"error: {message}" in capsys.readouterr().err
