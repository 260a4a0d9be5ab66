"""Figures of conditions as points: counts, sizes, distances and ranks, predicted and observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.plot.bars import CEILING, number
from scale.plot.canvas import (
    INK,
    PAPER,
    QUIET,
    SMALL_POINTS,
    Axes,
    Line2D,
    dot,
    few_ticks,
    key,
    logarithmic,
    method_name,
    new_axes,
    tidy,
)

Floats = npt.NDArray[np.float64]

_DASHED = (0, (4, 3))
_ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0.0, 1.0),
    "title_fontsize": 7.5,
    "alignment": "left",
}
"""A legend above the axes, where it covers no point."""


def counts(
    observed: pd.Series,
    predicted: Mapping[str, pd.Series],
    *,
    colours: Mapping[str, str],
    label: str = "significant genes",
    ax: Axes | None = None,
) -> Axes:
    """Draw counts per condition, predicted against observed, both axes logarithmic above 1."""
    ax = new_axes(ax, width=4.4, height=4.0)
    top = 1.0
    handles = []
    for method, values in predicted.items():
        both = pd.concat({"x": observed, "y": values}, axis=1, join="inner").dropna()
        if both.empty:
            continue
        x, y = both["x"].to_numpy(np.float64), both["y"].to_numpy(np.float64)
        top = max(top, float(x.max()), float(y.max()))
        colour = colours.get(method, QUIET)
        ax.scatter(x, y, s=24, color=colour, alpha=0.75, edgecolors=PAPER, linewidths=0.4)
        ratio = y.sum() / x.sum() if x.sum() > 0 else float("nan")
        handles.append(dot(colour, f"{method_name(method)} ({number(ratio)} ×)"))
    lowest = min((float(v.min()) for v in [observed, *predicted.values()] if len(v)), default=0.0)
    limit = top * 1.5
    ax.plot([0, limit], [0, limit], color=QUIET, linewidth=0.9, linestyle=_DASHED)
    if lowest > 0:
        ax.set_xscale("log")
        ax.set_yscale("log")
    else:  # zero has a place of its own
        ax.set_xscale("symlog", linthresh=1.0)
        ax.set_yscale("symlog", linthresh=1.0)
    low = 0.7 * lowest if lowest > 0 else -0.3
    ax.set_xlim(low, limit)
    ax.set_ylim(low, limit)
    ticks = [t for t in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000) if low <= t <= limit]
    if len(ticks) < 3:
        steps = (1, 1.5, 2, 3, 4, 5, 7)
        ticks = [int(s * 10**d) for d in range(1, 5) for s in steps if low <= s * 10**d <= limit]
    words = [f"{t:,}" for t in ticks]
    ax.set_xticks(ticks, words)
    ax.set_yticks(ticks, words)
    ax.minorticks_off()
    ax.set_aspect("equal")
    ax.set_xlabel(f"{label}, observed")
    ax.set_ylabel(f"{label}, predicted")
    tidy(ax, grid="both")
    key(ax, handles, title="sum predicted / observed", **_ABOVE)
    return ax


def against_effect(
    size: pd.Series,
    values: Mapping[str, pd.Series],
    *,
    colours: Mapping[str, str],
    label: str,
    limit: pd.Series | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a score per condition against the size of the observed change.

    Parameters
    ----------
    size
        Norm of the observed change by condition.
    values
        Method -> score by condition.
    limit
        What a prediction without any noise would reach, by condition; drawn as a running median.
    """
    ax = new_axes(ax, width=4.4, height=3.6)
    handles: list[Line2D] = []
    for method, series in values.items():
        both = pd.concat({"x": size, "y": series}, axis=1, join="inner").dropna()
        if both.empty:
            continue
        hollow = method == CEILING
        colour = colours.get(method, QUIET)
        ax.scatter(
            both["x"],
            both["y"],
            s=22,
            facecolors="none" if hollow else colour,
            edgecolors=colour if hollow else PAPER,
            linewidths=0.9 if hollow else 0.4,
            alpha=0.8,
            zorder=3 if not handles else 2,
        )
        handles.append(dot(colour, method_name(method), hollow=hollow))
    if limit is not None and (curve := running_median(size, limit)) is not None:
        x, y = curve
        ax.plot(x, y, color=INK, linewidth=1.3, linestyle=_DASHED, zorder=4)
        handles.append(Line2D([], [], color=INK, linestyle=_DASHED, label="no noise: √r"))
    ax.axhline(0, color=QUIET, linewidth=0.8)
    ax.set_xlabel("size of the observed change (norm over genes)")
    ax.set_ylabel(label)
    few_ticks(ax, "x")
    few_ticks(ax, "y")
    tidy(ax, grid="y")
    key(ax, handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    return ax


def running_median(size: pd.Series, values: pd.Series) -> tuple[Floats, Floats] | None:
    """Return x and the median of a fifth of the conditions around it; None below five."""
    both = pd.concat({"x": size, "y": values}, axis=1, join="inner").dropna().sort_values("x")
    if len(both) < 5:
        return None
    window = max(3, len(both) // 5)
    middle = both.rolling(window, center=True, min_periods=max(2, window // 2)).median().dropna()
    return middle["x"].to_numpy(np.float64), middle["y"].to_numpy(np.float64)


def ranks(
    values: Mapping[str, Floats],
    *,
    colours: Mapping[str, str],
    num_bins: int = 10,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how the retrieval of conditions is distributed, beside what chance gives.

    Parameters
    ----------
    values
        Method -> share of the other perturbations that are farther away, per condition: 1 is
        found at once, and a method that knows nothing is even over 0 to 1.
    """
    ax = new_axes(ax, width=4.4, height=3.2)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    width = 0.86 / num_bins / max(1, len(values))
    left = edges[:-1] + 0.07 / num_bins
    for place, (method, numbers) in enumerate(values.items()):
        share = np.histogram(numbers, edges)[0] / max(1, numbers.size)
        colour = colours.get(method, QUIET)
        ax.bar(left + place * width, share, width, align="edge", color=colour)
    ax.axhline(1 / num_bins, color=INK, linewidth=1.0, linestyle=_DASHED)
    ax.text(0.0, 1 / num_bins, "chance", va="bottom", fontsize=SMALL_POINTS, color=INK, zorder=5)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the other perturbations that are farther away")
    ax.set_ylabel("share of conditions")
    few_ticks(ax, "y")
    tidy(ax, grid="y", title=title)
    handles = [dot(colours.get(m, QUIET), method_name(m)) for m in values]
    key(ax, handles, loc="upper left")
    return ax


def distances(
    control: pd.Series,
    values: Mapping[str, pd.Series],
    *,
    colours: Mapping[str, str],
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the energy distance of each condition against that of a copy of the control.

    Below the diagonal a method is closer to the observed cells than the control is. Distances are
    unbiased estimates: those at or below zero stand on the lower edge.

    Parameters
    ----------
    control
        Distance of the control copy by condition.
    values
        Method -> distance by condition; the replicate is drawn hollow.
    """
    ax = new_axes(ax, width=4.4, height=3.8)
    known = np.concatenate([s.to_numpy(np.float64) for s in (control, *values.values())])
    positive = known[known > 0]
    top = float(positive.max()) * 1.4 if positive.size else 1.0
    floor = max(float(positive.min()) if positive.size else 1e-3, top * 1e-4) * 0.7
    handles = []
    for method, series in values.items():
        both = pd.concat({"x": control, "y": series}, axis=1, join="inner").dropna()
        hollow = method == CEILING
        colour = colours.get(method, QUIET)
        below = int((both["y"] < both["x"]).sum())
        ax.scatter(
            both["x"].clip(lower=floor),
            both["y"].clip(lower=floor),
            s=22,
            facecolors="none" if hollow else colour,
            edgecolors=colour if hollow else PAPER,
            linewidths=0.9 if hollow else 0.4,
            alpha=0.8,
        )
        name = method_name(method)
        handles.append(dot(colour, f"{name} ({below} of {len(both)} below)", hollow=hollow))
    ax.plot([floor, top], [floor, top], color=QUIET, linewidth=0.9, linestyle=_DASHED)
    low = float(control.clip(lower=floor).min()) * 0.8 if len(control) else floor
    ax.set_xlim(low, top)
    ax.set_ylim(floor * 0.9, top)
    logarithmic(ax)
    ax.set_xlabel("energy distance of the control copy")
    ax.set_ylabel("energy distance of the prediction")
    tidy(ax, grid="both", title=title)
    key(ax, handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
    return ax


def genes(
    observed: Floats,
    predicted: Mapping[str, Floats],
    *,
    colours: Mapping[str, str],
    label: str,
    by_ratio: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw one number per gene, predicted against observed, with the median ratio or difference.

    Parameters
    ----------
    observed
        One number per gene.
    predicted
        Method -> the same genes.
    label
        What the number is.
    by_ratio
        Ratios matter, not differences; genes that are zero on a side are left out.
    """
    ax = new_axes(ax, width=4.0, height=4.0)
    handles = []
    ends: list[float] = []
    for method, values in predicted.items():
        keep = np.isfinite(observed) & np.isfinite(values)
        if by_ratio:
            keep &= (observed > 0) & (values > 0)
        x, y = observed[keep], values[keep]
        if x.size == 0:
            continue
        colour = colours.get(method, QUIET)
        ax.scatter(x, y, s=9, color=colour, alpha=0.45, linewidths=0)
        middle = float(np.median(y / x if by_ratio else y - x))
        told = f"{number(middle)} ×" if by_ratio else f"{middle:+.3f}"
        handles.append(dot(colour, f"{method_name(method)} ({told})"))
        ends += [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = (high / low) ** 0.05 if by_ratio and low > 0 else 0.04 * max(high - low, 1e-9)
    limits = (low / room, high * room) if by_ratio else (low - room, high + room)
    ax.plot(limits, limits, color=QUIET, linewidth=0.9, linestyle=_DASHED)
    ax.set_xlim(*limits)
    ax.set_ylim(*limits)
    if by_ratio:
        logarithmic(ax)
    ax.set_aspect("equal")
    ax.set_xlabel(f"{label}, observed")
    ax.set_ylabel(f"{label}, predicted")
    tidy(ax, grid="both")
    title = "median of predicted / observed" if by_ratio else "median difference"
    key(ax, handles, title=title, **_ABOVE)
    return ax
