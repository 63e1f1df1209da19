"""Narrow weights in the layout of a GPU have the values of the rounded weights, in every layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.models import make_model
from helpers.ranks import run_ranks

from llama import parallel
from llama.errors import ConfigError
from llama.fast.gpu.device_weights import Matrix, NarrowLinear, joined, narrow, narrowed
from llama.fast.quantize import dequantize, quantize_int4, quantize_int8

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(8, 32), (20, 96), (33, 64)])
@pytest.mark.parametrize("width", ["int8", "int4"])
def test_stands_for_what_the_kernels_weight_stands_for(width: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    quantized = quantize_int8(weight) if width == "int8" else quantize_int4(weight)
    got = narrowed(weight, width, len(weight)).widened(torch.float32)
    assert torch.equal(got, dequantize(quantized)[: shape[0]])


def test_fp8_rounds_to_e4m3() -> None:
    weight = torch.randn(20, 96) * torch.logspace(-6, 6, 20)[:, None]
    weight[3] = 0
    rounded = narrowed(weight, "fp8", len(weight))
    got = rounded.widened(torch.float32)
    # fp8 has three mantissa bits: an error of 1/16 of a number, or half of the smallest step of a
    # row.
    limit = (weight.abs() / 16).maximum(rounded.scales[:, None] * 2**-10)
    assert ((got - weight).abs() <= limit * 1.001).all()
    torch.testing.assert_close(got.abs().amax(1), weight.abs().amax(1))


@pytest.mark.parametrize("width", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_widened_matrix(width: str, dtype: torch.dtype) -> None:
    layer = make_model().layers[0].feed_forward.w1
    linear = NarrowLinear(layer, width, CPU)
    x = torch.randn(3, 1, layer.weight.shape[1], dtype=dtype)
    matrix = Matrix(linear.values, linear.scales, width)
    assert torch.equal(linear(x), F.linear(x, matrix.widened(torch.float32).to(dtype)))


@pytest.mark.parametrize("width", ["int8", "int4", "fp8"])
def test_all_matrices_but_the_embedding(width: str) -> None:
    model = make_model()
    narrow(model, width, CPU)
    wide = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    assert wide == ["tok_embeddings.weight"]
    once = model.layers[0].attention.wq
    narrow(model, width, CPU)
    assert model.layers[0].attention.wq is once


@pytest.mark.parametrize("width", [None, "int8", "int4", "fp8"])
def test_layers_keep_views_of_joined_rows(width: str | None) -> None:
    model = make_model()
    with torch.inference_mode():
        want = model(torch.arange(12).view(1, 12), 0)
    if width is not None:
        narrow(model, width, CPU)
        with torch.inference_mode():
            want = model(torch.arange(12).view(1, 12), 0)
    attention = model.layers[0].attention
    layers = attention.wq, attention.wk, attention.wv
    matrix = joined(*layers)
    held = [layer.weight if width is None else layer.values for layer in layers]
    storage = matrix.values.untyped_storage().data_ptr()
    assert all(rows.untyped_storage().data_ptr() == storage for rows in held)
    assert matrix.n_rows == sum(map(len, held))
    with torch.inference_mode():
        assert torch.equal(model(torch.arange(12).view(1, 12), 0), want)


def logits_on_rank(width: str) -> Any:
    parallel.initialize()
    model = make_model()
    narrow(model, width, CPU)
    with torch.inference_mode():
        return model(torch.arange(12).view(1, 12), 0)


def test_two_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, tmp_path, logits_on_rank, "int8")
    want = logits_on_rank("int8")
    assert torch.equal(first, second)
    assert (first - want).std() / want.std() < 0.02  # a rank has its own scales of wo and w2


@pytest.mark.parametrize("width", ["int8", "int4", "fp8"])
def test_what_is_not_finite(width: str) -> None:
    with pytest.raises(ConfigError, match="not finite cannot be quantized"):
        narrowed(torch.full((8, 32), torch.nan), width, 8)
