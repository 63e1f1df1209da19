"""Memory that compiled kernels write. It never follows the caller's default dtype or device."""

import torch
from torch import Tensor


def float_buffer(*shape: int) -> Tensor:
    """An uninitialized float32 tensor on the CPU."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def int8_buffer(*shape: int) -> Tensor:
    """An uninitialized int8 tensor on the CPU."""
    return torch.empty(*shape, dtype=torch.int8, device="cpu")
