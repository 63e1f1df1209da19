"""What int8 and int4 weights stand for, how far that is from the weights, and what it costs."""

import pytest
import torch

from llama import Llama
from llama.errors import ConfigError
from llama.quantize import dequantize, quantize_int4, quantize_int8

W = torch.randn(70, 192, generator=torch.Generator().manual_seed(0))


def test_int8_is_within_half_a_step() -> None:
    weight = quantize_int8(W)
    assert weight.values.dtype == torch.int8
    assert weight.values.abs().amax(1).eq(127).all()
    assert ((dequantize(weight) - W).abs() <= weight.scale[:, None] * 0.5001).all()


def test_int4_is_within_a_step_of_its_group() -> None:
    weight = quantize_int4(W)
    assert weight.packed.shape == (70, 96)
    assert weight.scales.shape == (70, 6)
    assert weight.shape == W.shape
    error = (dequantize(weight) - W).unflatten(1, (-1, 32)).abs().amax(-1)
    assert (error <= weight.scales.float().abs() * 1.05).all()
    assert (dequantize(weight) - W).norm() < 0.1 * W.norm()


def test_int4_layout() -> None:
    w = torch.zeros(1, 64)
    w[0, 0], w[0, 1], w[0, 33] = -8, 3, -8
    w[0, 34] = 7
    weight = quantize_int4(w)
    assert weight.packed[0, :3].tolist() == [0x80, 0x0B, 0xF8]
    assert torch.equal(dequantize(weight), w)


def test_zeros_and_bfloat16() -> None:
    for quantize in (quantize_int8, quantize_int4):
        assert not dequantize(quantize(torch.zeros(2, 64))).any()
        assert torch.equal(
            dequantize(quantize(W.bfloat16())), dequantize(quantize(W.bfloat16().float()))
        )


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"matrix of floats can be quantized, not .*\(64,\)"):
        quantize_int8(W[0, :64])
    with pytest.raises(ConfigError, match="a row of 40 weights cannot be quantized: 32 go"):
        quantize_int8(W[:, :40])
    with pytest.raises(ConfigError, match="a row of 96 weights cannot be quantized: 64 go"):
        quantize_int4(W[:, :96])
    bad = W.clone()
    bad[3, 3] = float("nan")
    for quantize in (quantize_int8, quantize_int4):
        with pytest.raises(ConfigError, match="not finite"):
            quantize(bad)


def test_the_bundled_model_hardly_notices() -> None:
    """Perplexity of what the model itself tells: int8 adds 0.5 % at most, int4 4 %."""
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
