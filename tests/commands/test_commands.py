"""The command `llama`: from texts to a trained and scored model, and errors of one line."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.damaged import PARAMS, write_folder
from make_checkpoint import demo_pieces, write_tokenizer

from llama import Llama
from llama.checkpoints.folder import run_checkpoints
from llama.commands.train_config import FinetuneConfig, PretrainConfig
from llama.evaluation.perplexity import score
from llama.tokenizer import Tokenizer
from llama.training.chat_data import load_dialogs
from llama.training.token_files import read_token_file

TEXTS = [
    "that is the word and this is not the word they said. " * 30,
    "when you use all the words like him, what would they make of it? " * 30,
]
DIALOG = {
    "messages": [
        {"role": "user", "content": "what is the word?"},
        {"role": "assistant", "content": "this is the word."},
    ]
}

Run = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts, dialogs and a tokenizer."""
    write_tokenizer(tmp_path / "tokenizer.model", demo_pieces())
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": TEXTS[1]}) + "\n\n")
    (tmp_path / "dialogs.jsonl").write_text((json.dumps(DIALOG) + "\n") * 20)
    return tmp_path


def train_small(run: Run, folder: Path, *more: object) -> Path:
    run("tokenize", folder / "a.txt", folder / "b.jsonl", "--tokenizer", folder / "tokenizer.model",
        "--out", folder / "data.bin")  # fmt: skip
    run("train", "--data", folder / "data.bin", "--tokenizer", folder / "tokenizer.model",
        "--out_dir", folder / "run", "--dim=32", "--n_layers=2", "--n_kv_heads=2", "--batch=4",
        "--seq_len=64", "--steps=6", "--warmup_steps=2", "--learning_rate=0.01", "--device=cpu",
        *more)  # fmt: skip
    return run_checkpoints(folder / "run")[-1]


def test_from_texts_to_a_score(folder: Path, run: Run) -> None:
    newest = train_small(run, folder, "--eval_data", folder / "data.bin", "--eval_batches=1")
    assert newest.name == "step_00000006"
    text = TEXTS[0] + "王様 — a word of three bytes"
    (folder / "score.txt").write_text(text, encoding="utf-8")
    printed = run("perplexity", folder / "score.txt", "--ckpt_dir", newest, "--window=48")

    # The same score from plain forwards, one for each window.
    llama = Llama.build(newest, max_seq_len=64)
    tokens = llama.tokenizer.encode(text, bos=False, eos=False)
    nats = 0.0
    for start in range(0, len(tokens), 48):
        window = [llama.tokenizer.bos_id, *tokens[start : start + 48]]
        logprobs = llama.model(torch.tensor([window[:-1]]))[0].double().log_softmax(-1)
        nats -= sum(logprobs[i, token].item() for i, token in enumerate(window[1:]))
    expected = {
        "nats a token": nats / len(tokens),
        "perplexity": math.exp(nats / len(tokens)),
        "bits a byte": nats / math.log(2) / len(text.encode()),
    }
    for name, value in expected.items():
        found = next(float(x.split()[-1]) for x in printed.splitlines() if x.startswith(name))
        assert found == pytest.approx(value, abs=6e-4 if name == "perplexity" else 1e-4), name
    assert score(llama, [text], 48).nats == pytest.approx(nats, rel=1e-5)


def test_training_learns_and_goes_on(folder: Path, run: Run) -> None:
    first = Llama.build(train_small(run, folder))
    text = (folder / "a.txt").read_text()
    assert first.model.params.context_length == 64
    again = run("train", "--data", folder / "data.bin", "--tokenizer", folder / "tokenizer.model",
                "--out_dir", folder / "run", "--dim=32", "--n_layers=2", "--n_kv_heads=2",
                "--batch=4", "--seq_len=64", "--steps=30", "--warmup_steps=2",
                "--learning_rate=0.01", "--device=cpu")  # fmt: skip
    assert "Continuing after step 6" in again
    later = Llama.build(run_checkpoints(folder / "run")[-1])
    assert score(later, [text]).nats < 0.8 * score(first, [text]).nats


def test_finetuning_teaches_the_answer(folder: Path, run: Run) -> None:
    base = train_small(run, folder)
    printed = run("finetune", "--ckpt_dir", base, "--data", folder / "dialogs.jsonl", "--out_dir",
                  folder / "tuned", "--batch=2", "--seq_len=64", "--steps=40", "--device=cpu",
                  "--learning_rate=0.02", "--eval_data", folder / "dialogs.jsonl")  # fmt: skip
    assert "Saved in" in printed
    tuned = Llama.build(run_checkpoints(folder / "tuned")[-1])
    whole = Llama.build(folder / "tuned")  # the folder of a run stands for its newest checkpoint
    weights = zip(tuned.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in weights)
    (answer,) = tuned.chat_completion([DIALOG["messages"][:1]], temperature=0)  # type: ignore[list-item]
    assert answer["generation"]["content"] == "this is the word."


def test_a_toml_file_and_flags(folder: Path) -> None:
    file = folder / "run.toml"
    file.write_text('data = "d"\ntokenizer = "t"\nout_dir = "o"\nsteps = 5\nlearning_rate = 1\n')
    config = PretrainConfig.read(file, {"steps": 7, "decay_steps": 3, "out_dir": 12})
    assert (config.steps, config.learning_rate, config.decay_steps) == (7, 1.0, 3)
    assert config.out_dir == "12"


def test_tokenize_writes_numbered_files(folder: Path, run: Run) -> None:
    tokenizer = Tokenizer(folder / "tokenizer.model")
    run("tokenize", folder / "a.txt", folder / "b.jsonl", "--tokenizer", folder / "tokenizer.model",
        "--out", folder / "d_{:02d}.bin", "--shard_tokens=500")  # fmt: skip
    names = sorted(folder.glob("d_*.bin"))
    tokens = [token for name in names for token in read_token_file(name).tolist()]
    assert tokens == [t for text in TEXTS for t in tokenizer.encode(text, bos=True, eos=True)]
    assert len(names) == math.ceil(len(tokens) / 500)


def test_vocab_then_tokenize(folder: Path, run: Run) -> None:
    run("vocab", folder / "a.txt", folder / "b.jsonl", "--ranks=300", "--out", folder / "my.model")
    assert Tokenizer(folder / "my.model").n_words == 556


def test_tensorboard_and_samples(folder: Path, run: Run) -> None:
    printed = run_with_samples(folder, run)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "log"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"loss/train", "loss/held out", "gradient norm", "learning rate"} <= set(scalars)
    assert [event.step for event in events.Scalars("loss/train")] == [1, 2, 3, 4, 5, 6]
    assert printed.count("the word of") == 2  # the sample texts after steps 3 and 6 begin with it


def run_with_samples(folder: Path, run: Run) -> str:
    run("tokenize", folder / "a.txt", "--tokenizer", folder / "tokenizer.model",
        "--out", folder / "data.bin")  # fmt: skip
    return run(
        "train", "--data", folder / "data.bin", "--tokenizer", folder / "tokenizer.model",
        "--out_dir", folder / "run", "--dim=32", "--n_layers=2", "--batch=2", "--seq_len=64",
        "--steps=6", "--warmup_steps=2", "--device=cpu", "--log_dir", folder / "log",
        "--sample_every=3", "--sample_prompt", "the word of", "--eval_data", folder / "data.bin",
        "--eval_every=3", "--eval_batches=1",
    )  # fmt: skip


# ---- mistakes ---------------------------------------------------------------------------------


def test_mistakes_in_training(folder: Path, fail: Run) -> None:
    where = ["--data", folder / "*.bin", "--tokenizer", folder / "tokenizer.model"]
    out = ["--out_dir", folder / "run", "--device=cpu"]
    assert "out_dir is missing" in fail("train", *where)
    assert "no file matches" in fail("train", *where, *out)
    assert "unknown option --speed" in fail("train", *where, *out, "--speed=3")
    many = fail("train", *where, *out, "--steps=many")
    assert many == "error: --steps is 'many': it must be a whole number"
    small = ["--ckpt_dir", make_base(folder), "--data", folder / "dialogs.jsonl", *out]
    assert "learning_rate is -1" in fail("finetune", *small, "--learning_rate=-1")
    short = [*small, "--steps=2", "--warmup_steps=10"]
    assert "warmup_steps 10 do not fit into 2 steps" in fail("finetune", *short)
    assert "dialogs.jsonl is not a TOML file of options; did you mean --data" in fail(
        "finetune", folder / "dialogs.jsonl", *out
    )
    assert "preset is 'llama-9'" in fail("train", *where, *out, "--preset=llama-9")
    assert "cannot read nowhere.toml" in fail("train", "nowhere.toml")
    (folder / "bad.toml").write_text("steps = = 3")
    assert "bad.toml is not TOML" in fail("train", folder / "bad.toml")
    assert "fsdp" in fail("finetune", "--data", folder / "dialogs.jsonl", *out, "--fsdp",
                          "--ckpt_dir", folder / "base")  # fmt: skip


def make_base(folder: Path) -> Path:
    """Write a random checkpoint, if there is none, and return its folder."""
    from make_checkpoint import make_checkpoint

    params = dict(dim=32, n_layers=1, n_heads=2, vocab_size=len(demo_pieces()) + 256,
                  multiple_of=32, norm_eps=1e-5)  # fmt: skip
    make_checkpoint(folder / "base", params, 1, torch.float32)
    write_tokenizer(folder / "base" / "tokenizer.model", demo_pieces())
    return folder / "base"


def test_mistakes_in_the_other_commands(folder: Path, fail: Run) -> None:
    base = make_base(folder)
    assert "cannot read" in fail("perplexity", folder / "none.txt", "--ckpt_dir", base)
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    assert "is not UTF-8" in fail("perplexity", folder / "latin.txt", "--ckpt_dir", base)
    (folder / "empty.txt").write_text("")
    assert "nothing to score" in fail("perplexity", folder / "empty.txt", "--ckpt_dir", base)
    window = fail("perplexity", folder / "a.txt", "--ckpt_dir", base, "--window=0")
    assert "window" in window or "max_seq_len" in window
    assert "no such folder" in fail("perplexity", folder / "a.txt", "--ckpt_dir", folder / "none")
    tokenizer = ["--tokenizer", folder / "tokenizer.model"]
    assert "FILES is missing" in fail("tokenize", *tokenizer, "--out", folder / "o.bin")
    assert "no text in 'body'" in fail(
        "tokenize", folder / "b.jsonl", *tokenizer, "--out", folder / "o.bin", "--field=body"
    )
    assert "is not a file name with at most one {}" in fail(
        "tokenize", folder / "a.txt", *tokenizer, "--out", folder / "{x}.bin"
    )
    assert "merges for" in fail("vocab", folder / "a.txt", "--ranks=9999", "--out", folder / "m")
    assert "ranks is 'many'" in fail(
        "vocab", folder / "a.txt", "--ranks=many", "--out", folder / "m"
    )
    assert "window is 'wide'" in fail("perplexity", folder / "a.txt", "--window=wide")
    assert "no such folder: 12" in fail("perplexity", folder / "a.txt", "--ckpt_dir=12")


def test_an_unknown_flag_stops_a_command_before_it_runs(folder: Path, run: Run, fail: Run) -> None:
    base = make_base(folder)
    words = ["convert", base, folder / "new", "--to", "hf"]
    assert "unknown option --froce, did you mean --force?" in fail(*words, "--froce")
    assert not (folder / "new").exists()
    run(*words, "--dtype=bfloat16", "--noforce")
    assert (folder / "new").is_dir()
    run(*words, "-f")  # fire accepts this short form


def test_over_long_dialogs_are_counted(folder: Path, run: Run) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 99}, *DIALOG["messages"][1:]]}
    with (folder / "dialogs.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    printed = run("finetune", "--ckpt_dir", make_base(folder), "--data", folder / "dialogs.jsonl",
                  "--out_dir", folder / "tuned", "--batch=1", "--seq_len=64", "--steps=1",
                  "--warmup_steps=0", "--device=cpu")  # fmt: skip
    assert "0 dialogs cut after an answer and 1 dropped, to fit into 64 tokens" in printed
    formatter = Tokenizer(folder / "tokenizer.model").chat_format()
    assert load_dialogs(folder / "dialogs.jsonl", formatter, 65).dropped == 1


@pytest.mark.parametrize(
    ("given", "warmup"),
    [({}, 10), ({"steps": 10}, 10), ({"steps": 6}, 3), ({"steps": 1}, 0),
     ({"steps": 12, "decay_steps": 6}, 3), ({"steps": 6, "warmup_steps": 2}, 2)],
)  # fmt: skip
def test_a_short_run_has_a_short_warm_up(
    given: dict[str, int], warmup: int, caplog: pytest.LogCaptureFixture
) -> None:
    flags = dict(out_dir="run", data="dialogs.jsonl", ckpt_dir="base", **given)
    with caplog.at_level("INFO", logger="llama"):
        assert FinetuneConfig.read(None, flags).warmup_steps == warmup
    is_shortened = warmup not in (10, given.get("warmup_steps"))
    assert bool(caplog.records) == is_shortened


def test_the_bundled_model_where_no_folder_is_named(run: Run) -> None:
    assert "feed-forward 704" in run("inspect")
    assert "all is well" in run("verify")
    assert "all is well" in run("doctor")


def test_verify_says_whether_there_was_something_to_compare_with(run: Run, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", PARAMS)
    unknown = "whether a byte was changed earlier is not known"
    first = run("verify", str(folder))
    assert unknown in first
    assert "SHA256SUMS is written: later runs compare with it" in first
    assert run("verify", str(folder)).splitlines()[1:] == ["all is well"]
    (folder / "SHA256SUMS").unlink()
    again = run("verify", str(folder), "--nomanifest")
    assert unknown in again
    assert "is written" not in again
