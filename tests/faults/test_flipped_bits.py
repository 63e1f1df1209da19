"""One bit of the weights is another one: `verify` finds the file by its checksum."""

import hashlib
import random
from pathlib import Path

import pytest
import torch
from helpers.damaged import ONE_FILE, WIDER, write_folder
from helpers.fault_plan import Trials
from safetensors.torch import load_file

from llama.checkpoints.convert import convert
from llama.checkpoints.verify import CHECKLIST, MANIFEST, verify


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in each layout, by a name."""
    root = tmp_path_factory.mktemp("sources")
    one = write_folder(root / "one", WIDER)
    return {
        "one shard": one,
        "two shards": convert(one, root / "two", mp=2),
        "Hugging Face": convert(one, root / "hf", "hf"),
        "int8": convert(one, root / "int8", quantize="int8"),
    }


FILES = {
    "one shard": "consolidated.00.pth",
    "two shards": "consolidated.01.pth",
    "Hugging Face": ONE_FILE,
    "int8": "consolidated.00.safetensors",
}


def place_of_a_bit(draw: random.Random, path: Path, content: bytes) -> tuple[int, int]:
    """The byte in the file and the bit in it, of one of the numbers of a tensor."""
    is_zip = path.suffix == ".pth"
    state = torch.load(path, weights_only=True) if is_zip else load_file(path)
    tensor = state[draw.choice(sorted(state))]
    start = content.index(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return start + draw.randrange(tensor.nbytes), draw.randrange(8)


def write_checklist(folder: Path) -> None:
    """Write the MD5 checksums as Meta does."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    sums = [hashlib.md5((folder / name).read_bytes()).hexdigest() for name in names]
    lines = [f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True)]
    (folder / CHECKLIST).write_text("".join(lines))


@pytest.mark.fault(3)
@pytest.mark.parametrize("checksums", [MANIFEST, CHECKLIST])
@pytest.mark.parametrize("layout", FILES)
def test_a_flipped_bit(
    sources: dict[str, Path], layout: str, checksums: str, trials: Trials
) -> None:
    folder = sources[layout]
    path = folder / FILES[layout]
    for file in (MANIFEST, CHECKLIST):
        (folder / file).unlink(missing_ok=True)
    if checksums == CHECKLIST:
        write_checklist(folder)
    assert verify(folder, write_manifest=checksums == MANIFEST)[1] == []
    content = path.read_bytes()
    for seed in range(trials.number(few=3, all=13)):
        at, bit = place_of_a_bit(random.Random(seed), path, content)
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        with trials.trial(f"bit {bit} of byte {at} in {path.name}"):
            path.write_bytes(flipped)
            problems = verify(folder)[1]
            algorithm = "sha256" if checksums == MANIFEST else "md5"
            assert f"{path} does not have the {algorithm} checksum in {checksums}" in problems
        path.write_bytes(content)
    assert verify(folder)[1] == []


@pytest.mark.fault(3)
def test_a_flipped_bit_in_a_gguf_file(
    sources: dict[str, Path], tmp_path: Path, trials: Trials
) -> None:
    """The checksums are in a file beside it, which may list other models too."""
    path = convert(sources["one shard"], tmp_path / "model.gguf", "gguf", dtype="q8_0")
    content = path.read_bytes()
    other = hashlib.sha256(b"").hexdigest()
    sums = f"{hashlib.sha256(content).hexdigest()}  {path.name}\n{other}  other.gguf\n"
    (tmp_path / MANIFEST).write_text(sums)
    assert verify(path)[1] == []
    start = len(content) // 2  # the weights take more than half of the file
    for seed in range(trials.number(few=3, all=13)):
        draw = random.Random(seed)
        at, bit = draw.randrange(start, len(content)), draw.randrange(8)
        flipped = bytearray(content)
        flipped[at] ^= 1 << bit
        with trials.trial(f"bit {bit} of byte {at}"):
            path.write_bytes(flipped)
            problem = f"{path} does not have the sha256 checksum in {MANIFEST}"
            assert problem in verify(path)[1]
