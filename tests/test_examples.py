"""The two example scripts: on one rank, on two under torchrun, and in a pipe."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from make_checkpoint import SHAPES, demo_pieces, make_checkpoint, write_tokenizer

ROOT = Path(__file__).parent.parent
SCRIPTS = ["example_text_completion.py", "example_chat_completion.py"]
OPTIONS = ["--temperature", "0", "--max_seq_len", "1024", "--max_gen_len", "24"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same weights in one shard and in two."""
    made = {}
    for mp_size in (1, 2):
        made[mp_size] = tmp_path_factory.mktemp(f"mp{mp_size}")
        make_checkpoint(made[mp_size], SHAPES["demo"], mp_size, torch.float32)
        write_tokenizer(made[mp_size] / "tokenizer.model", demo_pieces())
    return made


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script in this process. Returns its exit code, standard output and standard error."""

    def run(script: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_rank_and_two_say_the_same(folders: dict[int, Path], script: str, run: Run) -> None:
    code, out, _ = run(script, "--ckpt_dir", str(folders[1]), *OPTIONS)
    assert code == 0
    assert out.count("==================================") == 4
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    two = subprocess.run(
        [*torchrun, script, "--ckpt_dir", str(folders[2]), *OPTIONS],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert two.stdout == out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_one_line_and_exit_code_2(script: str, run: Run) -> None:
    code, out, error = run(script, "--ckpt_dir", "nowhere")
    assert (code, out) == (2, "")
    assert error.startswith("error: no such folder: nowhere; nor is it an id on the Hugging Face")
    assert error.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_reader_that_has_enough_ends_it_without_a_word(script: str) -> None:
    with subprocess.Popen(
        [sys.executable, script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script: str, run: Run) -> None:
    code, out, errors = run(script, "--help")
    assert code == 0
    for flag in (
        "ckpt_dir", "tokenizer_path", "temperature", "top_p",
        "max_seq_len", "max_gen_len", "max_batch_size",
    ):  # fmt: skip
        assert flag in out + errors
