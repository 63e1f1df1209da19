"""Plausible mistakes of a new user: each ends with one line and exit code 2, before a model is
loaded or a file is written.
"""

import json
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from make_checkpoint import demo_pieces, write_tokenizer

from llama.checkpoints.folder import BUNDLED

Run = Callable[..., str]
ROOT = Path(__file__).parent.parent.parent
TOKENIZE = "tokenize tale.txt --tokenizer tokenizer.model --out"
TRAIN = "train --data tale.bin --tokenizer tokenizer.model --out_dir run"
FINETUNE = "finetune --data dialogs.jsonl --out_dir run"
NO_FOLDER = "no such folder: nowhere; nor is it an id on the Hugging Face Hub, OWNER/NAME"
CASES = [
    # ---- words ----
    ("doctor {B} other", "unexpected 'other': llama doctor takes one argument; see llama doctor"),
    ("verify {B} other", "unexpected 'other': llama verify takes one argument"),
    ("inspect {B} other", "unexpected 'other': llama inspect takes one argument"),
    ("batch prompts.jsonl out other", "unexpected 'other': llama batch takes 2 arguments"),
    ("convert {B} new other", "unexpected 'other': llama convert takes 2 arguments"),
    ("perplexity tale.txt other", "unexpected 'other': llama perplexity takes one argument"),
    ("train run.toml other", "unexpected 'other': llama train takes one argument"),
    ("bench {B} other", "unexpected 'other': llama bench takes one argument"),
    ("bench {B} --ckpt_dir other", "two models: "),
    ("complete Hi --n 1 --n 2", "--n is given twice; see llama complete --help"),
    ("inspect --ckpt_dir x", "unknown option --ckpt_dir: the model is MODEL; see llama inspect"),
    ("doctor --ckpt_dir x", "unknown option --ckpt_dir: the model is FOLDER; see llama doctor"),
    ("--versoin", "unknown command '--versoin', did you mean --version?"),
    # ---- values ----
    ("complete Hi --rope_factor -1", "rope_factor is -1: it must be a number above 0"),
    ("complete Hi --mode quick", "mode is 'quick': it must be reference or fast"),
    ("complete Hi --quantize int2", "quantize is 'int2': it must be int8 or int4 or fp8"),
    ("complete Hi --kv_cache int4", "kv_cache is 'int4': it must be int8"),
    ("complete Hi --stop_tokens 5", "stop_tokens is 5: it must be a list of token ids, such as"),
    ("complete Hi --adapter nowhere", NO_FOLDER),
    ("serve --port 99999", "port is 99999: it must be 0 to 65535"),
    ("serve --port {taken}", "cannot serve on 127.0.0.1:{taken}: Address already in use"),
    ("serve --max_waiting -1", "max_waiting is -1: it must be 0 or above"),
    ("serve --timeout 0", "timeout is 0: it must be a number above 0"),
    ("serve --allow_origin x:y", "allow_origin has 'x:y': an origin is such as https://example."),
    ("doctor --mp 0", "mp is 0: it must be a whole number above 0"),
    ("doctor --max_seq_len -1", "max_seq_len is -1: it must be a whole number above 0"),
    ("doctor --dtype int8", "dtype is int8: it must be float32, bfloat16 or float16"),
    ("explain Hi --mp 3", "this model cannot be split over 3 ranks, only over 1, 2, 4"),
    ("inspect --max_seq_len 0", "max_seq_len is 0: it must be 1 to the context, 1024"),
    ("inspect --lora_r 4", "--lora_r is about a training step: give --train too"),
    ("inspect --batch 4", "--batch is about a training step: give --train too"),
    ("perplexity tale.txt --window 0", "window is 0: it must be a whole number above 0"),
    ("perplexity tale.txt --window 9999", "window is 9999, but the model's context is 1024"),
    ("evaluate task --batch_size 0", "batch_size is 0: it must be a whole number above 0"),
    ("evaluate task --max_seq_len 0", "max_seq_len is 0: it must be a whole number above 0"),
    ("evaluate task --dtype int8", "dtype is int8: it must be float32, bfloat16 or float16"),
    ("evaluate task --ckpt_dir nowhere", NO_FOLDER),
    ("evaluate a,,b", "a name is empty"),
    (f"{TRAIN} --batch 0", "batch is 0: it must be a whole number above 0"),
    (f"{TRAIN} --learning_rate -1", "learning_rate is -1.0: it must be a number above 0"),
    (f"{TRAIN} --beta1 2", "beta1 is 2.0: it must be 0 to below 1"),
    (f"{TRAIN} --weight_decay -1", "weight_decay is -1.0: it must be 0 or above"),
    (f"{TRAIN} --sample_every -1", "sample_every is -1: it must be 0 or above"),
    (f"{TRAIN} --seed -1", "seed is -1: it must be 0 to 2**63 - 1"),
    (f"{TRAIN} --train some", "train is 'some': it must be one of all, norms, all_but_embeddings"),
    (f"{FINETUNE} --learning_rate -1", "learning_rate is -1.0: it must be a number above 0"),
    (f"{FINETUNE} --lora_dropout 0.1", "lora_dropout is for LoRA: give lora_r too"),
    (f"{FINETUNE} --lora_targets wq", "lora_targets is for LoRA: give lora_r too"),
    # ---- inputs and outputs ----
    ("batch prompts.jsonl out --max_seq_len -1", "max_seq_len is -1: it must be a whole number"),
    ("batch prompts.jsonl out --max_batch_size 0", "max_batch_size is 0: it must be a whole"),
    ("batch prompts.jsonl out --tokenizer_path no", "no: cannot read the tokenizer"),
    ("batch prompts.jsonl out --adapters a=nowhere", NO_FOLDER),
    ("batch prompts.jsonl old --force --max_seq_len -1", "max_seq_len is -1"),
    ("batch prompts.jsonl old", "old exists, but old.job.json does not"),
    ("batch prompts.jsonl nodir/out", "cannot write nodir/out: there is no folder nodir"),
    ("inspect --tensorboard old", "cannot write old: old is not a folder"),
    ("convert {B} new --to gguf", "to is gguf, but dst is new: a GGUF file, and only it, ends in"),
    ("convert {B} new.gguf", "to is meta, but dst is new.gguf: a GGUF file, and only it, ends in"),
    ("convert {B} {B} --force", "it is the source"),
    ("convert {B} old/new", "cannot write old: old is not a folder"),
    ("perplexity empty.txt", "empty.txt is empty: there is nothing to score"),
    ("vocab tale.txt --ranks 260 --out tale.txt --force", "cannot write tale.txt: it is the input"),
    ("vocab empty.txt --ranks 260 --out new", "empty.txt is empty"),
    (f"{TOKENIZE} tale.txt --force", "cannot write tale.txt: it is the input"),
    (f"{TOKENIZE} tokenizer.model --force", "cannot write tokenizer.model: it is the input"),
    (f"{TOKENIZE} new.bin --shard_tokens 50", "shard_tokens needs {} in out"),
    (f"{TOKENIZE} shard_{{}}.bin", "shard_3.bin exists: it is replaced only with --force"),
    ("tokenize empty.txt --tokenizer tokenizer.model --out new.bin", "empty.txt is empty"),
    (f"{TRAIN.replace('run', 'old')}", "cannot write old: old is not a folder"),
    (f"{TRAIN} --log_dir old", "cannot write old: old is not a folder"),
    (f"{FINETUNE.replace('run', 'old')}", "cannot write old: old is not a folder"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tale.txt").write_text("Once upon a time there was a fox and a king and a hen. " * 20)
    Path("empty.txt").write_text("")
    Path("prompts.jsonl").write_text('{"prompt": "Once"}\n')
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
    Path("dialogs.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    Path("old").write_text("precious")
    Path("shard_3.bin").write_text("precious")
    write_tokenizer(tmp_path / "tokenizer.model", demo_pieces())
    return tmp_path


@pytest.fixture
def taken() -> Iterator[str]:
    """A port on which another program listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield str(listening.getsockname()[1])


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights, and making the harness's index of tasks, fail the test."""
    from llama import generation
    from llama.commands import measure, train_run
    from llama.evaluation import harness

    def fail_test(*_: object) -> None:
        pytest.fail("loaded before the mistake was told")

    for module in (generation, measure, train_run):
        monkeypatch.setattr(module, "load_model", fail_test)
    monkeypatch.setattr(harness, "_task_manager", fail_test)


@pytest.mark.parametrize(("typed", "message"), CASES, ids=lambda text: text[:50])
def test_a_mistake_is_told_before_anything_is_done(
    typed: str, message: str, fail: Run, folder: Path, taken: str
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    words = [word.replace("{B}", str(BUNDLED)).replace("{taken}", taken) for word in typed.split()]
    assert message.replace("{taken}", taken) in fail(*words)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["example_chat_completion.py", "example_text_completion.py"])
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--temperature=-1", "temperature is -1: it must be 0 (greedy) or above"),
        ("--top_p=2", "top_p is 2: it must be between 0 and 1"),
        ("--max_gen_len=-1", "max_gen_len is -1: it must be 0 or above"),
        ("other", "unexpected 'other', did you mean --ckpt_dir other? See python example_"),
    ],
)
def test_a_mistake_in_an_example(
    name: str, flag: str, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", [name, flag])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {message}")
    assert shown.err.count("\n") == 1


def test_force_deletes_the_token_files_of_higher_numbers(run: Run) -> None:
    """A pattern such as "shard_*.bin" would read them with the new ones."""
    run(*f"{TOKENIZE} shard_{{}}.bin --force".split())
    assert [path.name for path in Path().glob("shard_*")] == ["shard_0.bin"]


def test_the_row_of_a_training_step_fits_the_context(run: Run) -> None:
    assert "peak" in run("inspect", "--train")
