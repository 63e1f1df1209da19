"""Headers of weight files with changed bytes: an error, or the same weights; no crash, no hang."""

import hashlib
import random
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.damaged import (
    ONE_FILE,
    UNSEEN,
    WIDER,
    build,
    build_with,
    spoil_bytes,
    spoil_header,
    with_content,
    write_folder,
)
from helpers.fault_plan import Trials
from helpers.isolated import Cases, isolated

from llama import Llama
from llama.checkpoints.convert import convert

QUANTIZED = "consolidated.00.safetensors"


def without_float16(cases: dict[str, tuple[bytes, Callable[[], object]]]) -> Cases:
    """The calls by name, but none for a file that calls bfloat16 float16: its bytes are valid, so
    that nothing can detect this change."""
    return {name: call for name, (content, call) in cases.items() if b'"F16"' not in content}


@pytest.mark.fault(2)
def test_a_safetensors_header(folders: Path, trials: Trials) -> None:
    """Two tensors of the same shape that are exchanged would not be detected. They do not occur in
    these trials."""
    digest, args = build(folders / "hf")
    data = (folders / "hf" / ONE_FILE).read_bytes()
    cases = {}
    for seed in range(trials.number(few=300, all=2100)):
        content = spoil_header(random.Random(seed), data)
        name = f"seed {seed}: {content[:2000]!r}"
        cases[name] = content, build_with(folders / "hf", ONE_FILE, content)
    for name, (kind, *found) in isolated(without_float16(cases)).items():
        with trials.trial(name):
            if kind == "ok":
                assert found[0][0] == digest
                changed = {key for key in args if found[0][1][key] != args[key]}
                assert changed <= UNSEEN


@pytest.mark.fault(2)
def test_the_pickle_in_a_pth_file(folders: Path, trials: Trials) -> None:
    """A changed pickle may load. It may name the data of another tensor, which nothing detects."""
    file = "consolidated.00.pth"
    data = (folders / "meta" / file).read_bytes()
    with zipfile.ZipFile(folders / "meta" / file) as archive:
        pickled = archive.read("consolidated.00/data.pkl")
    start = data.index(pickled)
    end = start + len(pickled)
    cases: Cases = {}
    for seed in range(trials.number(few=100, all=500)):
        spoiled = spoil_bytes(random.Random(seed), pickled)
        spoiled = spoiled[: len(pickled)].ljust(len(pickled), b".")
        content = data[:start] + spoiled + data[end:]
        cases[f"seed {seed}"] = build_with(folders / "meta", file, content)
    for name, outcome in isolated(cases).items():
        with trials.trial(name):
            assert outcome[0] in ("ok", "error")


@pytest.mark.fault(2)
def test_the_folder_in_a_pth_file(folders: Path, trials: Trials) -> None:
    """The changes are in the list of the zip archive's entries, at the end of the file."""
    file = "consolidated.00.pth"
    digest = build(folders / "meta")[0]
    data = (folders / "meta" / file).read_bytes()
    start = data.index(b"PK\x01\x02")
    cases: Cases = {}
    for seed in range(trials.number(few=100, all=500)):
        content = data[:start] + spoil_bytes(random.Random(seed), data[start:])
        cases[f"seed {seed}"] = build_with(folders / "meta", file, content)
    for name, (kind, *found) in isolated(cases).items():
        with trials.trial(name):
            assert kind == "error" or found[0][0] == digest


# ---- quantized folders --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quantized")
    write_folder(root / "floats", WIDER)
    return convert(root / "floats", root / request.param, quantize=request.param)


def build_quantized(folder: Path) -> str:
    """Build a model from a quantized folder. Returns a digest of all weights."""
    model = Llama.build(folder, mode="fast", device="cpu").model
    digest = hashlib.sha256()
    for module in model.modules():
        weight = getattr(module, "weight", ())
        for tensor in weight if isinstance(weight, tuple) else (weight,):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.fault(2)
def test_a_quantized_header(quantized: Path, trials: Trials) -> None:
    digest = build_quantized(quantized)
    data = (quantized / QUANTIZED).read_bytes()
    call = partial(build_quantized, quantized)
    cases = {}
    for seed in range(trials.number(few=50, all=300)):
        content = spoil_header(random.Random(seed), data)
        name = f"seed {seed}: {content[:2000]!r}"
        cases[name] = content, with_content(quantized / QUANTIZED, content, call)
    for name, (kind, *found) in isolated(without_float16(cases)).items():
        with trials.trial(name):
            assert kind == "error" or found[0] == digest


# ---- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.fault(2)
def test_a_gguf_header(tmp_path: Path, trials: Trials) -> None:
    """A changed header may open as another model: nothing detects another number or another piece
    of the vocabulary."""
    source = write_folder(tmp_path / "meta", WIDER)
    path = convert(source, tmp_path / "model.gguf", "gguf")
    data = path.read_bytes()
    end = data.index(b"blk.0.ffn_norm.weight") + 60
    cases: Cases = {}
    for seed in range(trials.number(few=40, all=300)):
        draw = random.Random(seed)
        spoiled = bytearray(data)
        for _ in range(draw.choice((1, 1, 3, 20))):
            # Half of the changes are in the first kilobyte, where the numbers of the shape are.
            at = draw.randrange(1024 if draw.random() < 0.5 else end)
            spoiled[at] = draw.choice((0, 1, 127, 255, spoiled[at] ^ 1 << draw.randrange(8)))
        cases[f"seed {seed}"] = with_content(path, bytes(spoiled), partial(build, path))
    for name, outcome in isolated(cases).items():
        with trials.trial(name):
            assert outcome[0] in ("ok", "error")
