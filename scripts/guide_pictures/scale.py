"""Pictures of size: tensor parallelism, training, the published models, and speed limits."""

import math
from itertools import pairwise

import torch
from matplotlib.figure import Figure

from guide_pictures.style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    arrow,
    box,
    charts,
    drawing,
    frame,
)  # fmt: skip
from llama import Llama, ModelArgs, Transformer
from llama.config import PRESETS, RopeScaling
from llama.model import apply_scaling
from llama.training.loop import TrainingOptions
from llama.training.optimizer import learning_rate_factor


def column_row(llama: Llama) -> Figure:
    """A column-parallel matrix, then a row-parallel one, on two ranks."""
    figure, ax = drawing(2.5)
    box(ax, 0.3, 1.0, 0.5, 0.5, "x", GRAY)
    ax.text(0.55, 0.85, "(…, D)\non both", ha="center", va="top", color=GRAY, fontsize=8)
    for y, rank, color in ((1.35, 0, BLUE), (0.35, 1, ORANGE)):
        box(ax, 1.5, y, 0.5, 0.85, f"A{rank}", color)
        box(ax, 2.7, y + 0.3, 0.6, 0.3, f"y{rank}", color)
        box(ax, 4.0, y + 0.2, 0.9, 0.45, f"B{rank}", color)
        box(ax, 5.6, y + 0.3, 0.6, 0.3, f"z{rank}", color)
        for start, end in (((0.8, 1.25), (1.5, y + 0.42)), ((2.0, y + 0.45), (2.7, y + 0.45)),
                           ((3.3, y + 0.45), (4.0, y + 0.45)), ((4.9, y + 0.45), (5.6, y + 0.45)),
                           ((6.2, y + 0.45), (6.75, 1.25))):  # fmt: skip
            arrow(ax, start, end, color)
    box(ax, 6.75, 1.0, 0.6, 0.5, "z0 + z1", GREEN, fontsize=8.5)
    ax.text(7.05, 0.85, "(…, D)\nall-reduce", ha="center", va="top", color=GRAY, fontsize=8)
    texts = {1.75: "column-parallel:\nhalf of the outputs", 3.0: "half of the\nfeatures"}
    texts |= {4.45: "row-parallel:\nhalf of the inputs", 5.9: "partial\nsums"}
    for x, text in texts.items():
        ax.text(x, 0.05, text, ha="center", va="bottom", color=GRAY, fontsize=8)
    return figure


def two_ranks(llama: Llama) -> Figure:
    """One block of Llama 3 8B on two ranks."""
    args = PRESETS["llama-3-8b"]
    n_heads, n_kv_heads, width = args.n_heads // 2, args.local_kv_heads(2), args.ffn_dim // 2
    figure, ax = drawing(5.3)
    for rank, left, color in ((0, 0.5, BLUE), (1, 4.5, ORANGE)):
        frame(ax, left - 0.2, 0.35, 3.0, 4.45, f"rank {rank}")
        queries = f"query heads {rank * n_heads}–{(rank + 1) * n_heads - 1}"
        keys = f"key/value heads {rank * n_kv_heads}–{(rank + 1) * n_kv_heads - 1}"
        features = f"features {rank * width}–{(rank + 1) * width - 1}"
        rows = [
            (4.3, "attention_norm(h)", GRAY), (3.65, f"wq wk wv: {queries},\n{keys}", color),
            (3.1, "softmax(q kᵀ) v, own KV cache", color), (2.55, "wo: a partial sum", color),
            (1.95, "ffn_norm(h)", GRAY), (1.4, f"w1 w3: {features}", color),
            (0.95, "silu(gate) · up", color), (0.5, "w2: a partial sum", color),
        ]  # fmt: skip
        for y, text, shade in rows:
            box(ax, left, y, 2.6, 0.42 if "\n" in text else 0.32, text, shade, fontsize=8.5)
        for (y, *_), (below, text, _) in pairwise(rows):
            if not text.startswith("ffn_norm"):  # an all-reduce comes before it
                top = below + (0.42 if "\n" in text else 0.32)
                arrow(ax, (left + 1.3, y), (left + 1.3, top))
    for y, end in ((2.36, 2.27), (0.31, 0.05)):
        ax.plot([1.8, 1.8, 5.8, 5.8], [y + 0.19, y, y, y + 0.19], color=GREEN, linewidth=1.2)
        box(ax, 2.95, y - 0.13, 1.7, 0.26, "all-reduce: h = h + sum", GREEN, fontsize=8)
        for x in (1.8, 5.8):
            arrow(ax, (x, y), (x, end), GREEN)
    for x in (1.8, 5.8):
        arrow(ax, (x, 5.15), (x, 4.62))
    ax.text(3.8, 5.1, "h (B, S, D), whole on both ranks", ha="center", color=INK)
    ax.text(3.8, 0.03, "h, on to the next block", ha="center", color=INK)
    return figure


def training(llama: Llama) -> Figure:
    """The loss of a small model that learns one sentence, and the schedule of the learning rate."""
    ids = llama.tokenizer.encode("The fox and the wolf went into the forest.", bos=True, eos=True)
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=llama.tokenizer.n_words)
    torch.manual_seed(0)
    model = Transformer(args)
    optimizer = model.configure_optimizers(learning_rate=3e-3)
    losses = []
    for _ in range(40):
        loss = model.forward_loss(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    figure, (left, right) = charts(2, 2.7)
    left.plot(losses, color=BLUE)
    left.axhline(math.log(args.vocab_size), color=ORANGE, linewidth=1, linestyle="--")
    left.text(len(losses), math.log(args.vocab_size), "ln V", color=ORANGE, ha="right", va="bottom")
    left.set(xlabel="step", ylabel="loss, nats a token", ylim=(0, None))
    left.set_title("one sentence, again and again")
    options = TrainingOptions(steps=1000, warmup_steps=100)
    right.plot([learning_rate_factor(step, options) for step in range(1000)], color=GREEN)
    right.set(xlabel="step", ylim=(0, 1.05))
    right.set_title("learning rate, as a share of its peak")
    return figure


def shares(args: ModelArgs) -> dict[str, int]:
    """Parameters by part of the model."""
    sizes = {name: math.prod(shape) for name, shape in args.parameter_shapes().items()}
    attention = sum(size for name, size in sizes.items() if ".attention." in name)
    feed_forward = sum(size for name, size in sizes.items() if ".feed_forward." in name)
    rest = sum(sizes.values()) - attention - feed_forward
    return {"embedding and output": rest, "attention": attention, "feed-forward": feed_forward}


def models(llama: Llama) -> Figure:
    """Where the parameters of the published models are."""
    names = ["llama-1-7b", "llama-2-7b", "llama-2-70b", "llama-3-8b", "llama-3.1-405b",
             "llama-3.2-1b", "llama-3.2-3b", "llama-3.3-70b"]  # fmt: skip
    figure, (ax,) = charts(height=3.1)
    for y, args in enumerate([*(PRESETS[name] for name in names), llama.model.params]):
        parts, left = shares(args), 0.0
        total = sum(parts.values())
        for (part, count), color in zip(parts.items(), (GRAY, ORANGE, BLUE), strict=True):
            ax.barh(y, count / total, left=left, color=color, label=part if y == 0 else None)
            left += count / total
        size = f"{total / 1e9:.3g} billion" if total >= 1e9 else f"{total / 1e6:.3g} million"
        ax.text(1.01, y, size, va="center", color=GRAY)
    ax.set_yticks(range(len(names) + 1), [*names, "bundled"])
    ax.set(xlim=(0, 1.22), xticks=[0, 0.5, 1], xticklabels=["0", "half", "all parameters"])
    ax.invert_yaxis()
    ax.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def rope_factor(llama: Llama) -> Figure:
    """Wavelengths of Llama 3.2 1B with the published factor, and with the one in Meta's code."""
    args = PRESETS["llama-3.2-1b"]
    frequencies = args.rope_theta ** -(torch.arange(0, args.head_dim, 2) / args.head_dim)
    figure, (ax,) = charts(height=2.5)
    for factor, color, text in ((32, BLUE, "published, and here"), (8, ORANGE, "Meta's code")):
        ratio = frequencies / apply_scaling(frequencies, RopeScaling(float(factor)))
        ax.plot(ratio, color=color, marker=".", label=f"factor {factor}: {text}")
    ax.set(yscale="log", xlabel="pair of features", ylabel="wavelength, times")
    ax.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    ax.minorticks_off()
    ax.legend()
    return figure


def roofline(llama: Llama) -> Figure:
    """Tokens a second of Llama 3 8B in bfloat16, by the number of tokens in one forward."""
    bandwidth, flops = 3e12, 800e12  # round numbers near those of an H100
    args = PRESETS["llama-3-8b"]
    n_weights = sum(math.prod(shape) for name, shape in args.parameter_shapes().items()
                    if not name.startswith("tok_embeddings"))  # fmt: skip
    tokens = torch.logspace(0, 4, 200)
    reading, computing = 2 * n_weights / bandwidth, 2 * n_weights * tokens / flops
    figure, (ax,) = charts(height=2.9)
    ax.plot(tokens, tokens / reading, color=GRAY, linestyle=":", label="limit of reading")
    ax.plot(tokens, tokens / computing, color=GRAY, linestyle="--", label="limit of arithmetic")
    ax.plot(tokens, tokens / computing.clamp(min=reading), color=BLUE, label="the lower of both")
    ax.plot(1, 1 / reading, "o", color=ORANGE)
    ax.text(1.15, 0.8 / reading, "decode of one prompt", color=ORANGE, va="top")
    ax.plot(2048, flops / (2 * n_weights), "o", color=PURPLE)
    ax.text(2048, 0.75 * flops / (2 * n_weights), "prefill", color=PURPLE, va="top", ha="center")
    ax.set(xscale="log", yscale="log", xlabel="tokens in one forward", ylabel="tokens a second")
    ax.set_ylim(100, 1e6)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    ax.legend()
    return figure
