"""A trace: every tensor of a forward, bit-equal logits, edits, and the parts of several ranks."""

import inspect
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from llama import Llama, LlamaError
from llama.explain import Trace, knock_out, logit_lens, replace, scale, trace
from llama.explain.tensors import KINDS, kind_of, names, owners
from llama.model import apply_rotary_emb

PROMPT = "Once upon a time there was a fox"


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=64, max_batch_size=2, device="cpu")


@pytest.fixture(scope="module")
def traced(llama: Llama) -> Trace:
    return trace(llama, PROMPT, max_gen_len=6)


def logits_of(llama: Llama, ids: list[int]) -> Tensor:
    cache = llama.model.make_cache(1, len(ids))
    return llama.model(torch.tensor([ids]), 0, cache)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_bit_equal_with_and_without(dtype: str) -> None:
    llama = Llama.build(max_seq_len=64, device="cpu", dtype=dtype)
    before = logits_of(llama, llama.encode_prompt(PROMPT))
    seen = trace(llama, PROMPT)
    assert torch.equal(seen["output"].float(), before)
    assert torch.equal(logits_of(llama, seen.tokens), before)  # no hook is left
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules()]
    assert sum(hooks) == 0


def test_steps_are_the_tokens_that_llama_generates(llama: Llama, traced: Trace) -> None:
    (want,), _ = llama.generate([traced.tokens], 6, temperature=0)
    assert traced.generated == want
    assert traced.text == llama.text_completion([PROMPT], 0, max_gen_len=6)[0]["generation"]
    assert [step.start_pos for step in traced.steps] == [0, *range(len(traced.tokens), 14)]
    everything = logits_of(llama, traced.tokens + traced.generated[:-1])
    for i, step in enumerate(traced.steps):
        at = len(traced.tokens) - 1 + i
        torch.testing.assert_close(step.tensors["output"][0, -1], everything[0, at])


@torch.no_grad()
def test_every_tensor_is_what_its_formula_says(llama: Llama, traced: Trace) -> None:
    """The tensors are computed again from those before them, to the last bit."""
    model, t = llama.model, traced
    assert list(t) == names(model.n_layers)
    assert torch.equal(t["tok_embeddings"], model.tok_embeddings(torch.tensor([t.tokens])))
    x = t["tok_embeddings"]
    for i, block in enumerate(model.layers):
        prefix = f"layers.{i}."
        inside = {name: tensor for name, tensor in t.items() if name.startswith(prefix)}
        a = {name.removeprefix(f"{prefix}attention."): x for name, x in inside.items()}
        f = {name.removeprefix(f"{prefix}feed_forward."): x for name, x in inside.items()}
        a |= {name.removeprefix(prefix): x for name, x in inside.items()}
        assert torch.equal(a["attention_norm"], block.attention_norm(x))
        for name in ("wq", "wk", "wv"):
            want = getattr(block.attention, name)(a["attention_norm"])
            assert torch.equal(a[name], want)
        split = [a[name].unflatten(-1, (-1, model.params.head_dim)) for name in ("wq", "wk", "wv")]
        queries, keys = apply_rotary_emb(split[0], split[1], model.freqs_cis[: len(t.tokens)])
        assert torch.equal(a["queries"], queries)
        assert torch.equal(a["keys"], keys)
        assert torch.equal(a["cache_k"], keys)
        assert torch.equal(a["cache_v"], split[2])
        n_rep = model.params.n_heads // model.params.local_kv_heads(1)
        wide_keys, values = (
            x.repeat_interleave(n_rep, 2).transpose(1, 2) for x in (keys, split[2])
        )
        scores = queries.transpose(1, 2) @ wide_keys.transpose(2, 3) / model.params.head_dim**0.5
        seen = torch.ones(scores.shape[-2:]).tril().bool()
        assert torch.equal(a["scores"], scores.masked_fill(~seen, -torch.inf))
        assert torch.equal(a["weights"], a["scores"].softmax(-1))
        torch.testing.assert_close(a["weights"].sum(-1), torch.ones(a["weights"].shape[:3]))
        assert torch.equal(a["heads"], (a["weights"] @ values).transpose(1, 2))
        assert torch.equal(a["wo"], block.attention.wo(a["heads"].flatten(2)))
        assert torch.equal(a["after_attention"], x + a["wo"])
        assert torch.equal(a["ffn_norm"], block.ffn_norm(a["after_attention"]))
        assert torch.equal(f["gated"], torch.nn.functional.silu(f["w1"]) * f["w3"])
        assert torch.equal(f["w2"], block.feed_forward.w2(f["gated"]))
        x = t[f"layers.{i}"]
        assert torch.equal(x, a["after_attention"] + f["w2"])
    assert torch.equal(t["norm"], model.norm(x))
    assert torch.equal(t["output"], model.output(t["norm"]))
    assert torch.equal(torch.view_as_complex(t["freqs_cis"]), model.freqs_cis[: len(t.tokens)])


def test_a_decode_step_sees_all_keys(traced: Trace) -> None:
    n = len(traced.tokens)
    for i, step in enumerate(traced.steps[1:], 1):
        assert step.tensors["layers.1.attention.queries"].shape[1] == 1
        keys = step.tensors["layers.1.attention.cache_k"]
        assert keys.shape[1] == n + i
        assert torch.equal(keys[:, :n], traced["layers.1.attention.keys"])
        assert step.tensors["layers.1.attention.weights"].shape[2:] == (1, n + i)


def test_the_shapes_are_as_described(llama: Llama, traced: Trace) -> None:
    args = llama.model.params
    kv = args.local_kv_heads(1)
    n = len(traced.tokens)
    sizes = {"B": 1, "S": n, "T": n, "D": args.dim, "H": args.n_heads, "K": kv,
             "hd": args.head_dim, "hd/2": args.head_dim // 2, "2": 2,
             "H·hd": args.n_heads * args.head_dim, "K·hd": kv * args.head_dim,
             "F": args.ffn_dim, "V": args.vocab_size}  # fmt: skip
    for name, tensor in traced.items():
        assert list(tensor.shape) == [sizes[s] for s in kind_of(name).shape.split(" ")], name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_line_of_code_is_the_one_named(kind: Any) -> None:
    lines = inspect.getsource(kind.function).splitlines()
    assert sum(kind.code in line for line in lines) == 1
    place, function = kind.place.split(" ")
    file, number = place.split(":")
    code = (Path(__file__).parents[2] / file).read_text(encoding="utf-8").splitlines()
    assert kind.code in code[int(number) - 1]
    assert function == kind.function.__qualname__


# ---- edits --------------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing(llama: Llama, traced: Trace) -> None:
    editable = [name for name in traced if kind_of(name).is_editable]
    again = trace(llama, PROMPT, 2, edits={name: scale(1) for name in editable})
    for name, tensor in traced.items():
        assert torch.equal(again[name], tensor), name
    same = trace(llama, PROMPT, edits={name: replace(traced[name]) for name in editable})
    assert torch.equal(same["output"], traced["output"])


def test_each_editable_tensor_changes_the_logits(llama: Llama, traced: Trace) -> None:
    for name in traced:
        if kind_of(name).is_editable and (name.startswith("layers.1") or "." not in name):
            changed = trace(llama, PROMPT, edits={name: lambda x: x * 1.5 + 0.1})
            is_shift = name.endswith("scores")  # softmax removes what is added to a row
            assert is_shift or not torch.equal(changed["output"], traced["output"]), name
            assert torch.equal(changed["tok_embeddings"], traced["tok_embeddings"]) or (
                name == "tok_embeddings"
            )


def test_a_head_that_is_knocked_out(llama: Llama, traced: Trace) -> None:
    """The same as a model whose wo takes nothing from that head; generation goes on without it."""
    without = trace(llama, PROMPT, 6, edits={"layers.2.attention.heads": knock_out(1)})
    fresh = Llama.build(max_seq_len=64, device="cpu")
    head_dim = fresh.model.params.head_dim
    with torch.no_grad():
        fresh.model.layers[2].attention.wo.weight[:, head_dim : 2 * head_dim] = 0
    want = trace(fresh, PROMPT, 6)
    assert torch.equal(without["output"], want["output"])
    assert without.generated == want.generated
    assert not torch.equal(without["output"], traced["output"])


def test_a_pattern_edits_every_layer(llama: Llama) -> None:
    edited = trace(llama, PROMPT, edits={"layers.*.attention.wo": scale(0),
                                         "layers.*.feed_forward.w2": scale(0)})  # fmt: skip
    assert torch.equal(edited["layers.5"], edited["tok_embeddings"])


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"layers.1.attention.weight": scale(0)}, "did you mean layers.1.attention.weights"),
        ({"xyz": scale(0)}, "no tensor is called xyz"),
        ({"layers.1.attention.cache_k": scale(0)}, "cannot be edited"),
        ({"layers.1": lambda x: x[:, :1]}, r"returned \[1, 1, 256\]"),
        ({"layers.1": lambda x: None}, "returned NoneType"),
        ({"layers.1": replace(torch.zeros(3))}, r"of shape \[3\] cannot replace"),
        ({"layers.1": knock_out(0)}, "knock_out is for"),
        ({"layers.1.attention.heads": knock_out(9)}, "head 9: the layer has heads 0 to 3"),
        ({"layers.9.attention.heads": knock_out(1)}, "the layers are 0 to 5"),
    ],
)
def test_wrong_edits(llama: Llama, edits: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        trace(llama, PROMPT, edits=edits)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT, {"max_gen_len": 0}, "max_gen_len is 0"),
        (PROMPT, {"max_gen_len": 1000}, "max_seq_len is 64"),
        ([7000], {}, "token id 7000"),
        ([], {}, "no tokens"),
        (5, {}, "must be a text, a dialog or a list of token ids"),
        ([1, "fox"], {}, "must be a text, a dialog or a list of token ids"),
    ],
)
def test_wrong_prompts(llama: Llama, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        trace(llama, prompt, **options)


def test_wrong_arguments_of_edits() -> None:
    with pytest.raises(LlamaError, match="factor is 'a'"):
        scale("a")  # type: ignore[arg-type]
    with pytest.raises(LlamaError, match="needs the numbers of the heads"):
        knock_out()


def test_quantized_weights_are_refused() -> None:
    llama = Llama.build(max_seq_len=64, mode="fast", quantize="int8", device="cpu")
    with pytest.raises(LlamaError, match="quantized"):
        trace(llama, PROMPT)


def test_fast_mode_is_traced_as_reference_mode(traced: Trace) -> None:
    fast = Llama.build(max_seq_len=64, mode="fast", device="cpu")
    assert torch.equal(trace(fast, PROMPT)["output"], traced["output"])


def test_other_threads_do_not_disturb_a_trace(llama: Llama, traced: Trace) -> None:
    """While one thread traces with an edit, another generates: neither sees the other."""
    (want,), _ = llama.generate([[1, 2, 3]], 20, temperature=0)
    results: list[list[int]] = []
    done = threading.Event()

    def generate() -> None:
        while not done.is_set():
            results.append(llama.generate([[1, 2, 3]], 20, temperature=0)[0][0])

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        edits = {"layers.0": scale(1), "layers.2.attention.weights": scale(1)}
        traces = [trace(llama, PROMPT, 6, edits) for _ in range(20)]
    finally:
        done.set()
        thread.join()
    assert all(torch.equal(seen["output"], traced["output"]) for seen in traces)
    assert all(seen.generated == traced.generated for seen in traces)
    assert results
    assert all(tokens == want for tokens in results)


# ---- what can be done with a trace --------------------------------------------------------------


def test_names(traced: Trace) -> None:
    with pytest.raises(LlamaError, match=r"did you mean layers\.1\.attention\.queries"):
        traced["layers.1.attention.querys"]
    assert "layers.1.attention.queries" in traced
    assert len(traced) == len(list(traced)) == 3 + 1 + 19 * 6


def test_save(traced: Trace, tmp_path: Path) -> None:
    traced.save(tmp_path / "trace.safetensors")
    saved = load_file(tmp_path / "trace.safetensors")
    assert saved.pop("tokens").tolist() == traced.tokens
    assert saved.pop("generated").tolist() == traced.generated
    for number, step in enumerate(traced.steps):
        for name, tensor in step.tensors.items():
            key = f"steps.{number}.{name}" if number else name
            assert torch.equal(saved.pop(key), tensor)
    assert not saved
    with pytest.raises(LlamaError, match="cannot write"):
        traced.save(tmp_path / "missing" / "trace.safetensors")


def test_what_a_notebook_shows(llama: Llama, traced: Trace) -> None:
    broken = trace(llama, PROMPT, edits={"layers.0.attention.wo": replace(float("nan"))})
    assert "<td>–</td>" in broken._repr_html_()
    shown = traced._repr_html_()
    assert all(f"<td>{name}</td>" in shown for name in traced)
    assert shown.count("<details>") == 6
    assert f"{traced['layers.1'].max():.3g}" in shown
    assert repr(traced) == "<Trace of 9 prompt tokens and 5 decode steps, 118 tensors each>"


def test_the_logit_lens_ends_with_the_model_itself(llama: Llama, traced: Trace) -> None:
    ids, probs = logit_lens(llama.model, traced, k=4)
    assert ids.shape == probs.shape == (7, len(traced.tokens), 4)
    want = traced["output"][0].softmax(-1).topk(4)
    assert torch.equal(ids[-1], want.indices)
    assert torch.equal(probs[-1], want.values)
    with pytest.raises(LlamaError, match="k is 0"):
        logit_lens(llama.model, traced, k=0)


# ---- ranks --------------------------------------------------------------------------------------


def trace_of_rank(folder: str) -> dict[str, Tensor]:
    llama = Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32")
    return dict(trace(llama, PROMPT).steps[0].tensors)


@pytest.mark.parametrize("n", [2, 4])
def test_ranks_hold_the_parts_that_are_described(llama: Llama, n: int, tmp_path: Path) -> None:
    """With four ranks each of the two key/value heads is on two ranks."""
    from llama.checkpoints.folder import BUNDLED

    whole = trace(llama, PROMPT)
    parts = run_ranks(n, tmp_path, trace_of_rank, str(BUNDLED))
    for name, tensor in whole.items():
        kind = kind_of(name)
        ranges = owners(kind, llama.model.params, n)
        for rank, part in enumerate(parts):
            want = tensor
            if ranges is not None and not kind.exchange:
                first, end = ranges[rank]
                want = tensor.narrow(kind.split % tensor.dim(), first, end - first)
            torch.testing.assert_close(part[name], want, atol=2e-3, rtol=1e-3)
