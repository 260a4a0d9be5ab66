"""Paper and ink of every figure, and the one door to matplotlib.

Figures are ``matplotlib.figure.Figure`` objects that are never registered with pyplot: no backend
is chosen, nothing global is changed, nothing has to be closed, and it works without a display.

Colours say what a thing is, in every figure alike: models are saturated, baselines pale, the
replicate (the noise ceiling) is dark and hollow. Hues are those of Okabe and Ito (2008), which
stay apart under the common kinds of colour blindness.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

__all__ = ["Axes", "Figure", "Line2D", "Normalize", "NullFormatter"]

INK = "#26303d"
QUIET = "#6b7684"
RULE = "#d5dae1"
FAINT = "#eef1f4"
PAPER = "#ffffff"
OBSERVED = "#e69f00"
CONTROL = "#a7adb6"
REPLICATE = "#3b4552"

_MODELS = ("#0072b2", "#d55e00", "#009e73", "#b05a8a", "#3a9bd9", "#8a6d00")
_BASELINES = {
    "control_copy": "#b9bec6",
    "perturbation_mean": "#e3c07c",
    "context_transfer": "#93c9b8",
    "additive": "#dbabc6",
    "nearest": "#a9c9e6",
    "linear": "#cdbfa4",
}
_OTHER_BASELINES = ("#e9dd93", "#c3b4e0", "#bcd39a")

TITLE_POINTS = 10.5
LABEL_POINTS = 9.0
SMALL_POINTS = 8.0

HEAT = LinearSegmentedColormap.from_list(
    "scale_heat", ["#f7fbff", "#cfe1f0", "#8fbcdc", "#3f8fc4", "#0b5e98", "#083b66"]
)
"""Pale to dark blue; lightness falls evenly, so that it also reads in grey."""


def method_colours(models: Sequence[str], baselines: Iterable[str] = ()) -> dict[str, str]:
    """Return one colour per method; a known baseline has the same one in every report.

    Examples
    --------
    >>> method_colours(["mine"], ["additive"])["mine"]
    '#0072b2'
    """
    colours = {"observed": OBSERVED, "control": CONTROL, "replicate": REPLICATE}
    others = 0
    for name in baselines:
        if name in _BASELINES:
            colours[name] = _BASELINES[name]
        else:
            colours[name] = _OTHER_BASELINES[others % len(_OTHER_BASELINES)]
            others += 1
    for number, name in enumerate(models):
        colours[name] = _MODELS[number % len(_MODELS)]
    return colours


def new_axes(ax: Axes | None, *, width: float, height: float) -> Axes:
    """Return ``ax``, or the axes of a new figure of that size in inches."""
    if ax is not None:
        return ax
    return new_figure(width, height).subplots()


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches, laid out without overlaps."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    engine = cast("Any", figure.get_layout_engine())
    engine.set(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.06)
    return figure


def tidy(ax: Axes, *, grid: str | None = None, title: str | None = None) -> None:
    """Quiet frame, readable ticks; ``grid`` is the axis ("x", "y" or "both") that gets lines."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(RULE)
    ax.tick_params(colors=QUIET, labelsize=SMALL_POINTS, length=3, width=0.7)
    ax.tick_params(which="minor", colors=QUIET, labelsize=SMALL_POINTS - 1, length=2, width=0.5)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(INK)
        label.set_fontsize(LABEL_POINTS)
    ax.set_axisbelow(True)
    if grid is not None:
        ax.grid(visible=True, axis=cast("Any", grid), color=FAINT, linewidth=0.9)
    if title is not None:
        ax.set_title(title, loc="left", fontsize=TITLE_POINTS, color=INK, pad=8)


def key(ax: Axes, handles: Sequence[Any] | None = None, **options: Any) -> None:
    """Draw a legend without a frame."""
    settings = {
        "frameon": False,
        "fontsize": SMALL_POINTS,
        "labelcolor": INK,
        "handlelength": 1.4,
        "borderaxespad": 0.4,
        **options,
    }
    if handles is None:
        ax.legend(**settings)
    else:
        ax.legend(handles=list(handles), **settings)


def figure_key(figure: Figure, handles: Sequence[Any]) -> None:
    """Draw one legend for all panels, below them."""
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        fontsize=SMALL_POINTS + 0.5,
        labelcolor=INK,
        handlelength=1.2,
    )


def dot(colour: str, label: str, *, hollow: bool = False, size: float = 5.5) -> Line2D:
    """Return a legend entry: a dot."""
    return Line2D(
        [],
        [],
        linestyle="none",
        marker="o",
        markersize=size,
        markerfacecolor=PAPER if hollow else colour,
        markeredgecolor=colour if hollow else PAPER,
        markeredgewidth=1.2 if hollow else 0.4,
        label=label,
    )


def whole_numbers(ax: Axes, axis: str, bins: int = 5) -> None:
    """Put at most ``bins`` round ticks on an axis."""
    target = ax.xaxis if axis == "x" else ax.yaxis
    target.set_major_locator(MaxNLocator(nbins=bins, integer=True))


def few_ticks(ax: Axes, axis: str, bins: int = 5) -> None:
    """Put at most ``bins`` ticks on an axis."""
    target = ax.xaxis if axis == "x" else ax.yaxis
    target.set_major_locator(MaxNLocator(nbins=bins))


def thousands(ax: Axes) -> None:
    """Write the numbers of the x axis as 1k, 20k."""
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
    )


def spread_evenly(count: int, width: float) -> npt.NDArray[np.float64]:
    """Return offsets in (-width, width) that never clump: the golden-ratio sequence."""
    return np.asarray(width * (2.0 * ((0.5 + np.arange(count) * 0.6180339887) % 1.0) - 1.0))


def ink_on(colour: Any) -> str:
    """Return black or white ink, whichever reads better on ``colour``."""
    red, green, blue = to_rgb(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else PAPER


def shorten(text: str, length: int = 26) -> str:
    """Return ``text`` cut to ``length`` characters with an ellipsis.

    Examples
    --------
    >>> shorten("[('Erdafitinib', 0.5, 'uM')]", 16)
    "[('Erdafitinib'…"
    """
    return text if len(text) <= length else text[: length - 1] + "…"


def png(figure: Figure, *, dpi: int = 144) -> bytes:
    """Return the figure as PNG; equal figures give equal bytes (no date, no version inside)."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
