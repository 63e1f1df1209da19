"""A step of compiled tasks equals the model, and a token does not depend on other tokens."""

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.models import make_sharp_model
from torch import Tensor

from llama import Transformer
from llama.cache import KVCache
from llama.errors import GenerationError
from llama.fast.cpu.kernels import layer_ops
from llama.fast.cpu.kernels.exponential import exp
from llama.fast.cpu.kernels.isa import ISAS, instruction_sets
from llama.fast.cpu.kernels.task_list import TaskList
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.quantize import Width, dequantize, is_quantized
from llama.fast.quantizers import QUANTIZERS

VOCAB = 300
SHAPE: dict[str, Any] = dict(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=64, norm_eps=1e-5
)


def make_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    model = make_sharp_model(5, dtype, **SHAPE | changes, max_seq_len=2100)
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight, 0.0, 0.5, generator)
    return model


BIASED: dict[str, Any] = dict(attention_bias=True, mlp_bias=True)


def filled(network: FastTransformer, rows: int, positions: int) -> KVCache:
    """A cache with random numbers at all positions."""
    cache = network.make_cache(rows, positions)
    generator = torch.Generator().manual_seed(2)
    for tensor in (cache.k, cache.v):
        tensor.normal_(generator=generator)
    return cache


def copy_of(cache: KVCache) -> KVCache:
    return KVCache(cache.k.clone(), cache.v.clone())


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [40, 1, 7]])
@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"dim": 96}, BIASED, {"mlp_bias": True}]
)
def test_logits_are_the_models(pieces: list[int], changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    network = FastTransformer(model)
    tokens = torch.randint(0, VOCAB, (1, sum(pieces)))
    cache = network.make_cache(1, sum(pieces))
    found, start = [], 0
    for piece in pieces:  # start positions as numbers and as tensors
        at = start if piece == 1 else torch.tensor([start])
        part = tokens[:, start : start + piece]
        found.append(network.logits(network.features(part, at, cache)))
        start += piece
    torch.testing.assert_close(torch.cat(found, 1), model(tokens, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seqlen", [1, 3])
def test_rows_at_positions_of_their_own(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, seqlen: int, isa: str
) -> None:
    monkeypatch.setenv("LLAMA_ISA", isa)
    # Some instruction sets round the activations to bfloat16, and float32 does not.
    is_rounded = dtype == torch.bfloat16 and ISAS[isa].has_pairs
    tolerance = dict(rtol=0.0, atol=0.05) if is_rounded else dict(rtol=1e-4, atol=1e-4)
    network = FastTransformer(make_model(dtype))
    tokens, starts = torch.randint(0, VOCAB, (4, seqlen)), torch.tensor([0, 70, 5, 63])
    one, two = filled(network, 4, 80), filled(network, 4, 80)
    got = network.features(tokens, starts, one)
    want = make_model(dtype).float().features(tokens, starts, two)
    torch.testing.assert_close(got, want, **tolerance)
    for mine, theirs in ((one.k, two.k), (one.v, two.v)):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights(quantize: Width) -> None:
    """Equal to a model with the rounded weights, except for the rounding of activations."""
    network, plain = FastTransformer(make_model(), quantize), make_model()
    for name, weight in plain.named_parameters():
        if is_quantized(name):
            weight.copy_(dequantize(QUANTIZERS[quantize](weight))[: len(weight)])
    tokens, starts = torch.randint(0, VOCAB, (3, 2)), torch.tensor([0, 33, 70])
    cache = filled(network, 3, 80)
    want = plain.features(tokens, starts, copy_of(cache))
    got = network.features(tokens, starts, cache)
    assert (got - want).std() / want.std() < 0.03


@pytest.mark.parametrize("changes", [{}, BIASED], ids=["plain", "biases"])
@pytest.mark.parametrize("quantize", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("isa", instruction_sets())
def test_a_token_does_not_depend_on_its_company(
    monkeypatch: pytest.MonkeyPatch, isa: str, quantize: Width | str, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv("LLAMA_ISA", isa)
    if quantize in ("float32", "bfloat16"):
        network = FastTransformer(make_model(getattr(torch, quantize), **changes))
    else:
        network = FastTransformer(make_model(**changes), quantize)
    tokens = torch.randint(0, VOCAB, (8, 3))
    starts = torch.arange(8) * 17
    before = filled(network, 8, 130)
    together = copy_of(before)
    features = network.features(tokens, starts, together)
    logits = network.logits(features)
    for row in range(8):
        alone = copy_of(before)
        part = alone.part(row, 1, 130)
        for i in range(3):
            one = network.features(tokens[row : row + 1, i : i + 1], int(starts[row]) + i, part)
            assert torch.equal(one[0, 0], features[row, i])
            assert torch.equal(network.logits(one)[0, 0], logits[row, i])
        assert torch.equal(alone.k[:, row], together.k[:, row])
        assert torch.equal(alone.v[:, row], together.v[:, row])


def test_part_of_a_cache() -> None:
    """Rows in the middle of a larger cache give the same results. Other positions do not change."""
    network = FastTransformer(make_model())
    tokens, starts = torch.randint(0, VOCAB, (2, 2)), torch.tensor([3, 9])
    whole = filled(network, 5, 40)
    before = copy_of(whole)
    part = whole.part(2, 2, 11)
    own = KVCache(part.k.contiguous(), part.v.contiguous())
    assert torch.equal(
        network.features(tokens, starts, part), network.features(tokens, starts, own)
    )
    assert torch.equal(part.k, own.k)
    assert torch.equal(part.v, own.v)
    for row, start in ((2, 3), (3, 9)):
        before.k[:, row, start : start + 2] = whole.k[:, row, start : start + 2]
    assert torch.equal(before.k, whole.k)


@pytest.mark.parametrize("n_kv_heads", [1, 4])
def test_long_context(n_kv_heads: int) -> None:
    network = FastTransformer(make_model(n_kv_heads=n_kv_heads))
    cache = filled(network, 2, 2100)
    cache.k.mul_(3)  # attention scores of all sizes
    tokens, starts = torch.randint(0, VOCAB, (2, 1)), torch.tensor([2000, 2047])
    want = network.model.features(tokens, starts, copy_of(cache))
    got = network.features(tokens, starts, cache)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_any_number_of_threads_gives_the_same(quantize: Width | None) -> None:
    """Also more threads than processors, and fewer threads than in the call before."""
    network = FastTransformer(make_model(), quantize)
    tokens, starts = torch.randint(0, VOCAB, (3, 2)), torch.tensor([2, 90, 40])
    before = torch.get_num_threads()
    results = []
    for n_threads in (1, 2, 7, 1):
        torch.set_num_threads(n_threads)
        cache = filled(network, 3, 100)
        results += [network.features(tokens, starts, cache) for _ in range(20)]
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_several_threads_call_it() -> None:
    network = FastTransformer(make_model())
    tokens = torch.randint(0, VOCAB, (4, 1))
    want = [network.features(tokens[i : i + 1], 9, filled(network, 1, 10)) for i in range(4)]
    wrong = []

    def call(i: int) -> None:
        torch.set_num_threads(2)
        with torch.inference_mode():
            for _ in range(50):
                got = network.features(tokens[i : i + 1], 9, filled(network, 1, 10))
                if not torch.equal(got, want[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(1)
    assert not wrong


def test_what_is_not_finite_stays_with_its_row() -> None:
    network = FastTransformer(make_model())
    cache = filled(network, 2, 10)
    cache.k[0, 0, 3] = float("nan")
    features = network.features(torch.ones(2, 1, dtype=torch.long), 5, cache)
    assert features[0].isnan().all()
    assert features[1].isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "start", "message"),
    [
        ([[0], [0], [0]], 0, "a batch of 3 rows, but the KV cache has 2"),
        ([[VOCAB, 1]], 0, f"token ids from 1 to {VOCAB}, but vocab_size is {VOCAB}"),
        ([[-1]], 0, f"token ids from -1 to -1, but vocab_size is {VOCAB}"),
        ([[1, 2]], 9, "tokens at positions 9 to 10, but the limit is 10"),
        ([[1], [1]], torch.tensor([-1, 3]), "tokens at positions -1 to 3, but the limit is 10"),
    ],
)
def test_refusals(tokens: Any, start: int | Tensor, message: str) -> None:
    network = FastTransformer(make_model())
    with pytest.raises(GenerationError, match=message):
        network.features(torch.tensor(tokens), start, network.make_cache(2, 10))


def test_tasks_run_in_their_order() -> None:
    """A hundred tasks on three threads. Each adds the result of the task before it."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    n, dim, count = 8, 64, 100
    h, normed = torch.zeros(n, dim), torch.ones(n, dim)
    job = [0, n, dim, h.data_ptr(), normed.data_ptr(), torch.ones(dim).data_ptr(), 0, 0, 0]
    job[layer_ops.OUT] = normed.data_ptr()
    weight = torch.ones(dim)
    job[layer_ops.WEIGHT] = weight.data_ptr()
    tasks = TaskList([layer_ops.add_and_norm()] * count, [job] * count)
    tasks.run(0, count)
    torch.set_num_threads(before)
    torch.testing.assert_close(h, torch.full((n, dim), float(count)))


def test_exp() -> None:
    x = torch.linspace(-87, 88, 100_001)
    got = torch.tensor([float(exp(number)) for number in x.numpy()], dtype=torch.double)
    assert (got / x.double().exp() - 1).abs().max() < 3 * 2**-23
    assert np.isnan(exp(np.float32("nan")))
    assert exp(np.float32(-1000)) < 2e-38


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1) / 127
    return (x / scale[..., None]).nan_to_num(0).round().to(torch.int8), scale


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (6, 2, 32), (3, 1, 20)])
def test_int8_cache(heads: int, kv_heads: int, head_dim: int) -> None:
    """New keys and values are rounded exactly, and stored ones are read exactly."""
    starts, layers, positions = [150, 3], 2, 160
    n, rows, layer, width = 4, 2, 1, heads + 2 * kv_heads
    generator = torch.Generator().manual_seed(0)
    shape = (layers, rows + 1, positions, kv_heads, head_dim)
    both = [rounded(torch.randn(shape, generator=generator)) for _ in range(2)]
    (k, k_scale), (v, v_scale) = [
        [t[:, 1:] for t in pair] for pair in both
    ]  # views that are not contiguous
    qkv = torch.randn(n, width, head_dim, generator=generator)
    qkv[1, heads:] = 0
    x = qkv.clone()
    still = torch.tensor([1.0, 0.0]).repeat(positions, head_dim // 2)  # rotations by an angle of 0
    scores = torch.empty(n, heads, layer_ops.BLOCK + layer_ops.STATS)
    out = torch.empty(n, heads, head_dim)
    first = np.array(starts)
    cache = np.zeros(layer_ops.CACHE_LENGTH, np.int64)
    cache[:6] = 2, first.ctypes.data, *k.stride()[:4]
    cache[6:] = [t.data_ptr() for t in (k, v, k_scale, v_scale)]
    job = [0, n, layer, heads // kv_heads, kv_heads, head_dim]
    job += [qkv.data_ptr(), still.data_ptr(), cache.ctypes.data, scores.data_ptr(), out.data_ptr()]
    TaskList([layer_ops.store(), layer_ops.attend(head_dim, 8)], [job, job]).run(0, 2)
    for token in range(n):
        row, position = token // 2, starts[token // 2] + token % 2
        for held, scale, place in ((k, k_scale, heads), (v, v_scale, heads + kv_heads)):
            numbers, steps = rounded(x[token, place : place + kv_heads])
            assert torch.equal(held[layer, row, position], numbers)
            assert torch.equal(scale[layer, row, position], steps)
        keys, values = (
            (held[layer, row, : position + 1] * scale[layer, row, : position + 1, :, None])
            .transpose(0, 1)
            .double()
            for held, scale in ((k, k_scale), (v, v_scale))
        )
        query = x[token, :heads, None].double()
        want = F.scaled_dot_product_attention(
            query[None], keys[None], values[None], enable_gqa=True
        )
        torch.testing.assert_close(out[token].double(), want[0, :, 0], rtol=1e-5, atol=1e-5)
