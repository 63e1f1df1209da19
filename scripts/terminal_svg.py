"""Draw the output of a terminal program as an SVG picture, for the README.

script -qc 'llama chat --seed 4' chat.txt        # a real session, typed by hand
python scripts/terminal_svg.py chat.txt docs/images/chat.svg
"""

import re
import textwrap
from html import escape
from pathlib import Path

import fire

COLUMNS = 92
LINE, CHARACTER, MARGIN = 19, 8.1, 18  # pixels
STYLE = (
    "text{font:13.5px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#d7dae0;"
    "white-space:pre}.dim{fill:#7d8590}.typed{fill:#7ee787}"
)


def rows_of(output: str) -> list[tuple[str, str]]:
    """The wrapped lines of the screen, each with its CSS class: "dim", "typed" or ""."""
    rows: list[tuple[str, str]] = []
    is_dim = False
    for line in output.replace("\r", "").splitlines():
        starts_dim = "\x1b[2m" in line
        kind = "dim" if is_dim or starts_dim else "typed" if line.startswith("> ") else ""
        is_dim = (is_dim or starts_dim) and "\x1b[0m" not in line
        text = re.sub(r"\x1b\[[\d;]*m", "", line)
        rows += [(part, kind) for part in textwrap.wrap(text, COLUMNS) or [""]]
    return rows


def draw(rows: list[tuple[str, str]]) -> str:
    """The SVG text of a window that shows the lines."""
    width, height = COLUMNS * CHARACTER + 2 * MARGIN, len(rows) * LINE + 3 * MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'role="img" aria-label="A chat with the bundled model in a terminal">',
        f"<style>{STYLE}</style>",
        f'<rect width="{width:.0f}" height="{height}" rx="10" fill="#0d1117"/>',
        *(
            f'<circle cx="{MARGIN + 16 * i}" cy="16" r="5" fill="{color}"/>'
            for i, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
        ),
    ]
    for number, (text, kind) in enumerate(rows):
        y = 2.6 * MARGIN + number * LINE
        lines.append(f'<text class="{kind}" x="{MARGIN}" y="{y:.0f}">{escape(text)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main(source: str, picture: str) -> None:
    """Draw a file of terminal output.

    Args:
        source: the file with the program's output, as `script` records it.
        picture: the SVG file to write.
    """
    output = Path(source).read_text(encoding="utf-8")
    Path(picture).write_text(draw(rows_of(output)), encoding="utf-8")


if __name__ == "__main__":
    fire.Fire(main)
