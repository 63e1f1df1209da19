"""The pictures of docs/llama3_explain.md: one function for each, which takes the bundled model."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from tqdm import tqdm

from guide_pictures import network, running, scale, text
from guide_pictures.style import RC
from llama import Llama

PICTURES: dict[str, Callable[[Llama], Figure]] = {
    function.__name__: function
    for function in (
        text.whole_way, text.merges, text.special_tokens, text.chat, text.build,
        network.residual, network.rms_norm, network.attention, network.rope, network.rope_scaling,
        network.gqa, network.swiglu, network.logits,
        running.loops, running.kv_cache, running.sampling, running.logprobs, running.engine,
        scale.column_row, scale.two_ranks, scale.training, scale.models, scale.rope_factor,
        scale.roofline,
    )
}  # fmt: skip


def draw_all(folder: Path, description: str) -> None:
    """Draw every picture as an SVG file. description: a text that each file holds."""
    llama = Llama.build(device="cpu")
    metadata = {"Date": None, "Creator": None, "Description": description}
    with matplotlib.rc_context(RC):
        for name, draw in tqdm(PICTURES.items(), "Drawing", unit="picture", delay=2):
            draw(llama).savefig(folder / f"{name}.svg", metadata=metadata)
