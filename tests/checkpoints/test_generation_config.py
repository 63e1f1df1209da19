"""Stop tokens and sampling options that a folder names: read, checked, shown and used."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.__main__ import main
from llama.checkpoints.folder import BUNDLED
from llama.checkpoints.generation_config import read_sampling, read_stop_tokens
from llama.errors import ConfigError


def write(folder: Path, name: str = "generation_config.json", **content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled model in a folder of its own, with what a generation_config.json may hold."""
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    write(folder, temperature=0.0, top_p=0.5, eos_token_id=4096, do_sample=True)
    return folder


@pytest.mark.parametrize(("eos", "want"), [(7, [7]), ([7, 9], [7, 9]), (None, None), ([], None)])
def test_stop_tokens_are_a_number_or_a_list(tmp_path: Path, eos: Any, want: Any) -> None:
    write(tmp_path, eos_token_id=eos)
    assert read_stop_tokens(tmp_path) == want
    write(tmp_path, "config.json", eos_token_id=3)
    assert read_stop_tokens(tmp_path) == want or [3]


def test_the_file_may_lie_beside_original(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    write(tmp_path, eos_token_id=[1, 2], temperature=0.6)
    assert read_stop_tokens(tmp_path / "original") == [1, 2]
    assert read_sampling(tmp_path / "original") == {"temperature": 0.6}


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_stop_tokens, {"eos_token_id": "</s>"}, "eos_token_id is '</s>', not a token id or"),
        (read_stop_tokens, {"eos_token_id": [True]}, r"eos_token_id is \[True\]"),
        (read_sampling, {"temperature": -1}, "temperature is -1: it must be 0 .greedy. or above"),
        (read_sampling, {"top_p": "0.9"}, "top_p is '0.9': it must be between 0 and 1"),
    ],
)
def test_a_wrong_value_names_the_file(
    tmp_path: Path, read: Callable[[Path], Any], content: dict[str, Any], message: str
) -> None:
    write(tmp_path, **content)
    with pytest.raises(ConfigError, match=f"generation_config.json: {message}"):
        read(tmp_path)


def test_build_keeps_metas_defaults_and_tells_the_folders(folder: Path) -> None:
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=1, device="cpu")
    assert llama.suggested_sampling == {"temperature": 0.0, "top_p": 0.5}
    assert llama.tokenizer.stop_tokens == [4096]
    options: dict[str, Any] = dict(max_gen_len=20, seed=1)
    sampled = llama.text_completion(["Once"], **options)
    assert sampled == llama.text_completion(["Once"], temperature=0.6, top_p=0.9, **options)
    assert Llama.build(max_seq_len=64, max_batch_size=1, device="cpu").suggested_sampling == {}


@pytest.mark.parametrize(
    ("flags", "is_greedy", "note"),
    [
        ([], True, "temperature 0.0, top_p 0.5, as the folder's generation_config.json says"),
        (["--top_p", "0.9"], True, "temperature 0.0, as"),
        (["--temperature", "1.5", "--top_p", "1.0"], False, ""),
    ],
)
def test_complete_uses_them_where_no_flag_does(
    folder: Path,
    flags: list[str],
    is_greedy: bool,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = []
    for own in (flags, ["--temperature", "0", "--top_p", "1.0"]):
        model = ["--ckpt_dir", str(folder), "--device", "cpu", "--mode", "reference"]
        words = ["complete", "Once upon", *model, "--max_gen_len", "12", *own]
        monkeypatch.setattr(sys, "argv", ["llama", *words])
        main()
        shown = capsys.readouterr()
        texts.append(shown.out)
        if own is flags:
            assert note in shown.err
            assert bool(note) == ("generation_config.json" in shown.err)
    assert (texts[0] == texts[1]) == is_greedy


def test_doctor_shows_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["llama", "doctor", str(folder), "--device", "cpu"])
    main()
    shown = capsys.readouterr().out
    assert "temperature 0.0, top_p 0.5 (generation_config.json); a text ends at " in shown
