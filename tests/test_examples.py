"""The two example scripts as a user starts them, on one rank and on two under torchrun."""

import subprocess
import sys
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


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_rank_and_two_say_the_same(folders: dict[int, Path], script: str) -> None:
    one = run(script, "--ckpt_dir", str(folders[1]), *OPTIONS)
    assert one.returncode == 0, one.stderr
    assert one.stdout.count("==================================") == 4
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    two = run(*torchrun, script, "--ckpt_dir", str(folders[2]), *OPTIONS)
    assert two.returncode == 0, two.stderr
    assert two.stdout == one.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_one_line_and_exit_code_2(script: str) -> None:
    done = run(script, "--ckpt_dir", "nowhere")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: no such checkpoint folder: nowhere\n"


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
def test_help_names_every_flag(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    for flag in (
        "ckpt_dir", "tokenizer_path", "temperature", "top_p",
        "max_seq_len", "max_gen_len", "max_batch_size",
    ):  # fmt: skip
        assert flag in done.stdout + done.stderr
