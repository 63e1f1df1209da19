"""Weight files that end too early: one error, soon, and without reading the file into memory."""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.damaged import PARAMS, write_folder
from helpers.fault_plan import Trials
from helpers.isolated import isolated
from safetensors.torch import load_file

from llama import Llama
from llama.checkpoints.convert import convert
from llama.errors import LlamaError
from llama.fast.mode import Mode
from llama.memory import used_memory

# About 100 MB in bfloat16, more than an error may add to the memory.
LARGE = PARAMS | dict(dim=1024, n_layers=4, n_heads=8, n_kv_heads=8, multiple_of=64)
SECONDS = 2
MEMORY = 64 << 20  # bytes


def write_bin(source: Path, folder: Path, is_zip: bool = True) -> Path:
    """The folder of Hugging Face's layout with its `.safetensors` files as `.bin` files."""
    convert(source, folder, "hf")
    for path in folder.glob("*.safetensors"):
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        state = load_file(path)
        torch.save(state, folder / name, _use_new_zipfile_serialization=is_zip)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        index.unlink()
        (folder / "pytorch_model.bin.index.json").write_text(text)
    return folder


class Layout(NamedTuple):
    """write: write the model in a source folder at a destination. file: the file to cut."""

    write: Callable[[Path, Path], Path]
    file: str
    mode: Mode = "reference"


LAYOUTS = {
    ".pth": Layout(lambda source, path: convert(source, path), "consolidated.00.pth"),
    "sharded .pth": Layout(lambda source, path: convert(source, path, mp=4), "consolidated.02.pth"),
    ".safetensors": Layout(lambda source, path: convert(source, path, "hf"), "model.safetensors"),
    "sharded .safetensors": Layout(
        lambda source, path: convert(source, path, "hf"), "model-00002-of-00003.safetensors"
    ),
    ".bin": Layout(write_bin, "pytorch_model.bin"),
    "sharded .bin": Layout(write_bin, "pytorch_model-00002-of-00003.bin"),
    "quantized": Layout(
        lambda source, path: convert(source, path, quantize="int8"),
        "consolidated.00.safetensors",
        "fast",
    ),
    ".gguf": Layout(lambda source, path: convert(source, path.with_suffix(".gguf"), "gguf"), ""),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("large") / "meta", LARGE)


def ends(size: int, number: int) -> Iterator[int]:
    """The ends of `number` cuts, the longest first. Most are anywhere in the file. Some are near
    its beginning and its end."""
    near = [size - 1, size - 2, size - 70, 9, 8, 7, 1, 0]
    rest = [size * i // number for i in range(1, number - len(near) + 1)]
    yield from sorted({*near, *rest}, reverse=True)


def cost_of_opening(folder: Path, mode: Mode) -> tuple[str, float, int]:
    """The message of the error, the seconds until it came, and the bytes that the process grew by
    at its largest. The message is empty if there was no error."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = used_memory(torch.device("cpu"))["peak"]
    start, message = time.monotonic(), ""
    try:
        Llama.build(folder, device="cpu", mode=mode)
    except LlamaError as error:
        message = str(error)
    seconds = time.monotonic() - start
    return message, seconds, used_memory(torch.device("cpu"))["peak"] - before


@pytest.mark.fault(1)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_cut_file(
    source: Path, kind: str, trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind.startswith("sharded ."):
        monkeypatch.setattr("llama.checkpoints.convert.HF_FILE_BYTES", 40 << 20)
    layout = LAYOUTS[kind]
    folder = layout.write(source, tmp_path / "model")
    file = folder / layout.file if layout.file else folder

    def cut(end: int) -> tuple[str, float, int]:
        os.truncate(file, end)
        return cost_of_opening(folder, layout.mode)

    assert cost_of_opening(folder, layout.mode)[0] == ""
    numbers = ends(file.stat().st_size, trials.number(few=12, all=32))
    outcomes = isolated({str(end): partial(cut, end) for end in numbers})
    for end, (kind_of_end, found) in outcomes.items():
        with trials.trial(f"{file.name} cut at {end}"):
            message, seconds, grown = found
            assert kind_of_end == "ok"
            assert file.name in message
            assert "\n" not in message
            assert seconds < SECONDS
            assert grown < MEMORY
