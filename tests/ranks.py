"""Run a function on several gloo ranks, each a process of its own, as torchrun would."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(n: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(*args) on n ranks; returns what each returned, in rank order.

    An exception of a rank becomes a RuntimeError with its traceback here.
    """
    mp.start_processes(_rank, (n, free_port(), folder, function, args), nprocs=n)
    return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(n)]


def _rank(rank: int, n: int, port: int, folder: Path, function: Callable[..., Any], args: Any):
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        result = function(*args)
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(result, folder / f"result.{rank}")
