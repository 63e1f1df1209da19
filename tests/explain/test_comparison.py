"""`compare` finds equal models equal, and names the first module that differs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.folders import make_model, write_meta
from helpers.ranks import run_ranks
from torch import Tensor

from llama import Llama
from llama.checkpoints.convert import convert
from llama.checkpoints.folder import BUNDLED, open_checkpoint
from llama.errors import ConfigError, GenerationError
from llama.explain import oracles, parity
from llama.explain.oracles import META_FILES, META_RESHARDED, OURS, OWN_FILES, LlamaModels
from llama.explain.parity import Comparison, compare
from llama.explain.recording import LOGITS, module_names

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
ARGS = open_checkpoint(BUNDLED).args


def bundled(**options: Any) -> Comparison:
    """A comparison of the bundled model on the CPU."""
    return compare(device="cpu", **{"max_gen_len": 8} | options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bundled_model_is_bit_equal_to_metas_code(dtype: str) -> None:
    found = bundled(dtype=dtype)
    assert found.is_bit_equal
    assert found.holds
    assert found.differing_modules == []
    assert found.tokens == found.oracle_tokens
    assert found.logprob_difference == 0
    assert found.logits_sha256 == found.oracle_logits_sha256
    assert found.verdict.startswith("bit-equal to llama-models: the outputs of all ")


def test_every_module_is_compared_for_every_token() -> None:
    found = bundled()
    llama = Llama.build(device="cpu")
    assert list(found.modules) == module_names(ARGS.n_layers)
    leaves = {name for name, m in llama.model.named_modules() if not list(m.children())}
    assert leaves <= found.modules.keys()
    n = len(found.prompt_tokens)
    assert found.modules["layers.1.feed_forward.w1"].elements == n * ARGS.ffn_dim
    assert found.modules[LOGITS].elements == n * ARGS.vocab_size
    assert found.decoded.elements == 8 * ARGS.vocab_size


def test_the_tokens_are_the_greedy_ones() -> None:
    found = bundled(prompt=parity.PROMPT)
    llama = Llama.build(device="cpu")
    greedy, _ = llama.generate([found.prompt_tokens], 8, temperature=0, ignore_eos=True)
    assert found.tokens == greedy[0]
    assert found.prompt_tokens == llama.encode_prompt(parity.PROMPT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_bundled_model_is_close_to_transformers(dtype: str) -> None:
    found = bundled(against="transformers", dtype=dtype)
    assert found.holds
    assert 0 < found.logit_ulps <= found.limit
    assert found.oracle_weights == OURS
    # Both apply the same matrix to the same numbers, whatever the order of rows in the file.
    assert found.differing_modules[0] == "layers.0.attention.wo"


SHAPES: dict[str, dict[str, Any]] = {
    "gqa": dict(n_kv_heads=8),
    "scaled-rope": dict(n_kv_heads=4, use_scaled_rope=True),
    "llama-2": dict(rope_theta=10000.0, embedding_shard_dim=1),
    "tied": dict(tied=True),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["meta", "hf"])
@pytest.mark.parametrize("against", ["llama-models", "transformers"])
def test_folders_of_both_layouts(against: str, layout: str, shape: str, tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", make_model(**SHAPES[shape]), 1)
    if layout == "hf":
        folder = convert(folder, tmp_path / "hf", "hf")
    found = compare(folder, None, against, PROMPT, 4, "cpu")
    assert found.holds
    own = META_FILES if against == "llama-models" else OWN_FILES
    is_its_own = (against == "llama-models") == (layout == "meta")
    assert found.oracle_weights == (own if is_its_own else OURS)
    assert found.rope_factor == (8.0 if shape == "scaled-rope" else None)


@pytest.mark.parametrize("change", [dict(attention_bias=True), dict(mlp_bias=True)])
def test_biases_against_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    folder = write_meta(tmp_path / "meta", make_model(**change), 1)
    assert compare(folder, None, "transformers", PROMPT, 4, "cpu").holds


# ---- ranks --------------------------------------------------------------------------------------


def test_two_ranks_compare_their_own_tensors(tmp_path: Path) -> None:
    alone = bundled()
    first, second = run_ranks(2, tmp_path, bundled)
    assert first == second
    assert first.is_bit_equal
    assert first.ranks == 2
    assert first.tokens == alone.tokens
    # The ranks share the rows of wq, and each has the whole output of a row-parallel layer.
    names = ("layers.0.attention.wq", "layers.0.attention.wo")
    shares = [first.modules[name].elements / alone.modules[name].elements for name in names]
    assert shares == [1, 2]


def compare_folder(folder: Path) -> Comparison:
    return compare(folder, None, "llama-models", PROMPT, 4, "cpu")


@pytest.mark.parametrize(
    ("changes", "n_shards", "n", "source"),
    [
        (SHAPES["llama-2"], 2, 2, META_FILES),
        (SHAPES["gqa"], 4, 2, META_RESHARDED),
        (SHAPES["gqa"], 1, 2, META_RESHARDED),
        (SHAPES["llama-2"] | dict(n_kv_heads=2), 2, 4, OURS),
    ],
)
def test_shards_and_ranks(
    changes: dict[str, Any], n_shards: int, n: int, source: str, tmp_path: Path
) -> None:
    folder = write_meta(tmp_path / "meta", make_model(**changes), n_shards)
    for found in run_ranks(n, tmp_path, compare_folder, folder):
        assert found.is_bit_equal
        assert found.oracle_weights == source


# ---- a difference -------------------------------------------------------------------------------


class Perturbed(LlamaModels):
    """Meta's model with one bit of a weight flipped, one of the last bits of a bfloat16 number."""

    name = "layers.2.attention.wk"
    rank = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if oracles.parallel.mp_rank() == self.rank:
            flip_bit(self.module(self.name).weight.data)


def flip_bit(weight: Tensor) -> None:
    row = weight.float().abs().amax(1).argmax()
    column = weight[row].float().abs().argmax()
    bits = weight.view(torch.int32 if weight.dtype == torch.float32 else torch.int16)
    bits[row, column] ^= 1 << 16 if weight.dtype == torch.float32 else 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["layers.0.feed_forward.w2", "layers.2.attention.wk", LOGITS])
def test_one_flipped_bit_is_found(dtype: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Perturbed, "name", name)
    monkeypatch.setitem(oracles.ORACLES, "llama-models", Perturbed)
    found = bundled(dtype=dtype)
    assert not found.holds
    assert found.differing_modules[0] == name
    assert 0 < found.modules[name].differing <= len(found.prompt_tokens)
    assert found.verdict.startswith(f"NOT bit-equal to llama-models: {name} is the first module")


def compare_with_a_flipped_bit() -> Comparison:
    """Runs on each rank. The bit is flipped on the second one."""
    Perturbed.rank = 1
    oracles.ORACLES["llama-models"] = Perturbed
    return bundled()


def test_a_flipped_bit_on_another_rank_is_found(tmp_path: Path) -> None:
    first, second = run_ranks(2, tmp_path, compare_with_a_flipped_bit)
    assert first == second
    assert first.differing_modules[0] == Perturbed.name


class Forgetful(LlamaModels):
    """Meta's model with a KV cache that loses the first key after the prompt."""

    def decode(self, prompt_tokens: list[int], n: int) -> list[int]:
        def forget(module: Any, inputs: Any) -> None:
            if inputs[1] > 0:
                module.cache_k[:, 0] = 0

        handle = self.module("layers.0.attention").register_forward_pre_hook(forget)
        tokens = super().decode(prompt_tokens, n)
        handle.remove()
        return tokens


def test_a_wrong_cache_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(oracles.ORACLES, "llama-models", Forgetful)
    found = bundled()
    assert found.differing_modules == []
    assert found.decoded.differing > 0
    assert not found.holds
    assert (
        found.verdict == "NOT bit-equal to llama-models: the decoded tokens or their logits differ"
    )


class OtherTheta(oracles.Transformers):
    """transformers with another base of RoPE's frequencies."""

    factor = 1.0

    def __init__(self, setup: Any, ours: Any) -> None:
        args = setup.opened.args
        theta = args.rope_theta
        args.rope_theta = theta * self.factor
        super().__init__(setup, ours)
        args.rope_theta = theta


# In bfloat16 a change of one percent is less than rounding.
@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.01), ("bfloat16", 0.01)])
def test_a_wrong_rope_is_beyond_the_limit_of_transformers(
    dtype: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OtherTheta, "factor", factor)
    monkeypatch.setitem(oracles.ORACLES, "transformers", OtherTheta)
    found = bundled(against="transformers", dtype=dtype)
    assert not found.holds
    assert found.verdict.startswith(f"NOT within the limit of transformers in {dtype}, ")


# ---- mistakes -----------------------------------------------------------------------------------

CONTEXT = ARGS.context


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_gen_len=0), "max_gen_len is 0: it must be 1 or above"),
        (dict(max_gen_len="8"), "max_gen_len is '8': it must be 1 or above"),
        (dict(prompt=[]), "prompt 0 is empty: it needs at least one token"),
        (dict(prompt=[5, 99999]),
         f"prompt 0 has token id 99999, but vocab_size is {ARGS.vocab_size}"),
        (dict(prompt=[5] * (CONTEXT - 2), max_gen_len=8),
         f"the prompt has {CONTEXT - 2} tokens and max_gen_len is 8, but together they may be at "
         f"most {CONTEXT}"),
    ],
)  # fmt: skip
def test_prompts_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError) as error:
        bundled(**options)
    assert str(error.value) == message


def test_a_second_copy_of_the_weights_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "available_memory", lambda device: 1e6)
    with pytest.raises(ConfigError, match=r"the other implementation needs .* on cpu, but .* free"):
        bundled()
