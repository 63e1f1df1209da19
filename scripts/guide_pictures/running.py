"""Pictures of a model that runs: the two loops, the KV cache, sampling, scores, the engine."""

from matplotlib.figure import Figure

from guide_pictures.inside import PROMPT, look_inside
from guide_pictures.style import (
    BLUE,
    GRAY,
    GREEN,
    LINE,
    MONO,
    ORANGE,
    PURPLE,
    box,
    charts,
    drawing,
    key,
    shown,
)  # fmt: skip
from llama import Llama, SamplingParams
from llama.config import PRESETS
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.slot import Slot
from llama.sampling import distribution

TOP_P = 0.9
# What a step feeds: the slot, the request, how many tokens of its prompt, how many generated ones.
Fed = tuple[int, int, int, int]


def loops(llama: Llama) -> Figure:
    """Which tokens each call of the model gets: the prompt at once, then one at a time."""
    prompt = llama.tokenizer.encode("Once upon a time", bos=True, eos=False)
    ((generated,), _) = llama.generate([prompt], 4, temperature=0)
    ids, n_prompt = prompt + generated[:3], len(prompt)
    texts = [shown(text) for text in llama.tokenizer.token_texts(ids)]
    width, height, left = 0.6, 0.34, 2.3
    figure, ax = drawing(2.75)
    for position, text in enumerate(texts):
        x = left + width * (position + 0.5)
        ax.text(x, 1.75, text, rotation=45, ha="left", va="bottom", family=MONO, fontsize=8)
    for call in range(4):
        first = 0 if call == 0 else n_prompt + call - 1
        end = n_prompt + call
        y = 1.35 - height * call
        name = "prefill" if call == 0 else "decode"
        ax.text(0.1, y + 0.13, f"{name}: tokens[:, {first}:{end}]", va="center", family=MONO,
                fontsize=8)  # fmt: skip
        for position in range(end):
            color = GRAY if position < first else BLUE if call == 0 else GREEN
            box(ax, left + width * position + 0.02, y, width - 0.04, height - 0.08, "", color)
    meanings = {BLUE: "computed at once", GREEN: "computed alone", GRAY: "read from the KV cache"}
    key(ax, meanings, 0.2, 0.04, distance=1.9)
    return figure


def kv_cache(llama: Llama) -> Figure:
    """Memory of the KV cache in bfloat16, by the number of positions."""
    figure, (ax,) = charts(height=2.9)
    colors = {"llama-2-7b": ORANGE, "llama-3-8b": BLUE, "llama-3.2-1b": GREEN,
              "llama-3.1-70b": PURPLE}  # fmt: skip
    for name, color in colors.items():
        args = PRESETS[name]
        positions = [256, args.context]
        per_position = 2 * args.n_layers * args.local_kv_heads(1) * args.head_dim * 2
        gib = [n * per_position / 2**30 for n in positions]
        ax.plot(positions, gib, color=color, marker="o", markersize=4, label=name)
        ax.annotate(f"{gib[-1]:.3g} GiB", (args.context, gib[-1]), xytext=(7, -3), color=color,
                    textcoords="offset points", backgroundcolor="white")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="positions of one row", ylabel="GiB")
    ax.set_xlim(200, 400_000)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:,g}")
    ax.legend(loc="lower right")
    return figure


def sampling(llama: Llama) -> Figure:
    """Temperature changes the probabilities, and top_p keeps the likeliest tokens."""
    inside = look_inside(llama)
    order = inside.logits.argsort(descending=True)
    texts = [shown(llama.tokenizer.decode([int(i)])) for i in order[:8]]
    figure, (bars, totals) = charts(2, 3.0)
    for i, (temperature, color) in enumerate(((0.5, BLUE), (1.0, ORANGE), (1.5, GREEN))):
        probabilities = (inside.logits / temperature).softmax(-1)[order]
        places = [number + 0.27 * (i - 1) for number in range(len(texts))]
        label = f"temperature {temperature}"
        bars.bar(places, probabilities[: len(texts)].tolist(), 0.27, color=color, label=label)
        total = probabilities.cumsum(0)
        params = SamplingParams(temperature=temperature, top_p=TOP_P)
        n_kept = int((distribution(inside.logits, params, [], []) > 0).sum())
        totals.plot(range(1, len(total) + 1), total, color=color)
        totals.plot(n_kept, total[n_kept - 1], "o", color=color)
        totals.annotate(f"{n_kept}", (n_kept, total[n_kept - 1]), xytext=(0, 7), color=color,
                        textcoords="offset points", ha="right")  # fmt: skip
    bars.set_xticks(range(len(texts)), texts, rotation=60, family=MONO, fontsize=7.5)
    bars.set_title("probability")
    bars.legend()
    totals.axhline(TOP_P, color=GRAY, linewidth=1, linestyle="--")
    totals.set(xscale="log", xlabel="number of likeliest tokens", ylim=(0, 1.08))
    totals.xaxis.set_major_formatter("{x:,.0f}")
    totals.set_title(f"their total; top_p {TOP_P} keeps this many")
    return figure


def logprobs(llama: Llama) -> Figure:
    """The log-probability of each token of a text."""
    (scores,) = llama.score([PROMPT])
    ids = llama.tokenizer.encode(PROMPT, bos=True, eos=False)
    texts = [shown(text) for text in llama.tokenizer.token_texts(ids)][1:]
    figure, (ax,) = charts(height=2.6)
    ax.bar(range(len(texts)), scores[1:], color=BLUE)
    ax.set_xticks(range(len(texts)), texts, family=MONO, fontsize=8)
    ax.set_ylabel("log-probability, nats")
    ax.axhline(0, color=LINE, linewidth=1)
    return figure


def fed_tokens(llama: Llama, texts: list[str], lengths: list[int]) -> list[list[Fed]]:
    """Run prompts on an engine of two slots. Returns what each step feeds to the model."""
    engine = Engine(llama.model, 2, 64, llama.tokenizer, prefill_chunk=8)
    requests = []
    for row, (text, n) in enumerate(zip(texts, lengths, strict=True)):
        params = SamplingParams(max_gen_len=n, ignore_eos=True)
        requests.append(engine.submit(llama.encode_prompt(text), params, row))
    n_fed = dict.fromkeys(requests, 0)
    slots: dict[Request, Slot] = {}
    steps = []
    while engine.has_work:
        engine.step()
        slots |= {slot.request: slot for slot in engine._slots if slot.request is not None}
        fed = []
        for request, slot in slots.items():
            before, now, n_prompt = n_fed[request], len(slot.tokens), len(request.prompt_tokens)
            of_prompt = max(0, min(now, n_prompt) - before)
            fed.append((slot.index, request.row, of_prompt, now - before - of_prompt))
            n_fed[request] = now
        steps.append(fed)
        slots = {request: slot for request, slot in slots.items() if request.finish_reason is None}
    return steps


def engine(llama: Llama) -> Figure:
    """What an engine of two slots feeds to the model in each step, for four requests."""
    texts = ["Once upon a time there was a king who had three sons and a daughter", "The fox",
             "A wolf and a bear", "The queen said"]  # fmt: skip
    steps = fed_tokens(llama, texts, [5, 4, 5, 4])
    colors = (BLUE, ORANGE, GREEN, PURPLE)
    width, height, left = 0.72, 0.42, 0.75
    figure, ax = drawing(1.95)
    ax.text(left - 0.1, 1.72, "step", ha="right", color=GRAY)
    for step, fed in enumerate(steps):
        x = left + width * step
        ax.text(x + width / 2, 1.72, str(step), ha="center", color=GRAY)
        for slot, row, of_prompt, generated in fed:
            text = "\n".join([f"prompt {of_prompt}"] * (of_prompt > 0) + ["1 new"] * generated)
            box(ax, x + 0.02, 1.2 - 0.48 * slot, width - 0.04, height, text, colors[row],
                fontsize=7.5)  # fmt: skip
    for slot in range(2):
        ax.text(left - 0.1, 1.41 - 0.48 * slot, f"slot {slot}", ha="right", va="center")
    meanings = {color: f"request {row}" for row, color in enumerate(colors)}
    key(ax, meanings, left, 0.25, distance=1.3)
    return figure
