"""The function that rounds a matrix to a width: compiled where numba is installed."""

from collections.abc import Callable

from torch import Tensor

from llama.fast.cpu.kernels.product import is_installed
from llama.fast.quantize import Quantized, quantize_int4, quantize_int8


def _to_int4(w: Tensor) -> Quantized:
    if w.device.type != "cpu" or not is_installed():
        return quantize_int4(w)
    from llama.fast.cpu.kernels.round_int4 import round_int4

    return round_int4(w)


# For a CPU and for checkpoint folders. For a GPU see `gpu/device_weights.py`.
QUANTIZERS: dict[str, Callable[[Tensor], Quantized]] = {"int8": quantize_int8, "int4": _to_int4}
