"""Pictures of the way from text to the model: tokens, dialogs, and the files of a model."""

from itertools import pairwise

from matplotlib.figure import Figure

from guide_pictures.style import (
    BLUE,
    GRAY,
    GREEN,
    INK,
    MONO,
    ORANGE,
    PURPLE,
    WIDTH,
    arrow,
    box,
    drawing,
    frame,
    key,
    shown,
)  # fmt: skip
from llama import Llama, Message, Tokenizer
from llama.checkpoints.folder import BUNDLED


def whole_way(llama: Llama) -> Figure:
    """From text to the next token, with the shape of each result."""
    figure, ax = drawing(5.6)
    left, width, height = 2.6, 2.5, 0.34

    steps = [
        (5.1, "Tokenizer.encode", "token ids (B, S)", PURPLE),
        (4.5, "tok_embeddings", "h (B, S, D)", BLUE),
        (3.75, "attention_norm", "(B, S, D)", BLUE),
        (3.2, "attention", "added to h (B, S, D)", ORANGE),
        (2.65, "ffn_norm", "(B, S, D)", BLUE),
        (2.1, "feed_forward", "added to h (B, S, D)", ORANGE),
        (1.4, "norm", "(B, S, D)", BLUE),
        (0.85, "output", "logits (B, S, V)", BLUE),
        (0.3, "choose", "one new id", GREEN),
    ]
    for y, name, result, color in steps:
        box(ax, left, y, width, height, name, color, family=MONO)
        ax.text(left + width + 0.25, y - 0.16, result, va="center", color=GRAY)
    middle = left + width / 2
    for (y, *_), (below, *_) in pairwise(steps):
        arrow(ax, (middle, y), (middle, below + height))
    arrow(ax, (middle, 5.56), (middle, 5.1 + height))
    ax.text(middle + 0.1, 5.5, "text", va="center", color=GRAY)
    frame(ax, left - 0.3, 1.79, width + 2.35, 2.43, "")
    ax.text(left - 0.4, 3.0, "TransformerBlock,\nonce for each layer", ha="right", color=GRAY)
    ax.plot([left, 0.6, 0.6, left - 0.02], [0.47, 0.47, 4.67, 4.67], color=GREEN, linewidth=1.2)
    arrow(ax, (left - 0.1, 4.67), (left, 4.67), GREEN)
    ax.text(0.7, 4.8, "the new id is the next\ninput: S is now 1", color=GREEN)
    return figure


def merge_steps(tokenizer: Tokenizer, word: str) -> list[list[bytes]]:
    """The parts of a word after each merge of byte-pair encoding, from single bytes on."""
    n_ranks = tokenizer.n_words - len(tokenizer.special_tokens)
    ranks = {tokenizer.token_bytes(i): i for i in range(n_ranks)}
    parts = [bytes([byte]) for byte in word.encode()]
    steps = [parts]
    while True:
        unions = [first + second for first, second in pairwise(parts)]
        known = [(ranks[union], i) for i, union in enumerate(unions) if union in ranks]
        if not known:
            return steps
        _, i = min(known)
        parts = [*parts[:i], unions[i], *parts[i + 2 :]]
        steps.append(parts)


def merges(llama: Llama) -> Figure:
    """Byte-pair encoding joins two neighbours in each step."""
    steps = merge_steps(llama.tokenizer, " princess")
    row, size = 0.36, 0.36
    figure, ax = drawing(row * len(steps) + 0.2)
    for number, parts in enumerate(steps):
        x, y = 1.6, row * (len(steps) - number - 1) + 0.12
        for part in parts:
            is_new = number > 0 and part not in steps[number - 1]
            width = size * len(part)
            box(ax, x + 0.02, y, width - 0.04, row - 0.08, shown(part.decode()),
                ORANGE if is_new else GRAY, family=MONO)  # fmt: skip
            x += width
        label = "single bytes" if number == 0 else f"merge {number}"
        ax.text(1.4, y + row / 2 - 0.04, label, ha="right", va="center", color=GRAY)
        if number == len(steps) - 1:
            ids = llama.tokenizer.encode(" princess", bos=False, eos=False)
            ax.text(x + 0.2, y + row / 2 - 0.04, f"id {', '.join(map(str, ids))}", va="center")
    return figure


def special_tokens(llama: Llama) -> Figure:
    """The ids of the vocabulary: single bytes, longer pieces, special tokens."""
    tokenizer = llama.tokenizer
    names = tokenizer.special_tokens
    first = min(names.values())
    figure, ax = drawing(1.5)
    parts = [
        (0.2, 1.5, "256 single bytes", 0, 255, GRAY),
        (1.8, 3.3, "longer pieces,\nfrequent ones first", 256, first - 1, BLUE),
        (5.2, 2.2, f"{len(names)} special tokens", first, tokenizer.n_words - 1, PURPLE),
    ]
    for x, width, text, low, high, color in parts:
        box(ax, x, 0.75, width, 0.5, text, color)
        ax.text(x, 0.67, f"{low:,}", va="top", color=GRAY)
        ax.text(x + width, 0.67, f"{high:,}", va="top", ha="right", color=GRAY)
    ax.text(0.2, 1.32, "ids, not to scale", color=GRAY)
    shown_names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
    text = "   ".join(f"{name} {names[name]}" for name in shown_names)
    ax.text(7.4, 0.2, text, family=MONO, fontsize=8, ha="right", color=PURPLE)
    return figure


def chat(llama: Llama) -> Figure:
    """The tokens of a dialog and its answer: special tokens, text of the caller, of the model."""
    dialog: list[Message] = [{"role": "user", "content": "Who are you?"}]
    prompt = llama.encode_dialog(dialog)
    ((answer,), _) = llama.generate([prompt], None, temperature=0)
    ids = [*prompt, *answer, llama.tokenizer.special_tokens["<|eot_id|>"]]
    special = set(llama.tokenizer.special_tokens.values())
    texts = [shown(text) for text in llama.tokenizer.token_texts(ids)]
    character, row, x, rows = 0.088, 0.34, 0.2, 1
    places = []
    for i, (token, text) in enumerate(zip(ids, texts, strict=True)):
        width = character * len(text) + 0.12
        if x + width > WIDTH - 0.2:
            x, rows = 0.2, rows + 1
        color = PURPLE if token in special else GREEN if i >= len(prompt) else BLUE
        places.append((x, rows, width, text, color))
        x += width + 0.04
    figure, ax = drawing(row * rows + 0.55)
    for x, number, width, text, color in places:
        y = row * (rows - number) + 0.42
        box(ax, x, y, width, row - 0.08, text, color, family=MONO, fontsize=8.5)
    meanings = {PURPLE: "special tokens", BLUE: "text of the prompt", GREEN: "generated text"}
    key(ax, meanings, 0.2, 0.12, distance=1.8)
    return figure


def build(llama: Llama) -> Figure:
    """What `Llama.build` makes of the files of a folder."""
    figure, ax = drawing(2.55)
    n_shards = len(list(BUNDLED.glob("consolidated.*.pth")))
    rows = [
        (1.85, "tokenizer.model", "Tokenizer", "text to ids and back", PURPLE),
        (1.15, "params.json", "ModelArgs", "the sizes, the letters of this page", GRAY),
        (0.45, f"consolidated.NN.pth ({n_shards} files)", "Transformer", "the weights", BLUE),
    ]
    frame(ax, 0.15, 0.25, 2.5, 2.05, "the folder")
    frame(ax, 3.35, 0.25, 4.05, 2.05, "Llama")
    for y, file, name, meaning, color in rows:
        box(ax, 0.3, y, 2.2, 0.36, file, color, family=MONO, fontsize=8)
        box(ax, 3.5, y, 1.3, 0.36, name, color, family=MONO)
        ax.text(4.95, y + 0.18, meaning, va="center", color=INK)
        arrow(ax, (2.5, y + 0.18), (3.5, y + 0.18))
    arrow(ax, (4.15, 1.15), (4.15, 0.81))
    ax.text(4.25, 0.98, "shapes, on the meta device", va="center", color=GRAY, fontsize=8.5)
    return figure
