"""--adapter: every command that builds a model merges a LoRA adapter."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.adapters import write_adapter, write_base

from llama import Llama

TEXT = "the word is the word"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model and its adapter."""
    root = tmp_path_factory.mktemp("folders")
    base = write_base(root / "base")
    write_adapter(base, root / "adapter", target_modules="all-linear", lora_alpha=32)
    return base, root / "adapter"


@pytest.fixture
def run(folders: tuple[Path, Path], run: Callable[..., str]) -> Callable[..., str]:
    """Run a command with the base model and the adapter. Returns its standard output."""

    def run_with_both(*arguments: object) -> str:
        options: list[object] = ["--adapter", folders[1]]
        if arguments[0] not in ("doctor", "convert"):
            options += ["--ckpt_dir", folders[0]]
        return run(*arguments, *options)

    return run_with_both


def test_complete_and_batch(
    folders: tuple[Path, Path], run: Callable[..., str], tmp_path: Path
) -> None:
    base, adapter = folders
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": TEXT}) + "\n")
    options = ("--temperature=0", "--max_gen_len=6", "--mode=reference")
    run("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", *options)
    text = json.loads((tmp_path / "out.jsonl").read_text())["text"]
    texts = [
        Llama.build(base, adapter=chosen).text_completion([TEXT], temperature=0, max_gen_len=6)
        for chosen in (adapter, None)
    ]
    assert [prediction[0]["generation"] == text for prediction in texts] == [True, False]
    assert run("complete", TEXT, *options).strip() == text.strip()
    job = json.loads((tmp_path / "out.jsonl.job.json").read_text())
    assert job["adapter"] == str(adapter)


def test_lines_of_a_batch_name_their_adapters(
    folders: tuple[Path, Path], exit_code: Callable[..., int], tmp_path: Path
) -> None:
    base, adapter = folders
    lines = [{"prompt": TEXT}, {"prompt": TEXT, "adapter": "a"}, {"prompt": TEXT, "adapter": "b"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--ckpt_dir", base,
             "--adapters", f"a={adapter}", "--temperature=0", "--max_gen_len=6"]  # fmt: skip
    assert exit_code(*words) == 1  # because one line failed
    plain, with_adapter, failed = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    for result, chosen in ((plain, None), (with_adapter, adapter)):
        llama = Llama.build(base, adapter=chosen, mode="fast")
        options = dict(temperature=0, max_gen_len=6)
        expected = "".join(event.text for event in llama.stream(TEXT, **options))
        assert result["text"] == expected
    assert failed["error"] == "adapter is 'b': it must be one of a"


@pytest.mark.parametrize("adapters", ["a", "=b", "a=", "a=b,c"])
def test_malformed_adapters(adapters: str, fail: Callable[..., str]) -> None:
    error = f"adapters is '{adapters}': it must be NAME=FOLDER,NAME=FOLDER"
    assert error in fail("serve", "--adapters", adapters)


def test_perplexity(folders: tuple[Path, Path], run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    shown = run("perplexity", tmp_path / "a.txt")
    scores = Llama.build(folders[0], adapter=folders[1]).score([TEXT])[0][1:]
    expected = -sum(scores) / len(scores)
    assert float(re.findall(r"nats a token +(.+)", shown)[0]) == pytest.approx(expected, abs=1e-3)


def test_bench(run: Callable[..., str], tmp_path: Path) -> None:
    assert "decode" in run("bench", "--prefill=16", "--decode=4", "--rounds=1", "--dtype=float32")


def test_convert(folders: tuple[Path, Path], run: Callable[..., str], tmp_path: Path) -> None:
    run("convert", folders[0], tmp_path / "merged")
    merged, at_load = Llama.build(tmp_path / "merged"), Llama.build(folders[0], adapter=folders[1])
    assert merged.score([TEXT]) == at_load.score([TEXT])


def test_doctor(folders: tuple[Path, Path], run: Callable[..., str]) -> None:
    assert re.search(r"adapter +ok +changes 14 matrices", run("doctor", folders[0]))
    other = folders[0].rename(folders[0].with_name("other"))
    try:
        shown = run("doctor", other)
    finally:
        other.rename(folders[0])
    assert re.search(rf"adapter +warning +\S+ was trained on {folders[0]}, and is used on", shown)
