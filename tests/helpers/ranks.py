"""Run a function on several gloo ranks, each a process of its own, as torchrun would."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# Processes are forked from one that has imported what they need and has done nothing else.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["llama.generation", "llama.fast.cpu.kernels.matmul", "pytest"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(n: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(*args) on n ranks; returns what each returned, in rank order.

    An exception of a rank becomes a RuntimeError with its traceback here.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    arguments = (environment, folder, function, args)
    mp.start_processes(_rank, arguments, nprocs=n, start_method="forkserver")
    return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(n)]


def _rank(
    rank: int, environment: dict[str, str], folder: Path, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        result = function(*args)
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(result, folder / f"result.{rank}")
