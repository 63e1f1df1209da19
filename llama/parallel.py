"""Ranks: the process group, fairscale's model-parallel groups, broadcasts, errors on all ranks.

torchrun starts one process per rank, and describes the group to each in environment variables
(RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without torchrun there is one rank, which
needs no network.
"""

import atexit
import contextlib
import importlib.metadata
import io
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils._python_dispatch import TorchDispatchMode

from llama.errors import ParallelError
from llama.lost_ranks import connect, introduce, naming_lost_ranks, timeout

# How many numbers the first message of `broadcast_numbers` carries. The plan of a decode step with
# few rows fits into this message, so it needs no second one.
HEAD_LENGTH = 63

# The dimension along which each weight is split over the ranks. Other weights are replicated.
# Matches ColumnParallelLinear (0) and RowParallelLinear (1). `tok_embeddings` depends on the
# family, see `ModelArgs.embedding_shard_dim`.
SHARD_DIMS = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}


def shard_dim(name: str, embedding_shard_dim: int) -> int | None:
    """The dimension along which ranks split the tensor with this name; None: replicated."""
    module, kind = name.split(".")[-2:]
    dim = embedding_shard_dim if module == "tok_embeddings" else SHARD_DIMS.get(module)
    # The bias of a row-parallel layer is added once, after the ranks' results are summed. A LoRA
    # change B A of a matrix is split like it: B by rows, or A by columns.
    is_replicated = (kind, dim) in (("bias", 1), ("lora_A", 0), ("lora_B", 1))
    return None if is_replicated else dim


def initialize(model_parallel_size: int | None = None, device: torch.device | None = None) -> None:
    """Make the process group and fairscale's groups, if they do not exist yet.

    model_parallel_size: the number of ranks that share one model. None: the size of the existing
        groups, or, if there are none, the number of ranks that torchrun started.
    Raises ParallelError if the size differs from the size of the existing groups, or if it does not
    divide the number of ranks.
    """
    device = device or torch.device("cpu")
    check_fork()
    if fs_init.model_parallel_is_initialized() and not _groups_are_alive():
        fs_init.destroy_model_parallel()  # the caller has destroyed the process group
    world_size = dist.get_world_size() if dist.is_initialized() else _environment("WORLD_SIZE", 1)
    if fs_init.model_parallel_is_initialized():
        if model_parallel_size not in (None, mp_size()):
            raise ParallelError(
                f"model_parallel_size is {model_parallel_size}, but this process already runs "
                f"with {mp_size()}: it cannot change within a process"
            )
        return
    size = world_size if model_parallel_size is None else model_parallel_size
    if size < 1 or world_size % size:
        raise ParallelError(
            f"model_parallel_size {size} does not divide the {world_size} started rank(s): "
            f"run under torchrun --nproc_per_node {size}"
        )
    if not dist.is_initialized():
        _init_process_group(world_size, device)
    introduce()
    with contextlib.redirect_stdout(io.StringIO()), naming_lost_ranks():
        fs_init.initialize_model_parallel(size)  # prints three lines on rank 0
    # fairscale makes its groups without a timeout, which means half an hour for gloo.
    for group in (fs_init.get_model_parallel_group(), fs_init.get_data_parallel_group()):
        _set_pg_timeout(timeout(), group)


_made_in: int | None = None  # id of the process that made the groups; its children inherit it


def check_fork() -> None:
    """Raise ParallelError in a forked child, where PyTorch's thread pool would hang forever."""
    global _made_in
    _made_in = _made_in or os.getpid()
    if _made_in != os.getpid() and torch.get_num_threads() > 1:
        raise ParallelError(
            "this process was forked from one that has a model: its threads would hang. Start it "
            'by "spawn", or call torch.set_num_threads(1) in it first'
        )


def _groups_are_alive() -> bool:
    if not dist.is_initialized():
        return False
    try:
        dist.get_group_rank(fs_init.get_model_parallel_group(), dist.get_rank())
    except (RuntimeError, ValueError):  # the group belongs to an earlier process group
        return False
    return True


def _init_process_group(world_size: int, device: torch.device) -> None:
    if world_size == 1:  # in memory: no socket, no environment variables
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise ParallelError(
                    f"WORLD_SIZE is {world_size} but {name} is not set: use torchrun"
                )
        rank, on_gpu = _environment("RANK", 0), device.type == "cuda"
        address, port = os.environ["MASTER_ADDR"], _environment("MASTER_PORT", 0)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", rank=rank, world_size=world_size, timeout=timeout(),
            store=connect(rank, world_size, address, port), device_id=device if on_gpu else None,
        )  # fmt: skip
    atexit.register(_shut_down)


def _shut_down() -> None:
    if dist.is_initialized():
        fs_init.destroy_model_parallel()
        dist.destroy_process_group()


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ParallelError(f"the environment variable {name} is {text!r}: not a whole number")
    return int(text)


def local_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this rank: the one asked for, else its own GPU, else MPS, else the CPU."""
    if device is None:
        if torch.cuda.is_available():
            device = "cuda"
        else:
            device = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ParallelError(f"unknown device {device!r}: it must be cuda, mps or cpu") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ParallelError("device is 'mps', but this machine has no such GPU")
    if device.type == "cuda":
        index = _environment("LOCAL_RANK", 0) if device.index is None else device.index
        count = torch.cuda.device_count()
        if count == 0:
            raise ParallelError(f"device is {str(device)!r}, but no GPU is visible to PyTorch")
        if index >= count:
            raise ParallelError(f"this rank needs GPU {index}, but {count} are visible")
        return torch.device("cuda", index)
    return device


def local_size() -> int:
    """Number of ranks on this machine, which share its memory."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return _environment("LOCAL_WORLD_SIZE", world_size)


def mp_size() -> int:
    """Number of ranks that share the model."""
    return fs_init.get_model_parallel_world_size()


def mp_rank() -> int:
    """This process's rank among those that share the model."""
    return fs_init.get_model_parallel_rank()


def dp_size() -> int:
    """Number of data-parallel groups. Each group holds one copy of the model."""
    return fs_init.get_data_parallel_world_size()


def dp_rank() -> int:
    """The data-parallel group that this process belongs to."""
    return fs_init.get_data_parallel_rank()


def is_main_rank() -> bool:
    """True on the rank that logs and prints: global rank 0, or the only process."""
    return (dist.get_rank() if dist.is_initialized() else _environment("RANK", 0)) == 0


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """Broadcast `tensor` in place from the first model-parallel rank to the others."""
    if mp_size() > 1:
        group = fs_init.get_model_parallel_group()
        with naming_lost_ranks(group):
            dist.broadcast(tensor, fs_init.get_model_parallel_src_rank(), group)
    return tensor


def broadcast_numbers(
    numbers: list[Any] | None, dtype: torch.dtype, device: torch.device
) -> list[Any]:
    """Broadcast the numbers of the first model-parallel rank. The other ranks pass None."""
    head = torch.zeros(1 + HEAD_LENGTH, dtype=dtype, device=device)
    if numbers is not None:
        head[: 1 + len(numbers[:HEAD_LENGTH])] = torch.tensor(
            [len(numbers), *numbers[:HEAD_LENGTH]], dtype=dtype, device=device
        )
    n, *received = broadcast_from_first(head).tolist()
    rest = max(0, int(n) - HEAD_LENGTH)
    if rest:
        tail = torch.empty(rest, dtype=dtype, device=device)
        if numbers is not None:
            tail = torch.tensor(numbers[HEAD_LENGTH:], dtype=dtype, device=device)
        received += broadcast_from_first(tail).tolist()
    return received[: int(n)] if numbers is None else numbers


def raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise on every rank if any rank has an error. Otherwise the other ranks would wait in their
    next collective. A rank that has an error raises its own. The others raise ParallelError with
    the message of the first rank that has one."""
    if dist.get_world_size() > 1:
        first = torch.tensor([dist.get_world_size() if error is None else dist.get_rank()])
        first = first.to(device)
        with naming_lost_ranks():
            dist.all_reduce(first, dist.ReduceOp.MIN)
            if first.item() < dist.get_world_size():
                own = "" if error is None else str(error) or type(error).__name__
                message = all_texts(own, device)[int(first.item())]
                error = error or ParallelError(f"rank {first.item()}: {message}")
    if error is not None:
        raise error


@contextlib.contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """A block that succeeds on every rank or raises on every rank; see `raise_together`."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # of any kind, because the other ranks must raise too
        error = caught
    raise_together(error, device)


def all_texts(text: str, device: torch.device) -> list[str]:
    """The text that each rank gives, in the order of the ranks. All ranks call it together."""
    if dist.get_world_size() == 1:
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(data)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    with naming_lost_ranks():
        dist.all_gather(sizes, size)
        longest = max(1, *(int(each.item()) for each in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8, device=device)
        padded[: len(data)] = data
        rows = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(rows, padded)
    return [
        bytes(row[: int(size.item())].tolist()).decode()
        for row, size in zip(rows, sizes, strict=True)
    ]


def require_same(facts: Mapping[str, object], device: torch.device) -> None:
    """Raise ParallelError, with the same message on every rank, unless all ranks have the same
    versions and the same facts. The values are compared as texts."""
    if dist.get_world_size() == 1:
        return
    versions = {"PyTorch's version": torch.__version__, "llama-reference's version": _version()}
    own = {name: str(value) for name, value in {**versions, **facts}.items()}
    first, *others = (json.loads(text) for text in all_texts(json.dumps(own), device))
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other.get(name) != value:
                raise ParallelError(
                    f"{name} is {other.get(name)} on rank {rank}, but {value} on rank 0: all ranks "
                    "need the same versions, files and options"
                )


def _version() -> str:
    try:
        return importlib.metadata.version("llama-reference")
    except importlib.metadata.PackageNotFoundError:  # it runs from its source, not installed
        return "unknown"


class _MetaDeviceMode(TorchDispatchMode):
    """Make every new tensor on the meta device."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # with True, PyTorch would import its compiler, which takes 2 seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Like `torch.device("meta")`, but it also works for fairscale's layers. Those layers call the
    legacy constructor `torch.Tensor(rows, columns)`, which ignores the default device."""
    with torch.device("meta"), _MetaDeviceMode():
        yield
