"""Record the outputs of a model's modules by forward hooks."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llama.explain import tensors

LOGITS = "output"  # the module whose output is the logits


def module_names(n_layers: int) -> list[str]:
    """Meta's names of the modules that are recorded, in the order of computation."""
    return [name for name in tensors.names(n_layers) if tensors.kind_of(name).is_output]


@dataclass(frozen=True)
class Run:
    """What one implementation computed, on the CPU.

    outputs: of each module for the prompt, (S, features).
    tokens: the decoded ones.
    decoded: the logits from which they were chosen, (len(tokens), V).
    """

    outputs: dict[str, Tensor]
    tokens: list[int]
    decoded: Tensor


def record(
    modules: Mapping[str, nn.Module],
    forward: Callable[[], object],
    decode: Callable[[], list[int]],
    bar: Any,
) -> Run:
    """Record the outputs of the modules.

    forward: computes the prompt.
    decode: decodes tokens after the prompt, and returns them.
    bar: a progress bar. It advances by one for each forward of the model.
    """
    with torch.inference_mode():
        with _recording(modules, bar) as outputs:
            forward()
        with _recording({LOGITS: modules[LOGITS]}, bar) as steps:
            tokens = decode()
    decoded = torch.stack([logits[-1] for logits in steps[LOGITS]])
    return Run({name: output for name, (output,) in outputs.items()}, tokens, decoded)


@contextlib.contextmanager
def _recording(modules: Mapping[str, nn.Module], bar: Any) -> Iterator[dict[str, list[Tensor]]]:
    """The outputs of each module in its calls inside the block."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            outputs[name].append(output.flatten(0, -2).to("cpu", copy=True))
            if name == LOGITS:
                bar.update()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
