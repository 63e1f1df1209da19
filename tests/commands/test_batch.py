"""Batch jobs: each line has one result, in order. Stops and the number of ranks change nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import context, run_ranks
from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer

from llama import Llama
from llama.__main__ import main
from llama.commands.batch_files import Part
from llama.commands.batch_run import Task, _progress_bar, _run_tasks, run_batch
from llama.errors import DataError, LlamaError
from llama.files import lock, unlock

OPTIONS = {"temperature": 0.8, "max_gen_len": 12}
DIALOG = [{"role": "user", "content": "what is the word?"}]


@pytest.fixture(scope="module")
def ckpt_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    pieces = demo_pieces()
    params = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=len(pieces) + 256,
                  multiple_of=32, norm_eps=1e-5)  # fmt: skip
    make_checkpoint(folder, params, 1, torch.float32, spoken=range(len(pieces)))
    write_tokenizer(folder / "tokenizer.model", pieces)
    return str(folder)


Batch = Callable[..., tuple[int, int]]


@pytest.fixture
def batch(ckpt_dir: str, tmp_path: Path) -> Batch:
    """A function that runs a job in this process, from objects or lines to out.jsonl."""

    def batch(lines: list[Any] | None = None, **more: Any) -> tuple[int, int]:
        if lines is not None:
            write_lines(tmp_path / "in.jsonl", lines)
        options = OPTIONS | more.pop("options", {})
        model = dict(ckpt_dir=ckpt_dir, max_seq_len=64, max_batch_size=4, device="cpu")
        files = str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")
        return run_batch(*files, options, **model | more)

    return batch


def write_lines(path: Path, lines: list[Any]) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))


def read_results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def some_lines(n: int) -> list[Any]:
    """Lines of all kinds: long and short prompts, dialogs, greedy, n samples, and wrong lines."""
    lines: list[Any] = []
    for i in range(n):
        lines.append({"prompt": f"the word {i}", "id": f"é{i}", "max_gen_len": 1 + i * 7 % 24})
    for i in range(0, n, 5):
        lines[i] = {"messages": DIALOG, "temperature": 0}
        lines[i + 1] = {"prompt": "they said", "n": 2}
        lines[i + 2] = "{not json"
    return lines


def test_one_result_a_line_in_order(batch: Batch, tmp_path: Path, ckpt_dir: str) -> None:
    lines = some_lines(20)
    assert batch(["", *lines, "  "]) == (20, 4)
    results = read_results(tmp_path)
    assert [result["index"] for result in results] == list(range(20))
    assert [result.get("id") for result in results] == [
        line.get("id") if isinstance(line, dict) else None for line in lines
    ]
    assert all("JSON" in result["error"] for result in results[2::5])

    llama = Llama.build(ckpt_dir, max_seq_len=64, max_batch_size=1, mode="fast", device="cpu")
    answer = llama.chat_completion([DIALOG], temperature=0, max_gen_len=12)[0]["generation"]
    assert results[5]["message"] == answer
    assert {"prompt_tokens", "finish_reason", "generated_tokens"} < results[5].keys()
    texts = [output["text"] for output in results[6]["outputs"]]
    assert len(texts) == 2
    assert texts[0] != texts[1]
    assert (
        results[6]["outputs"] != results[11]["outputs"]
    )  # another line with the same prompt has another seed


def test_files_as_other_tools_write_them(batch: Batch, tmp_path: Path) -> None:
    """A byte-order mark, Windows line ends, blank lines, and OpenAI's key for the id."""
    lines = [{"custom_id": f"q{i}", "prompt": "Once", "max_gen_len": 2} for i in range(3)]
    text = "\r\n".join([*map(json.dumps, lines), "", ""])
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert batch() == (3, 0)
    results = read_results(tmp_path)
    assert [result["custom_id"] for result in results] == ["q0", "q1", "q2"]
    assert all(result["text"] for result in results)


def test_a_final_message_is_continued(batch: Batch, tmp_path: Path, ckpt_dir: str) -> None:
    begun = [*DIALOG, {"role": "assistant", "content": "It is "}]
    line = {"messages": begun, "temperature": 0}
    batch([line | {"continue_final_message": True}, line, line | {"continue_final_message": 1}])
    right, without, wrong = read_results(tmp_path)
    llama = Llama.build(ckpt_dir, max_seq_len=64, max_batch_size=1, mode="fast", device="cpu")
    answers = llama.chat_completion(
        [begun], continue_final_message=True, temperature=0, max_gen_len=12
    )
    assert right["message"] == answers[0]["generation"]
    assert "the last message must be from user or ipython" in without["error"]
    assert wrong["error"] == '"continue_final_message" must be true or false, not 1'


def test_options_of_a_line(batch: Batch, tmp_path: Path, ckpt_dir: str) -> None:
    prompt = "this is the word"
    batch(
        [
            {"prompt": prompt, "seed": 7, "logprobs": 2, "prompt_logprobs": True},
            {"prompt": prompt, "seed": 7},
            {"prompt": prompt, "seed": None, "logit_bias": {"65": 1e6}, "max_gen_len": 3},
            {"prompt": prompt, "logit_bias": {"65": 1e6}, "stop": ["AA"]},
        ]
    )
    asked, plain, biased, stopped = read_results(tmp_path)
    llama = Llama.build(ckpt_dir, max_seq_len=64, max_batch_size=1, mode="fast", device="cpu")
    [expected] = llama.text_completion([prompt], seed=7, logprobs=True, **OPTIONS)
    assert asked["text"] == plain["text"] == expected["generation"]
    assert asked["tokens"] == expected["tokens"]
    assert asked["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)
    assert [len(top) for top in asked["top_logprobs"]] == [2] * asked["generated_tokens"]
    assert len(asked["prompt_logprobs"]) == asked["prompt_tokens"]
    assert "logprobs" not in plain
    assert (biased["text"], biased["finish_reason"]) == ("AAA", "length")
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("[1, 2]", "not an object with keys"),
        ("[" * 100_000, "not JSON"),
        ({}, 'either "prompt" or "messages"'),
        ({"prompt": "a", "messages": DIALOG}, 'either "prompt" or "messages"'),
        ({"prompt": ["a"]}, "\"prompt\" must be a text, not ['a']"),
        ({"messages": 3}, '"messages" must be a list, not 3'),
        ({"messages": []}, "the dialog is empty"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "role 'robot'"),
        ({"prompt": "a", "speed": 3}, "unknown option speed"),
        ({"prompt": "a", "logits_processor": 3}, "logits_processor is 3"),
        ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
        ({"prompt": "a", "logit_bias": {"a": 3}}, "its keys must be token ids"),
        ({"prompt": "a", "logit_bias": {"99999": 3}}, "token id 99999"),
        ({"prompt": "a", "n": 0}, "n is 0"),
        ({"prompt": "the word " * 50}, "max_seq_len is 64"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own(
    line: Any, error: str, batch: Batch, tmp_path: Path
) -> None:
    assert batch([line, {"prompt": "the word"}]) == (2, 1)
    bad, good = read_results(tmp_path)
    assert bad.keys() == {"index", "error"}
    assert error in bad["error"]
    assert good["generated_tokens"] > 0


def test_text_that_utf8_cannot_write(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(
        b'{"prompt": "a\\ud800", "id": "\\ud800"}\n{"prompt": "\xff"}'
    )
    assert batch() == (2, 1)
    half, latin = read_results(tmp_path)
    assert half["id"] == "\ud800"
    assert "utf-8" in latin["error"]


def test_the_window_bounds_what_is_read_ahead(tmp_path: Path, ckpt_dir: str) -> None:
    llama = Llama.build(ckpt_dir, max_seq_len=64, max_batch_size=2, mode="fast", device="cpu")
    out = tmp_path / "out.jsonl"

    def tasks() -> Iterator[Task]:
        for i in range(30):
            assert i - out.read_text().count("\n") < 5
            yield Task(llama, i, json.dumps({"prompt": f"word {i}"}).encode(), OPTIONS, 1)

    with _progress_bar(bytearray(30), 0, 1) as bar:
        assert _run_tasks(llama, tasks(), Part(out, None), 5, bar) == 0
    assert [result["index"] for result in read_results(tmp_path)] == list(range(30))


# ---- going on after a stop --------------------------------------------------------------------


def test_whatever_is_there_is_neither_lost_nor_repeated(batch: Batch, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert batch(some_lines(15)) == (15, 3)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    for n_bytes in (0, 5, len(lines[0]), len(lines[0]) + 1, 900, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:n_bytes])
        assert batch() == (15, 3)
        assert out.read_bytes() == whole, n_bytes

    # Two groups have left these parts, and now one group continues.
    out.unlink()
    parts = [tmp_path / f"out.jsonl.part-{group}-of-2" for group in range(2)]
    parts[0].write_bytes(b"".join(lines[:11:2]))
    parts[1].write_bytes(lines[1] + lines[3][:20])
    assert batch() == (15, 3)
    assert out.read_bytes() == whole
    assert not any(part.exists() for part in parts)

    # A run was killed after it had merged OUT, and before it had removed all parts.
    parts[0].write_bytes(b"".join(lines[::2]))
    assert batch() == (15, 3)
    assert out.read_bytes() == whole
    assert not parts[0].exists()


def test_killed_at_several_moments(batch: Batch, tmp_path: Path, ckpt_dir: str) -> None:
    batch(some_lines(60))
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    out.unlink()
    for n_lines in (1, 20, 41):
        process = context.Process(target=batch_on_rank, args=(tmp_path, ckpt_dir, 1))
        process.start()
        while not out.exists() or out.read_bytes().count(b"\n") < n_lines:
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert whole.startswith(out.read_bytes())
    command = [sys.executable, "-m", "llama", "batch", str(tmp_path / "in.jsonl"), str(out),
               "--ckpt_dir", ckpt_dir, "--max_seq_len=64", "--max_batch_size=4", "--device=cpu",
               "--temperature=0.8", "--max_gen_len=12"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert out.read_bytes() == whole
    assert done.returncode == 1
    assert done.stdout == f"60 lines in {out}, 12 of them failed\n"
    assert "line/s" in done.stderr
    assert "tokens/s" in done.stderr


def test_another_job_is_refused(batch: Batch, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    batch([{"prompt": "a"}, {"prompt": "b"}])
    before = out.read_bytes()
    with pytest.raises(DataError, match=r"started with max_gen_len 12, not 3: .*--force"):
        batch(options={"max_gen_len": 3})
    with pytest.raises(DataError, match="started with seed 1, not 2"):
        batch(seed=2)
    with pytest.raises(DataError, match="started with input 'sha256:"):
        batch([{"prompt": "a"}, {"prompt": "c"}])
    assert out.read_bytes() == before
    batch(force=True)
    assert out.read_bytes() != before

    (tmp_path / "out.jsonl.job.json").unlink()
    with pytest.raises(DataError, match=r"exists, but out\.jsonl\.job\.json does not"):
        batch()
    out.unlink()
    batch()
    out.write_text('{"index": 1}\n{"index": 0}\n')
    with pytest.raises(DataError, match="line 2 is no result of this job"):
        batch()


def test_two_runs_at_a_time_are_refused(batch: Batch, tmp_path: Path) -> None:
    batch([{"prompt": "a"}])
    held = lock(tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="another run is writing"):
        batch()
    unlock(held)
    assert batch() == (1, 0)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in.jsonl", "out.jsonl", "out.jsonl.job.json"}  # no lock is left


def test_mistakes_end_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> str:
        command = ["llama", "batch", *map(str, arguments), "--ckpt_dir", "nowhere"]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code == 2
        return capsys.readouterr().err

    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert fail(file, out) == f"error: cannot read {file}: No such file or directory\n"
    write_lines(file, [{"prompt": "a"}])
    missing = tmp_path / "missing" / "out.jsonl"
    assert "no such checkpoint folder" in fail(file, missing)
    assert "it is the input" in fail(file, file, "--force")
    assert "temperature is -1" in fail(file, out, "--temperature=-1")
    assert "unknown option --speed" in fail(file, out, "--speed=3")
    assert "no such checkpoint folder" in fail(file, out)
    assert file.read_text() == '{"prompt": "a"}\n'
    out.unlink()
    os.mkfifo(out)
    assert fail(file, out) == fail(out, file) == f"error: {out} is not a regular file\n"


# ---- more ranks -------------------------------------------------------------------------------


def batch_on_rank(folder: Path, ckpt_dir: str, mp_size: int) -> tuple[int, int] | str:
    try:
        return run_batch(
            str(folder / "in.jsonl"), str(folder / "out.jsonl"), OPTIONS, ckpt_dir=ckpt_dir,
            max_seq_len=64, max_batch_size=4, model_parallel_size=mp_size, device="cpu",
        )  # fmt: skip
    except LlamaError as error:
        return str(error)


@pytest.mark.parametrize(("n_ranks", "mp_size"), [(2, 2), (2, 1), (4, 2)])
def test_any_number_of_ranks_gives_the_same(
    n_ranks: int, mp_size: int, batch: Batch, tmp_path: Path, ckpt_dir: str
) -> None:
    batch(some_lines(25))
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    out.write_bytes(whole[:1500])  # several ranks continue a job of one rank
    results = run_ranks(n_ranks, tmp_path, batch_on_rank, tmp_path, ckpt_dir, mp_size)
    assert results == [(25, 5)] * n_ranks
    assert out.read_bytes() == whole
    assert not list(tmp_path.glob("out.jsonl.part*"))


def test_a_group_that_cannot_write_stops_all(tmp_path: Path, ckpt_dir: str) -> None:
    write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    (tmp_path / "out.jsonl.part-1-of-2").symlink_to(tmp_path / "missing" / "file")
    first, second = run_ranks(2, tmp_path, batch_on_rank, tmp_path, ckpt_dir, 1)
    assert first == f"rank 1: {second}"
    assert "cannot write" in second


def lose_a_group(folder: Path, ckpt_dir: str) -> Any:
    if os.environ["RANK"] == "1":
        Part.write = lambda *_: os._exit(0)  # type: ignore[method-assign]
    said = batch_on_rank(folder, ckpt_dir, 1)
    (folder / "said").write_text(str(said))
    os._exit(0)


def test_a_group_that_dies_is_noticed_and_its_lines_are_done_later(
    batch: Batch, tmp_path: Path, ckpt_dir: str
) -> None:
    batch(some_lines(15))
    out = tmp_path / "out.jsonl"
    whole = out.read_bytes()
    out.unlink()
    with pytest.raises(FileNotFoundError):  # no rank returns a result
        run_ranks(2, tmp_path, lose_a_group, tmp_path, ckpt_dir)
    assert (tmp_path / "said").read_text() == "rank 1 ended before the others"
    assert not out.exists()
    assert batch() == (15, 3)
    assert out.read_bytes() == whole
