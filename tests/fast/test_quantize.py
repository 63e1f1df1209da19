"""int8 and int4 weights: their values, their rounding errors, and the loss of accuracy."""

import pytest
import torch

from llama import Llama
from llama.errors import ConfigError
from llama.fast.cpu.kernels.round_int4 import round_int4
from llama.fast.quantize import dequantize, quantize_int4, quantize_int8

W = torch.randn(72, 192, generator=torch.Generator().manual_seed(0))


def test_int8_is_within_half_a_step() -> None:
    weight = quantize_int8(W)
    assert weight.values.dtype == torch.int8
    assert weight.shape == W.shape
    assert weight.values.abs().amax((1, 3)).eq(127).all()
    assert ((dequantize(weight) - W).abs() <= weight.scale[:, None] * 0.5001).all()


def test_int4_is_within_a_step_of_its_group() -> None:
    weight = quantize_int4(W)
    assert weight.packed.shape == (9, 6, 128)
    assert weight.scales.shape == (9, 6, 8)
    assert weight.shape == W.shape
    error = (dequantize(weight) - W).unflatten(1, (-1, 32)).abs().amax(-1)
    scales = weight.scales.transpose(1, 2).flatten(0, 1).float()
    assert (error <= scales.abs() * 1.05).all()
    assert (dequantize(weight) - W).norm() < 0.1 * W.norm()


def test_layouts() -> None:
    w = torch.zeros(16, 64)
    w[9, 0], w[9, 1], w[9, 33], w[9, 50] = -8, 3, -8, 7
    four = quantize_int4(w)
    assert four.packed[1, 0, 4:7].tolist() == [0x80, 0x8B, 0x88]
    assert four.packed[1, 1, 4:8].tolist() == [0x88, 0x80, 0xF8, 0x88]
    assert torch.equal(dequantize(four), w)
    eight = quantize_int8(w / 8 * 127)
    assert eight.values[1, 8, 1].tolist() == [0, -127, 0, 0]
    torch.testing.assert_close(dequantize(eight), w / 8 * 127, rtol=0, atol=0.5)


def test_rows_are_filled_up_to_eights() -> None:
    for quantize in (quantize_int8, quantize_int4):
        weight = quantize(W[:70])
        assert weight.shape == (72, 192)
        assert torch.equal(dequantize(weight)[:70], dequantize(quantize(W))[:70])
        assert not dequantize(weight)[70:].any()


def test_zeros_and_bfloat16() -> None:
    for quantize in (quantize_int8, quantize_int4):
        assert not dequantize(quantize(torch.zeros(8, 64))).any()
        assert torch.equal(
            dequantize(quantize(W.bfloat16())), dequantize(quantize(W.bfloat16().float()))
        )


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"matrix of floats can be quantized, not .*\(64,\)"):
        quantize_int8(W[0, :64])
    with pytest.raises(
        ConfigError,
        match="a row of 40 weights cannot be quantized: the number must be a multiple of 32",
    ):
        quantize_int8(W[:, :40])
    bad = W.clone()
    bad[3, 3] = float("nan")
    for quantize in (quantize_int8, quantize_int4):
        with pytest.raises(ConfigError, match="not finite"):
            quantize(bad)


def test_the_bundled_model_hardly_notices() -> None:
    """Perplexity of texts that the model has generated rises by 0.5 % at most in int8, 4 % in
    int4."""
    llama = Llama.build(device="cpu", max_batch_size=1)
    (told,) = llama.text_completion(["Once upon a time"], max_gen_len=200, temperature=0.8, seed=1)
    tokens = llama.tokenizer.encode("Once upon a time" + told["generation"], bos=True, eos=False)
    weights = [w for name, w in llama.model.named_parameters() if w.dim() == 2]
    kept = [w.detach().clone() for w in weights]

    def nats() -> float:
        (logprobs,) = llama.score([tokens])
        return -sum(logprobs) / len(logprobs)

    before = nats()
    for quantize, limit in ((quantize_int8, 0.005), (quantize_int4, 0.04)):
        for weight, whole in zip(weights, kept, strict=True):
            weight.data = dequantize(quantize(whole))
        assert nats() - before <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [72, 69])
def test_the_compiled_loop_rounds_alike(dtype: torch.dtype, rows: int) -> None:
    w = W[:rows].to(dtype)
    w[3, 32:64], w[5, 7] = 0, 100
    compiled, plain = round_int4(w), quantize_int4(w)
    assert torch.equal(compiled.scales, plain.scales)
    assert torch.equal(compiled.packed, plain.packed)


def test_the_compiled_loop_refuses_alike() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        w = W.clone()
        w[71, 191] = bad
        with pytest.raises(ConfigError, match="weights that are not finite"):
            round_int4(w)
    with pytest.raises(ConfigError, match="a row of 31 weights cannot be quantized"):
        round_int4(torch.ones(2, 31))
