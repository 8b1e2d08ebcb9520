"""A matplotlib figure as an SVG that takes its colours and font from the page around it."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# matplotlib knows colours, not CSS variables: each role has a colour of its own, replaced afterwards.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
ACCENT, SECOND, THIRD = "#040404", "#050505", "#060606"
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    ACCENT: "accent",
    SECOND: "second",
    THIRD: "third",
}

WIDTH_INCHES = 4.7
POINTS_PER_INCH = 72  # what an SVG is saved at, so that measured positions are the saved ones
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so measured alike on every machine
    "font.size": 8.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": True,
}
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@dataclass(frozen=True)
class Plot:
    """A figure of a page."""

    title: str
    caption: str
    svg: str


def render(name: str, title: str, draw: Callable[["Figure"], None], *, height: float = 3.0) -> str:
    """Draw on an empty figure and return its `<svg>`; equal input gives equal bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained", dpi=POINTS_PER_INCH)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=_NO_METADATA)
    return _for_page(file.getvalue(), name, title)


def _for_page(text: str, name: str, title: str) -> str:
    """Only the `<svg>` element, scalable, labelled, with ids that no other figure of the page has."""
    text = text[text.index("<svg") :]
    view = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">") + 1 :]
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    # `title` and `name` are this package's own words, never a reader's input.
    return f'<svg {view.group() if view else ""} role="img" aria-label="{title}">{body.rstrip()}'
