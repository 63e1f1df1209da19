"""LoRA changes in mode fast on a CPU: they are added to the products' results, token by token.

The kernels compute them too. So to the last bit, a token's result does not depend on other tokens.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.adapters import Change
from llama.fast.cpu.kernels.product import Product


def tokens_by_number(numbers: Sequence[int], seqlen: int) -> dict[int, Tensor]:
    """The indices of the tokens with an adapter in a batch of rows of `seqlen` tokens, by the
    adapter's number. numbers: those of the rows' adapters; 0 for a row without one."""
    found: dict[int, list[int]] = {}
    for row, number in enumerate(numbers):
        if number:
            found.setdefault(number, []).extend(range(row * seqlen, (row + 1) * seqlen))
    return {number: torch.tensor(places) for number, places in found.items()}


class ProductChanges:
    """The changes of the matrices that one `Product` multiplies, by several adapters.

    changes: for each matrix, by the adapters' numbers.
    """

    def __init__(self, product: Product, changes: Sequence[Mapping[int, Change]]) -> None:
        self._by_adapter: dict[int, list[tuple[slice, Product, Product]]] = {}
        start = 0
        for weight, by_number in zip(product.weights, changes, strict=True):
            for number, (a, b) in by_number.items():
                columns = slice(start, start + len(b))
                pair = Product(a.contiguous()), Product(b.contiguous())
                self._by_adapter.setdefault(number, []).append((columns, *pair))
            start += weight.shape[0]  # the rows of quantized weights may be padded
        # SwiGLU's product overwrites the first of its two results.
        self._gate: Product | None = None
        if product.swiglu and self._by_adapter:
            biases = None if product.biases is None else product.biases[:1]
            self._gate = Product(product.weights[0], biases=biases)

    def add(self, x: Tensor, out: Tensor, n: int, tokens: Mapping[int, Tensor]) -> None:
        """Add the changes to the results of n tokens.

        x: (≥ n, K). out: (≥ n, N); for SwiGLU (≥ 2 n, F), with x w3^T in the rows from n on.
        tokens: the indices of the tokens that have an adapter, by its number.
        """
        for number in tokens.keys() & self._by_adapter.keys():
            places = tokens[number]
            inputs = x[places]
            if self._gate is None:
                out[places] = self._changed(number, inputs, out[places])
                continue
            both = torch.cat((self._gate(inputs), out[n + places]), 1)
            gate, up = self._changed(number, inputs, both).chunk(2, 1)
            out[places] = F.silu(gate) * up

    def _changed(self, number: int, x: Tensor, out: Tensor) -> Tensor:
        for columns, down, up in self._by_adapter[number]:
            out[:, columns] += up(down(x))
        return out
