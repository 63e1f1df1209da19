"""The commands as a new user types them, with plausible mistakes: the message and the exit code.

A number is a line of the list in the issue "First use without a stumble".
"""

import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama.__main__ import main
from llama.checkpoints.folder import BUNDLED

Run = Callable[..., str]
ROOT = Path(__file__).parent.parent.parent
VOCABULARY = f"{BUNDLED}/tokenizer.model"
SMALL = "--steps=2 --batch=1 --seq_len=16 --dim=32 --n_layers=1 --device=cpu"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, which is the current one: texts, dialogs, an output, outside git."""
    monkeypatch.chdir(tmp_path)
    Path("tale.txt").write_text("Once upon a time there was a fox and a king and a hen. " * 20)
    Path("plain.txt").write_text("one\ntwo\n")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
    Path("dialogs.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    Path("old").write_text("precious")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        # 3, 4: a model that is not there, a value that is not there
        ("complete Hi --ckpt_dir llama/bundlde", "no such folder: llama/bundlde; as an id on"),
        ("complete Hi --ckpt_dir --max_gen_len 10", "--ckpt_dir needs a value (text)"),
        # 5, 6: words in the wrong place, words that are missing
        ("chat Hello", "'Hello' is no folder and no id on the Hub: type messages after the chat"),
        ("convert", "SRC is missing: a checkpoint folder, GGUF file or id on the Hub"),
        ("perplexity", "FILE is missing: any UTF-8 text; see llama perplexity --help"),
        ("evaluate", "TASKS is missing: names of tasks, groups or tags, separated by commas"),
        # 7: no output is replaced without a word
        (f"tokenize tale.txt --tokenizer {VOCABULARY} --out old", "old exists: it is replaced"),
        ("vocab tale.txt --ranks 260 --out old", "old exists: it is replaced only with --force"),
        ("evaluate arc_easy --out old", "old exists: it is replaced only with --force"),
        ("bench --out old", "old exists: it is replaced only with --force"),
        ("explain Hi --out old", "old exists: it is replaced only with --force"),
        ("parity Hi --out old", "old exists: it is replaced only with --force"),
        (f"convert {BUNDLED} old", "old exists: it is replaced only with --force"),
        # 10, 14
        ("batch plain.txt out --tempratur 1", "unknown option --tempratur, did you mean --temp"),
        ("complete Hi --device cuda", "device is 'cuda', but no GPU is visible to PyTorch"),
        # 11: options and data are checked first
        ("finetune --data dialogs.jsonl --out_dir ft --steps 6 --warmup_steps 10 --log_dir tb",
         "warmup_steps 10 do not fit into 6 steps"),
        ("finetune --data nowhere.jsonl --out_dir ft --log_dir tb", "cannot read nowhere.jsonl"),
    ],
)  # fmt: skip
def test_a_mistake_has_one_line_and_nothing_is_written(
    typed: str, message: str, fail: Run, folder: Path
) -> None:
    before = sorted(folder.iterdir())
    assert message in fail(*typed.split())
    assert sorted(folder.iterdir()) == before
    assert Path("old").read_text() == "precious"


@pytest.mark.parametrize("name", ["example_chat_completion.py", "example_text_completion.py"])
def test_1_a_misspelt_flag_of_an_example(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--ckpt", str(BUNDLED)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "unknown option --ckpt, did you mean --ckpt_dir?" in shown.err


def test_2_token_files_of_another_vocabulary(run: Run, fail: Run) -> None:
    run("vocab", "tale.txt", "--ranks=260", "--out=small.model")
    run("tokenize", "tale.txt", "--tokenizer=small.model", "--out=tale.bin")
    words = ["train", "--data=tale.bin", "--out_dir=run", *SMALL.split()]
    message = "tale.bin was written with another vocabulary than that of"
    assert message in fail(*words, f"--tokenizer={VOCABULARY}")
    assert not Path("run").exists()
    # 12: a run that is started again after its end; 18: the speed of the first step
    own = [*words, "--tokenizer=small.model"]
    run(*own)
    assert "run is finished at step 2: more need larger --steps" in run(*own)
    # 15: the folder of a run stands for its newest checkpoint
    assert "perplexity" in run("perplexity", "tale.txt", "--ckpt_dir=run", "--device=cpu")


def test_5_a_text_may_begin_with_dashes(run: Run) -> None:
    assert run("complete", "-- he said", "--max_gen_len=3", "--device=cpu")


def test_7_force_replaces_an_output(run: Run) -> None:
    run("vocab", "tale.txt", "--ranks=260", "--out=old", "--force")
    assert Path("old").read_text() != "precious"


def test_9_batch_shows_why_lines_failed(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("batch", "plain.txt", "out", "--device=cpu")
    assert exit_.value.code == 1
    shown = capsys.readouterr()
    assert "2 lines in out, 2 of them failed" in shown.out
    assert "index 0: not JSON: Expecting value" in shown.err


def test_13_doctor_says_which_limit_fits(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    with pytest.raises(SystemExit) as exit_:
        run("doctor", BUNDLED, "--max_batch_size=10000000", "--device=cpu")
    assert exit_.value.code == 1
    assert "each of these alone would fit: max_batch_size" in capsys.readouterr().out


def test_16_a_chat_from_a_pipe_fails_with_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 3000 + "\n"))
    monkeypatch.setattr(sys, "argv", ["llama", "chat", "--device=cpu"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "tokens, but max_seq_len is 1024" in capsys.readouterr().err


def test_17_the_harness_does_not_ask_git(capfd: pytest.CaptureFixture[str]) -> None:
    from lm_eval import evaluator

    import llama.evaluation.harness  # noqa: F401

    assert evaluator.get_git_commit_hash() is None
    assert capfd.readouterr().err == ""


def test_8_an_error_under_torchrun_has_a_line_and_the_exit_code_of_torchrun() -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             "-m", "llama", "complete", "Hi", "--ckpt_dir", "no/where"]  # fmt: skip
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 1  # torchrun's own
    # On a machine under load a rank may take longer than the other ranks wait for it. So the number
    # of these lines is not compared.
    assert "error: no such folder: no/where" in ended.stderr
