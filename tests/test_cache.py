"""The int8 KV cache: the stored values, the loss of accuracy, and the independence of rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import make_setup
from helpers.ranks import run_ranks
from make_checkpoint import demo_pieces, make_checkpoint, write_tokenizer

from llama import Llama
from llama.cache import KVCache
from llama.errors import ConfigError
from llama.evaluation.perplexity import score

CPU = torch.device("cpu")


def make_cache(dtype: torch.dtype = torch.int8) -> KVCache:
    return KVCache.zeros(2, 3, 8, 2, 4, dtype, CPU)


def test_what_is_stored() -> None:
    cache = make_cache()
    assert (cache.k.dtype, cache.k.shape) == (torch.int8, (2, 3, 8, 2, 4))
    for scale in (cache.k_scale, cache.v_scale):
        assert scale is not None
        assert (scale.dtype, scale.shape) == (torch.float32, (2, 3, 8, 2))
    k = torch.tensor([[1.0, -2.0, 0.5, 254.0], [0.0, 0.0, 0.0, 0.0]]).expand(1, 1, 2, 4)
    keys, values = cache.layer(1).update(5, k, -k / 2)
    assert cache.k[1, 0, 5].tolist() == [
        [0, -1, 0, 127],
        [0] * 4,
    ]  # 0.5 is rounded to the even number
    assert cache.v[1, 0, 5].tolist() == [[0, 1, 0, -127], [0] * 4]
    assert cache.k_scale[1, 0, 5].tolist() == [2, 0]
    assert cache.v_scale[1, 0, 5].tolist() == [1, 0]
    assert keys.shape == (1, 6, 2, 4)
    assert keys[0, 5].tolist() == [[0, -2, 0, 254], [0] * 4]
    assert values[0, 5].tolist() == [[0, 1, 0, -127], [0] * 4]
    assert not keys[0, :5].any()
    assert not cache.k[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_of_each_row(dtype: torch.dtype) -> None:
    """A start position and a tensor of positions write the same places, and no others."""
    k, v = torch.randn(2, 2, 3, 2, 4).to(dtype)
    one, two = make_cache(), make_cache()
    for row, start in enumerate((4, 1)):
        part = two.part(row, 1, 8)
        part.layer(0).update(start, k[row : row + 1], v[row : row + 1])
    positions = torch.tensor([[4, 5, 6], [1, 2, 3]])
    keys, values = one.layer(0).update(positions, k, v)
    for first, second in zip(one.tensors(), two.tensors(), strict=True):
        assert torch.equal(first, second)
    assert keys.dtype == values.dtype == dtype
    assert keys.shape == (2, 8, 2, 4)
    for row in range(2):
        found = keys[row, positions[row]]
        step = k[row].abs().amax(-1, keepdim=True).float() / 127
        assert ((found - k[row]).abs() <= step * 0.5 + 2**-8 * found.abs()).all()


def test_rows_are_copied_with_their_scales() -> None:
    cache = make_cache()
    x = torch.randn(1, 8, 2, 4)
    keys, _ = cache.part(0, 1, 8).layer(0).update(0, x, x)
    cache.copy_row(0, 2, 5)
    copied, _ = cache.part(2, 1, 8).layer(0).update(7, x[:, :1], x[:, :1])
    assert torch.equal(copied[:, :5], keys[:, :5])
    assert not copied[:, 5:7].any()


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(1, 1, 2, 4)
    x[0, 0, 0, 2] = float("nan")
    x[0, 0, 1, 1] = float("inf")
    keys, _ = make_cache().layer(0).update(0, x, x)
    assert not keys.isfinite().all(-1).any()


def test_perplexity() -> None:
    """Perplexity on tales that the model has generated rises by a thousandth at most."""
    llama = Llama.build(mode="fast")
    beginnings = ["Once upon a time", "There was once", "A king", "In the wood"]
    told = llama.text_completion(beginnings, max_gen_len=200, temperature=0.8, ignore_eos=True)
    tales = [start + rest["generation"] for start, rest in zip(beginnings, told, strict=True)]
    small = Llama.build(mode="fast", kv_cache="int8")
    assert score(small, tales).perplexity <= score(llama, tales).perplexity * 1.001


# ---- a model with it --------------------------------------------------------------------------

SHAPE: dict[str, Any] = dict(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=len(demo_pieces()) + 256,
    multiple_of=32, norm_eps=1e-5,
)  # fmt: skip
PROMPTS = [[4] * 20, [1, 2, 3], list(range(60)), [4] * 20 + [5, 6]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "model"
    make_checkpoint(folder, SHAPE, dtype=torch.float32)
    write_tokenizer(folder / "tokenizer.model", demo_pieces())
    return folder


def generate(folder: Path, prompts: list[list[int]], **options: Any) -> Any:
    options = dict(mode="fast", max_seq_len=96, kv_cache="int8") | options
    llama = Llama.build(folder, **options)
    assert (llama.engine.cache.k.dtype == torch.int8) == (options["kv_cache"] is not None)
    return llama.generate(prompts, max_gen_len=12, temperature=0, logprobs=True)


@pytest.mark.parametrize("is_installed", [True, False])
def test_a_row_in_company_is_the_row_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_installed: bool
) -> None:
    """With the compiled kernels, and with PyTorch's matrix products, which a GPU uses too."""
    monkeypatch.setattr("llama.fast.mode.is_installed", lambda: is_installed)
    tokens, logprobs = generate(
        folder, PROMPTS, max_batch_size=3
    )  # fewer rows than prompts, so rows are used again
    for prompt, together, scores in zip(PROMPTS, tokens, logprobs, strict=True):
        (alone,), (alone_scores,) = generate(folder, [prompt], max_batch_size=1)
        assert together == alone
        assert scores == pytest.approx(alone_scores, abs=5e-3)
    exact = generate(folder, PROMPTS, kv_cache=None)[1]
    assert logprobs != exact
    for got, want in zip(logprobs, exact, strict=True):
        assert got[0] == pytest.approx(want[0], abs=0.02)


def test_a_prompt_that_is_there_already(folder: Path) -> None:
    llama = Llama.build(folder, max_seq_len=96, max_batch_size=2, mode="fast", kv_cache="int8")
    beginning = list(range(40))
    options: dict[str, Any] = dict(max_gen_len=12, temperature=0)
    both = [
        [*beginning, 1, 2],
        [*beginning, 3, 4],
    ]  # together: the second copies the first row's prefix
    together = llama.generate(both, **options)[0]
    assert llama.generate(both[:1], **options)[0] == together[:1]  # again: the row is reused
    assert together == [generate(folder, [prompt])[0][0] for prompt in both]


def test_two_ranks(folder: Path, tmp_path: Path) -> None:
    tokens, logprobs = generate(folder, PROMPTS)
    for got in run_ranks(2, tmp_path, generate, folder, PROMPTS):
        assert got[0] == tokens
        for some, want in zip(got[1], logprobs, strict=True):
            assert some == pytest.approx(want, abs=1e-3)


def test_its_memory_is_counted(folder: Path) -> None:
    llama = Llama.build(folder, max_seq_len=128, mode="fast", kv_cache="int8")
    setup = make_setup(folder, mode="fast", kv_cache="int8")
    cache = llama.engine.cache
    assert setup.cache_bytes == sum(tensor.nbytes for tensor in cache.tensors())
    assert setup.cache_bytes < make_setup(folder, mode="fast").cache_bytes / 3


def test_reference_mode_has_none() -> None:
    with pytest.raises(ConfigError, match="a KV cache in int8 is for mode fast"):
        Llama.build(kv_cache="int8")
    with pytest.raises(ConfigError, match="kv_cache is 'int4': it must be int8"):
        Llama.build(mode="fast", kv_cache="int4")  # type: ignore[arg-type]
