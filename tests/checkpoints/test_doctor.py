"""doctor reports what will not run, and build refuses it too."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import VOCAB, make_model, make_setup, write_meta
from helpers.ranks import run_ranks

from llama import Llama, Tokenizer
from llama.__main__ import main
from llama.checkpoints import doctor
from llama.checkpoints.convert import convert
from llama.checkpoints.doctor import PROBLEM, WARNING
from llama.config import PRESETS, ModelArgs
from llama.errors import ConfigError
from llama.memory import available_memory, size

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two float32 shards."""
    return write_meta(tmp_path_factory.mktemp("doctor") / "Tiny", make_model(n_kv_heads=4), 2)


# ---- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_setup_counts_what_building_takes(folder: Path, dtype: str | None) -> None:
    llama = Llama.build(folder, max_seq_len=128, dtype=dtype)
    setup = make_setup(folder, dtype=dtype)
    assert sum(setup.weight_bytes()) == sum(w.nbytes for w in llama.model.parameters())
    cache = llama.model.make_cache(4, 128)
    assert setup.cache_bytes == cache.k.nbytes + cache.v.nbytes
    norms = sum(w.nbytes for w in llama.model.parameters() if w.dim() == 1)
    # One rank joins two shards into copies. Weights that are not split stay mapped.
    assert setup.weight_bytes()[1] == (norms if dtype is None else 0)


def test_weights_are_mapped_where_shards_are_ranks(folder: Path, tmp_path: Path) -> None:
    own, mapped = make_setup(folder, mp=2).weight_bytes()
    assert own == 0
    assert mapped > 0
    one = make_setup(convert(folder, tmp_path / "one", "meta"))
    assert one.weight_bytes()[0] == 0
    theirs = make_setup(convert(folder, tmp_path / "hf", "hf"))
    assert theirs.weight_bytes()[0] > 0  # at least Q and K, whose rows are reordered
    on_gpu = replace(one, device=torch.device("cuda", 0))
    assert on_gpu.weight_bytes() == one.weight_bytes()[::-1]


def test_memory_by_the_byte(folder: Path) -> None:
    setup = make_setup(folder, mp=2)  # only the cache is in private memory
    needed = 2 * setup.cache_bytes
    mapped = 2 * setup.weight_bytes()[1]
    assert setup.needed_bytes() == needed
    assert doctor.check_memory(setup, needed + mapped).level == doctor.OK
    slow = doctor.check_memory(setup, needed + mapped - 1)
    assert slow.level == WARNING
    assert "fits only from disk, slowly" in slow.text
    assert doctor.check_memory(setup, needed).level == WARNING
    message = (
        rf"{size(setup.cache_bytes)} of KV cache for each of 2 ranks, but .* free on cpu; "
        r"each of these alone would fit: max_seq_len 127, max_batch_size 3$"
    )
    with pytest.raises(ConfigError, match=message):
        doctor.check_memory(setup, needed - 1)


def test_what_is_advised_fits(folder: Path) -> None:
    setup = make_setup(folder)
    own = setup.weight_bytes()[0]
    with pytest.raises(
        ConfigError, match="each of these alone would fit: max_seq_len 32, max_batch_size 1, "
    ) as error:
        doctor.check_memory(setup, own + setup.cache_bytes / 4)
    # Two ranks map the two shards and copy nothing.
    assert str(error.value).endswith("dtype bfloat16, 2 ranks")
    assert doctor.check_memory(make_setup(folder, rows=1), own + setup.cache_bytes / 4)
    with pytest.raises(ConfigError, match="no smaller KV cache would fit"):
        doctor.check_memory(setup, 1000)


def test_prompts_are_an_estimate_and_no_error(folder: Path) -> None:
    setup = make_setup(folder)
    assert setup.prompt_bytes() == 8 * (4 * 16 * 128 * 128)  # attention scores and their softmax
    assert doctor.check_prompts(setup, setup.needed_bytes()).level == WARNING
    enough = setup.needed_bytes() + setup.prompt_bytes()
    assert doctor.check_prompts(setup, enough).level == doctor.OK


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:  800 kB\nHugePages_Total:  0\n"}


def test_available_memory_of_control_groups(tmp_path: Path) -> None:
    def available(root: str, files: dict[str, str]) -> float:
        return available_memory(CPU, write(tmp_path / root, MEMINFO | files))

    assert available("none", {}) == 800 * 1024
    v2 = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "5000\n",
        "sys/fs/cgroup/a/memory.current": "3000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 2000\ninactive_file 300\nactive_file 200\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    }
    assert available("v2", v2) == 2500
    v1 = {
        "proc/self/cgroup": "9:cpu:/x\n4:memory:/not/to/be/seen\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "6000",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 10\ntotal_active_file 1\n",
    }
    assert available("v1", v1) == 1011
    v1["sys/fs/cgroup/memory/memory.limit_in_bytes"] = str(2**63 - 4096)
    assert available("unlimited", v1) == 800 * 1024
    assert available("outside", {"proc/self/cgroup": "0::/../..\n"}) == 800 * 1024


def test_this_machine_says_what_is_free() -> None:
    assert 0 < available_memory(CPU) < 2**60


def error_of(folder: Path, rows: int) -> str:
    with pytest.raises(ConfigError) as error:
        Llama.build(folder, max_batch_size=rows)
    return str(error.value)


def test_build_refuses_a_cache_without_memory(folder: Path, tmp_path: Path) -> None:
    assert "not enough memory: " in error_of(folder, 10**9)
    for error in run_ranks(2, tmp_path, error_of, folder, 10**9):
        assert "of KV cache for each of 2 ranks, but" in error
        assert (
            "each of these alone would fit: max_seq_len" in error
            or "each of these alone would fit: max_batch_size" in error
        )


# ---- tokenizer, model, device -----------------------------------------------------------------


def test_the_tokenizer_of_another_model(folder: Path, llama3_tokenizer_path: Path) -> None:
    tiny, real = Tokenizer(folder / "tokenizer.model"), Tokenizer(llama3_tokenizer_path)
    found = doctor.check_tokenizer(PRESETS["llama-3.1-8b"], real)
    assert (found.level, found.text) == (
        doctor.OK, "Llama 3's kind, 128,256 tokens, as many as the model's"
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match="of Llama 3's kind with 640 tokens, and is not that of llama-2"
    ):
        doctor.check_tokenizer(PRESETS["llama-2-7b"], tiny)
    with pytest.raises(ConfigError, match=r"vocab_size 640 is smaller than .* 128256 tokens"):
        doctor.check_tokenizer(ModelArgs(vocab_size=VOCAB), real)
    assert doctor.check_tokenizer(ModelArgs(vocab_size=VOCAB + 8), tiny).level == WARNING


def test_llama_2s_tokenizer_is_not_llama_3s(llama2_tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(llama2_tokenizer_path)
    assert doctor.check_tokenizer(PRESETS["llama-2-7b"], tokenizer).level == doctor.OK
    with pytest.raises(
        ConfigError, match="of Llama 2's kind with 32000 tokens, and is not that of"
    ):
        doctor.check_tokenizer(PRESETS["llama-3-8b"], tokenizer)


def test_a_base_model_is_warned_of_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = shutil.copytree(folder, tmp_path / "Meta-Llama-3-8B")
    dialog: Any = [{"role": "user", "content": "the word?"}]
    for place, times in ((base, 1), (folder, 0)):
        caplog.clear()
        llama = Llama.build(place)
        for _ in range(2):
            llama.chat_completion([dialog], max_gen_len=1)
        assert caplog.text.count("base model: complete text, do not chat") == times


# ---- the command ------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["llama", "doctor", *map(str, arguments), "--device=cpu"])
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_the_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, folder, "--mp=2", "--dtype=float32") == 0
    lines = capsys.readouterr().out.splitlines()
    abouts = [
        "model", "chat", "tokenizer", "sampling", "memory", "prompts", "device", "versions",
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines[:-1]] == [[about, "ok"] for about in abouts]
    assert "float32, 2 ranks over gloo" in lines[6]
    assert lines[-1] == "all is well"


def test_problems_and_the_exit_code(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = Path(shutil.copytree(folder, tmp_path / "sub" / "bad"))
    (bad / "tokenizer.model").unlink()
    assert run(monkeypatch, bad, "--max_batch_size=1000000000") == 1
    printed = capsys.readouterr().out
    assert f"tokenizer  {PROBLEM}  {bad} has no tokenizer.model" in printed
    assert f"memory     {PROBLEM}  not enough memory: " in printed
    assert printed.endswith("2 problem(s)\n")
    assert run(monkeypatch, bad, "--mp=3") == 1
    assert f"set-up     {PROBLEM}  this model cannot be split over 3" in capsys.readouterr().out
    assert run(monkeypatch, tmp_path / "none") == 2
    assert "error: no such folder" in capsys.readouterr().err


def test_a_draft_model_beside_it(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, folder, f"--draft={folder}", "--mode=fast") == 0
    assert "draft      ok       " in capsys.readouterr().out
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    (other / "tokenizer.model").unlink()
    assert run(monkeypatch, folder, f"--draft={other}", "--mode=fast") == 1
    assert f"draft      {PROBLEM}  draft model {other}: " in capsys.readouterr().out
    needed = make_setup(folder, mode="fast").needed_bytes()
    monkeypatch.setattr(doctor, "available_memory", lambda device: needed + 1.0)
    assert run(monkeypatch, folder, f"--draft={folder}", "--mode=fast", "--max_seq_len=128") == 1
    assert f"draft      {PROBLEM}  draft model {folder}: not enough" in capsys.readouterr().out
    assert run(monkeypatch, folder, f"--draft={folder}") == 2
    assert "are for mode fast, but mode is reference" in capsys.readouterr().err
