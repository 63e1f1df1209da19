"""Capture work on static tensors in CUDA graphs. Without a GPU the work is called directly."""

from collections.abc import Callable, Hashable

import torch

WARM_UPS = 2  # runs before a capture; the first compiles kernels and allocates workspaces


class Graphs:
    """Captures and replays functions without arguments, on tensors that keep their addresses.

    On a GPU, the first run of a function captures it. Later runs launch all of its kernels at once,
    without Python. A function must do the same work each time, and must not wait for the GPU.
    If it calls collectives, all ranks must run it at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._captured: dict[Hashable, torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # All graphs share one memory pool, because they run one after the other.
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run the work. The same key must always come with the same work."""
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
