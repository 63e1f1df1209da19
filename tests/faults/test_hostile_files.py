"""Files that would run code, lead out of the folder, never end or fill the memory: refused."""

import json
import os
import pickle
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damaged import INDEX, ONE_FILE, PARAMS, WIDER, build, build_with, write_folder
from helpers.fault_plan import Trials
from helpers.isolated import Cases, isolated
from safetensors.torch import load_file

from llama import Llama, ModelArgs
from llama.checkpoints.convert import convert
from llama.checkpoints.verify import CHECKLIST, MANIFEST, verify

# ---- code in a pickle ---------------------------------------------------------------------------


class Calls:
    """An object whose pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def codes(mark: Path) -> dict[str, Calls]:
    """Pickles that would create the file `mark`, or a file that is named like it."""
    return {
        "a shell command": Calls(os.system, f"touch {mark}"),
        "a process": Calls(subprocess.call, ["touch", str(mark)]),
        "eval": Calls(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Calls(exec, f"open({str(mark)!r}, 'w')"),
        "a method": Calls(Path.touch, mark),
        "a function of PyTorch": Calls(torch.save, 1, str(mark)),
        "a pickle in a pickle": Calls(pickle.loads, pickle.dumps(Calls(Path.touch, mark))),
        "getattr": Calls(getattr, mark, "touch"),
    }


# Each way to write a pickle, by a name.
WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "zip": torch.save,
    "old format": partial(torch.save, _use_new_zipfile_serialization=False),
    "bare": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


@pytest.mark.fault(8)
@pytest.mark.parametrize("layout", ["meta", "hf"])
def test_code_in_a_pickle(folders: Path, layout: str, trials: Trials) -> None:
    mark = folders / "executed"
    folder = folders / layout
    path = folder / "consolidated.00.pth"
    if layout == "hf":
        path = folder / "pytorch_model.bin"
        state: dict[str, Any] = dict(load_file(folder / ONE_FILE))
        (folder / ONE_FILE).unlink()
    else:
        state = torch.load(path, weights_only=True)
    commands: dict[str, Callable[[], object]] = {
        "build": partial(build, folder),
        "verify": lambda: verify(folder)[1],
        "convert": lambda: str(convert(folder, folders / "new")),
    }
    name = list(state)[-1]
    for code, hostile in codes(mark).items():
        for writer, write in WRITERS.items():
            for place, content in (
                ("in place of a tensor", state | {name: hostile}),
                ("in place of all", hostile),
            ):
                write(content, path)
                for outcome in isolated(commands).items():
                    with trials.trial(f"{code}, {writer}, {place}: {outcome[0]}"):
                        assert outcome[1][0] == "error"
                        assert str(path) in outcome[1][2]
                        assert not mark.exists()


# ---- paths that lead out of the folder ----------------------------------------------------------

PLACES: list[Any] = [
    "../hf/model.safetensors", "/etc/passwd", "..", ".", "", "a/../b", "a" * 300, "nul\0",
    "tokenizer.model", "missing.safetensors", 7, None, ["model.safetensors"],
    "..\\hf\\model.safetensors", "~", "file:///etc/passwd", "\ud800",
]  # fmt: skip


@pytest.mark.fault(8)
def test_an_index_that_points_elsewhere(folders: Path, trials: Trials) -> None:
    index = json.loads((folders / "index" / INDEX).read_text())
    cases: Cases = {}
    for place in PLACES:
        index["weight_map"]["model.norm.weight"] = place
        content = json.dumps(index).encode()
        cases[f"place {place!r}"] = build_with(folders / "index", INDEX, content)
    for name, outcome in isolated(cases).items():
        with trials.trial(name):
            assert outcome[:2] == ("error", "CheckpointError")


@pytest.mark.fault(8)
@pytest.mark.parametrize("checksums", [MANIFEST, CHECKLIST])
def test_checksums_of_files_elsewhere(folders: Path, checksums: str, trials: Trials) -> None:
    digits = "0" * (64 if checksums == MANIFEST else 32)
    for name in ("../hf/model.safetensors", "/etc/passwd", "..", "a/b", "."):
        (folders / "meta" / checksums).write_text(f"{digits}  {name}\n")
        outcome = isolated({name: lambda: verify(folders / "meta")[1]})[name]
        with trials.trial(name):
            assert "is no checksum and name" in outcome[-1] or "is missing" in outcome[1][0]


# ---- sizes that no machine has ------------------------------------------------------------------


def header_of(entries: dict[str, Any], numbers: bytes) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + numbers


@pytest.mark.fault(8)
def test_a_declared_terabyte_is_not_allocated(folders: Path, trials: Trials) -> None:
    data = (folders / "hf" / ONE_FILE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    cases: Cases = {}
    for size in (22064, 1 << 40, 1 << 64):
        entries = json.loads(data[8:end])
        entries["lm_head.weight"] |= {"shape": [1 << 20, 1 << 19], "data_offsets": [0, size]}
        content = header_of(entries, data[end:])
        cases[f"safetensors, {size} bytes"] = build_with(folders / "hf", ONE_FILE, content)
    for dtype in ("F4", "F8_E8M0", "F8_E4M3", "C64", "U16", "BOOL", "I64"):
        entries = json.loads(data[8:end])
        entries["lm_head.weight"]["dtype"] = dtype
        content = header_of(entries, data[end:])
        cases[f"safetensors of {dtype}"] = build_with(folders / "hf", ONE_FILE, content)

    huge = PARAMS | dict(dim=1 << 19, vocab_size=1 << 20)
    shapes = ModelArgs(**huge).whole_shapes()
    one = torch.zeros(1)
    for name, make in {
        "strides of zero": lambda shape: one.expand(shape),
        "sparse": lambda shape: torch.sparse_coo_tensor(size=shape, check_invariants=True),
        "no storage": lambda shape: torch.empty(shape, device="meta"),
    }.items():
        folder = Path(shutil.copytree(folders / "meta", folders / name))
        torch.save({n: make(shape) for n, shape in shapes.items()}, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(huge))
        cases[name] = partial(build, folder)
        cases[f"{name}, verify"] = partial(verify, folder)
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            assert kind == "error"
            assert name.startswith("safetensors") or "has fewer numbers than its shape" in found[1]


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


# For each header its number of tensors, its number of keys, and its content. The type numbers of
# GGUF: 4 is uint32, 8 a string, 9 an array.
HUGE_GGUF = {
    "a string": (0, 1, string(b"a") + struct.pack("<IQ", 8, 1 << 40)),
    "an array": (0, 1, string(b"a") + struct.pack("<IIQ", 9, 4, 1 << 40)),
    "keys": (0, 1 << 40, b""),
    "tensors": (1 << 40, 0, b""),
    "a tensor": (
        1, 0, string(b"output.weight") + struct.pack("<IQQIQ", 2, 1 << 20, 1 << 19, 0, 0)
    ),
    "a tensor of 2^64 numbers": (
        1, 0, string(b"output.weight") + struct.pack("<IQQIQ", 2, 1 << 32, 1 << 32, 0, 0)
    ),
}  # fmt: skip


@pytest.mark.fault(8)
def test_a_gguf_file_that_declares_a_terabyte(tmp_path: Path, trials: Trials) -> None:
    path = tmp_path / "model.gguf"
    for name, (n_tensors, n_keys, content) in HUGE_GGUF.items():
        start = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys)
        path.write_bytes(start + content + bytes(64))
        outcome = isolated({name: partial(build, path)})[name]
        with trials.trial(name):
            assert outcome[0] == "error"
            assert str(path) in outcome[2]


# ---- no regular files ---------------------------------------------------------------------------


NO_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a folder": lambda path: path.symlink_to(path.parent),
    "a link to a pipe": lambda path: path.symlink_to(path.parent.parent / "pipe"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
}
FILES = {
    "meta": ("params.json", "consolidated.00.pth", "tokenizer.model"),
    "hf": ("config.json", ONE_FILE, "generation_config.json"),
    "index": (INDEX, "model-00001-of-00003.safetensors", "tokenizer.model"),
}


def in_place_of(path: Path, make: Callable[[Path], None], call: Callable[[], object]) -> object:
    """Make the call while something else replaces a file. The file is restored afterwards."""
    aside = path.with_name("aside")
    if path.exists():
        path.rename(aside)
    make(path)
    try:
        return call()
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        if aside.exists():
            aside.rename(path)


@pytest.mark.fault(8)
def test_what_is_no_regular_file_is_refused(folders: Path, trials: Trials) -> None:
    os.mkfifo(folders / "pipe")
    cases: Cases = {}
    for kind, make in NO_FILES.items():
        for layout, names in FILES.items():
            for name in names:
                call = partial(build, folders / layout)
                path = folders / layout / name
                cases[f"{name} is {kind}"] = partial(in_place_of, path, make, call)
        for name in (CHECKLIST, MANIFEST):
            call = partial(verify, folders / "meta")
            path = folders / "meta" / name
            cases[f"{name} is {kind}"] = partial(in_place_of, path, make, call)
        call = partial(Llama.build, folders / "meta", folders / "other.model", device="cpu")
        cases[f"tokenizer_path is {kind}"] = partial(
            in_place_of, folders / "other.model", make, call
        )
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            assert kind == "error"
            assert name.split(" is ")[0].replace("tokenizer_path", "other.model") in found[1]


@pytest.mark.fault(8)
def test_a_gguf_file_that_is_no_regular_file(tmp_path: Path, trials: Trials) -> None:
    source = write_folder(tmp_path / "meta", WIDER)
    path = convert(source, tmp_path / "model.gguf", "gguf")
    os.mkfifo(tmp_path.parent / "pipe")
    for kind, make in NO_FILES.items():
        outcome = isolated({kind: partial(in_place_of, path, make, partial(build, path))})[kind]
        with trials.trial(kind):
            assert outcome[0] == "error"
            assert path.name in outcome[2]
