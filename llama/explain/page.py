"""The explain page: one HTML file that follows a prompt through every tensor."""

import json
from collections.abc import Sequence
from pathlib import Path

from llama import parallel
from llama.errors import ExplainError
from llama.explain.page_data import check_length, page_data
from llama.explain.tracing import trace
from llama.files import atomic_file
from llama.generation import Llama
from llama.tokenizer import Dialog

PARTS = Path(__file__).parent / "page"
SCRIPTS = ("data.js", "draw.js", "layer.js", "page.js")


def write_page(
    llama: Llama, prompt: str | Sequence[int] | Dialog, path: str | Path, mp_size: int = 1
) -> int:
    """Follow a prompt and one decode step, and write the page to `path`.

    mp_size: the number of ranks whose parts of each tensor are drawn. The model runs on one rank.

    Returns the size of the file in bytes. Raises ExplainError for a prompt that is too long for the
    page, ConfigError where the model cannot be split over `mp_size` ranks, DataError where the file
    cannot be written, and what `trace` raises.
    """
    if parallel.mp_size() > 1:
        raise ExplainError("the page is made on one rank: mp_size draws the split over more")
    llama.model.params.check_split(mp_size)
    check_length(llama.model.params, len(llama.encode_prompt(prompt)))
    data = page_data(llama, trace(llama, prompt, max_gen_len=2, ignore_eos=True), mp_size)
    page = _page(json.dumps(data, separators=(",", ":"))).encode()
    with atomic_file(path) as file:
        file.write(page)
    return len(page)


def _page(data: str) -> str:
    """The parts of the page and its data as one file."""
    page = (PARTS / "page.html").read_text(encoding="utf-8")
    parts = {
        "/* style */": (PARTS / "page.css").read_text(encoding="utf-8"),
        "/* scripts */": "".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "/* data */": data.replace("<", "\\u003c"),  # "</script>" in a token would end the data
    }
    for place, part in parts.items():
        page = page.replace(place, part)
    return page
