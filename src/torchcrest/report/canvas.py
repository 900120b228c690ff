"""What the figures of a report are drawn on: SVG whose colours and letters are the page's, in light and in dark.

Figures are drawn at the width of a phone, with placeholders for colours that become the page's CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from torchcrest.errors import ConfigError, must
from torchcrest.train.methods import METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["INKS", "LETTER", "PHASES", "axes_of", "drawing", "legend", "name", "scale", "spread", "svg_of", "tick"]

WIDTH = 380  # CSS pixels
LETTER = 6.6  # pixels that a letter takes
LINE = 15  # pixels from a line of text to the next
PHASES = ("training", "selecting", "checking", "curvature")
MARKS = dict(zip(METHODS, "DvsoP^X>p*d<", strict=False))  # beside each name: nothing is said by colour alone
NAMES = ("ink", "soft", "grid", "paper", *(f"m-{name}" for name in METHODS), *(f"p-{name}" for name in PHASES))
INKS = {name: f"#0101{number:02x}" for number, name in enumerate(NAMES)}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.color": INKS["ink"],
    "axes.edgecolor": INKS["grid"],
    "axes.labelcolor": INKS["soft"],
    "axes.titlecolor": INKS["soft"],
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INKS["grid"],
    "xtick.color": INKS["grid"],
    "xtick.labelcolor": INKS["soft"],
    "xtick.minor.size": 0,
    "ytick.labelcolor": INKS["soft"],
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "round",
}


@contextmanager
def drawing(salt: str) -> Iterator[None]:
    """Draw in our style alone, whatever is set outside.

    Args:
        salt: another one for each figure of a page, so that names inside the SVG don't meet.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        do = "Run pip install 'torchcrest[plot]', or use --format md."
        raise ConfigError(must("matplotlib", "be installed", str(error), do)) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": salt})
        yield


def axes_of(
    height: float, *, left: float, right: float, top: float = 30, bottom: float = 46, rows: int = 1
) -> tuple[Figure, Any]:
    """Return a figure, and its axes with margins in pixels: SVG has 72 to the inch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.subplots(rows, 1)
    figure.subplots_adjust(left / WIDTH, bottom / height, 1 - right / WIDTH, 1 - top / height, hspace=0.42)
    return figure, axes


def scale(axis: Axis, write: Callable[[float, object], str] | None = None, *, whole: bool = False) -> None:
    """Put few ticks at round numbers on a linear axis."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole))
    axis.set_major_formatter(FuncFormatter(write or tick))


def legend(figure: Figure, entries: Sequence[tuple[str, str, str, str]]) -> None:
    """Put marks and names into the upper left corner, side by side: mark, edge, face, name."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], ls="none", ms=8, marker=m, color=edge, mfc=face, label=x) for m, edge, face, x in entries]
    figure.legend(
        handles=marks,
        loc="upper left",
        bbox_to_anchor=(0, 1),
        ncols=len(marks),
        frameon=False,
        borderpad=0.2,
        handletextpad=0.1,
        columnspacing=1.0,
    )


def name(figure: Figure, axes: Axes, ends: Sequence[tuple[str, str, float, float]]) -> None:
    """Write names into the right margin, apart from each other, and a thin line to each from its end.

    Args:
        figure: that holds the axes.
        axes: with their limits and scales set.
        ends: methods, names, and where their lines end. What ends below the axes gets no thin line.
    """
    width, height = axes.get_position().size * figure.get_size_inches() * 72
    inside = (axes.transScale + axes.transLimits).transform([(x, y) for *_, x, y in ends])
    places = spread([max(0.0, float(y)) for _, y in inside], LINE / height, 0.0, 1.02)
    settings: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    for (method, words, *_), (x, y), place in zip(ends, inside, places, strict=True):
        ink, mark, edge = INKS[f"m-{method}"], MARKS[method], 1 + 10 / width
        axes.plot(edge, place, mark, ms=6.5, mec=INKS["paper"], mfc=ink, mew=0.7, zorder=6, **settings)
        axes.text(1 + 18 / width, place, words, color=ink, va="center_baseline", **settings)
        if y >= 0:
            axes.plot([x, edge], [y, place], lw=0.8, ls=(0, (1, 2)), color=ink, zorder=2, **settings)
            axes.plot(x, y, mark, ms=6.5, mec=INKS["paper"], mfc=ink, mew=0.7, zorder=6, **settings)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places along a line apart, in their order, with a pass up and one down.

    Args:
        wanted: places.
        gap: least distance of two.
        low: no place is below, unless there are too many.
        high: no place is above.

    >>> spread([1.0, 5.0, 1.5], 1.0, 0.0, 5.0)
    [1.0, 5.0, 2.0]
    """
    order = sorted(range(len(wanted)), key=lambda k: wanted[k])
    places = list(wanted)
    floor = low
    for k in order:
        places[k] = max(places[k], floor)
        floor = places[k] + gap
    for k in reversed(order):
        places[k] = min(places[k], high)
        high = places[k] - gap
    return places


def svg_of(figure: Figure, title: str, about: str) -> Markup:
    """Return the figure for a page: no size, letters or colours of its own, and words for who does not see it.

    Args:
        figure: drawn inside :func:`drawing`.
        title: its name.
        about: what can be seen in it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<defs>") : svg.rindex("</svg>")].replace("xlink:href", "href")
    svg = re.sub(r"<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"(\.\d\d)\d+", r"\1", svg)  # hundredths of a pixel will do
    svg = re.sub(r"; font-family: [^;\"]*", "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    for place, ink in INKS.items():
        svg = svg.replace(ink, f"var(--{place})")
    opened = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">\n<title>{}</title>\n')
    height = round(72 * figure.get_figheight())
    return opened.format(WIDTH, height, f"{title}. {about}", title) + Markup(svg) + Markup("</svg>")


def tick(value: float, _: object = None) -> str:
    """Write a number on an axis.

    >>> [tick(x) for x in (0, 0.05, 2.5, 950, 1500, 20_000, 3_000_000)]
    ['0', '0.05', '2.5', '950', '1.5k', '20k', '3M']
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
