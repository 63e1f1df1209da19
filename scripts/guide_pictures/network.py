"""Pictures of the network: the residual stream, norms, attention, RoPE, feed-forward, logits."""

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from guide_pictures.inside import look_inside
from guide_pictures.style import (
    BLUE,
    GRAY,
    GREEN,
    LINE,
    MONO,
    ORANGE,
    PURPLE,
    arrow,
    box,
    charts,
    drawing,
    shown,
)  # fmt: skip
from llama import Llama
from llama.config import PRESETS
from llama.model import apply_scaling


def rms(x: Tensor) -> float:
    """The root mean square of all numbers."""
    return x.pow(2).mean().sqrt().item()


def residual(llama: Llama) -> Figure:
    """How large the residual stream is, and what each layer adds to it."""
    inside = look_inside(llama)
    numbers = range(1, len(inside.layers) + 1)
    stream = [*(rms(layer.before) for layer in inside.layers), rms(inside.after)]
    figure, (ax,) = charts(height=2.7)
    for offset, color, name in ((-0.17, ORANGE, "attention"), (0.17, GREEN, "feed_forward")):
        sizes = [rms(getattr(layer, name)) for layer in inside.layers]
        ax.bar([n + offset for n in numbers], sizes, 0.3, color=color, label=f"{name} adds")
    ax.plot(range(len(stream)), stream, color=BLUE, marker="o", label="h after the layer")
    ax.set_xticks(range(len(stream)), ["embedding", *(f"layer {n - 1}" for n in numbers)])
    ax.set_ylabel("root mean square")
    ax.legend()
    return figure


def rms_norm(llama: Llama) -> Figure:
    """The features of one token, before and after RMSNorm, in three layers."""
    inside = look_inside(llama)
    last = len(inside.layers) - 1
    figure, axes = charts(2, 2.6, sharey=True)
    for number, color in ((0, BLUE), (last // 2, ORANGE), (last, GREEN)):
        x = inside.layers[number].before[-1]
        label = f"layer {number}: {rms(x):.2f}"
        for ax, values in zip(axes, (x, x / rms(x)), strict=True):
            ax.plot(torch.linspace(0, 1, len(x)), values.sort().values, color=color, label=label)
    axes[0].set_title("x, and its root mean square")
    axes[1].set_title("x / rms(x): all have root mean square 1")
    axes[0].legend()
    for ax in axes:
        ax.set_xticks([])
        ax.set_xlabel("the features of one token, sorted")
    return figure


def attention(llama: Llama) -> Figure:
    """The attention weights of some heads: a row is a query, a column is a key."""
    inside = look_inside(llama)
    number = min(1, len(inside.layers) - 1)
    weights = inside.layers[number].weights[:3]
    figure, axes = charts(len(weights), 3.1)
    texts = [shown(text) for text in inside.texts]
    for head, (ax, of_head) in enumerate(zip(axes, weights, strict=True)):
        ax.imshow(of_head.numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set_title(f"layer {number}, head {head}")
        ax.set_xticks(range(len(texts)), texts, rotation=90, family=MONO, fontsize=7.5)
        ax.set_yticks(range(len(texts)), texts if head == 0 else [], family=MONO, fontsize=7.5)
        ax.grid(False)
    axes[0].set_ylabel("query")
    axes[0].set_xlabel("key")
    return figure


def rope(llama: Llama) -> Figure:
    """RoPE turns a pair of features by an angle that grows with the position."""
    args = llama.model.params
    figure, (circle, waves) = charts(2, 2.9, width_ratios=[1, 1.7])
    turn = torch.linspace(0, 2 * math.pi, 100)
    circle.plot(turn.cos(), turn.sin(), color=LINE, linewidth=1)
    for position in range(6):
        x, y = math.cos(position), math.sin(position)
        arrow(circle, (0, 0), (x, y), BLUE)
        circle.text(1.2 * x, 1.2 * y, str(position), ha="center", va="center")
    circle.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", xticks=[], yticks=[])
    circle.set_title("pair 0: one radian a position")
    positions = torch.linspace(0, 60, 400)
    for pair, color in ((0, BLUE), (args.head_dim // 16, ORANGE), (args.head_dim // 8, GREEN)):
        frequency = args.rope_theta ** (-2 * pair / args.head_dim)
        waves.plot(positions, (positions * frequency).cos(), color=color, label=f"pair {pair}")
    waves.set_title("cosine of the angle, by position")
    waves.legend(loc="lower right", facecolor="white", frameon=True, edgecolor=LINE)
    return figure


def rope_scaling(llama: Llama) -> Figure:
    """The wavelengths of Llama 3.1 8B before and after scaling."""
    args = PRESETS["llama-3.1-8b"]
    frequencies = args.rope_theta ** -(torch.arange(0, args.head_dim, 2) / args.head_dim)
    before = 2 * math.pi / frequencies
    after = 2 * math.pi / apply_scaling(frequencies, args.rope_scaling)
    scaling = args.rope_scaling
    assert scaling is not None
    context = scaling.original_context_length
    figure, (ax,) = charts(height=2.9)
    ax.plot(before, color=GRAY, label="Llama 3 8B")
    ax.plot(after, color=BLUE, label="Llama 3.1 8B")
    longest, shortest = context / scaling.low_freq_factor, context / scaling.high_freq_factor
    for limit in (longest, shortest):
        ax.axhline(limit, color=ORANGE, linewidth=1, linestyle="--")
    ax.text(0, shortest / 1.3, f"below {shortest:,.0f}: unchanged", va="top", color=ORANGE)
    ax.text(0, longest * 1.3, f"above {longest:,.0f}: times {scaling.factor:.0f}", color=ORANGE)
    ax.set(yscale="log", xlabel="pair of features", ylabel="wavelength, positions")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.legend(loc="lower right")
    return figure


def gqa(llama: Llama) -> Figure:
    """Query heads that share key/value heads."""
    figure, ax = drawing(1.75)
    kinds = [(8, "K = H: each its own\n(Llama 2 7B)"), (2, "K < H: groups share\n(Llama 3)"),
             (1, "K = 1: all share one\n(no Llama)")]  # fmt: skip
    for i, (n_kv_heads, text) in enumerate(kinds):
        left, size, n_heads = 1.25 + 2.15 * i, 0.24, 8
        for head in range(n_heads):
            x = left + size * head
            box(ax, x + 0.02, 1.35, size - 0.04, 0.24, "", BLUE)
            group = head // (n_heads // n_kv_heads)
            middle = left + size * n_heads * (group + 0.5) / n_kv_heads
            ax.plot([x + size / 2, middle], [1.35, 0.94], color=LINE, linewidth=1)
        for group in range(n_kv_heads):
            middle = left + size * n_heads * (group + 0.5) / n_kv_heads
            box(ax, middle - size / 2 + 0.02, 0.7, size - 0.04, 0.24, "", ORANGE)
        ax.text(left + size * n_heads / 2, 0.5, text, ha="center", va="top", color=GRAY)
    ax.text(1.15, 1.47, "queries", ha="right", va="center", color=BLUE)
    ax.text(1.15, 0.82, "keys, values", ha="right", va="center", color=ORANGE)
    return figure


def swiglu(llama: Llama) -> Figure:
    """The gate's function, and the widths of the three matrices."""
    figure, (curve, flow) = charts(2, 2.7, width_ratios=[1, 1.25])
    x = torch.linspace(-6, 4, 200)
    curve.plot(x, torch.nn.functional.silu(x), color=BLUE, label="silu(x) = x · sigmoid(x)")
    curve.plot(x, x.relu(), color=GRAY, linewidth=1.2, linestyle="--", label="relu(x)")
    curve.legend(loc="upper left")
    curve.set_xlabel("x")
    flow.axis("off")
    flow.set(xlim=(0, 4), ylim=(0, 2.7))
    box(flow, 0.0, 1.1, 0.75, 0.5, "x\n(B, S, D)", GRAY, fontsize=8)
    box(flow, 1.1, 1.75, 1.0, 0.5, "w1: gate\n(B, S, F)", BLUE, fontsize=8)
    box(flow, 1.1, 0.45, 1.0, 0.5, "w3: up\n(B, S, F)", ORANGE, fontsize=8)
    box(flow, 2.35, 1.1, 0.75, 0.5, "silu(gate)\n· up", PURPLE, fontsize=8)
    box(flow, 3.3, 1.1, 0.7, 0.5, "w2: down\n(B, S, D)", GREEN, fontsize=8)
    for start, end in (((0.75, 1.45), (1.1, 1.95)), ((0.75, 1.25), (1.1, 0.75)),
                       ((2.1, 1.95), (2.4, 1.6)), ((2.1, 0.75), (2.4, 1.1)),
                       ((3.1, 1.35), (3.3, 1.35))):  # fmt: skip
        arrow(flow, start, end)
    return figure


def logits(llama: Llama) -> Figure:
    """The likeliest next tokens of a prompt."""
    inside = look_inside(llama)
    probabilities, ids = inside.logits.softmax(-1).topk(10)
    texts = [shown(llama.tokenizer.decode([int(i)])) for i in ids]
    figure, (ax,) = charts(height=2.7)
    ax.barh(range(10), probabilities.tolist(), color=BLUE)
    ax.set_yticks(range(10), texts, family=MONO)
    for y, probability in enumerate(probabilities.tolist()):
        ax.text(probability, y, f" {probability:.3f}", va="center", color=GRAY)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_title("after: " + "".join(inside.texts[1:]))
    ax.set_xlabel("probability")
    return figure
