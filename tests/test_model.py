"""The transformer equals Meta's bit for bit, and Hugging Face's within rounding."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torchinfo
from helpers.metas import CONFIGURATIONS, SMALL, both_models, logits_of
from helpers.oracle import import_oracle
from helpers.ranks import run_ranks

from llama import parallel
from llama.checkpoints import hugging_face
from llama.config import PRESETS
from llama.errors import ConfigError, GenerationError
from llama.model import ModelArgs, Transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_are_bit_equal_to_metas(oracle: Any, name: str, dtype: torch.dtype) -> None:
    ours, metas = both_models(oracle, dtype, **CONFIGURATIONS[name])
    tokens = torch.randint(0, ours.vocab_size, (3, 40))
    # Also at the end of a long cache, where scaled and plain RoPE differ most.
    for offset in {0, ours.params.max_seq_len - 64}:
        pairs = zip(logits_of(ours, tokens, offset), logits_of(metas, tokens, offset), strict=True)
        for got, want in pairs:
            assert got.dtype == torch.float32
            assert torch.equal(got, want)


DTYPES = (torch.float32, torch.bfloat16)


def mp_logits(n_kv_heads: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Runs on each rank: the logits of both models in both dtypes, with the rank's own weights."""
    oracle = import_oracle()
    parallel.initialize()
    params = {**SMALL, "max_batch_size": 3, "max_seq_len": 64, "n_kv_heads": n_kv_heads}
    ours = Transformer(ModelArgs(**params))
    generator = torch.Generator().manual_seed(parallel.mp_rank())
    for weight in ours.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0.0, 0.3, generator=generator)
    metas = oracle.model.Transformer(oracle.args.ModelArgs(**params))
    metas.load_state_dict(ours.state_dict(), strict=True)
    torch.manual_seed(5)
    tokens = torch.randint(0, ours.vocab_size, (3, 40))
    return [
        (logits_of(ours.to(dtype), tokens), logits_of(metas.to(dtype), tokens)) for dtype in DTYPES
    ]


@pytest.mark.parametrize("n", [2, 4])
def test_logits_are_bit_equal_to_metas_on_ranks(n: int, tmp_path: Path) -> None:
    for by_dtype in run_ranks(n, tmp_path, mp_logits, 4):
        for ours, metas in by_dtype:
            for got, want in zip(ours, metas, strict=True):
                assert torch.isfinite(got).all()
                assert torch.equal(got, want)


def seeded_logits() -> list[torch.Tensor]:
    """The logits of a seeded model, with its embedding split by vocabulary and by features."""
    logits = []
    for embedding_shard_dim in (0, 1):
        torch.manual_seed(3)
        args = ModelArgs(**SMALL, n_kv_heads=2, embedding_shard_dim=embedding_shard_dim)
        with torch.no_grad():
            logits.append(Transformer(args)(torch.arange(60).view(2, 30)))
    return logits


def test_a_seed_gives_one_model_at_any_number_of_ranks(tmp_path: Path) -> None:
    alone = seeded_logits()
    for logits in run_ranks(2, tmp_path, seeded_logits):
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)


def to_hugging_face(model: Transformer) -> Any:
    """A LlamaForCausalLM with the same weights.

    Meta rotates pairs of neighbouring features, and Hugging Face pairs features of the two halves.
    So the rows of Q and K are reordered within each head.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    args = model.params
    config = LlamaConfig(
        hidden_size=args.dim,
        intermediate_size=args.ffn_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        rope_theta=args.rope_theta,
        max_position_embeddings=args.max_seq_len,
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        rope_scaling=None
        if args.rope_scaling is None
        else dict(
            rope_type="llama3",
            factor=args.rope_scaling.factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    )
    state = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("wq.weight", "wk.weight")):
            weight = hugging_face.to_hugging_face_rows(weight, args.head_dim)
        state[hugging_face.hugging_face_name(name)] = weight
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(state, strict=True)
    return theirs


@pytest.mark.parametrize("name", ["mha", "gqa-2", "theta-1e4", "scaled-rope-gqa", "ffn-1.3"])
def test_logits_and_greedy_tokens_equal_transformers(oracle: Any, name: str) -> None:
    ours, _ = both_models(oracle, **CONFIGURATIONS[name])
    theirs = to_hugging_face(ours)
    tokens = torch.randint(0, ours.vocab_size, (3, 30))
    with torch.no_grad():
        want = theirs(tokens).logits
        torch.testing.assert_close(ours(tokens, 0), want, atol=1e-4, rtol=0)
        greedy = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False
        )
        rows = tokens
        for start, end in [(0, 30), *((i, i + 1) for i in range(30, 49))]:
            chosen = ours(rows[:, start:end], start)[:, -1:].argmax(-1)
            rows = torch.cat([rows, chosen], dim=1)
    assert torch.equal(rows, greedy)


def test_the_call_without_a_cache_gives_the_same_logits_and_gradients() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelArgs(**SMALL, n_kv_heads=2))
    tokens = torch.randint(0, 160, (2, 20))
    logits = model(tokens)
    torch.testing.assert_close(logits.detach(), model(tokens, 0), atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert not model(tokens, 0).requires_grad


def test_generation_first_does_not_spoil_training() -> None:
    """Tensors that are made under inference_mode cannot be used in training."""
    model = Transformer(ModelArgs(**SMALL))
    tokens = torch.randint(0, 160, (2, 20))
    with torch.inference_mode():
        model(tokens, 0)
    model(tokens, 0)
    model(tokens).sum().backward()


def test_training_makes_no_cache_and_no_state_is_added() -> None:
    model = Transformer(ModelArgs(**SMALL))
    model(torch.randint(0, 160, (2, 20)))
    attentions = [layer.attention for layer in model.layers]
    assert all(attention._cache is None for attention in attentions)
    model(torch.randint(0, 160, (2, 20)), 0)
    assert all(attention._cache is not None for attention in attentions)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_cache_of_ones_own() -> None:
    model = Transformer(ModelArgs(**SMALL))
    tokens = torch.randint(0, 160, (2, 20))
    cache = model.make_cache(max_batch_size=2, max_seq_len=20)
    assert torch.equal(model(tokens, 0, cache), model(tokens, 0))
    assert torch.equal(model(tokens[:, 7:], 7, cache), model(tokens[:, 7:], 7))
    with pytest.raises(GenerationError, match="positions 0 to 20, but max_seq_len is 20"):
        model(torch.zeros(2, 21, dtype=torch.long), 0, cache)
    with pytest.raises(GenerationError, match="max_seq_len is 2048"):
        model(torch.zeros(2, 2049, dtype=torch.long), 0, model.make_cache(2, 4096))
    with pytest.raises(GenerationError, match="a cache needs a start_pos"):
        model(tokens, cache=cache)
    with pytest.raises(GenerationError, match="3 rows, but the KV cache has 2"):
        model(torch.zeros(3, 4, dtype=torch.long), 0, cache)


def test_the_cache_follows_the_models_dtype() -> None:
    model = Transformer(ModelArgs(**SMALL))
    tokens = torch.randint(0, 160, (2, 5))
    model(tokens, 0)
    model.bfloat16()
    model(tokens, 0)
    assert model.layers[0].attention.cache_k.dtype == torch.bfloat16
    assert model.freqs_cis.dtype == torch.complex64


# ---- what the README promises, as written ------------------------------------------------------


def test_a_transformer_from_nothing() -> None:
    model = Transformer(ModelArgs(dim=512, n_layers=12, vocab_size=10000))
    assert model(torch.randint(0, 10000, (32, 4)), 0).shape == (32, 4, 10000)


PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-30b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-70b": 68_976_910_336,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-405b-mp16": 410_081_247_232,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_the_published_models(name: str) -> None:
    with torch.device("meta"):
        model = Transformer(PRESETS[name])
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    assert all(weight.is_meta for weight in model.parameters())


def test_llama_2_7b_as_print_and_torchinfo_show_it() -> None:
    with torch.device("meta"):
        model = Transformer(PRESETS["llama-2-7b"])
    shown = str(model)
    assert "(tok_embeddings): ParallelEmbedding()" in shown
    assert "(0-31): 32 x TransformerBlock(" in shown
    for name in ("wq", "wk", "wv", "w1", "w3", "output"):
        assert f"({name}): ColumnParallelLinear()" in shown
    for name in ("wo", "w2"):
        assert f"({name}): RowParallelLinear()" in shown
    for name in ("attention_norm", "ffn_norm", "norm"):
        assert f"({name}): RMSNorm()" in shown

    summary = torchinfo.summary(model, depth=3, verbose=0)
    assert summary.total_params == 6_738_415_616
    rows = [line.split() for line in str(summary).splitlines()]
    for module, parameters, times in [
        ("Attention:", "67,108,864", 32),
        ("FeedForward:", "135,266,304", 32),
        ("RMSNorm:", "4,096", 65),
        ("ParallelEmbedding:", "131,072,000", 1),
        ("ColumnParallelLinear:", "131,072,000", 1),
    ]:
        assert sum(module in " ".join(row) and row[-1] == parameters for row in rows) == times


def test_a_tied_output_is_one_parameter() -> None:
    model = Transformer(dataclasses.replace(ModelArgs(**SMALL), tied=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert model(torch.arange(10).view(1, 10)).shape == (1, 10, 160)


# ---- misuse ------------------------------------------------------------------------------------


def test_no_vocabulary_is_an_error() -> None:
    with pytest.raises(ConfigError, match="vocab_size is -1"):
        Transformer(ModelArgs(dim=64, n_layers=1, n_heads=2))


@pytest.mark.parametrize("start_pos", [-1, 50, 64])
def test_positions_outside_the_cache_are_an_error(start_pos: int) -> None:
    model = Transformer(ModelArgs(**SMALL, max_seq_len=64))
    with pytest.raises(GenerationError, match="max_seq_len is 64"):
        model(torch.zeros(1, 20, dtype=torch.long), start_pos)
