"""Colours, fonts and shapes that all pictures of the guide share.

The background is white and opaque, so that a picture is readable on light and dark pages.
"""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, GRAY, LINE, PAPER = "#1f2328", "#59636e", "#d1d9e0", "#f6f8fa"
BLUE, ORANGE, GREEN, PURPLE, RED = "#0969da", "#bc4c00", "#1a7f37", "#8250df", "#cf222e"
PALE = {
    BLUE: "#ddf4ff",
    ORANGE: "#fff1e5",
    GREEN: "#dafbe1",
    PURPLE: "#fbefff",
    RED: "#ffebe9",
    GRAY: PAPER,
}
WIDTH = 7.6  # inches
MONO = ["DejaVu Sans Mono", "monospace"]

RC: Any = {
    "font.size": 9.5,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "svg.fonttype": "none",  # text stays text: files are small
    "svg.hashsalt": "guide",  # the same picture is the same file
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "xtick.color": GRAY,
    "ytick.color": GRAY,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "text.parse_math": False,
}


def charts(columns: int = 1, height: float = 3.0, **options: Any) -> tuple[Figure, list[Axes]]:
    """A picture with charts side by side. height: inches. options: of `Figure.subplots`."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def drawing(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty picture, whose coordinates are inches from the lower left corner."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    color: str = GRAY,
    **font: Any,
) -> None:
    """A box whose lower left corner is at (x, y), with text in its middle."""
    shape = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.04",
        facecolor=PALE[color],
        edgecolor=color,
        linewidth=1,
        zorder=3,
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", zorder=4, **font)


def frame(axes: Axes, x: float, y: float, width: float, height: float, text: str) -> None:
    """A dashed frame around other shapes, with text above its upper left corner."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08",
        facecolor="none", edgecolor=GRAY, linewidth=1, linestyle=(0, (4, 3)),
    )  # fmt: skip
    axes.add_patch(shape)
    axes.text(x, y + height + 0.05, text, color=GRAY, va="bottom")


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str = GRAY,
    **options: Any,
) -> None:
    """An arrow between two points. options: of `FancyArrowPatch`."""
    style: dict[str, Any] = dict(arrowstyle="-|>", mutation_scale=9, linewidth=1.2)
    style |= dict(shrinkA=0, shrinkB=0)
    axes.add_patch(FancyArrowPatch(start, end, color=color, **style | options))


def key(axes: Axes, meanings: dict[str, str], x: float, y: float, distance: float) -> None:
    """Small boxes in a row, each with the meaning of its colour. distance: from box to box."""
    for i, (color, meaning) in enumerate(meanings.items()):
        box(axes, x + distance * i, y, 0.16, 0.16, "", color)
        axes.text(x + 0.24 + distance * i, y + 0.08, meaning, va="center", color=GRAY)


def shown(text: str) -> str:
    """The text of a token with its blanks and line ends visible."""
    return text.replace(" ", "·").replace("\n", "\\n")
