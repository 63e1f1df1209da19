"""Adapters beside the weights: rows of one batch have different ones, or none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import write_adapter, write_base
from helpers.ranks import run_ranks

from llama import Llama
from llama.checkpoints.convert import convert
from llama.errors import LlamaError
from llama.sampling import SamplingParams

NAMES: list[str | None] = ["first", None, "second", "first", None]
CONFIGS: dict[str, dict[str, Any]] = {
    "first": dict(target_modules="all-linear", r=4, lora_alpha=12),
    "second": dict(
        target_modules=["q_proj", "o_proj", "up_proj"], r=8, rank_pattern={"up_proj": 3}
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and two adapters."""
    root = tmp_path_factory.mktemp("adapters")
    write_base(root / "base")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        write_adapter(root / "base", root / name, seed, **config)
    return root


def prompts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(1, 640, (12 + i,), generator=draw).tolist() for i in range(count)]


def build(root: Path, adapter: str | None = None, beside: bool = True, **more: Any) -> Llama:
    adapters = {name: root / name for name in CONFIGS} if beside else None
    merged = None if adapter is None else root / adapter
    more = dict(max_seq_len=96, max_batch_size=8) | more
    return Llama.build(root / "base", adapter=merged, adapters=adapters, **more)


def together(llama: Llama, names: list[str | None] = NAMES) -> list[tuple[list[int], list[float]]]:
    """The tokens and logprobs of requests that run in one batch, one for each adapter's name."""
    requests = []
    with llama.runner.leading() as is_first:
        if not is_first:
            return []
        for row, (prompt, name) in enumerate(zip(prompts(len(names)), names, strict=True)):
            params = SamplingParams(
                temperature=0, max_gen_len=8, prompt_logprobs=True, adapter=name
            )
            requests.append(llama.engine.submit(prompt, params, row))
        while llama.engine.has_work:
            llama.engine.step()
    return [(request.tokens, request.prompt_logprobs + request.logprobs) for request in requests]


MODES: dict[str, dict[str, Any]] = {
    "reference": {},
    "bfloat16": dict(dtype="bfloat16"),
    "fast": dict(mode="fast"),
    "int8": dict(mode="fast", quantize="int8"),
    "int4": dict(mode="fast", quantize="int4"),
    "int8-cache": dict(mode="fast", kv_cache="int8"),
}


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_an_adapter_are_bit_equal_to_the_base(mode: str, root: Path) -> None:
    """The base runs the same requests without adapters."""
    found = together(build(root, **MODES[mode]))
    base = together(build(root, beside=False, **MODES[mode]), [None] * len(NAMES))
    for name, row, plain in zip(NAMES, found, base, strict=True):
        assert (row == plain) == (name is None)


@pytest.mark.parametrize("mode", ["reference", "fast"])
def test_a_batch_equals_the_merged_models(mode: str, root: Path) -> None:
    found = together(build(root, **MODES[mode]))
    for i, name in enumerate(NAMES):
        merged = build(root, name, beside=False, **MODES[mode])
        tokens, logprobs = together(merged, [None] * len(NAMES))[i]
        assert found[i][0] == tokens
        assert found[i][1] == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("mode", ["reference", "fast", "int8", "int4"])
def test_a_batch_equals_solo_runs(mode: str, root: Path) -> None:
    llama = build(root, **MODES[mode])
    found = together(llama)
    for row, name in enumerate(NAMES):
        params = SamplingParams(temperature=0, max_gen_len=8, prompt_logprobs=True, adapter=name)
        (alone,) = llama.runner.complete([prompts(len(NAMES))[row]], params)
        assert alone.tokens == found[row][0]
        logprobs = alone.prompt_logprobs + alone.logprobs
        if mode == "reference":  # alone, a request is computed with Meta's operations
            assert logprobs == pytest.approx(found[row][1], abs=1e-5)
        else:
            assert logprobs == found[row][1]


def test_long_prompts_in_chunks(root: Path) -> None:
    """A chunk of mode fast has at most 512 tokens, and a call of the kernels too."""
    llama = build(root, max_seq_len=1300, mode="fast")
    draw = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, 640, (1200,), generator=draw).tolist()
    params = SamplingParams(max_gen_len=0, prompt_logprobs=True, adapter="first")
    (request,) = llama.runner.complete([prompt], params)
    merged = build(root, "first", beside=False, max_seq_len=1300, mode="fast")
    assert request.prompt_logprobs == pytest.approx(merged.score([prompt])[0], abs=1e-4)


@pytest.mark.parametrize("mode", ["reference", "fast"])
def test_a_prefix_is_reused_only_with_the_same_adapter(mode: str, root: Path) -> None:
    llama = build(root, **MODES[mode])
    prompt = torch.arange(1, 60).tolist()
    options: dict[str, Any] = dict(temperature=0, max_gen_len=4)
    reused = {}
    for name in ("first", None, "second", "first", None):
        # Two prompts, because in mode reference one alone reuses nothing.
        params = SamplingParams(adapter=name, **options)
        request, _ = llama.runner.complete([prompt, [5]], params)
        (fresh, _) = build(root, **MODES[mode]).runner.complete([prompt, [5]], params)
        assert request.tokens == fresh.tokens
        reused.setdefault(name, []).append(request.n_reused)
    assert reused == {"first": [0, 58], None: [0, 58], "second": [0]}


def test_speculation(root: Path) -> None:
    """Proposals change no token. The draft model has no adapters."""
    plain = together(build(root, mode="fast"))
    for options in (dict(lookup=True), dict(draft=root / "base")):
        found = together(build(root, mode="fast", **options))
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in plain]


def test_the_model_itself_stays_the_base(root: Path) -> None:
    """Names of weights are Meta's, and a direct call has no adapter, also after a batch."""
    llama, base = build(root), build(root, beside=False)
    together(llama)
    tokens = torch.tensor([prompts(1)[0]])
    assert torch.equal(llama.model(tokens, 0), base.model(tokens, 0))
    assert llama.model.state_dict().keys() == base.model.state_dict().keys()


def test_every_call_takes_an_adapter(root: Path) -> None:
    llama, merged = build(root), build(root, "first", beside=False)
    options: dict[str, Any] = dict(temperature=0, max_gen_len=6)
    texts = ["the word is", "a word of"]
    found = llama.text_completion(texts, adapter="first", **options)
    assert found == merged.text_completion(texts, **options)
    assert found != llama.text_completion(texts, **options)
    events = llama.stream("the word is", adapter="first", **options)
    expected = merged.stream("the word is", **options)
    assert [event.text for event in events] == [event.text for event in expected]
    dialog: Any = [{"role": "user", "content": "the word"}]
    found_chat = llama.chat_completion([dialog], adapter="first", **options)
    assert found_chat == merged.chat_completion([dialog], **options)


# ---- ranks --------------------------------------------------------------------------------------


def on_ranks(root: Path) -> list[Any]:
    return [together(build(root)), together(build(root, mode="fast"))]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks(ranks: int, root: Path, tmp_path: Path) -> None:
    """The model has two key/value heads, so four ranks repeat them."""
    expected = on_ranks(root)
    found, *others = run_ranks(ranks, tmp_path, on_ranks, root)
    assert others == [[[], []]] * (ranks - 1)
    for rows, wanted in zip(found, expected, strict=True):
        for (tokens, logprobs), (their_tokens, their_logprobs) in zip(rows, wanted, strict=True):
            assert tokens == their_tokens
            assert logprobs == pytest.approx(their_logprobs, abs=1e-4)


# ---- errors -------------------------------------------------------------------------------------


def test_names_that_are_unknown(root: Path) -> None:
    with pytest.raises(LlamaError, match="adapter is 'third': it must be one of first, second"):
        build(root).generate([[1, 2]], 4, adapter="third")
    with pytest.raises(LlamaError, match="adapter is 'first', but the model was built without"):
        build(root, beside=False).generate([[1, 2]], 4, adapter="first")
    with pytest.raises(LlamaError, match="adapter is 5: it must be one of first"):
        build(root).generate([[1, 2]], 4, adapter=5)


def test_adapters_that_cannot_stay_beside_the_weights(root: Path, tmp_path: Path) -> None:
    base = root / "base"
    write_adapter(base, tmp_path / "head", target_modules=["lm_head"])
    write_adapter(base, tmp_path / "norm", target_modules=["q_proj"], modules_to_save=["norm"])
    for name, what in (("head", "output.weight"), ("norm", "norm.weight")):
        with pytest.raises(LlamaError, match=rf"{name} changes .*{what}: only changes of the"):
            Llama.build(base, adapters={"a": tmp_path / name})
    with pytest.raises(LlamaError, match="no such folder: nowhere"):
        Llama.build(base, adapters={"a": "nowhere"})
    with pytest.raises(LlamaError, match="give one of them"):
        build(root, "first")


def test_a_base_that_is_saved_quantized(root: Path, tmp_path: Path) -> None:
    convert(root / "base", tmp_path / "int8", quantize="int8")
    adapters = {name: root / name for name in CONFIGS}
    saved = Llama.build(tmp_path / "int8", mode="fast", adapters=adapters, max_batch_size=8)
    assert together(saved) == together(build(root, mode="fast", quantize="int8"))
