"""The formula for the memory of training, beside what autograd keeps and what tensors take."""

from typing import Any

import pytest
import torch
from helpers.training import ARGS, Rows, make_model
from torch import Tensor

from llama import ModelArgs
from llama.config import PRESETS
from llama.errors import LlamaError
from llama.training.loop import checkpoint_activations
from llama.training.lora import LoraOptions, add_lora, trained
from llama.training.memory import describe_training, training_memory

SHAPE: dict[str, Any] = dict(dim=128, n_heads=8, hidden_dim=320, n_layers=4)
LORAS = [LoraOptions(4, 8), LoraOptions(8, 8, targets=("wq", "w2"))]


@pytest.mark.parametrize(
    ("lora", "dtype"),
    [
        (None, torch.float32),  # the only dtype of weights that are all trained
        (LORAS[0], torch.float32),
        (LORAS[0], torch.bfloat16),
        (LORAS[1], torch.bfloat16),
    ],
)
def test_what_autograd_keeps(lora: LoraOptions | None, dtype: torch.dtype) -> None:
    """Small vectors are left out of the formula: of the norms, and attention's sums."""
    model = make_model(**SHAPE).to(dtype)
    if lora is not None:
        add_lora(model, lora, seed=1)
    weights = [weight.untyped_storage().data_ptr() for weight in model.parameters()]
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs, _ = Rows(2, 60).next_batch()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.features(inputs)
    activations = {
        place: tensor.untyped_storage().nbytes()
        for place, tensor in kept.items()
        if place not in weights and tensor.shape[:1] not in ((8,), (128,), (320,), (4,))
    }
    needed = training_memory(model.params, 2, 60, lora, dtype)
    # The input of the last norm is the next one after the layers.
    extra = 2 * 60 * 128 * 4 * (2 if lora is None else 1)
    assert needed.activations + extra == pytest.approx(sum(activations.values()), rel=0.02)


@pytest.mark.parametrize("lora", LORAS)
def test_the_size_of_weights_and_adapter(lora: LoraOptions) -> None:
    model = make_model()
    base = sum(weight.nbytes for weight in model.parameters())
    add_lora(model, lora, seed=1)
    adapter = sum(weight.nbytes for weight in trained(model).values())
    needed = training_memory(ModelArgs(**ARGS), 1, 8, lora)
    assert (needed.weights, needed.adapter) == (base, adapter)
    assert needed.gradients + needed.optimizer == 3 * adapter
    halves = training_memory(ModelArgs(**ARGS), 1, 8, lora, mp_size=2)
    assert needed.adapter / 2 < halves.adapter < needed.adapter


def test_checkpointing_keeps_the_inputs_of_the_layers() -> None:
    model = make_model(**SHAPE)
    add_lora(model, LORAS[0], seed=1)
    checkpoint_activations(model)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs, _ = Rows(2, 60).next_batch()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.features(inputs)
    args, tokens = model.params, 2 * 60
    saving, plain = (
        training_memory(args, 2, 60, LORAS[0], checkpointed=checkpointed).activations
        for checkpointed in (True, False)
    )
    inputs_of_layers = saving - plain // args.n_layers
    assert inputs_of_layers == args.n_layers * tokens * args.dim * 4
    table = model.freqs_cis[:60].nbytes
    assert inputs_of_layers <= sum(kept.values()) + table


def test_published_models_fit_where_they_should() -> None:
    """Full training of 8B takes 16 bytes a weight. Changes of an int4 base fit a GPU of 24 GB."""
    args, lora = PRESETS["llama-3.1-8b"], LoraOptions(16, 32)
    assert training_memory(args, 1, 2048).peak > 16 * 8.03e9
    rounded = training_memory(args, 1, 2048, lora, torch.bfloat16, "int4", checkpointed=True)
    assert rounded.peak < 10e9
    # int4 takes half a byte and a share of a scale; the embedding is not rounded.
    assert rounded.weights == pytest.approx(0.5625 * 7.5e9 + 2 * 128256 * 4096, rel=0.01)


def test_the_report() -> None:
    lora = LoraOptions(16, 32)
    shown = describe_training("llama-3.2-1b", 1, 2048, lora, "bfloat16", None, True, 1)
    assert shown.startswith("Training llama-3.2-1b: 1 × 2,048 tokens a step\n")
    assert "weights in bfloat16, frozen     2.30 GiB" in shown
    for bad, message in (
        (("llama-3.2-1b", 0, 2048, lora, "bfloat16", None, True, 1), "batch is 0"),
        (("llama-3.2-1b", 1, 999999, lora, "bfloat16", None, True, 1), "context is 131072"),
        (("llama-3.2-1b", 1, 9, None, "bfloat16", "int8", True, 1), "give lora_r"),
        (("llama-3.2-1b", 1, 9, lora, "bfloat16", "fp8", True, 1), "quantize is 'fp8'"),
        (("llama-3.2-1b", 1, 9, lora, "bfloat16", None, True, 3), "cannot be split over 3 ranks"),
        (("nothing", 1, 9, lora, "bfloat16", None, True, 1), "no such folder: nothing"),
    ):
        with pytest.raises(LlamaError, match=message):
            describe_training(*bad)  # type: ignore[arg-type]
