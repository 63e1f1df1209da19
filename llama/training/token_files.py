"""Token files for training: a header of 256 int32, then uint32 tokens.

The header has magic, version, count of the tokens, and the fingerprint of the vocabulary. The other
numbers are 0. So is the fingerprint in files of other programs.
"""

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llama.errors import DataError
from llama.files import atomic_file
from llama.tokenizer import Tokenizer

MAGIC = 20240801
VERSION = 7
HEADER = np.dtype("<i4"), 256  # little-endian on every machine
TOKEN = np.dtype("<u4")
HEADER_BYTES = 256 * 4
IGNORED = -100  # a target that has no loss


def write_token_file(
    path: str | Path, tokens: Iterable[int] | np.ndarray, fingerprint: int = 0
) -> int:
    """Write one token file, atomically. Returns the number of tokens.

    fingerprint: `Tokenizer.fingerprint()`; 0: the vocabulary is unknown.

    Raises DataError for an id below 0 or above 2**32 - 1, for more than 2**31 - 1 tokens, and if
    the file cannot be written.
    """
    array = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
    if array.size and (array.min() < 0 or array.max() >= 2**32):
        found = f"{array.min()} to {array.max()}"
        raise DataError(f"{path}: token ids must be 0 to 2**32 - 1, but these are {found}")
    if array.size >= 2**31:
        raise DataError(
            f"{path}: {array.size} tokens, but the header can count {2**31 - 1} at most"
        )
    header = np.zeros(HEADER[1], dtype=HEADER[0])
    header[:3] = MAGIC, VERSION, array.size
    header[3:4].view("<u4")[0] = fingerprint
    with atomic_file(path) as file:
        file.write(header.tobytes())
        file.write(array.astype(TOKEN).tobytes())
    return int(array.size)


def read_token_file(path: str | Path) -> np.ndarray:
    """The tokens of a token file, uint32, as an array that is mapped from the file.

    Raises DataError if the file cannot be read, has another magic number or version, or has another
    size than its header's count requires.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
            size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path} has {len(raw)} bytes: the header alone has {HEADER_BYTES}")
    magic, version, count = np.frombuffer(raw, dtype=HEADER[0])[:3].tolist()
    if magic != MAGIC:
        raise DataError(f"{path} is no token file: its magic is {magic}, not {MAGIC}")
    if version != VERSION:
        raise DataError(
            f"{path} is a token file of version {version}; only version {VERSION} is supported"
        )
    expected = HEADER_BYTES + TOKEN.itemsize * count
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, but the {count} tokens in its header need {expected}"
        )
    if count == 0:
        return np.zeros(0, dtype=TOKEN)
    return np.memmap(path, dtype=TOKEN, mode="r", offset=HEADER_BYTES)


def check_vocabulary(paths: Iterable[str | Path], tokenizer: Tokenizer) -> None:
    """Raise DataError if one of the token files, which `read_token_file` accepts, has the
    fingerprint of another vocabulary than the tokenizer's."""
    expected = tokenizer.fingerprint()
    for path in paths:
        with Path(path).open("rb") as file:
            found = np.frombuffer(file.read(HEADER_BYTES), dtype=TOKEN)[3]
        if found not in (0, expected):
            raise DataError(
                f"{path} was written with another vocabulary than that of {tokenizer.model_path}"
            )


class Loader(Protocol):
    """An endless sequence of batches. `state_dict` returns the position in it."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T), int64. A target of -100 has no loss."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class DistributedShardedDataLoader:
    """Endless batches of B rows of T tokens, from token files in the order of their names.

    A step takes num_processes * B * T successive tokens of a file, B * T for each data-parallel
    rank. Tokens at the end of a file that do not fill a step are skipped. After the last file the
    loader continues with the first.

    Args:
        filename_pattern: a glob pattern, such as "tales_*.bin".
        process_rank: the data-parallel rank, 0 to num_processes - 1.

    Raises DataError if no file matches, and for a file that is damaged or shorter than one step.
    """

    def __init__(
        self, filename_pattern: str, B: int, T: int, process_rank: int = 0, num_processes: int = 1
    ) -> None:
        if B < 1 or T < 1 or not 0 <= process_rank < num_processes:
            raise DataError(
                f"B {B} and T {T} must be 1 or more, and process_rank {process_rank} below "
                f"num_processes {num_processes}"
            )
        self.B, self.T = B, T
        self.process_rank, self.num_processes = process_rank, num_processes
        self.files = sorted(glob.glob(filename_pattern))
        if not self.files:
            raise DataError(f"no file matches {filename_pattern}")
        self.total_tokens = 0
        for file in self.files:
            count = len(read_token_file(file))
            # A target is the next token, so a step needs one token more than it consumes.
            if count < self._step_tokens + 1:
                raise DataError(
                    f"{file} has {count} tokens: one batch of {num_processes} rank(s) x {B} rows "
                    f"x {T} tokens needs {self._step_tokens + 1}"
                )
            self.total_tokens += count
        self.reset()

    @property
    def _step_tokens(self) -> int:
        return self.num_processes * self.B * self.T

    def reset(self) -> None:
        """Restart at the first token of the first file."""
        self._seek(0, 0)

    def _seek(self, shard: int, position: int) -> None:
        self.shard = shard  # index in self.files
        self.position = position  # of the step's first token; this rank may begin later
        self._tokens = read_token_file(self.files[shard])

    def _leave_short_rest(self) -> None:
        """Go to the next file if fewer tokens than those of a step are left in this one."""
        if self.position + self._step_tokens + 1 > len(self._tokens):
            self._seek((self.shard + 1) % len(self.files), 0)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T), int64: each target is the token after its input."""
        start = self.position + self.process_rank * self.B * self.T
        # int64, because embeddings and losses need it
        block = torch.from_numpy(self._tokens[start : start + self.B * self.T + 1].astype(np.int64))
        self.position += self._step_tokens
        self._leave_short_rest()
        return block[:-1].view(self.B, self.T), block[1:].view(self.B, self.T)

    def state_dict(self) -> dict[str, int]:
        """The position of the next batch, the same on every rank."""
        return {"shard": self.shard, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position of `state_dict`, perhaps with another number of ranks. Raises
        DataError if the files do not have the position."""
        shard, position = state["shard"], state["position"]
        if not 0 <= shard < len(self.files):
            raise DataError(
                f"the run was in token file {shard}, but there are {len(self.files)} files"
            )
        self._seek(shard, position)
        if position > len(self._tokens):
            raise DataError(
                f"the run was at token {position} of {self.files[shard]}, which has "
                f"{len(self._tokens)}: was the file changed?"
            )
        self._leave_short_rest()
