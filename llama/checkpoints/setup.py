"""Decide how an opened checkpoint will run: ranks, device, dtype and memory. Reads no weight."""

from dataclasses import dataclass, replace

import torch

from llama.checkpoints.inspect import bytes_of, cache_bytes, weights_of
from llama.checkpoints.load import check_complete, default_dtype, parse_dtype
from llama.checkpoints.shards import Checkpoint
from llama.errors import CheckpointError, ConfigError
from llama.fast.mode import CacheWidth, Mode, cache_dtype, check_mode
from llama.fast.quantize import Width, is_quantized


@dataclass(frozen=True)
class Setup:
    """How an opened checkpoint will run. The KV cache's size is in `opened.args`."""

    opened: Checkpoint
    mp_size: int
    device: torch.device
    dtype: torch.dtype
    ranks_per_device: int  # ranks that share one memory: on the CPU all ranks of this machine
    is_fast: bool = False  # uses the CPU kernels, whose KV cache is float32
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
        """Fill in the defaults. Raises a LlamaError if tensors are missing, or if the ranks, the KV
        cache or the quantization do not fit the model."""
        if opened.quantization is not None:
            if quantize not in (None, opened.quantization):
                raise ConfigError(
                    f"{opened.folder} is saved in {opened.quantization} and cannot be loaded in "
                    f"{quantize}"
                )
            if mode == "reference":
                raise ConfigError(
                    f"{opened.folder} is saved in {opened.quantization}, which needs mode fast"
                )
            quantize = opened.quantization
        opened.set_vocab_size()
        check_complete(opened)
        for problem in opened.copied_shards():
            raise CheckpointError(problem)
        opened.args.set_limits(max_seq_len, max_batch_size)
        opened.args.check_split(mp_size)
        asked = None if dtype is None else parse_dtype(dtype)
        chosen = asked or default_dtype(device) or opened.dtype
        ranks_per_device = local_size if device.type == "cpu" else 1
        is_fast = check_mode(mode, quantize, device, chosen, opened.args.has_biases)
        cache_dtype(mode, kv_cache)
        return Setup(opened, mp_size, device, chosen, ranks_per_device, is_fast, quantize, kv_cache)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token on one rank."""
        dtype = torch.float32 if self.is_fast else self.dtype
        if self.kv_cache is not None:
            dtype = torch.int8
        return cache_bytes(self.opened.args, self.mp_size, dtype)

    @property
    def cache_bytes(self) -> int:
        """Bytes of a rank's KV cache. Its full size is counted, although the system allocates a
        page only when the page is first written to. If no page is left then, the system kills the
        process."""
        args = self.opened.args
        return self.token_bytes * args.max_batch_size * args.max_seq_len

    def weight_bytes(self) -> tuple[int, int]:
        """Bytes of a rank's weights that are in its own memory, and of its mapped weights.
        The system can drop mapped pages and read them again."""
        own = mapped = 0
        args = self.opened.args
        if self.quantize is not None:  # quantized, the output matrix is not the embedding
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
        """Bytes that all ranks of a device need, without the mapped weights."""
        return (self.weight_bytes()[0] + self.cache_bytes) * self.ranks_per_device

    def prompt_bytes(self) -> int:
        """Estimated additional bytes of a rank for the prefill of a full batch of the longest
        prompts."""
        args = self.opened.args
        rows, tokens = args.max_batch_size, args.max_seq_len
        return args.prefill_bytes(rows, tokens, self.mp_size, self.dtype.itemsize)
