"""Run a function on several gloo ranks. Each rank is a process, as under torchrun."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# Ranks are forked from a server process. It has imported these modules and run nothing else.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["llama.generation", "llama.fast.cpu.kernels.matmul", "pytest"])


def free_port() -> int:
    """A TCP port that no process uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(n: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(*args) on n ranks. Returns their results in rank order.

    folder: ranks write their results there. An exception on a rank raises an exception here, with
    the rank's traceback.
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
