"""Check or renew docs/llama3_explain.md: outputs of snippets, line numbers of links, and pictures.

python scripts/guide.py            # says what is out of date
python scripts/guide.py --write    # renews it; pictures need the extra [docs]
"""

import difflib
import hashlib
import sys
from importlib.util import find_spec

import fire
from pages import ROOT, PageError, run, snippets, with_line_numbers, with_outputs

from llama.checkpoints.folder import BUNDLED

GUIDE = ROOT / "docs" / "llama3_explain.md"
PICTURES = ROOT / "docs" / "images" / "guide"
# With these settings sums run in another order, as on processors without AVX.
OTHER_PROCESSOR = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def refreshed(page: str, **environment: str) -> str:
    """The page with what its snippets print now, and with the present line numbers of its links.

    environment: variables for the process of the snippets. Raises PageError if a snippet fails, or
    if a link names code that does not exist.
    """
    page = with_line_numbers(page, GUIDE.parent)
    return with_outputs(page, run(snippets(page), **environment))


def fingerprint() -> str:
    """A text that changes with the scripts of the pictures and with the bundled model. Each picture
    holds the fingerprint that was valid when it was drawn."""
    sources = list((ROOT / "scripts" / "guide_pictures").glob("*.py"))
    sources += [path for path in BUNDLED.iterdir() if path.suffix != ".md"]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return f"guide_pictures {digest.hexdigest()[:16]}"


def stale_pictures() -> list[str]:
    """The names of the pictures that an earlier script or model drew."""
    drawn = sorted(PICTURES.glob("*.svg"))
    return [p.name for p in drawn if fingerprint() not in p.read_text(encoding="utf-8")]


def difference(old: str, new: str) -> str:
    """The lines in which two versions of the page differ."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "the page", "now", n=1)
    return "\n".join(lines)


def main(write: bool = False) -> None:
    """Check the guide, or renew it.

    Args:
        write: write outputs, line numbers and pictures. Without it, only say what is out of date.
    """
    if write and find_spec("matplotlib") is None:
        sys.exit("the pictures need matplotlib: pip install -e '.[docs]'")
    page = GUIDE.read_text(encoding="utf-8")
    try:
        new = refreshed(page)
        elsewhere = refreshed(new, **OTHER_PROCESSOR) if write else new
    except PageError as error:
        sys.exit(str(error))
    if elsewhere != new:
        print(difference(new, elsewhere))
        sys.exit("these numbers depend on the processor: print fewer digits")
    if write:
        from guide_pictures import draw_all

        GUIDE.write_text(new, encoding="utf-8")
        draw_all(PICTURES, fingerprint())
        return
    stale = stale_pictures()
    if new != page or stale:
        print(difference(page, new), *stale, sep="\n")
        sys.exit("out of date: run python scripts/guide.py --write")


if __name__ == "__main__":
    fire.Fire(main)
