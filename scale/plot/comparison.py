"""Figures that compare methods over all conditions: scaled scores, gains, overlap, collapse."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.plot.bars import CEILING, number
from scale.plot.canvas import (
    FAINT,
    INK,
    LABEL_POINTS,
    PAPER,
    QUIET,
    SMALL_POINTS,
    Axes,
    dot,
    end_labels,
    few_ticks,
    key,
    method_name,
    new_axes,
    shorten,
    text_on_paper,
    tidy,
)

Floats = npt.NDArray[np.float64]

_SHADE = "#fbe7dc"


def scaled(
    table: pd.DataFrame,
    *,
    colours: Mapping[str, str],
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw scores between the best baseline (0) and a repeated experiment (1).

    Parameters
    ----------
    table
        One row per label (text of the metric) and method: value, low, high; the intervals may be
        NaN.
    """
    labels = list(dict.fromkeys(table["label"]))
    methods = list(dict.fromkeys(table["method"]))
    ax = new_axes(ax, width=5.6, height=1.25 + len(labels) * (0.22 + 0.24 * len(methods)))
    step = len(methods) + 0.9
    drawn: list[float] = [0.0, 1.0]
    for row, method, value, low, high in zip(
        table["label"].map(labels.index),
        table["method"],
        *(table[name].to_numpy(np.float64) for name in ("value", "low", "high")),
        strict=True,
    ):
        y = -(row * step + methods.index(method))
        colour = colours.get(method, QUIET)
        ax.barh(y, value, height=0.74, color=colour)
        if np.isfinite(low) and np.isfinite(high):
            ax.plot([low, high], [y, y], color=INK, linewidth=1.2, solid_capstyle="round")
        ends = [v for v in (value, low, high, 0.0) if np.isfinite(v)]
        drawn += ends
        ax.annotate(
            number(float(value)),
            (max(ends), y),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL_POINTS,
            color=INK,
            bbox={"boxstyle": "round,pad=0.1", "facecolor": PAPER, "edgecolor": "none"},
        )
    span = max(drawn) - min(drawn)
    ax.set_xlim(min(drawn) - 0.04 * span, max(drawn) + 0.12 * span)
    top = 1.35
    for place, text in ((0.0, "best baseline"), (1.0, "repeated experiment")):
        ax.axvline(place, color=INK, linewidth=1.0, linestyle=(0, (3, 3)) if place else "-")
        ax.text(place, top, text, ha="center", va="bottom", fontsize=SMALL_POINTS, color=INK)
    middle = [-(i * step + (len(methods) - 1) / 2) for i in range(len(labels))]
    ax.set_yticks(middle, labels)
    ax.set_ylim(-(len(labels) - 1) * step - len(methods) + 0.3, top)
    ax.set_xlabel("scaled score")
    few_ticks(ax, "x", 6)
    tidy(ax, grid="x", title=title)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    if len(methods) > 1:
        handles = [dot(colours.get(m, QUIET), method_name(m)) for m in methods]
        key(ax, handles, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(methods))
    return ax


def gains(
    by_unit: Mapping[str, pd.Series],
    intervals: Mapping[str, tuple[float, float, float]],
    *,
    colours: Mapping[str, str],
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the paired gain over a baseline unit by unit, and its mean with the interval.

    Parameters
    ----------
    by_unit
        Method -> gain by unit; positive = the method is better.
    intervals
        Method -> mean, low, high over units; NaN where there is no interval.
    """
    units = list(dict.fromkeys(u for series in by_unit.values() for u in series.index))
    ax = new_axes(ax, width=2.8, height=1.0 + 0.24 * len(units) + 0.3 * len(by_unit))
    values = [0.0]
    for number_of, (method, series) in enumerate(by_unit.items()):
        colour = colours.get(method, QUIET)
        shift = 0.16 * (number_of - (len(by_unit) - 1) / 2)
        y = [len(units) - 1 - units.index(u) - shift for u in series.index]
        ax.scatter(series.to_numpy(), y, s=26, color=colour, edgecolors=PAPER, linewidths=0.4)
        mean, low, high = intervals[method]
        place = -1.1 - 0.75 * number_of
        if np.isfinite(low) and np.isfinite(high):
            ax.plot([low, high], [place] * 2, color=colour, linewidth=3, solid_capstyle="round")
        ax.plot([mean], [place], marker="D", color=colour, markeredgecolor=PAPER, markersize=6)
        values += [v for v in (*series, mean, low, high) if np.isfinite(v)]
    ax.axvline(0, color=INK, linewidth=1.0)
    ax.axhline(-0.55, color=QUIET, linewidth=0.6)
    means = [-1.1 - 0.75 * i for i in range(len(by_unit))]
    names = [shorten(str(u), 14) for u in reversed(units)]
    of_whom = [shorten(m, 14) for m in by_unit] if len(by_unit) > 1 else ["mean"]
    ax.set_yticks([*range(len(units)), *means], [*names, *of_whom])
    ax.set_ylim(means[-1] - 0.6, len(units) - 0.4)
    span = max(values) - min(values) or 1.0
    ax.set_xlim(min(values) - 0.08 * span, max(values) + 0.08 * span)
    few_ticks(ax, "x", 4)
    tidy(ax, grid="x")
    if title is not None:  # above a narrow panel, where a usual title would not fit
        ax.set_title(title, loc="left", fontsize=LABEL_POINTS, color=INK, pad=8)
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    return ax


def overlap_curves(
    curves: Mapping[str, pd.Series],
    *,
    colours: Mapping[str, str],
    label: str,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one curve per method over the length of the gene list, named at its end.

    Parameters
    ----------
    curves
        Method -> value by number of genes.
    """
    ax = new_axes(ax, width=4.6, height=3.4)
    ends = []
    lengths = sorted({int(k) for series in curves.values() for k in series.index})
    for method, series in curves.items():
        colour = colours.get(method, QUIET)
        hollow = method == CEILING
        ax.plot(
            series.index,
            series.to_numpy(np.float64),
            color=colour,
            linewidth=1.8,
            linestyle=(0, (3, 2)) if hollow else "-",
            marker="o",
            markersize=4.5,
            markerfacecolor=PAPER if hollow else colour,
        )
        last = series.dropna()
        if len(last):
            x, y = float(last.index[-1]), float(last.iloc[-1])
            ends.append((x, y, method_name(method), colour))
    ax.set_xscale("log")
    ax.set_xticks(lengths, [str(k) for k in lengths])
    ax.minorticks_off()
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("genes at the top of the list, k")
    ax.set_ylabel(label)
    tidy(ax, grid="y", title=title)
    end_labels(ax, ends)
    return ax


Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


def _meet(first: Box, second: Box) -> bool:
    return (
        first[0] < second[2]
        and second[0] < first[2]
        and first[1] < second[3]
        and second[1] < first[3]
    )


def _free_box(point: tuple[float, float], size: tuple[float, float], taken: list[Box]) -> Box:
    """Return where a name of that size meets nothing: beside its point, else above or below."""
    x, y = point
    width, height = size
    for lift in sorted(range(-12, 13), key=lambda step: (abs(step), -step)):
        for left in (x + 0.3 * height, x - 0.3 * height - width):
            bottom = y + (lift - 0.5) * height
            box = (left, bottom, left + width, bottom + height)
            if not any(_meet(box, other) for other in taken):
                return box
    return (x, y, x + width, y + height)


def _name_points(
    ax: Axes,
    points: Mapping[str, tuple[float, float]],
    colours: Mapping[str, str],
    taken: list[Box],
) -> None:
    """Write the name of every point beside it, none over another one or over a point.

    Places are sought in shares of the axes, so that a letter is as wide everywhere.

    Parameters
    ----------
    taken
        Boxes that are to stay free, in shares of the axes.
    """
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    shares = {
        m: ((x - left) / (right - left), (y - bottom) / (top - bottom))
        for m, (x, y) in points.items()
    }
    taken = [*taken, *((x - 0.01, y - 0.015, x + 0.01, y + 0.015) for x, y in shares.values())]
    frame = [(-9.0, -9.0, 0.0, 9.0), (1.0, -9.0, 9.0, 9.0)]
    frame += [(-9.0, -9.0, 9.0, 0.0), (-9.0, 1.0, 9.0, 9.0)]
    for method, share in shares.items():
        name, colour = method_name(method), text_on_paper(colours.get(method, QUIET))
        box = _free_box(share, (_LETTER * len(name), _LINE), [*frame, *taken])
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        is_right = box[0] > share[0]
        if abs(middle - share[1]) > _LINE / 2:
            end = box[0] if is_right else box[2]
            path = zip(share, (end, middle), strict=True)
            ax.plot(*path, color=colour, linewidth=0.5, transform=ax.transAxes, zorder=3)
        ax.text(
            box[0] if is_right else box[2],
            middle,
            name,
            transform=ax.transAxes,
            ha="left" if is_right else "right",
            va="center",
            fontsize=SMALL_POINTS,
            color=colour,
            zorder=5,
        )


_LETTER, _LINE = 0.0145, 0.043
"""Width of a letter and height of a line, as shares of axes of 5.6 x 4 inches."""


def collapse_plane(
    points: Mapping[str, tuple[float, float]],
    *,
    colours: Mapping[str, str],
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw variance within sets against spread over perturbations, collapsed regions shaded.

    Parameters
    ----------
    points
        Method -> (variance within a set, spread of responses), both predicted / observed.
    """
    ax = new_axes(ax, width=5.6, height=4.0)
    numbers = np.array(list(points.values()), dtype=np.float64)
    right = max(2.3, 1.08 * float(np.nanmax(numbers[:, 0], initial=1.0)))
    top = max(1.25, 1.1 * float(np.nanmax(numbers[:, 1], initial=1.0)))
    bottom = min(-0.1, 1.1 * float(np.nanmin(numbers[:, 1], initial=0.0)))
    ax.axhspan(bottom, 0.05, color=_SHADE, linewidth=0, zorder=0)
    ax.axhspan(0.05, 0.5, color=FAINT, linewidth=0, zorder=0)
    ax.axvspan(0, 0.5, color=_SHADE, linewidth=0, zorder=0, alpha=0.8)
    ax.axvspan(2.0, right, color=FAINT, linewidth=0, zorder=0)
    ax.plot(1, 1, marker="+", color=INK, markersize=11, markeredgewidth=1.4)
    ax.annotate(
        "as observed",
        (1, 1),
        xytext=(8, 6),
        textcoords="offset points",
        fontsize=SMALL_POINTS,
        color=INK,
    )
    for x, y, text in (
        (right * 0.995, 0.035, "one response for all"),
        (right * 0.995, 0.485, "shrunk"),
        (0.02, top * 0.985, "too little\nvariance in a set"),
    ):
        side = "left" if x < 1 else "right"
        ax.text(x, y, text, ha=side, va="top", fontsize=SMALL_POINTS - 0.5, color=QUIET)
    known = {m: (x, y) for m, (x, y) in points.items() if np.isfinite(x) and np.isfinite(y)}
    for method, (x, y) in known.items():
        colour = colours.get(method, QUIET)
        ax.scatter([x], [y], s=64, color=colour, edgecolors=PAPER, linewidths=0.8, zorder=4)
    ax.set_xlim(0, right)
    ax.set_ylim(bottom, top)
    words = [(0.79, 0.0, 1.0, 0.12), (0.0, 0.9, 0.22, 1.0)]
    observed = ((1 - 0.02) / right, (1 - bottom) / (top - bottom))
    words.append((observed[0], observed[1] - 0.02, observed[0] + 0.2, observed[1] + 0.06))
    _name_points(ax, known, colours, words)
    ax.set_xlabel("variance within a predicted set / observed")
    ax.set_ylabel("spread over perturbations / observed")
    few_ticks(ax, "x", 6)
    tidy(ax, title=title)
    return ax
