"""Code written against Meta's `model.py` runs on ours and gives the same numbers.

Each script below is written once, in Meta's names. It runs on the classes of llama-models and on
ours, with the same weights, and the results are compared.
"""

import inspect
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import llama.model

SHAPE = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=160, multiple_of=32)
LIMITS = dict(max_batch_size=3, max_seq_len=32)
CLASSES = ["RMSNorm", "Attention", "FeedForward", "TransformerBlock", "Transformer"]
FUNCTIONS = ["apply_scaling", "precompute_freqs_cis", "reshape_for_broadcast"]
FUNCTIONS += ["apply_rotary_emb", "repeat_kv"]


@pytest.fixture(scope="module")
def metas(oracle: SimpleNamespace) -> SimpleNamespace:
    """Meta's module, with the `ModelArgs` that Meta's llama3 keeps in it."""
    names = {name: getattr(oracle.model, name) for name in CLASSES + FUNCTIONS}
    return SimpleNamespace(**names, ModelArgs=oracle.args.ModelArgs)


def fill(module: Any) -> Any:
    """Fill every weight with numbers that depend only on its shape and its place in the model."""
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.data.normal_(0.0, 0.3, generator=generator)
    return module


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def make_args(module: Any) -> Any:
    return module.ModelArgs(**SHAPE, **LIMITS, ffn_dim_multiplier=1.3, use_scaled_rope=True)


def norm(m: Any) -> Any:
    layer = fill(m.RMSNorm(64, eps=1e-5))
    return layer(draw(2, 5, 64)), layer._norm(draw(2, 5, 64))


def rope(m: Any) -> Any:
    table = m.precompute_freqs_cis(16, 40, 500000.0, True)
    plain = m.precompute_freqs_cis(dim=16, end=40, theta=10000.0)
    xq, xk = draw(2, 5, 4, 16), draw(2, 5, 2, 16)
    pairs = torch.view_as_complex(xq.reshape(2, 5, 4, 8, 2))
    shaped = m.reshape_for_broadcast(table[3:8], pairs)
    freqs = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    return table, plain, shaped, m.apply_scaling(freqs), *m.apply_rotary_emb(xq, xk, table[3:8])


def repeated(m: Any) -> Any:
    return m.repeat_kv(draw(2, 5, 2, 16), 3), m.repeat_kv(draw(2, 5, 2, 16), 1)


def attention(m: Any) -> Any:
    args = make_args(m)
    layer = fill(m.Attention(args))
    table = m.precompute_freqs_cis(args.dim // args.n_heads, 64)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    with torch.no_grad():
        first = layer(draw(2, 5, 64), 0, table[:5], mask)
        second = layer(draw(2, 1, 64), 5, freqs_cis=table[5:6], mask=None)
    numbers = [layer.n_local_heads, layer.n_local_kv_heads, layer.n_rep, layer.head_dim]
    return first, second, layer.cache_k, layer.cache_v, numbers, layer.n_kv_heads


def attention_without_its_cache(m: Any) -> Any:
    """Some scripts clear an attention's cache, or read it before the first call."""
    args = make_args(m)
    layer = fill(m.Attention(args))
    before = layer.cache_k.clone(), layer.cache_v.shape
    table = m.precompute_freqs_cis(16, 64)
    with torch.no_grad():
        layer(draw(2, 1, 64), 0, table[:1], None)
        layer.cache_k = torch.zeros_like(layer.cache_k)
        layer.cache_v.zero_()
        return before, layer(draw(2, 1, 64), 3, table[3:4], None)


def feed_forward(m: Any) -> Any:
    args = make_args(m)
    layer = m.FeedForward(
        dim=args.dim,
        hidden_dim=4 * args.dim,
        multiple_of=args.multiple_of,
        ffn_dim_multiplier=args.ffn_dim_multiplier,
    )
    positional = m.FeedForward(64, 256, 48, None)
    shapes = [tuple(weight.shape) for weight in positional.parameters()]
    return fill(layer)(draw(2, 5, 64)), shapes


def block(m: Any) -> Any:
    args = make_args(m)
    layer = fill(m.TransformerBlock(1, args))
    table = m.precompute_freqs_cis(16, 64)
    with torch.no_grad():
        out = layer(draw(2, 1, 64), 0, table[:1], None)
    return out, layer.n_heads, layer.dim, layer.head_dim, layer.layer_id


def transformer(m: Any) -> Any:
    model = fill(m.Transformer(make_args(m)))
    tokens = torch.arange(24).view(3, 8)
    first = model(tokens, 0)
    second = model.forward(tokens[:, :1], start_pos=8)
    layer = model.layers[1].attention
    names = list(model.state_dict())
    numbers = [model.vocab_size, model.n_layers, model.params.dim]
    return first, second, layer.cache_k, layer.cache_v, model.freqs_cis, names, numbers


def by_hand(m: Any) -> Any:
    """The forward pass as tutorials write it: embedding, layers, norm and output, called in
    turn."""
    model = fill(m.Transformer(make_args(m)))
    table_before = model.freqs_cis.clone()
    tokens = torch.arange(12).view(2, 6)
    mask = torch.full((6, 6), float("-inf")).triu(1)
    with torch.no_grad():
        h = model.tok_embeddings(tokens)
        for layer in model.layers:
            h = layer(h, 0, model.freqs_cis[:6], mask)
        return table_before, model.output(model.norm(h)).float(), model(tokens, 0)


def subclass(m: Any) -> Any:
    """A user's own norm and block replace those of the model."""

    class Norm(m.RMSNorm):
        def _norm(self, x: Tensor) -> Tensor:
            return super()._norm(x) * 2

    class Block(m.TransformerBlock):
        def __init__(self, layer_id: int, args: Any) -> None:
            super().__init__(layer_id, args)
            self.ffn_norm = Norm(self.dim, eps=args.norm_eps)

        def forward(self, x: Any, start_pos: Any, freqs_cis: Any, mask: Any) -> Any:
            return super().forward(x, start_pos, freqs_cis, mask) / 2

    model = m.Transformer(make_args(m))
    model.layers[1] = Block(1, make_args(m))
    fill(model)
    return model(torch.arange(8).view(2, 4), 0), model(torch.arange(2).view(2, 1), 4)


def patched(m: Any) -> Any:
    """A user's function replaces the forward of one layer, as hooks and probes do."""
    model = fill(m.Transformer(make_args(m)))
    seen = []
    forward = model.layers[0].attention.forward

    def spy(x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Any) -> Tensor:
        seen.append((x.shape, start_pos, freqs_cis.shape, mask is None))
        return forward(x, start_pos, freqs_cis, mask)

    model.layers[0].attention.forward = spy
    return model(torch.arange(8).view(2, 4), 0), model(torch.arange(2).view(2, 1), 4), seen


SCRIPTS: list[Callable[[Any], Any]] = [
    norm, rope, repeated, attention, attention_without_its_cache, feed_forward, block, transformer,
    by_hand, subclass, patched,
]  # fmt: skip


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) and torch.equal(ours, theirs)
    if isinstance(theirs, list | tuple) and not isinstance(theirs, torch.Size):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_same_script_gives_the_same_numbers(
    script: Callable[[Any], Any], metas: SimpleNamespace
) -> None:
    ours = script(llama.model)  # first, while no process group exists
    assert same(ours, script(metas))


@pytest.mark.parametrize("name", CLASSES + FUNCTIONS)
def test_signatures_begin_as_metas(name: str, metas: SimpleNamespace) -> None:
    """Our signatures begin with Meta's parameters, in the same order and with the same defaults."""

    def check(ours: Any, theirs: Any) -> None:
        extended = list(inspect.signature(ours).parameters.values())
        expected = list(inspect.signature(theirs).parameters.values())
        assert [p.name for p in extended[: len(expected)]] == [p.name for p in expected]
        for own, meta in zip(extended, expected, strict=False):
            if meta.default is not meta.empty:
                assert own.default == meta.default, own.name
        for added in extended[len(expected) :]:
            assert added.default is not added.empty or added.kind is added.VAR_KEYWORD, added.name

    ours, theirs = getattr(llama.model, name), getattr(metas, name)
    check(ours, theirs)
    if name in CLASSES:
        check(ours.forward, theirs.forward)


@pytest.mark.parametrize(
    "make",
    ["Attention(args)", "TransformerBlock(0, args)", "FeedForward(64, 256, 32, None)"],
)
def test_parts_need_no_process_group(make: str) -> None:
    code = (
        "import torch\n"
        "from llama.model import *\n"
        "from llama.model import ModelArgs\n"
        f"args = ModelArgs(**{SHAPE}, **{LIMITS})\n"
        f"part = {make}\n"
        "print(sum(weight.isfinite().all().item() for weight in part.parameters()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) > 0
