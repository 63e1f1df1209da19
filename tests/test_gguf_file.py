"""GGUF files are opened as the package `gguf` opens them. A damaged file is one line, at once."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers.folders import make_model, write_meta

from llama import Llama
from llama.checkpoints.convert import convert
from llama.errors import CheckpointError, LlamaError
from llama.gguf_file import PackedTensor, read_gguf, read_value

TYPES = gguf.GGMLQuantizationType
QUANTIZED = "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split()
ROWS, COLUMNS = 70, 512


def write(path: Path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]) -> Path:
    """Write a file with the package's writer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    for name, (data, type_) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(type_: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random bytes, so that all codes of a type occur, and scales that are not finite."""
    shape = gguf.quant_shape_to_byte_shape((ROWS, COLUMNS), type_)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model with a vocabulary."""
    root = tmp_path_factory.mktemp("gguf")
    source = write_meta(root / "meta", make_model(n_layers=1, n_kv_heads=2), 1)
    return convert(source, root / "model.gguf", "gguf", dtype="q8_0")


# ---- tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_matrix_is_unpacked_as_the_package_does(kind: str, tmp_path: Path) -> None:
    blocks = random_blocks(TYPES[kind])
    path = write(tmp_path / "a.gguf", {"x.weight": (blocks, TYPES[kind])})
    packed = read_gguf(path).tensors["x.weight"]
    assert isinstance(packed, PackedTensor)
    assert (packed.kind, packed.shape) == (kind, (ROWS, COLUMNS))
    with np.errstate(all="ignore"):
        want = torch.from_numpy(gguf.dequantize(blocks, TYPES[kind]))
    same = dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(packed.unpack(), want, **same)
    some = packed.unpack(torch.bfloat16, slice(3, 69), slice(16, 80))
    assert some.is_contiguous()
    torch.testing.assert_close(some, want[3:69, 16:80].bfloat16(), **same)


def test_floats_are_mapped(tmp_path: Path) -> None:
    numbers = torch.randn(6, 10)
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for kind, dtype in dtypes.items():
        tensors[kind] = (numbers.to(dtype).view(torch.uint8).numpy(), TYPES[kind])
    opened = read_gguf(write(tmp_path / "a.gguf", tensors))
    for kind, dtype in dtypes.items():
        assert torch.equal(opened.tensors[kind], numbers.to(dtype))


def test_a_change_of_a_weight_does_not_reach_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"x": (np.zeros((2, 4), np.float32), TYPES.F32)})
    content = path.read_bytes()
    read_gguf(path).tensors["x"].fill_(1)
    assert path.read_bytes() == content
    assert read_gguf(path).tensors["x"].sum() == 0


def test_values_and_arrays(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_float32("small", 1e-5)
    writer.add_array("words", ["", "é", "word"])
    writer.add_array("numbers", [0.5, 1e-5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = read_gguf(tmp_path / "a.gguf")
    assert opened.get("general.architecture", str) == "llama"
    assert opened.get("small", float) == 1e-5
    assert opened.get("other", int) is None
    assert opened.get_list("words", str) == ["", "é", "word"]
    assert opened.get_list("numbers", float) == [0.5, float(np.float32(1e-5))]
    assert read_value(tmp_path / "a.gguf", "small", float) == 1e-5
    with pytest.raises(CheckpointError, match="small is 1e-05, not of type str"):
        opened.get("small", str)
    with pytest.raises(CheckpointError, match="words is an array, not of type int"):
        opened.get("words", int)
    with pytest.raises(CheckpointError, match="words is not an array of type int"):
        opened.get_list("words", int)


# ---- parts ------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"x{i}", np.full((2, 2), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("*.gguf"))


def test_any_part_opens_the_model(parts: list[Path]) -> None:
    assert [part.name for part in parts][:1] == ["m-00001-of-00003.gguf"]
    for part in parts:
        opened = read_gguf(part)
        assert opened.path == parts[0]
        assert opened.get("general.architecture", str) == "llama"
        assert [int(opened.tensors[f"x{i}"][0, 0]) for i in range(5)] == list(range(5))


def test_parts_that_do_not_fit_together(parts: list[Path]) -> None:
    content = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003.gguf: x2 is in an earlier part"):
        read_gguf(parts[0])
    parts[2].write_bytes(content.replace(b"x4", b"x9"))
    read_gguf(parts[0])
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003.gguf: No such file"):
        read_gguf(parts[0])
    many = parts[0].with_name("m-00001-of-99999.gguf")
    with pytest.raises(CheckpointError, match="a model has 1 to 1000 parts, not 99999"):
        read_gguf(many)


# ---- damage -----------------------------------------------------------------------------------


def header(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def array(kind: int, length: int) -> bytes:
    """A key `a` with the beginning of an array."""
    return struct.pack("<Q1sIIQ", 1, b"a", 9, kind, length)


def tensor(dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return struct.pack(f"<Q1sI{len(dims)}QIQ", 1, b"x", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with GGUF"),
        (b"PK\x03\x04" + bytes(40), "does not begin with GGUF"),
        (header()[:20], "ends at byte 20"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(version=1), "of version 1, not 2 or 3"),
        (header(keys=2**60), f"has {2**60} keys, and the limit is 16384"),
        (header(tensors=2**63), f"has {2**63} tensors, and the limit is 16384"),
        (header(keys=1), "ends at byte 24, before its content does"),
        (header(keys=1) + array(8, 2**62), "its arrays have more than 2097152 elements"),
        (header(keys=1) + array(0, 2**21), "ends at byte 49, before its content does"),
        (header(keys=1) + array(8, 2**21), "ends at byte 49, before its content"),
        (header(keys=1) + struct.pack("<Q", 2**62), f"its header has {2**62 + 32} bytes or more"),
        (header(keys=1) + array(9, 3) + bytes(100), "an array has elements of type ARRAY"),
        (header(keys=1) + array(77, 3), "77 is not a valid GGUFValueType"),
        (header(tensors=1) + tensor([4] * 9) + bytes(99), r"x has the shape \[4, 4, 4, 4\]"),
        (header(tensors=1) + tensor([]) + bytes(99), r"x has the shape \[\]"),
        (header(tensors=1) + tensor([4, 0]) + bytes(99), r"x has the shape \[4, 0\]"),
        (header(tensors=1) + tensor([4], kind=99) + bytes(99), "x is of the unknown type 99"),
        (header(tensors=1) + tensor([4], kind=26) + bytes(99), "x .* is of type I32, which"),
        (header(tensors=1) + tensor([32], kind=8) + bytes(99), "x .* is of type Q8_0, which"),
        (header(tensors=1) + tensor([2**40, 2**40]) + bytes(99), "ends at byte .*, and the file"),
        (header(tensors=1) + tensor([4], offset=2**64 - 8) + bytes(99), "ends at byte"),
        (header(tensors=1) + tensor([1], offset=2) + bytes(99), "a multiple of 8"),
        (header(tensors=1) + tensor([33, 4], kind=8) + bytes(999), "not a multiple of Q8_0 block"),
    ],
)
def test_a_damaged_file_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none.gguf: No such file"):
        Llama.build(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="no such folder"):
        Llama.build(tmp_path / "none")


def test_any_cut_is_one_line(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in sorted(random.Random(0).sample(range(len(content) - 1), 100)):
        cut.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="damaged or of another format"):
            read_gguf(cut)


def test_300_mutated_headers(path: Path, tmp_path: Path) -> None:
    """Each file is opened with its vocabulary, or refused in one line."""
    content = path.read_bytes()
    end = content.index(b"blk.0.ffn_norm.weight") + 60
    rng = random.Random(1)
    refused = []
    for i in range(300):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 3, 20))):
            # Half of the changes are in the first kilobyte, where the numbers of the shape are.
            at = rng.randrange(1024 if rng.random() < 0.5 else end)
            mutated[at] = rng.choice((0, 1, 127, 255, mutated[at] ^ 1 << rng.randrange(8)))
        file = tmp_path / f"{i}.gguf"
        file.write_bytes(mutated)
        try:
            Llama.build(file, max_seq_len=8, max_batch_size=1)
        except LlamaError as error:
            refused.append(str(error))
        file.unlink()
    assert 50 < len(refused) < 300
    assert not any("\n" in message for message in refused)
