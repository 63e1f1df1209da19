"""How an opened checkpoint is to run: ranks, device, dtype and memory, before a weight is read."""

from dataclasses import dataclass, replace

import torch

from llama.checkpoints.inspect import bytes_of, cache_bytes, weights_of
from llama.checkpoints.load import check_complete, default_dtype, parse_dtype
from llama.checkpoints.shards import Checkpoint
from llama.errors import ConfigError
from llama.fast.mode import CacheWidth, Mode, cache_dtype, check_mode
from llama.fast.quantize import Width, is_quantized


@dataclass(frozen=True)
class Setup:
    """How an opened checkpoint is to run; the KV cache's size is in its `args`."""

    opened: Checkpoint
    mp_size: int
    device: torch.device
    dtype: torch.dtype
    sharers: int  # ranks that draw on the same memory: on the CPU all of this machine's
    is_fast: bool = False  # on the CPU with kernels, whose cache is float32
    quantize: Width | None = None
    kv_cache: CacheWidth | None = None

    @staticmethod
    def make(
        opened: Checkpoint,
        mp_size: int,
        local_size: int,
        max_seq_len: int | None,
        max_batch_size: int,
        device: torch.device,
        dtype: str | torch.dtype | None,
        mode: Mode = "reference",
        quantize: Width | None = None,
        kv_cache: CacheWidth | None = None,
    ) -> "Setup":
        """Settle what was left open. Raises a LlamaError where the tensors are not all there, or
        where the ranks, the KV cache or the width do not fit the model."""
        if opened.quantization is not None:
            if quantize not in (None, opened.quantization):
                raise ConfigError(
                    f"{opened.folder} is saved in {opened.quantization}: it cannot be had in "
                    f"{quantize}"
                )
            if mode == "reference":
                raise ConfigError(
                    f"{opened.folder} is saved in {opened.quantization}, which is for mode fast"
                )
            quantize = opened.quantization
        opened.settle_vocabulary()
        check_complete(opened)
        opened.args.set_limits(max_seq_len, max_batch_size)
        opened.args.check_split(mp_size)
        asked = None if dtype is None else parse_dtype(dtype)
        settled = asked or default_dtype(device) or opened.dtype
        sharers = local_size if device.type == "cpu" else 1
        is_fast = check_mode(mode, quantize, device, settled)
        cache_dtype(mode, kv_cache)
        return Setup(opened, mp_size, device, settled, sharers, is_fast, quantize, kv_cache)

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token on one rank."""
        dtype = torch.float32 if self.is_fast else self.dtype
        if self.kv_cache is not None:
            dtype = torch.int8
        return cache_bytes(self.opened.args, self.mp_size, dtype)

    @property
    def cache_bytes(self) -> int:
        """A rank's KV cache. It counts in full: the system gives pages out when they are written
        to, and ends the process where there are none left."""
        args = self.opened.args
        return self.token_bytes * args.max_batch_size * args.max_seq_len

    def weight_bytes(self) -> tuple[int, int]:
        """A rank's weights in memory of its own, and those that are the file's pages, which the
        system can drop and read again."""
        own = mapped = 0
        args = self.opened.args
        if self.quantize is not None:  # then the output matrix is not the embedding
            args = replace(args, tied=False)
        for weight in weights_of(args, self.mp_size):
            numbers = weight.per_rank(self.mp_size) // weight.count
            for name in weight.names:
                is_rounded = self.quantize is not None and is_quantized(name)
                each = int(numbers * bytes_of(name, self.dtype, self.quantize))
                is_new = is_rounded and self.opened.quantization is None
                if (
                    self.device.type == "cpu"
                    and not is_new
                    and self.opened.is_mapped(name, self.mp_size, self.dtype)
                ):
                    mapped += each
                else:
                    own += each
        return own, mapped

    def needed_bytes(self) -> int:
        """What all sharers together need of memory of their own."""
        return (self.weight_bytes()[0] + self.cache_bytes) * self.sharers

    def prompt_bytes(self) -> int:
        """About what a rank needs on top to read a whole batch of the longest prompts at once:
        the scores of one layer (B, H, S, S) or the logits (B, S, V), both also in float32."""
        args = self.opened.args
        tokens = args.max_batch_size * args.max_seq_len
        scores = tokens * args.max_seq_len * args.n_heads // self.mp_size
        low = 0 if self.dtype == torch.float32 else self.dtype.itemsize
        return max(scores * (low + 8), tokens * args.vocab_size * (low + 4))
