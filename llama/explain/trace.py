"""A trace: the recorded tensors of one prompt, by name."""

import difflib
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from llama.config import ModelArgs
from llama.errors import ExplainError
from llama.explain.tensors import kind_of
from llama.files import atomic_file
from llama.model import Transformer
from llama.sampling import hide_unknown
from llama.tokenizer import TextDecoder, Tokenizer


@dataclass(frozen=True)
class Step:
    """One recorded forward: the prefill of the prompt, or one decode step.

    Attributes:
        tokens: the ids that went in.
        start_pos: the position of the first one.
        tensors: every tensor of the forward, by name.
        next_token: the likeliest id after them.
    """

    tokens: Sequence[int]
    start_pos: int
    tensors: dict[str, Tensor]
    next_token: int


class Trace(Mapping[str, Tensor]):
    """The tensors of a prompt's forward, by name: `trace["layers.3.attention.weights"]`.

    `list(trace)` has the names in the order of computation. Under torchrun a trace has this rank's
    part of each tensor.

    Attributes:
        steps: the prefill of the prompt, then each decode step. The tensors of the trace itself are
            those of the prefill.
        tokenizer: of the traced Llama.
        params: the ModelArgs of its model.
    """

    def __init__(self, steps: Sequence[Step], tokenizer: Tokenizer, params: ModelArgs) -> None:
        self.steps = steps
        self.tokenizer = tokenizer
        self.params = params

    @property
    def tokens(self) -> list[int]:
        """The ids of the prompt."""
        return list(self.steps[0].tokens)

    @property
    def generated(self) -> list[int]:
        """The ids of the generated tokens. The last one may be a stop token."""
        return [step.next_token for step in self.steps]

    @property
    def text(self) -> str:
        """The generated text."""
        decoder = TextDecoder(self.tokenizer, is_continued=True)
        return "".join(decoder.push(token) for token in self.generated) + decoder.flush()

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.steps[0].tensors[name]
        except KeyError:
            raise unknown_name(name, list(self)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps[0].tensors)

    def __len__(self) -> int:
        return len(self.steps[0].tensors)

    def save(self, path: str | Path) -> None:
        """Write all tensors to a safetensors file at `path`. The tensors of the k-th decode step
        have `steps.k.` before their names. The ids are in the tensors `tokens` and `generated`.

        Raises DataError if the file cannot be written.
        """
        everything = {
            "tokens": torch.tensor(self.tokens),
            "generated": torch.tensor(self.generated),
        }
        for number, step in enumerate(self.steps):
            prefix = f"steps.{number}." if number else ""
            for name, tensor in step.tensors.items():
                everything[prefix + name] = tensor.contiguous()
        with atomic_file(path) as file:
            file.write(save(everything))

    def __repr__(self) -> str:
        return (
            f"<Trace of {len(self.tokens)} prompt tokens and {len(self.steps) - 1} decode steps, "
            f"{len(self)} tensors each>"
        )

    def _repr_html_(self) -> str:
        """The tables of tensors that a notebook shows. The table of a layer is folded at first."""
        parts = [f"<p>{html.escape(repr(self))}</p>"]
        layer_of = {name: name.split(".")[1] if name.startswith("layers.") else "" for name in self}
        for layer, names in groupby(self, layer_of.__getitem__):
            table = self._table(list(names))
            summary = f"<summary>layer {layer}</summary>"
            parts.append(f"<details>{summary}{table}</details>" if layer else table)
        return "".join(parts)

    def _table(self, names: Sequence[str]) -> str:
        head = ("name", "shape", "dtype", "formula", "least", "largest", "computed in")
        rows = ["".join(f"<th>{cell}</th>" for cell in head)]
        for name in names:
            tensor, kind = self[name], kind_of(name)
            seen = tensor[tensor.isfinite()]  # the scores of later tokens are minus infinity
            limits = [f"{seen.min():.3g}", f"{seen.max():.3g}"] if seen.numel() else ["–", "–"]
            cells = (
                name, " × ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."),
                kind.formula, *limits, kind.place,
            )  # fmt: skip
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def unknown_name(name: str, known: Sequence[str]) -> ExplainError:
    """The error for a name that no tensor has, with up to three similar names."""
    layers = {known_name.split(".")[1] for known_name in known if known_name.startswith("layers.")}
    parts = name.split(".")
    if parts[0] == "layers" and len(parts) > 1 and parts[1].isdecimal() and parts[1] not in layers:
        return ExplainError(f"no tensor is called {name}: the layers are 0 to {len(layers) - 1}")
    near = difflib.get_close_matches(name, known, 3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "list(trace) has all names"
    return ExplainError(f"no tensor is called {name}: {hint}")


@torch.no_grad()
def logit_lens(model: Transformer, trace: Trace, k: int = 5) -> tuple[Tensor, Tensor]:
    """What the model would predict if it ended after each layer: the final norm and the output
    matrix are applied to the residual stream there. The method is that of nostalgebraist 2020,
    "interpreting GPT: the logit lens".

    Args:
        model: the Transformer that was traced.
        trace: its tensors.
        k: how many of the likeliest tokens are returned.

    Returns the ids of the k likeliest next tokens and their probabilities, each (n_layers + 1, S,
    k). Row 0 is the embedding, the last row is the model's own prediction.
    Raises ExplainError if k is below 1 or the vocabulary has fewer than k tokens.
    """
    if not 1 <= k <= model.vocab_size:
        raise ExplainError(f"k is {k}: it must be between 1 and {model.vocab_size}")
    stages = ["tok_embeddings", *(f"layers.{i}" for i in range(model.n_layers))]
    found = []
    for stage in stages:
        logits = model.logits(model.norm(trace[stage]))[0]  # (S, V)
        found.append(hide_unknown(logits, trace.tokenizer.n_words).softmax(-1).topk(k))
    return torch.stack([top.indices for top in found]), torch.stack([top.values for top in found])
