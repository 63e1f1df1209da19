"""Work on static tensors as one CUDA graph; without a GPU it is called as it is."""

from collections.abc import Callable
from typing import Any

import torch

WARM_UPS = 2  # the first compiles kernels and makes workspaces and connections


class Captured:
    """A function without arguments that reads and writes tensors which stay where they are.

    On a GPU it is captured when this is made: then a call launches all of its kernels at once, and
    Python runs none of it. It must give the same when it runs again, and must not wait for the GPU.
    Ranks that talk to each other in it make theirs at the same time.

    pool: of the memory used on the way, for several that never run at the same time.
    """

    def __init__(
        self,
        work: Callable[[], None],
        device: torch.device,
        pool: Any = None,
    ) -> None:
        self._run: Callable[[], None] = work
        if device.type != "cuda":
            return
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU, as NCCL's watchdog does.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        self._run = graph.replay

    def __call__(self) -> None:
        self._run()


def pool_of(device: torch.device) -> Any:
    """A new pool of memory for graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below n: few sizes mean few graphs."""
    return 1 << (n - 1).bit_length()
