"""Every command and two ranks on an imitation of Windows; see helpers/as_on_windows.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ranks import free_port

from llama.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
IMITATION = str(ROOT / "tests" / "helpers" / "as_on_windows.py")
TEXT = "Once upon a time there was a fox, and the sea was deep, and the hill was high. \u65e5"
RUN = "--checkpoint_every 1 --keep 1 --batch 1 --device cpu".split()
SHAPE = "--dim 32 --n_layers 1 --seq_len 16".split()


def on_windows(
    *commands: list[str], ranks: int = 1, typed: str = ""
) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    launcher += ["--master_port", str(free_port())]
    command = [*(launcher if ranks > 1 else []), IMITATION, json.dumps(commands)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, input=typed, timeout=300,
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tales = [json.dumps({"text": f"{TEXT} {i}"}) for i in range(30)]
    (tmp_path / "tales.jsonl").write_text("\r\n".join(tales), encoding="utf-8-sig", newline="")
    dialog = [{"role": "user", "content": "Hi \u65e5"}, {"role": "assistant", "content": "Ho"}]
    (tmp_path / "dialogs.jsonl").write_text(json.dumps({"messages": dialog}), encoding="utf-8")
    lines = [{"prompt": TEXT}, {"messages": dialog[:1]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    task = {
        "task": "win", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "tales.jsonl")}, "cache_dir": str(tmp_path / "c"),
        },
        "output_type": "multiple_choice", "doc_to_text": "text", "doc_to_choice": ["a", "b"],
        "doc_to_target": 0, "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "win.yaml").write_text(json.dumps(task))  # YAML knows JSON
    return tmp_path


def test_every_command(folder: Path) -> None:
    def at(name: str) -> str:
        return str(folder / name)

    data = ["--data", at("tales_*.bin"), "--tokenizer", at("tokenizer.model")]
    train = ["train", *data, "--out_dir", at("run"), *SHAPE, *RUN]
    finetune = ["finetune", "--data", at("dialogs.jsonl"), "--out_dir", at("tuned"), *RUN]
    batch = ["batch", at("in.jsonl"), at("out.jsonl"), "--max_gen_len"]
    commands = [
        ["doctor"], ["inspect"], ["verify"], ["tokens", "Once upon"],
        ["complete", TEXT, "--max_gen_len", "4"],
        [*batch, "4"], [*batch, "5", "--force"],
        ["convert", "llama/bundled", at("hf"), "--to", "hf"],
        ["convert", at("hf"), at("meta"), "--mp", "2"],
        ["convert", "llama/bundled", at("meta"), "--force"],
        ["convert", "llama/bundled", at("int8"), "--quantize", "int8"],
        ["verify", at("hf")], ["verify", at("hf")],  # the second reads what the first wrote
        ["complete", "Once", "--ckpt_dir", at("int8"), "--max_gen_len", "4"],
        ["vocab", at("tales.jsonl"), "--ranks", "280", "--out", at("tokenizer.model")],
        ["tokenize", at("tales.jsonl"), "--tokenizer", at("tokenizer.model"),
         "--out", at("tales_{:04d}.bin")],
        [*train, "--steps", "2"], [*train, "--steps", "4"],  # the second deletes what it began with
        [*finetune, "--steps", "1"], [*finetune, "--steps", "2"],
        ["perplexity", at("tales.jsonl"), "--ckpt_dir", at("run")],
        ["evaluate", "win", "--include_path", at(""), "--device", "cpu"],
        ["explain", "Once upon", "--device", "cpu", "--out", at("explain.html")],
        ["parity", "--max_gen_len", "4", "--device", "cpu", "--out", at("parity.json")],
        ["bench", "--prefill", "8", "--decode", "4", "--rounds", "1", "--device", "cpu"],
        ["example_text_completion.py", "--max_gen_len", "4"],
        ["example_chat_completion.py", "--max_gen_len", "4"],
        ["chat", "--max_gen_len", "4"],
    ]  # fmt: skip
    # `serve` runs until a signal.
    assert {words[0] for words in commands} >= COMMANDS.keys() - {"serve"}
    done = on_windows(*commands, typed=f"Hello\n/save {at('chat.jsonl')}\n/quit\n")
    assert "all is well" in done.stdout
    assert json.loads((folder / "chat.jsonl").read_bytes())["messages"][0]["content"] == "Hello"
    results = (folder / "out.jsonl").read_bytes().splitlines()
    assert all("error" not in json.loads(line) for line in results)
    assert len(results) == 2
    assert [path.name for path in (folder / "run").glob("step_*")] == ["step_00000004"]
    written = [path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", "")]
    texts = [path for path in written if path.is_file() and path.name != "tales.jsonl"]
    assert not [path for path in texts if b"\r\n" in path.read_bytes()]


def test_two_ranks_exchange_without_shared_memory(folder: Path) -> None:
    command = ["complete", "Once upon a time", "--max_gen_len", "12", "--temperature", "0"]
    batch = ["batch", str(folder / "in.jsonl"), str(folder / "out.jsonl"), "--max_gen_len", "4"]
    alone, both = (on_windows(command, batch, ranks=n) for n in (1, 2))
    assert alone.stdout.splitlines()[0] == both.stdout.splitlines()[0] != ""


def test_output_in_a_pipe_is_utf_8() -> None:
    code = "from llama.errors import one_line\nwith one_line(): print('\u65e5')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == "\u65e5"
