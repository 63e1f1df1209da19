"""Fast mode gives the results of reference mode, up to rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import make_sharp_model
from helpers.ranks import run_ranks
from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer

from llama import Llama, Transformer
from llama.errors import ConfigError
from llama.evaluation.perplexity import score
from llama.fast.cpu.kernels.isa import ISAS, instruction_sets
from llama.fast.cpu.transformer import FastTransformer
from llama.fast.mode import check_mode, drawback

VOCAB = len(demo_pieces()) + 256
SHAPE: dict[str, Any] = dict(
    dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=64, norm_eps=1e-5
)


def make_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    return make_sharp_model(5, dtype, **SHAPE | changes, max_seq_len=128)


@torch.inference_mode()
def logits_of(network: Any, tokens: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """The logits of all positions. Each forward takes as many tokens as `pieces` says."""
    cache = network.make_cache(len(tokens), tokens.shape[1])
    found, start = [], 0
    for piece in pieces:
        positions = torch.full((len(tokens),), start)
        part = tokens[:, start : start + piece]
        found.append(network.logits(network.features(part, positions, cache)))
        start += piece
    return torch.cat(found, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("pieces", [[70, 1, 1, 5], [1] * 10, [49, 47]])
def test_logits_are_the_models(dtype: torch.dtype, tolerance: float, pieces: list[int]) -> None:
    model = make_model(dtype)
    tokens = torch.randint(0, VOCAB, (2, sum(pieces)))
    got = logits_of(FastTransformer(model), tokens, pieces)
    # The same weights in float32. Fast mode rounds at most activations to bfloat16.
    want = make_model().to(dtype).float()(tokens)
    is_rounded = dtype == torch.bfloat16 and ISAS[instruction_sets()[0]].has_pairs
    assert (got - want).abs().max() < (0.1 if is_rounded else 1e-3)
    with torch.no_grad():
        assert (got - model(tokens, 0)).std() / want.std() < tolerance


def test_greedy_tokens_are_reference_modes() -> None:
    """For 104 prompts, in float32."""
    one, two = Llama.build(mode="reference"), Llama.build(mode="fast")
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(0, 4096, (n % 50 + 1,), generator=generator).tolist() for n in range(104)
    ]
    options: dict[str, Any] = dict(max_gen_len=12, temperature=0)
    assert two.generate(prompts, **options)[0] == one.generate(prompts, **options)[0]
    alone = [two.generate([prompt], **options)[0][0] for prompt in prompts[:8]]
    assert alone == two.generate(prompts[:8], **options)[0]


def test_weights_are_not_copied() -> None:
    model = make_model(torch.bfloat16)
    addresses = {weight.data_ptr() for weight in model.parameters()}
    products = [product for layer in FastTransformer(model).products for product in layer]
    for product in products:
        assert {weight.data_ptr() for weight in product.weights} <= addresses


TALE = (
    "Once upon a time there was a king who had three sons. The eldest was clever, the second was "
    "brave, and the youngest was kind to every beast he met upon the road. One day the king fell "
    "ill, and no doctor in the land could cure him, so the eldest son set out to find the water of "
    "life. In the wood he met an old man, who asked him for a piece of bread."
)


@pytest.mark.parametrize(("quantize", "limit"), [("int8", 0.01), ("int4", 0.08)])
def test_quantized_weights_say_nearly_the_same(quantize: Any, limit: float) -> None:
    plain = score(Llama.build(mode="fast"), [TALE]).nats_per_token
    llama = Llama.build(mode="fast", quantize=quantize)
    assert abs(score(llama, [TALE]).nats_per_token - plain) < limit
    text = llama.text_completion(["Once upon a time"], temperature=0, max_gen_len=20)
    assert len(text[0]["generation"]) > 20


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_token_does_not_depend_on_its_company(quantize: Any) -> None:
    """Logits are equal to the last bit for any pieces, with and without other rows."""
    network = FastTransformer(make_model(tied=True), quantize)
    tokens = torch.randint(0, VOCAB, (3, 64))
    whole = logits_of(network, tokens, [64])
    for pieces in ([1] * 64, [3, 50, 1, 10]):
        assert torch.equal(logits_of(network, tokens, pieces), whole)
        assert torch.equal(logits_of(network, tokens[1:2], pieces), whole[1:2])


def test_more_tokens_than_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(0, VOCAB, (5, 9))
    want = logits_of(FastTransformer(make_model()), tokens, [9])
    for most in (1, 3, 11, 44):
        monkeypatch.setattr("llama.fast.cpu.transformer.MAX_TOKENS", most)
        assert torch.equal(logits_of(FastTransformer(make_model()), tokens, [9]), want)


def generate_on_rank(folder: Path, quantize: Any) -> Any:
    llama = Llama.build(folder, max_seq_len=64, mode="fast", quantize=quantize)
    return llama.generate([[1, 2, 3], [4] * 20], max_gen_len=10, temperature=0, logprobs=True)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_two_ranks(tmp_path: Path, quantize: Any) -> None:
    make_checkpoint(tmp_path / "model", SHAPE, mp_size=2, dtype=torch.float32)
    write_tokenizer(tmp_path / "model" / "tokenizer.model", demo_pieces())
    tokens, logprobs = generate_on_rank(tmp_path / "model", quantize)
    first, second = run_ranks(2, tmp_path, generate_on_rank, tmp_path / "model", quantize)
    assert first == second
    if quantize is None:  # with int8 each rank has its own scales
        assert first[0] == tokens
    for got, want in zip(first[1], logprobs, strict=True):
        assert got == pytest.approx(want, abs=1e-4 if quantize is None else 0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="quick"), "mode is 'quick': it must be reference or fast"),
        (dict(mode="fast", quantize="int3"), "quantize is 'int3': it must be int8 or int4"),
        (dict(quantize="int8"), "quantized weights are for mode fast on the CPU or a CUDA GPU"),
        (dict(mode="fast", quantize="fp8", device="cpu"), "quantize is 'fp8': it needs an Ada"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Llama.build(**options)


def test_on_a_gpu_the_weights_are_narrow_and_the_model_its_own() -> None:
    device = torch.device("cuda")
    assert not check_mode("fast", "int8", device, torch.bfloat16)
    with pytest.raises(ConfigError, match="mode fast on the CPU or a CUDA GPU"):
        check_mode("reference", "int8", device, torch.bfloat16)


def test_biases_on_a_gpu_run_as_in_mode_reference() -> None:
    where = torch.device("cuda"), torch.bfloat16
    assert not check_mode("fast", None, *where, has_biases=True)
    assert drawback("fast", None, *where, has_biases=True) == (
        "fast mode has no GPU kernels for biases: the model runs as in mode reference"
    )
    assert drawback("fast", None, *where) is None
    with pytest.raises(ConfigError, match="a model with biases is quantized on a CPU only"):
        check_mode("fast", "int8", *where, has_biases=True)


def test_without_numba(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Fast mode is then the engine with PyTorch's matrix products."""
    monkeypatch.setattr("llama.fast.mode.is_installed", lambda: False)
    with caplog.at_level("INFO", "llama"):
        llama = Llama.build(mode="fast")
    assert "fast mode without numba is slower: pip install" in caplog.messages[-1]
    assert llama.engine.model is llama.model
    with pytest.raises(ConfigError, match="need numba: pip install"):
        Llama.build(mode="fast", quantize="int8")
