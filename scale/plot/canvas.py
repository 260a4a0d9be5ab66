"""Paper and ink of every figure, and the one door to matplotlib.

Figures are ``matplotlib.figure.Figure`` objects that are never registered with pyplot: no backend
is chosen, nothing global is changed, nothing has to be closed, and it works without a display.

Colours say what a thing is, in every figure alike: models are saturated, baselines pale, the
replicate (the noise ceiling) is dark and hollow. All stay apart under the common kinds of colour
blindness, which a test simulates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

CAN_DRAW = find_spec("matplotlib") is not None
"""Whether matplotlib is there; without it a report has its tables and no figures."""

if TYPE_CHECKING or CAN_DRAW:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
    from PIL import Image
else:

    class Absent:
        """Stands for matplotlib's classes; says what to install when one is asked for."""

        def __init__(self, *_: object, **__: object) -> None:
            raise ModuleNotFoundError("figures need matplotlib: pip install matplotlib")

    Axes = Figure = Line2D = Normalize = NullFormatter = Absent

__all__ = ["Axes", "Figure", "Line2D", "Normalize", "NullFormatter"]

INK = "#26303d"
QUIET = "#6b7684"
RULE = "#d5dae1"
FAINT = "#eef1f4"
PAPER = "#ffffff"
OBSERVED = "#e69f00"
CONTROL = "#a7adb6"
REPLICATE = "#3b4552"

# Chosen so that under the three common kinds of colour blindness, too, models are at least 11 apart
# from each other, baselines 9 from each other and 16 from models (CIE 1976, simulated as by
# Machado, Oliveira and Fernandes, 2009).
MODEL_COLOURS = ("#0072b2", "#c0392b", "#009e73", "#5b2a86", "#7a4a00", "#c2258f")
BASELINE_COLOURS = {
    "control_copy": "#b9bec6",
    "perturbation_mean": "#d1c28b",
    "context_transfer": "#82a7ac",
    "context_mean": "#e6dbcb",
    "additive": "#d396ce",
    "linear": "#f7d5b4",
    "nearest": "#9ea8f7",
    "other_perturbation": "#e9c0f5",
}
_IN_WORDS = (*BASELINE_COLOURS, "oracle_mean", "replicate_full_depth")

TITLE_POINTS = 10.5
LABEL_POINTS = 9.0
SMALL_POINTS = 8.0

_HEAT = ("#f7fbff", "#cfe1f0", "#8fbcdc", "#3f8fc4", "#0b5e98", "#083b66")


def heat_colours() -> LinearSegmentedColormap:
    """Return pale to dark blue; lightness falls evenly, so that it also reads in grey."""
    return LinearSegmentedColormap.from_list("scale_heat", list(_HEAT))


def method_colours(models: Sequence[str], baselines: Iterable[str] = ()) -> dict[str, str]:
    """Return one colour per method; a baseline has the same one in every report.

    Examples
    --------
    >>> method_colours(["mine"], ["additive"])["mine"]
    '#0072b2'
    """
    colours = {"observed": OBSERVED, "control": CONTROL, "replicate": REPLICATE}
    colours |= {name: BASELINE_COLOURS.get(name, QUIET) for name in baselines}
    colours |= {m: MODEL_COLOURS[i % len(MODEL_COLOURS)] for i, m in enumerate(models)}
    return colours


def method_name(method: str) -> str:
    """Return a method as it is written out: a baseline in words, a model as its owner calls it.

    Examples
    --------
    >>> method_name("control_copy"), method_name("my_model_v2")
    ('control copy', 'my_model_v2')
    """
    return method.replace("_", " ") if method in _IN_WORDS else method


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


def logarithmic(ax: Axes) -> None:
    """Make both axes logarithmic, with numbers as one writes them; call it after the limits."""
    for axis, limits, set_scale in (
        (ax.xaxis, ax.get_xlim(), ax.set_xscale),
        (ax.yaxis, ax.get_ylim(), ax.set_yscale),
    ):
        set_scale("log")
        is_short = limits[1] < 100 * limits[0]
        steps = (1.0, 2.0, 5.0) if is_short else (1.0,)
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_formatter(NullFormatter())


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
    return _as_png(_drawn(figure, dpi))


def column_edges(figure: Figure) -> list[float]:
    """Return where a drawn figure can be cut between its columns of panels: inches from the left.

    Panels above each other are one column; a colour bar belongs to the panel at its left. The
    first edge is 0, the last one the width of the figure.
    """
    found = []
    for ax in figure.axes:
        box = ax.get_tightbbox()
        if box is not None:
            found.append((box.x0, box.x1, ax.get_subplotspec() is not None))
    columns: list[list[float]] = []
    for left, right, is_panel in sorted(found):
        if columns and (left < columns[-1][1] or not is_panel):
            columns[-1][1] = max(columns[-1][1], right)
        else:
            columns.append([left, right])
    cuts = [(a[1] + b[0]) / 2 / figure.dpi for a, b in zip(columns, columns[1:], strict=False)]
    return [0.0, *cuts, float(figure.get_figwidth())]


def png_pieces(figure: Figure, *, dpi: int = 144) -> list[tuple[bytes, float]]:
    """Return the columns of a figure and its legend as PNGs of their own, each with its width.

    Side by side they are the figure; on a narrow screen they stand below each other at a size
    that can be read. Widths are in inches.
    """
    image = _drawn(figure, dpi)
    edges, bottom = column_edges(figure), 0.0
    height = float(figure.get_figheight())
    boxes = []
    for legend in figure.legends:
        box = legend.get_window_extent().padded(_AROUND_LEGEND * dpi)
        bottom = box.y1 / figure.dpi
        boxes.append((max(0.0, box.x0 / figure.dpi), height - bottom, box.x1 / figure.dpi, height))
    sides = zip(edges, edges[1:], strict=False)
    boxes = [*((a, 0.0, b, height - bottom) for a, b in sides), *boxes]
    pieces = []
    for left, top, right, low in boxes:
        # rounded inwards: beyond the image a crop is black
        ends = (right * dpi, low * dpi)
        corner = [min(math.floor(x), size) for x, size in zip(ends, image.size, strict=True)]
        cropped = image.crop((round(left * dpi), round(top * dpi), *corner))
        pieces.append((_as_png(cropped), right - left))
    return pieces


_AROUND_LEGEND = 0.06
"""Inches of room."""


def _drawn(figure: Figure, dpi: int) -> Image.Image:
    """Draw a figure once: laying out and measuring it again would take as long as the drawing."""
    figure.set_dpi(dpi)
    canvas = cast("Any", FigureCanvasAgg(figure))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _as_png(image: Image.Image) -> bytes:
    """Return the image in 256 colours, which takes a third of the bytes of all of them.

    The colours are chosen to cover all that occur, so that a single dot keeps its own.
    """
    buffer = BytesIO()
    few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def end_labels(
    ax: Axes, ends: Sequence[tuple[float, float, str, str]], *, gap: float = 0.06
) -> None:
    """Write the name of each line at its right end, none on top of another.

    Parameters
    ----------
    ends
        (x, y, text, colour) of the last point of every line.
    gap
        Least distance of two names, as a share of the height of the axes.
    """
    low, high = ax.get_ylim()
    step = gap * (high - low)
    placed = -np.inf
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        placed = max(y, placed + step)
        ax.annotate(
            text,
            (x, y),
            xytext=(1.02, (placed - low) / (high - low)),
            textcoords=("axes fraction", "axes fraction"),
            va="center",
            fontsize=SMALL_POINTS,
            color=text_on_paper(colour),
            annotation_clip=False,
        )


def text_on_paper(colour: str) -> str:
    """Return ``colour`` darkened until it can be read as text on white.

    Examples
    --------
    >>> text_on_paper("#000000")
    '#000000'
    """
    red, green, blue = to_rgb(colour)
    light = 0.299 * red + 0.587 * green + 0.114 * blue
    share = min(1.0, 0.45 / light) if light > 0 else 1.0
    return "#" + "".join(f"{round(255 * share * part):02x}" for part in (red, green, blue))
