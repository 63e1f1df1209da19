"""The explain page in a browser: its numbers are the tensors', and it works without a network."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks

from llama import Llama, LlamaError, SamplingParams
from llama.checkpoints.inspect import flops_per_token
from llama.explain import Trace, logit_lens, trace
from llama.explain.page import write_page
from llama.sampling import distribution

# The text has what HTML and JSON could take for markup.
PROMPT = "Once upon a time a fox </script><b>&amp; “so”: \\n \U0001f98a"


@pytest.fixture(scope="module")
def llama() -> Llama:
    return Llama.build(max_seq_len=300, max_batch_size=1, device="cpu")


@pytest.fixture(scope="module")
def traced(llama: Llama) -> Trace:
    return trace(llama, PROMPT, max_gen_len=2)


@pytest.fixture(scope="module")
def file(llama: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "explain.html"
    write_page(llama, PROMPT, path, mp_size=2)
    return path


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    """The page, opened from the disk. It may load nothing else and write nothing to the console."""
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert complaints == [file.as_uri()]


def data_of(file: Path) -> Any:
    """What the page holds as JSON."""
    text = file.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def number_of(text: str) -> float:
    return float(text.replace("−∞", "-inf").replace("%", "e-2").replace(" ", "").replace(",", ""))


def assert_shown(text: str, value: float) -> None:
    """The text is the number with three digits. Values are stored as float16, so the last digit may
    be one off."""
    assert number_of(text) == pytest.approx(value, rel=6e-3, abs=1e-9), text


def test_the_file_is_small_and_whole(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text) < 5_000_000  # for more than 32 tokens
    addresses = set(re.findall(r"https?://[\w./-]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of a format, not an address
    assert "</script><b>" not in text


def test_two_hundred_values_under_the_pointer(page: Any, traced: Trace) -> None:
    """Random cells of random heat maps, at random layers and both steps."""
    rng = random.Random(1)
    n = 0
    for _ in range(10):
        number, layer = rng.randrange(2), rng.randrange(traced.params.n_layers)
        page.evaluate("([step, layer]) => choose({step, layer})", [number, layer])
        cards = page.query_selector_all("[data-tensor]")
        for card in rng.sample(cards, 20):
            canvas = card.query_selector("canvas")
            canvas.scroll_into_view_if_needed()
            box = canvas.bounding_box()
            x, y = (rng.uniform(0.02, 0.98) * box[side] for side in ("width", "height"))
            page.mouse.move(box["x"] + x, box["y"] + y)
            output = card.query_selector("output")
            name, row, column = (
                output.get_attribute(f"data-{k}") for k in ("name", "row", "column")
            )
            tensor = traced.steps[number].tensors[name]
            is_attention = name.endswith(("scores", "weights"))
            cells = tensor.flatten(0, 2) if is_attention else tensor.flatten(0, 1).flatten(1)
            if name == "freqs_cis":
                cells = tensor.flatten(1)
            shown = output.inner_text().rpartition(": ")[2]
            assert_shown(shown, cells[int(row), int(column)].item())
            n += 1
    assert n == 200


def test_statistics_and_shapes(page: Any, traced: Trace) -> None:
    for card in page.query_selector_all("[data-tensor]"):
        name = card.query_selector(".name").inner_text()
        tensor, text = traced[name], card.inner_text()
        assert " × ".join(map(str, tensor.shape)) in text
        low, high, mean, rms = re.search(
            r"from (\S+) to (\S+), mean (\S+), root mean square (\S+)", text
        ).groups()  # type: ignore[union-attr]
        seen = tensor[tensor.isfinite()]
        assert_shown(low, seen.min().item())
        assert_shown(high, seen.max().item())
        assert number_of(mean) == pytest.approx(seen.mean().item(), rel=6e-3, abs=1e-7)
        assert_shown(rms, seen.square().mean().sqrt().item())


def test_attention_predictions_and_lens(page: Any, llama: Llama, traced: Trace) -> None:
    page.evaluate("choose({layer: 2, head: 3, token: 7})")
    weights = traced["layers.2.attention.weights"][0, 3, 7, :8].tolist()
    shown = [chip.inner_text() for chip in page.query_selector_all("#weights .chip small")]
    assert len(shown) == 8
    for text, weight in zip(shown, weights, strict=True):
        assert_shown(text, weight)
    top = traced["output"][0, 7].softmax(-1).topk(10).values.tolist()
    rows = page.query_selector_all("#predictions > span:nth-child(3n)")
    for row, probability in zip(rows, top, strict=True):
        assert_shown(row.inner_text(), probability)
    _, probs = logit_lens(llama.model, traced, k=1)
    for stage, row in enumerate(page.query_selector_all("#lens-table tr")[1:]):
        titles = [cell.get_attribute("title") for cell in row.query_selector_all("td")]
        for title, probability in zip(titles, probs[stage, :, 0].tolist(), strict=True):
            assert_shown(
                title.splitlines()[0].rpartition(" ")[0].rpartition(" ")[2], probability * 100
            )
    sizes = traced["layers.1"][0].square().mean(-1).sqrt().tolist()
    cells = page.query_selector_all("#residual tr:nth-child(6) td")
    for cell, size in zip(cells, sizes, strict=True):
        assert_shown(cell.inner_text(), size)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.6, 0.9), (1.0, 0.99), (2.0, 0.5), (0.05, 0.9), (0.0, 0.9)]
)
def test_sampling_is_that_of_the_library(
    page: Any, traced: Trace, temperature: float, top_p: float
) -> None:
    for name, value in (("temperature", temperature), ("top-p", top_p)):
        page.evaluate(
            "([name, value]) => { byId(name).value = value; byId(name).oninput(); }",
            [name, str(value)],
        )
    params = SamplingParams(temperature=temperature or 1e-6, top_p=top_p)
    want = distribution(traced["output"][0, -1], params, [], []).sort(descending=True).values
    if temperature > 0:
        n_kept = int((want > 0).sum())
        sentence = "Only the likeliest of 6,400 tokens" if n_kept == 1 else f"{n_kept:,} of 6,400"
        assert page.inner_text("#kept").startswith(sentence)
    rows = page.query_selector_all("#candidates > span:not(.text):not(.bar):not(.line)")
    for row, probability in zip(rows, want.tolist(), strict=False):
        shown = row.inner_text().partition(" → ")[2]
        assert number_of(shown) == pytest.approx(probability, rel=6e-3, abs=1e-9)
    assert len(rows) == 24


def test_what_the_cache_saves(page: Any, traced: Trace) -> None:
    args, n = traced.params, len(traced.tokens) + 1
    with_cache, without = (
        int(number.replace(",", ""))
        for number in re.findall(r"[\d,]{6,}", page.inner_text("#saved"))[:2]
    )
    assert with_cache == flops_per_token(args, n)
    assert without == sum(flops_per_token(args, i) for i in range(1, n + 1))
    kv = 2 * args.n_layers * args.local_kv_heads(1) * args.head_dim * 4
    assert f"{kv / 1024:.2f} KiB a token" in page.inner_text("#saved")


def test_keys_and_controls(page: Any, traced: Trace) -> None:
    state = "({step: state.step, token: state.token, layer: state.layer, head: state.head})"
    n = len(traced.tokens)
    assert page.evaluate(state) == {"step": 0, "token": n - 1, "layer": 0, "head": 0}
    for key in ("ArrowLeft", "]", "]", "[", ".", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    assert page.evaluate(state) == {"step": 0, "token": n - 2, "layer": 1, "head": 1}
    assert page.inner_text("#attention h2") == "Attention in layer 1"
    page.keyboard.press("s")
    assert page.evaluate(state) == {"step": 1, "token": 0, "layer": 1, "head": 1}
    page.keyboard.press("S")
    assert page.evaluate(state) == {"step": 0, "token": n - 2, "layer": 1, "head": 1}
    page.select_option("#step", "0")
    page.select_option("#layer", "3")
    page.click("#chips button >> nth=4")
    assert page.evaluate(state) == {"step": 0, "token": 4, "layer": 3, "head": 1}
    page.click("#patterns button >> nth=2")
    assert page.evaluate("state.head") == 2
    theme = page.evaluate("document.documentElement.dataset.theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    page.focus("[data-tensor='layers.N.attention.wk'] canvas")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    output = page.query_selector("[data-tensor='layers.N.attention.wk'] output")
    assert "head 0, feature 2" in output.inner_text()
    assert page.evaluate("state.token") == 4  # the arrows moved in the heat map only


def test_every_rank_and_exchange_is_drawn(page: Any) -> None:
    text = page.inner_text("#split")
    assert "13 exchanges" in text
    drawn = page.evaluate("[...document.querySelectorAll('#split text')].map(t => t.textContent)")
    assert {"rank 0", "rank 1", "wq: query heads 0 to 1", "wk, wv: head 1"} <= set(drawn)
    assert sum("all-reduce" in line for line in drawn) == 2
    rows = [row.inner_text() for row in page.query_selector_all("#table tr")]
    (gate,) = (row for row in rows if row.startswith("layers.N.feed_forward.w1"))
    assert "0: 0–351, 1: 352–703" in gate


@pytest.mark.parametrize("width", [360, 390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_makes_the_page_scroll_sideways(
    browser: Any, file: Path, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.close()


def test_wrong_pages(llama: Llama, tmp_path: Path) -> None:
    path = tmp_path / "explain.html"
    with pytest.raises(LlamaError, match="300 tokens: for this model the page has room for 209"):
        write_page(llama, [5] * 300, path)
    with pytest.raises(LlamaError, match="cannot be split over 3 ranks"):
        write_page(llama, PROMPT, path, mp_size=3)
    with pytest.raises(LlamaError, match="cannot write"):
        write_page(llama, PROMPT, tmp_path / "missing" / "explain.html")
    assert not path.exists()
    assert write_page(llama, [5] * 209, path) < 10_000_000


def page_of_rank(folder: str) -> str:
    llama = Llama.build(max_seq_len=64, device="cpu")
    with pytest.raises(LlamaError, match="on one rank"):
        write_page(llama, PROMPT, f"{folder}/explain.html")
    return "refused"


def test_the_page_is_made_on_one_rank(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, page_of_rank, str(tmp_path)) == ["refused"] * 2


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
def test_a_larger_model_has_every_nth_feature(heads: tuple[int, int], tmp_path: Path) -> None:
    """The page stays small; the values that are left out are a regular pattern."""
    from llama import ModelArgs, Tokenizer, Transformer
    from llama.checkpoints.folder import BUNDLED

    torch.manual_seed(1)
    args = ModelArgs(dim=512, n_layers=8, n_heads=heads[0], n_kv_heads=heads[1], vocab_size=6500,
                     max_seq_len=64, max_batch_size=1)  # fmt: skip
    model = Llama(Transformer(args), Tokenizer(BUNDLED / "tokenizer.model"))
    path = tmp_path / "explain.html"
    assert write_page(model, list(range(48)), path, 4) < 5_000_000
    data = data_of(path)
    assert data["stride"] > 1
    # The model has ids that the tokenizer lacks. They are never predicted.
    shown = {i for row in data["predictions"]["ids"] for i in row} | set(data["candidates"])
    assert max(shown) < model.tokenizer.n_words < args.vocab_size


def test_a_stop_token_does_not_end_the_page(tmp_path: Path) -> None:
    """The page has the step after the prompt, whatever the likeliest token is."""
    llama = Llama.build(max_seq_len=64, device="cpu")
    ids = llama.encode_prompt(PROMPT)
    likeliest = trace(llama, ids).generated
    llama.tokenizer.stop_tokens = likeliest
    assert len(trace(llama, ids, max_gen_len=2).steps) == 1
    write_page(llama, ids, tmp_path / "explain.html")
    assert [len(step["tokens"]) for step in data_of(tmp_path / "explain.html")["steps"]] == [
        len(ids),
        1,
    ]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    llama = Llama.build(max_seq_len=64, device="cpu")
    with torch.no_grad():
        llama.model.layers[1].attention.wo.weight.fill_(torch.nan)
    with pytest.raises(LlamaError, match="logits are not finite"):
        write_page(llama, PROMPT, tmp_path / "explain.html")
