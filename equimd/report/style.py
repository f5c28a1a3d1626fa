"""How figures look: colours that colour-blind readers tell apart; matplotlib settings stay inside a context."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
# Okabe and Ito (2008), in the order of use; each series also has its own marker and line, so colour is never alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":", "-", "--")

_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.minor.visible": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.2,
    "svg.fonttype": "path",
    "svg.hashsalt": "equimd",
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 160,
}


def colour(index: int) -> str:
    """The colour of the potential at this place."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """The marker of the potential at this place."""
    return MARKERS[index % len(MARKERS)]


def line(index: int) -> str:
    """The line style of the potential at this place."""
    return LINES[index % len(LINES)]


@contextmanager
def house_style() -> Iterator[None]:
    """matplotlib's settings for our figures, inside the block only."""
    from matplotlib import rc_context

    with rc_context(_SETTINGS):  # pyright: ignore
        yield


def new_axes(width: float = 5.6, height: float = 3.4) -> tuple[Any, Any]:
    """A figure (inches) with one pair of axes, without pyplot and its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def to_svg(figure: Any, label: str) -> str:
    """The figure as an inline <svg> that scales with the page; ``label`` is what a screen reader says."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    opening = svg.index(">")
    return f'<svg role="img" aria-label="{escape(label, quote=True)}" {svg[5:opening]}{svg[opening:]}'
