"""The guide is true: its outputs, its links to code, its pictures. `scripts/pages.py` finds errors.

Run `python scripts/guide.py --write` where a test here fails after a change of the code.
"""

import re
from pathlib import Path

import guide
import pytest
from guide_pictures import PICTURES, draw_all
from pages import ROOT, PageError, line_of, run, snippets, with_line_numbers, with_outputs

PAGE = guide.GUIDE.read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\d+\. .*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
WHERE_TO_READ_ON = list(SECTIONS)[-1]


def test_outputs_are_what_the_snippets_print() -> None:
    assert guide.refreshed(PAGE) == PAGE


@pytest.mark.parametrize("title", [title for title in SECTIONS if title != WHERE_TO_READ_ON])
def test_a_section_has_all_its_parts(title: str) -> None:
    section = SECTIONS[title]
    assert re.search(r"^- \*\*Code:\*\* .*\n?.*\.py#L\d+\)", section, re.MULTILINE)
    assert "\n- **Formula:** " in section
    assert "\n- **Shapes:** " in section
    assert re.search(r"^!\[.+\]\(images/guide/\w+\.svg\)$", section, re.MULTILINE)
    text, *exercises = re.split(r"^\*\*Exercise \d\.\*\* ", section, flags=re.MULTILINE)
    assert snippets(text)
    assert 1 <= len(exercises) <= 3
    for exercise in exercises:
        _, answer = exercise.split("<details><summary>Answer</summary>")
        assert snippets(answer)


def test_the_page_shows_every_picture_and_all_are_current() -> None:
    shown = re.findall(r"\]\(images/guide/(\w+)\.svg\)", PAGE)
    drawn = [path.stem for path in guide.PICTURES.iterdir()]
    assert sorted(shown) == sorted(PICTURES) == sorted(drawn)
    assert not guide.stale_pictures()


def test_pictures_can_be_drawn_and_are_small(tmp_path: Path) -> None:
    draw_all(tmp_path, guide.fingerprint())
    for path in tmp_path.iterdir():
        assert guide.fingerprint() in path.read_text(encoding="utf-8")
        assert path.stat().st_size < 100_000, path.name


# ---- scripts/pages.py ---------------------------------------------------------------------------

TWO_SNIPPETS = """# A page

```python
x = 1
print(x)
```

```text
one
```

<details>

```python
print(x + 1)
```

</details>
"""


def test_snippets_share_names_and_their_outputs_are_written_after_them() -> None:
    first, second = snippets(TWO_SNIPPETS)
    assert (first.line, first.output, second.line, second.output) == (4, "one\n", 15, None)
    outputs = run([first, second])
    assert outputs == ["1\n", "2\n"]
    written = with_outputs(TWO_SNIPPETS, outputs)
    assert [snippet.output for snippet in snippets(written)] == outputs
    assert with_outputs(written, outputs) == written


def test_a_failing_snippet_is_named_with_the_lines_of_the_page(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(PageError, match="line 15"):
        run(snippets(TWO_SNIPPETS.replace("x + 1", "x + '1'")))
    assert "line 15" in capfd.readouterr().err


def test_a_line_is_that_of_the_definition() -> None:
    source = (ROOT / "llama" / "generation.py").read_text(encoding="utf-8").splitlines()
    line = line_of("Llama.text_completion", ROOT / "llama" / "generation.py")
    assert source[line - 1].startswith("    def text_completion(")
    assert not source[line - 2].startswith("    @")  # it is not an overload
    assert line_of("ROOT", ROOT / "scripts" / "pages.py") > 1


@pytest.mark.parametrize("link", ["[`Llama.sing`](llama/generation.py#L1)", "[`x`](no.py#L1)"])
def test_a_link_to_nothing_is_an_error(link: str) -> None:
    with pytest.raises(PageError, match=r"sing|no\.py"):
        with_line_numbers(link, ROOT)
