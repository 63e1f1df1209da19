"""verify describes a folder and names every problem."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.folders import make_model, write_meta

from llama.checkpoints import shards
from llama.checkpoints.convert import convert
from llama.checkpoints.verify import MANIFEST, kind_of, verify
from llama.errors import CheckpointError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_meta(tmp_path_factory.mktemp("verify") / "Tiny-Instruct", make_model(), 2)


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / pristine.name))


def edit(folder: Path, shard: int, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / shards.shard_name(shard)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_a_whole_folder(folder: Path) -> None:
    title, problems = verify(folder)
    assert problems == []
    total = sum(weight.numel() for weight in make_model().parameters())
    assert title == f"a Llama of {total:,} parameters, instruct, 2 shards, float32, 0.00 GB"
    lines = (folder / MANIFEST).read_text().splitlines()
    sums = {line.split("  ")[1]: line.split("  ")[0] for line in lines}
    files = ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    assert sorted(sums) == files
    assert all(
        hashlib.sha256((folder / name).read_bytes()).hexdigest() == sums[name] for name in files
    )
    assert verify(folder) == (title, [])


def test_a_hugging_face_folder(folder: Path, tmp_path: Path) -> None:
    """A chat template is written, but not for a folder that is named as a base model."""
    base = Path(shutil.copytree(folder, tmp_path / "Llama-3.2-1B"))
    for source, kind in ((folder, "instruct"), (base, "base")):
        title, problems = verify(convert(source, tmp_path / kind, "hf"))
        assert problems == []
        assert f", {kind}, Hugging Face's layout, float32" in title


def test_a_changed_file_is_noticed(folder: Path) -> None:
    verify(folder)
    edit(folder, 1, lambda state: state["layers.0.attention.wq.weight"][0].add_(1))
    assert verify(folder)[1] == [
        f"{folder}/consolidated.01.pth does not have the sha256 checksum in {MANIFEST}"
    ]
    (folder / "tokenizer.model").unlink()
    assert f"{folder}/{MANIFEST} lists tokenizer.model, which is missing" in verify(folder)[1]


def test_metas_checklist(folder: Path) -> None:
    names = ["params.json", "consolidated.00.pth", "consolidated.01.pth"]
    sums = [hashlib.md5((folder / name).read_bytes()).hexdigest() for name in names]
    checklist = folder / "checklist.chk"
    pairs = zip(sums, names, strict=True)
    checklist.write_text("".join(f"{digest}  {name}\n" for digest, name in pairs))
    assert verify(folder)[1] == []
    checklist.write_text(f"{sums[1]}  params.json\n")
    assert verify(folder)[1] == [
        f"{folder}/params.json does not have the md5 checksum in checklist.chk"
    ]
    checklist.write_text(f"{sums[0]}  ../params.json\n")
    with pytest.raises(CheckpointError, match=r"checklist\.chk, line 1 is no checksum"):
        verify(folder)


WQ = "layers.0.attention.wq.weight"
PROBLEMS: dict[str, tuple[int, Callable[[dict[str, torch.Tensor]], object], str]] = {
    "nan": (
        1,
        lambda s: s["layers.1.feed_forward.w2.weight"][3].fill_(float("nan")),
        "consolidated.01.pth: layers.1.feed_forward.w2.weight has numbers that are not finite",
    ),
    "unequal": (
        1,
        lambda s: s["layers.0.ffn_norm.weight"].add_(1),
        "consolidated.01.pth: layers.0.ffn_norm.weight should be equal in all shards",
    ),
    "dtype": (
        0,
        lambda s: s.update({WQ: s[WQ].half()}),
        f"consolidated.00.pth: {WQ} is torch.float16, but the output matrix is torch.float32",
    ),
    "missing": (1, lambda s: s.pop("norm.weight"), "consolidated.01.pth lacks norm.weight"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_is_wrong_is_named(folder: Path, case: str) -> None:
    shard, change, message = PROBLEMS[case]
    edit(folder, shard, change)
    _, problems = verify(folder)
    assert len(problems) == 1
    assert message in problems[0]
    assert not (folder / MANIFEST).exists()


def test_shards_in_the_wrong_order_do_not_pass_their_sums(folder: Path) -> None:
    verify(folder)
    one, two = (folder / shards.shard_name(i) for i in range(2))
    one.rename(folder / "swap")
    two.rename(one)
    (folder / "swap").rename(two)
    assert len(verify(folder)[1]) == 2


def test_published_models_by_name(tmp_path: Path) -> None:
    from llama.checkpoints.verify import title_of
    from llama.config import PRESETS

    def title(name: str, folder: str) -> str:
        shapes = PRESETS[name].whole_shapes()
        tensors = {
            n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shapes.items()
        }
        (tmp_path / folder).mkdir()
        opened = shards.Checkpoint(tmp_path / folder, PRESETS[name], [tensors])
        return title_of(opened)

    unknown = "instruct or base unknown, 1 shard, bfloat16, 0.00 GB"
    assert title("llama-3.1-8b", "a") == f"Llama 3.1 8B, {unknown}"
    assert title("llama-3.3-70b", "b") == f"Llama 3.1 or 3.3 70B, {unknown}"
    assert title("llama-2-7b", "llama-2-7b-chat").startswith("Llama 2 7B, instruct, 1 shard")
    assert title("llama-3-8b", "Meta-Llama-3-8B").startswith("Llama 3 8B, base, 1 shard")


def test_what_a_folder_says_about_chat(tmp_path: Path) -> None:
    def kind(name: str, **files: str) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file.replace("_json", ".json").replace("_jinja", ".jinja")).write_text(text)
        return kind_of(folder)

    assert kind("a", tokenizer_config_json='{"chat_template": "x"}') == "instruct"
    assert kind("b", tokenizer_config_json="{}") == "base"
    assert kind("c", tokenizer_config_json="{}", chat_template_jinja="x") == "instruct"
    assert kind("Llama-2-7b-chat-hf", tokenizer_config_json="{}") == "instruct"
    assert kind("Llama-3.2-1B/original") == "base"
    assert kind("Llama-3.1-8B-Instruct/original") == "instruct"
    assert kind("Llama-3.1-8B-tuned") == "instruct or base unknown"
