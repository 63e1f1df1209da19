"""A damaged or hostile folder gives an error of one line: no crash, no hang, no other model.

The cases run in a forked child; a failure names the case.
"""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.damaged import ONE_FILE, PARAMS, build, write_folder
from helpers.isolated import isolated
from safetensors.torch import load_file, save_file

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.inspect import describe
from llama.checkpoints.verify import CHECKLIST, verify
from llama.errors import CheckpointError, ConfigError, DataError, LlamaError


def test_what_ends_a_child_is_named() -> None:
    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def panic() -> None:
        raise BaseException("panic")

    def two_lines() -> None:
        error = LlamaError("")
        error.args = ("one\ntwo",)
        raise error

    assert isolated({"first": lambda: 1}) == {"first": ("ok", 1)}
    with pytest.raises(AssertionError, match="second ended the process: -9"):
        isolated({"first": lambda: 1, "second": killed})
    for wrong in (panic, two_lines):
        with pytest.raises(AssertionError, match="second: "):
            isolated({"first": lambda: 1, "second": wrong})


@pytest.mark.parametrize("layout", ["meta", "hf", "index"])
def test_links_to_files_are_followed(folders: Path, layout: str) -> None:
    """Hugging Face's cache consists of links: snapshots/ABC/config.json -> ../../blobs/123."""
    snapshot = folders / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folders / layout).rename(folders / "blobs")
    for path in (folders / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs", path.name))
    assert build(snapshot)[0] == build(folders / "blobs")[0]
    assert verify(snapshot)[1] == []


# ---- an index, shards, sums ---------------------------------------------------------------------


def test_a_place_that_cannot_be_written(folders: Path) -> None:
    (folders / "file").write_text("")
    for place in (folders / "file" / "new", folders / ("long" * 100)):
        with pytest.raises(LlamaError, match="cannot write"):
            convert(folders / "meta", place, "hf")


def test_a_name_that_no_folder_can_have() -> None:
    for name in ("long" * 100, "nul\0"):
        with pytest.raises(CheckpointError, match="no such folder"):
            Llama.build(name)
        with pytest.raises(ConfigError, match="no such folder"):
            describe(name)


def test_a_tensor_under_two_names_and_a_false_tie(folders: Path) -> None:
    tensors = load_file(folders / "hf" / ONE_FILE)
    config = json.loads((folders / "hf" / "config.json").read_text())
    (folders / "hf" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to the embedding, but"):
        Llama.build(folders / "hf")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folders / "hf" / ONE_FILE)
    assert Llama.build(folders / "hf").model.params.tied
    save_file(tensors | {"norm.weight": torch.ones(8)}, folders / "hf" / ONE_FILE)
    with pytest.raises(CheckpointError, match=r"norm\.weight twice, under two names"):
        Llama.build(folders / "hf")


def test_names_out_of_a_file_stay_on_one_line(folders: Path) -> None:
    path = folders / "meta" / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    for name in ("two\nlines", "\x1b[2J", "long" * 10**6, 7, (1, 2)):
        torch.save(state | {name: torch.ones(1)}, path)
        with pytest.raises(CheckpointError) as caught:
            Llama.build(folders / "meta")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 2100


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "two", PARAMS | {"n_kv_heads": 2}, n_shards=2)


def test_a_missing_shard(two_shards: Path) -> None:
    (two_shards / "consolidated.01.pth").unlink()
    with pytest.raises(
        CheckpointError, match=r"tok_embeddings\.weight \(320, 8\) instead of \(640"
    ):
        Llama.build(two_shards)


def test_a_shard_that_is_a_copy_of_another(two_shards: Path) -> None:
    shutil.copy(two_shards / "consolidated.00.pth", two_shards / "consolidated.01.pth")
    assert verify(two_shards)[1] == [
        f"{two_shards}/consolidated.01.pth is a copy of consolidated.00.pth"
    ]


def test_shards_in_the_wrong_order_do_not_pass_metas_checklist(two_shards: Path) -> None:
    first, second = (two_shards / f"consolidated.0{i}.pth" for i in range(2))
    sums = [f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.name}\n" for p in (first, second)]
    (two_shards / CHECKLIST).write_text("".join(sums))
    first.rename(two_shards / "aside")
    second.rename(first)
    (two_shards / "aside").rename(second)
    assert verify(two_shards)[1] == [
        f"{path} does not have the md5 checksum in checklist.chk" for path in (first, second)
    ]


def test_a_checklist_that_is_no_text(two_shards: Path) -> None:
    (two_shards / CHECKLIST).write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"checklist\.chk is not UTF-8 text"):
        verify(two_shards)
