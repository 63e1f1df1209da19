"""Tensors that are missing, added, present twice, or of another shape or dtype: one error."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.damaged import INDEX, ONE_FILE, WIDER, build, write_folder
from helpers.fault_plan import Trials
from helpers.isolated import Cases, isolated
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.load import MAX_NAMES
from llama.fast.mode import Mode

State = dict[str, Tensor]
Pick = Callable[[str], bool]  # whether the tensor of this name is changed


def replace(make: Callable[[Tensor], Tensor], pick: Pick) -> Callable[[State], None]:
    """A change of the tensors whose names `pick` accepts."""

    def change(state: State) -> None:
        for name in filter(pick, list(state)):
            state[name] = make(state[name])

    return change


def is_wo(name: str) -> bool:
    """Whether this is one matrix, or its scale in a quantized folder."""
    return name.endswith(("wo.weight", "o_proj.weight", "wo.weight.scale"))


def is_matrix(name: str) -> bool:
    return "norm" not in name


def drop(state: State, pick: Pick) -> None:
    for name in filter(pick, list(state)):
        del state[name]


# Each change, and words of the message.
CHANGES: dict[str, tuple[Callable[[State], object], str]] = {
    "one missing": (lambda state: drop(state, is_wo), "lacks "),
    "all missing but one": (
        lambda state: drop(state, lambda name: "embed" not in name), " "),
    "one added": (lambda state: state.update(bias=torch.ones(3)), "unexpected tensors: bias"),
    "fifty added": (
        lambda state: state.update({f"extra.{i}": torch.ones(3) for i in range(50)}),
        "unexpected tensors: extra.0, ",
    ),
    "one more layer": (
        lambda state: state.update(
            {n.replace("layers.0", "layers.1"): t.clone() for n, t in state.items()}
        ),
        "unexpected tensors: ",
    ),
    "one column less": (
        replace(lambda t: t[..., :-1].contiguous(), is_wo), " instead of "),
    "one row more": (replace(lambda t: torch.cat([t, t[:1]]), is_wo), " instead of "),
    "one dimension more": (replace(lambda t: t[None], is_wo), " instead of "),
    "one column": (replace(lambda t: t.reshape(-1, 1), is_wo), " instead of "),
    "a single number": (replace(lambda t: t.flatten()[0].clone(), is_wo), " instead of "),
    "empty": (replace(lambda t: t[:0].contiguous(), is_wo), " instead of "),
    "every matrix smaller": (
        replace(lambda t: t[:-1].contiguous(), is_matrix), " instead of "),
    "int8": (replace(lambda t: t.to(torch.int8), is_wo), "torch.int8"),
    "bool": (replace(lambda t: t.bool(), is_wo), "torch.bool"),
    "float8": (replace(lambda t: t.to(torch.float8_e4m3fn), is_wo), "torch.float8_e4m3fn"),
    "complex": (replace(lambda t: t.to(torch.complex64), is_wo), "torch.complex64"),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as folders of one shard, of two shards and of Hugging Face's layout, and as GGUF
    file."""
    root = tmp_path_factory.mktemp("written")
    one = write_folder(root / "one", WIDER)
    convert(one, root / "two", mp=2)
    convert(one, root / "hf", "hf")
    convert(one, root / "int8", quantize="int8")
    (root / "gguf").mkdir()
    convert(one, root / "gguf" / "model.gguf", "gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama.checkpoints.convert.HF_FILE_BYTES", 100_000)
        convert(one, root / "index", "hf")
    return root


FILES = {
    "one": "consolidated.00.pth",
    "two": "consolidated.01.pth",
    "hf": ONE_FILE,
    "int8": "consolidated.00.safetensors",
}


def changed(path: Path, change: Callable[[State], object]) -> object:
    """Open the folder while the tensors of one file are changed."""
    original = path.read_bytes()
    is_zip = path.suffix == ".pth"
    state = torch.load(path, weights_only=True) if is_zip else load_file(path)
    change(state)
    torch.save(state, path) if is_zip else save_file(state, path)
    try:
        mode: Mode = "fast" if path.parent.name == "int8" else "reference"
        return Llama.build(path.parent, device="cpu", mode=mode).model.params.dim
    finally:
        path.write_bytes(original)


@pytest.mark.fault(4)
@pytest.mark.parametrize("layout", FILES)
def test_wrong_tensors(written: Path, layout: str, trials: Trials) -> None:
    path = written / layout / FILES[layout]
    changed(path, lambda state: None)
    cases: Cases = {name: partial(changed, path, CHANGES[name][0]) for name in CHANGES}
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(f"{layout}: {name}"):
            assert kind == "error"
            assert found[0] in ("CheckpointError", "ConfigError")
            assert CHANGES[name][1] in found[1]
            assert str(path.parent) in found[1]
            assert found[1].count(".weight") + found[1].count("extra.") <= MAX_NAMES


# ---- tensors that are there twice ---------------------------------------------------------------


def twice_in_a_header(folder: Path) -> None:
    """The header names a tensor a second time, with the numbers of another one."""
    path = folder / ONE_FILE
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    other = json.dumps(json.loads(data[8:end])["model.layers.0.self_attn.o_proj.weight"])
    header = f'{{"model.layers.0.self_attn.q_proj.weight":{other},'.encode() + data[9:end]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def twice_in_an_index(folder: Path) -> None:
    """The index places a tensor in two files."""
    text = (folder / INDEX).read_text()
    name = "model.norm.weight"
    twice = text.replace(f'"{name}"', f'"{name}": "model-00001-of-00003.safetensors", "{name}"')
    assert twice != text
    (folder / INDEX).write_text(twice)


def under_two_names(folder: Path) -> None:
    """A tensor has Hugging Face's name and Meta's."""
    state = load_file(folder / ONE_FILE)
    save_file(state | {"norm.weight": state["model.norm.weight"].clone()}, folder / ONE_FILE)


def twice_in_a_gguf_file(folder: Path) -> None:
    """Two tensors of the same shape get the same name, which is as long as the other."""
    path = folder / "model.gguf"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", 1))


def in_two_parts(folder: Path) -> None:
    """Both parts of a model have all tensors."""
    path = folder / "model.gguf"
    for i in (1, 2):
        shutil.copy(path, folder / f"model-{i:05d}-of-00002.gguf")
    path.unlink()


TWICE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "in a header": ("hf", twice_in_a_header),
    "in an index": ("index", twice_in_an_index),
    "under two names": ("hf", under_two_names),
    "in a GGUF file": ("gguf", twice_in_a_gguf_file),
    "in two parts": ("gguf", in_two_parts),
}


@pytest.mark.fault(4)
def test_a_tensor_that_is_there_twice(written: Path, tmp_path: Path, trials: Trials) -> None:
    def opened(layout: str, name: str, spoil: Callable[[Path], None]) -> object:
        folder = Path(shutil.copytree(written / layout, tmp_path / name))
        spoil(folder)
        return build(folder)[0]

    cases: Cases = {name: partial(opened, case[0], name, case[1]) for name, case in TWICE.items()}
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            assert kind == "error"
            assert found[0] in ("CheckpointError", "ConfigError")
