"""Token files and their loader: the loader reads the written tokens in order, and refuses
others."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llama.errors import DataError
from llama.training.loop import DistributedShardedDataLoader
from llama.training.token_files import read_token_file, write_token_file


def write(folder: Path, *lengths: int) -> str:
    """Write token files. Each has consecutive numbers, which begin at a multiple of 1000."""
    for shard, length in enumerate(lengths):
        write_token_file(
            folder / f"data_{shard:02d}.bin", range(1000 * shard, 1000 * shard + length)
        )
    return str(folder / "data_*.bin")


def test_the_format_is_the_published_one(tmp_path: Path) -> None:
    assert write_token_file(tmp_path / "a.bin", [5, 6, 2**32 - 1]) == 3
    data = (tmp_path / "a.bin").read_bytes()
    header = np.frombuffer(data[:1024], dtype="<i4")
    assert header[:3].tolist() == [20240801, 7, 3]
    assert not header[3:].any()
    assert np.frombuffer(data[1024:], dtype="<u4").tolist() == [5, 6, 2**32 - 1]
    assert read_token_file(tmp_path / "a.bin").tolist() == [5, 6, 2**32 - 1]


@pytest.mark.parametrize("tokens", [[-1], [2**32]])
def test_ids_that_do_not_fit(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(DataError, match="token ids must be"):
        write_token_file(tmp_path / "a.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_batches_follow_each_other_through_all_files(tmp_path: Path) -> None:
    loader = DistributedShardedDataLoader(write(tmp_path, 14, 7), B=2, T=3)
    assert loader.total_tokens == 21
    starts = []
    for _ in range(4):
        inputs, targets = loader.next_batch()
        assert inputs.shape == targets.shape == (2, 3)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.flatten().tolist() == list(range(inputs[0, 0], inputs[0, 0] + 6))
        assert torch.equal(targets, inputs + 1)
        starts.append(inputs[0, 0].item())
    assert starts == [0, 6, 1000, 0]
    loader.reset()
    assert loader.next_batch()[0][0, 0] == 0


def test_ranks_share_a_step(tmp_path: Path) -> None:
    pattern = write(tmp_path, 30)
    whole = DistributedShardedDataLoader(pattern, B=4, T=3)
    parts = [DistributedShardedDataLoader(pattern, 2, 3, rank, 2) for rank in range(2)]
    for _ in range(3):
        inputs, targets = whole.next_batch()
        found = [part.next_batch() for part in parts]
        assert torch.equal(torch.cat([x for x, _ in found]), inputs)
        assert torch.equal(torch.cat([y for _, y in found]), targets)


def test_the_state_leads_back(tmp_path: Path) -> None:
    pattern = write(tmp_path, 14, 20)
    loader = DistributedShardedDataLoader(pattern, 2, 3)
    for _ in range(3):
        loader.next_batch()
    other = DistributedShardedDataLoader(pattern, 2, 3)
    other.load_state_dict(loader.state_dict())
    for _ in range(5):
        assert torch.equal(loader.next_batch()[0], other.next_batch()[0])


def test_a_state_of_fewer_ranks(tmp_path: Path) -> None:
    """A step of more ranks may not fit into the rest of the file."""
    pattern = write(tmp_path, 14, 20)
    one = DistributedShardedDataLoader(pattern, 2, 3)
    one.next_batch()
    state = one.state_dict()
    two = DistributedShardedDataLoader(pattern, 2, 3, 1, 2)
    assert state == {"shard": 0, "position": 6}
    two.load_state_dict(state)
    assert two.state_dict() == {"shard": 1, "position": 0}


def test_a_state_of_other_files(tmp_path: Path) -> None:
    loader = DistributedShardedDataLoader(write(tmp_path, 14), 2, 3)
    with pytest.raises(DataError, match="token file 3, but there are 1"):
        loader.load_state_dict({"shard": 3, "position": 0})
    with pytest.raises(DataError, match="was the file changed"):
        loader.load_state_dict({"shard": 0, "position": 900})


def spoil(path: Path, at: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[4 * at : 4 * at + 4] = np.array([value], dtype="<i4").tobytes()
    path.write_bytes(data)


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "data_00.bin"
    pattern = str(tmp_path / "*.bin")
    with pytest.raises(DataError, match=r"no file matches .*\*\.bin"):
        DistributedShardedDataLoader(pattern, 2, 3)
    write(tmp_path, 20)
    spoil(path, 0, 7)
    with pytest.raises(DataError, match="its magic is 7, not 20240801"):
        DistributedShardedDataLoader(pattern, 2, 3)
    write(tmp_path, 20)
    spoil(path, 1, 1)
    with pytest.raises(DataError, match="version 1; only version 7 is supported"):
        DistributedShardedDataLoader(pattern, 2, 3)
    write(tmp_path, 20)
    spoil(path, 2, 21)
    with pytest.raises(DataError, match=r"has 1104 bytes, but the 21 tokens .* need 1108"):
        DistributedShardedDataLoader(pattern, 2, 3)
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="has 5 bytes: the header alone has 1024"):
        DistributedShardedDataLoader(pattern, 2, 3)
    write(tmp_path, 12)
    with pytest.raises(DataError, match=r"has 12 tokens: one batch of 2 rank.* needs 13"):
        DistributedShardedDataLoader(pattern, 2, 3, 0, 2)
    with pytest.raises(DataError, match="process_rank 2 below num_processes 2"):
        DistributedShardedDataLoader(pattern, 2, 3, 2, 2)
    with pytest.raises(DataError, match="cannot read"):
        read_token_file(tmp_path / "none.bin")


def test_an_empty_file_is_too_small(tmp_path: Path) -> None:
    write_token_file(tmp_path / "a.bin", [])
    with pytest.raises(DataError, match="has 0 tokens"):
        DistributedShardedDataLoader(str(tmp_path / "a.bin"), 1, 1)
