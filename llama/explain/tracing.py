"""Run a prompt through a model and record every tensor. The model's code is not changed.

Hooks record what modules return. A `TorchFunctionMode` records what is computed inside attention.
It sees every PyTorch function that this thread calls. Attention calls `type_as` three times: on the
rotated queries, on the rotated keys, and on the attention weights.
"""

import fnmatch
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from llama.cache import KVCache
from llama.errors import ExplainError
from llama.explain import tensors
from llama.explain.edits import Edit
from llama.explain.trace import Step, Trace, unknown_name
from llama.generation import Llama
from llama.lost_ranks import naming_lost_ranks
from llama.model import Transformer
from llama.sampling import hide_unknown
from llama.tokenizer import Dialog

CASTS = ("queries", "keys", "weights")  # the tensors on which attention calls type_as, in order


def trace(
    llama: Llama,
    prompt: str | Sequence[int] | Dialog,
    max_gen_len: int = 1,
    edits: Mapping[str, Edit] | None = None,
    ignore_eos: bool = False,
) -> Trace:
    """Run a prompt through the model and record every tensor.

    Without edits, the logits are bit-equal to those of a prompt that runs alone in reference mode.
    Under torchrun every rank must call this. Each records and edits its own part of the tensors.

    Args:
        llama: of any mode, with weights that are not quantized.
        prompt: a text, a dialog or token ids.
        max_gen_len: tokens to generate, fewer if a stop token comes first. Each is the likeliest
            one. The first follows from the prompt's own forward. Each further one takes a decode
            step, which is recorded too.
        edits: functions that change tensors during each forward, by name. A name may have
            wildcards, such as "layers.*.attention.heads". See `scale`, `replace` and `knock_out`.
            The rest of the forward, and the further steps, use the changed tensors.
        ignore_eos: go on after a stop token.

    Raises ExplainError for a name that is unknown or cannot be edited, for a quantized model, and
    where the prompt does not fit; and what `Llama.encode_prompt` raises.
    """
    model = llama.model
    wq: Any = model.get_submodule("layers.0.attention.wq")
    if not isinstance(wq.weight, Tensor):
        raise ExplainError("the weights are quantized: trace needs a model built without quantize")
    ids = llama.encode_prompt(prompt)
    _check(model, ids, max_gen_len)
    edits_by_name = _edits_by_name(edits or {}, tensors.names(model.n_layers))
    cache = model.make_cache(1, len(ids) + max_gen_len - 1)
    steps: list[Step] = []
    fed, start_pos = ids, 0
    for _ in tqdm(range(max_gen_len), desc="trace", unit="step", disable=max_gen_len < 8):
        recorded = _record(model, cache, fed, start_pos, edits_by_name)
        logits = hide_unknown(recorded["output"][0, -1], llama.tokenizer.n_words)
        chosen = int(logits.argmax())
        steps.append(Step(fed, start_pos, recorded, chosen))
        fed, start_pos = [chosen], start_pos + len(fed)
        if chosen in llama.tokenizer.stop_tokens and not ignore_eos:
            break
    return Trace(steps, llama.tokenizer, model.params)


def _check(model: Transformer, ids: Sequence[int], max_gen_len: int) -> None:
    if not isinstance(max_gen_len, int) or isinstance(max_gen_len, bool) or max_gen_len < 1:
        raise ExplainError(f"max_gen_len is {max_gen_len!r}: it must be 1 or above")
    if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
        raise ExplainError("the prompt must be a text, a dialog or a list of token ids")
    if not ids:
        raise ExplainError("the prompt has no tokens")
    if wrong := [i for i in ids if not 0 <= i < model.vocab_size]:
        raise ExplainError(f"token id {wrong[0]}: the model has ids 0 to {model.vocab_size - 1}")
    n_positions, most = len(ids) + max_gen_len - 1, model.params.max_seq_len
    if n_positions > most:
        raise ExplainError(
            f"the prompt has {len(ids)} tokens and {max_gen_len} are to be generated, but "
            f"max_seq_len is {most}"
        )


def _edits_by_name(edits: Mapping[str, Edit], names: Sequence[str]) -> dict[str, list[Edit]]:
    """The edits of each tensor. Raises ExplainError for a name that is unknown or not editable."""
    found: dict[str, list[Edit]] = {}
    for pattern, edit in edits.items():
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise unknown_name(pattern, names)
        for name in matches:
            if not tensors.kind_of(name).is_editable:
                raise ExplainError(
                    f"{name} cannot be edited, because the model does not read a changed value "
                    "everywhere: edit a tensor that it is computed from"
                )
            found.setdefault(name, []).append(edit)
    return found


@torch.no_grad()
def _record(
    model: Transformer,
    cache: KVCache,
    ids: Sequence[int],
    start_pos: int,
    edits: Mapping[str, list[Edit]],
) -> dict[str, Tensor]:
    """Run one forward. Returns its tensors by name, in the order of `tensors.names`."""
    recorder = _Recorder(model, edits)
    with recorder.hooks(), recorder, naming_lost_ranks():
        model(torch.tensor([ids], device=model.device), start_pos, cache)
    end = start_pos + len(ids)
    found = recorder.found
    found["freqs_cis"] = torch.view_as_real(model.freqs_cis[start_pos:end])
    for i in range(model.n_layers):
        keys, values = cache.layer(i).widened(1, end, cache.k.dtype)
        found[f"layers.{i}.attention.cache_k"] = keys.clone()  # later steps write to the cache
        found[f"layers.{i}.attention.cache_v"] = values.clone()
    names = tensors.names(model.n_layers)
    if missing := [name for name in names if name not in found]:
        raise ExplainError(
            f"{missing[0]} was not seen: the model's code differs from llama/model.py"
        )
    return {name: found[name] for name in names}


class _Recorder(TorchFunctionMode):
    """Records and edits the tensors of one forward in this thread.

    Other threads may use the model at the same time. Their calls run the same hooks, which do
    nothing there.
    """

    def __init__(self, model: Transformer, edits: Mapping[str, list[Edit]]) -> None:
        super().__init__()
        self.model, self.edits = model, edits
        self.found: dict[str, Tensor] = {}
        self.attention: str | None = None  # name of the attention layer that is computed now
        self.casts: Iterator[str] = iter(())  # names of what its next calls of type_as return
        self.thread = threading.get_ident()

    def see(self, name: str, tensor: Tensor) -> Tensor:
        """Record a tensor after its edits, and return it."""
        if threading.get_ident() != self.thread:
            return tensor
        # An edit may call any function. Its calls are not those of attention.
        attention, self.attention = self.attention, None
        for edit in self.edits.get(name, ()):
            edited = edit(tensor)
            if not isinstance(edited, Tensor) or edited.shape != tensor.shape:
                what = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
                raise ExplainError(
                    f"the edit of {name} returned {what}: it must be a tensor of shape "
                    f"{list(tensor.shape)}"
                )
            tensor = edited.to(tensor)
        self.attention = attention
        self.found[name] = tensor
        return tensor

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if self.attention is None:
            return func(*args, **(kwargs or {}))
        if func is Tensor.softmax:
            args = (self.see(f"{self.attention}.scores", args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func is Tensor.type_as and (cast := next(self.casts, None)):
            result = self.see(f"{self.attention}.{cast}", result)
        return result

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """The hooks of all modules. They are removed at the end of the block."""
        with ExitStack() as stack:
            for name in tensors.names(self.model.n_layers):
                kind = tensors.kind_of(name)
                if kind.is_output:
                    stack.enter_context(self._output(name, self.model.get_submodule(name)))
                elif kind.input_of:
                    stack.enter_context(self._input(name, kind))
            for i in range(self.model.n_layers):
                stack.enter_context(self._inside(f"layers.{i}.attention"))
            yield

    def _output(self, name: str, module: nn.Module) -> Any:
        """A hook that records what the module returns."""
        return module.register_forward_hook(lambda module, inputs, output: self.see(name, output))

    def _input(self, name: str, kind: tensors.Kind) -> Any:
        """A hook that records the input of the module `kind.input_of`, with the heads of "H hd" in
        a dimension of their own."""
        layer = ".".join(name.split(".")[:2])
        module = self.model.get_submodule(kind.input_of.replace("layers.N", layer))
        head_dim = self.model.params.head_dim if kind.shape.endswith(" H hd") else None

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,) = inputs
            if head_dim is None:
                return (self.see(name, x),)
            return (self.see(name, x.unflatten(-1, (-1, head_dim))).flatten(-2),)

        return module.register_forward_pre_hook(hook)

    @contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        """Hooks by which `__torch_function__` knows that this attention layer computes."""
        module = self.model.get_submodule(name)

        def set_attention(attention: str | None) -> None:
            if threading.get_ident() == self.thread:
                self.attention, self.casts = attention, iter(CASTS)

        with (
            module.register_forward_pre_hook(lambda *_: set_attention(name)),
            module.register_forward_hook(lambda *_: set_attention(None)),
        ):
            yield
