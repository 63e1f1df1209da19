"""Capture work on static tensors in CUDA graphs. Without a GPU the work is called directly."""

from collections.abc import Callable, Hashable

import torch

WARM_UPS = 2  # the first compiles kernels and makes workspaces and connections


class Graphs:
    """Functions without arguments that read and write tensors which stay where they are.

    On a GPU each is captured when it is first run: from then on all of its kernels are launched at
    once, and Python runs none of it. It must give the same when it runs again, and must not wait
    for the GPU. Ranks that talk to each other in one run it at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._pool = (
                torch.cuda.graph_pool_handle()
            )  # one pool, because graphs run one after the other

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run the work. For one key it must be the same every time."""
        if self._device.type != "cuda":
            work()
            return
        if key not in self._captured:
            with torch.cuda.device(self._device):
                self._captured[key] = self._capture(work)
        self._captured[key].replay()

    def _capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may use the GPU during the capture.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()
        return graph


def next_power_of_two(n: int) -> int:
    """The least power of two that is n or more. Few sizes mean few graphs."""
    return 1 << (n - 1).bit_length()
