"""Figures of scores: methods beside each other, over all conditions or condition by condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.plot.canvas import (
    INK,
    PAPER,
    QUIET,
    REPLICATE,
    SMALL_POINTS,
    Axes,
    Figure,
    dot,
    few_ticks,
    key,
    method_colours,
    method_name,
    new_axes,
    new_figure,
    spread_evenly,
    tidy,
)

Floats = npt.NDArray[np.float64]

CEILING = "replicate"
_NAMED_CONDITIONS = 48


def better_forms(aggregate: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return one row per method, its better form where there are two, indexed by method.

    A claim must beat the better form of every baseline (``cells`` or ``mean``), so that is the
    one to draw.
    """
    rows = aggregate[(aggregate["metric"] == metric) & aggregate["mean"].notna()]
    if rows.empty:
        return rows.set_index("method")
    higher = rows["better"].iloc[0] == "higher"
    ordered = rows.sort_values("mean", ascending=not higher, kind="stable")
    best = ordered.drop_duplicates("method").set_index("method")
    return best.loc[[m for m in dict.fromkeys(rows["method"]) if m in best.index]]


def ceiling_of(rows: pd.DataFrame) -> float:
    """Return the replicate's mean, carried to full depth where that is possible; else NaN.

    Parameters
    ----------
    rows
        As of :func:`better_forms`; the column ``mean_full_depth`` may be absent.
    """
    if CEILING not in rows.index:
        return float("nan")
    full = (
        float(rows["mean_full_depth"].to_dict()[CEILING]) if "mean_full_depth" in rows else np.nan
    )
    return full if np.isfinite(full) else float(rows["mean"].to_dict()[CEILING])


def arrow(better: str) -> str:
    """Return the sign of the good direction, nothing where neither is good."""
    return {"higher": "↑", "lower": "↓"}.get(better, "")


def number(value: float) -> str:
    """Return a number at the precision a score deserves.

    Examples
    --------
    >>> number(0.53124), number(0.00034), number(1234.5), number(float("nan"))
    ('0.531', '3.4e-04', '1,234', '–')
    """
    if not np.isfinite(value):
        return "–"
    if value != 0 and abs(value) < 0.001:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def scores(
    aggregate: pd.DataFrame,
    metric: str,
    *,
    colours: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw one metric as bars: models, then baselines, the ceiling last, with intervals.

    Parameters
    ----------
    aggregate
        Table with method, form, metric, mean, low, high, better (``Report.aggregate``).
    metric
        Which metric to draw.
    colours
        Method -> colour, in the order to draw; None = the table's order.
    labels
        Method -> text; None = the names.
    label
        Title; None = the metric's name.

    Raises
    ------
    ValueError
        If the table has no such metric.
    """
    rows = better_forms(aggregate, metric)
    if rows.empty:
        known = ", ".join(sorted(set(aggregate["metric"])))
        raise ValueError(f"no values of {metric!r}; the table has {known}")
    colours = colours or method_colours(list(rows.index))
    order = [m for m in colours if m in rows.index and m != CEILING]
    order += [m for m in rows.index if m not in order and m != CEILING]
    order += [CEILING] if CEILING in rows.index else []
    means = rows[["mean", "low", "high"]].to_dict()
    ax = new_axes(ax, width=4.0, height=0.9 + 0.3 * len(order))
    span = float(rows["mean"].max() - rows["mean"].min())
    for place, method in enumerate(reversed(order)):
        ends = [float(means[name][method]) for name in ("mean", "low", "high")]
        _bar(ax, place, method, ends, colours.get(method, QUIET), is_left=ends[0] < -0.02 * span)
    drawn = rows[["mean", "low", "high"]].to_numpy(np.float64).ravel()
    top = ceiling_of(rows)
    _leave_room(ax, np.append(drawn, top), is_negative=bool((rows["mean"] < -0.02 * span).any()))
    if np.isfinite(top):
        ax.axvline(top, color=REPLICATE, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
    ax.axvline(0, color=QUIET, linewidth=0.8)
    words = [(labels or {}).get(m, method_name(m)) for m in reversed(order)]
    ax.set_yticks(np.arange(len(order)), words)
    ax.set_ylim(-0.6, len(order) - 0.4)
    better = str(rows["better"].iloc[0])
    tidy(ax, grid="x", title=f"{label or metric} {arrow(better)}".rstrip())
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    few_ticks(ax, "x", 4)
    return ax


def _bar(
    ax: Axes, place: int, method: str, values: Sequence[float], colour: str, *, is_left: bool
) -> None:
    mean, low, high = values
    hollow = method == CEILING
    ax.barh(
        place,
        mean,
        height=0.68,
        color=PAPER if hollow else colour,
        edgecolor=colour,
        linewidth=1.1 if hollow else 0.0,
        hatch="////" if hollow else None,
        alpha=0.75 if hollow else 1.0,
    )
    end = mean if is_left else max(mean, 0.0)
    if np.isfinite(low) and np.isfinite(high):
        ax.plot([low, high], [place, place], color=INK, linewidth=1.1, solid_capstyle="round")
        end = low if is_left else max(high, 0.0)
    ax.annotate(
        number(mean),
        (end, place),
        xytext=(-4 if is_left else 4, 0),
        textcoords="offset points",
        ha="right" if is_left else "left",
        va="center",
        fontsize=SMALL_POINTS - 1,
        color=INK,
        zorder=5,
        bbox={"boxstyle": "round,pad=0.12", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.9},
    )


def _leave_room(ax: Axes, values: Floats, *, is_negative: bool) -> None:
    """Widen the axis so that the numbers at the ends of the bars stay inside."""
    ends = values[np.isfinite(values)]
    low, high = min(0.0, float(ends.min())), max(0.0, float(ends.max()))
    span = max(high - low, 1e-9)
    left = 0.28 if is_negative else 0.03 if low < 0 else 0.0
    ax.set_xlim(low - left * span, high + 0.28 * span)


def score_panels(
    aggregate: pd.DataFrame,
    metrics: Sequence[str],
    *,
    labels: Mapping[str, str],
    colours: Mapping[str, str],
    columns: int = 3,
) -> Figure:
    """Return bars of several metrics, one panel each."""
    num_rows = -(-len(metrics) // columns)
    num_methods = aggregate["method"].nunique()
    height = num_rows * (0.75 + 0.27 * num_methods)
    figure = new_figure(11.2, height)
    axes = figure.subplots(num_rows, columns, squeeze=False)
    for place, ax in enumerate(axes.flat):
        if place >= len(metrics):
            ax.remove()
            continue
        metric = metrics[place]
        scores(aggregate, metric, colours=colours, label=labels.get(metric, metric), ax=ax)
    return figure


def condition_values(scores_table: pd.DataFrame, metric: str, method: str, form: str) -> pd.Series:
    """Return a method's values of one metric by (context, perturbation), none undefined."""
    rows = scores_table[
        (scores_table["metric"] == metric)
        & (scores_table["method"] == method)
        & (scores_table["form"] == form)
    ]
    values = rows.set_index(["context", "perturbation"])["value"].dropna()
    return values.groupby(level=[0, 1]).mean()


def strip(
    scores_table: pd.DataFrame,
    metric: str,
    methods: Mapping[str, str],
    *,
    colours: Mapping[str, str],
    label: str,
    ax: Axes | None = None,
) -> Axes:
    """Draw every condition as a dot, one column per method, with the median as a line.

    Parameters
    ----------
    methods
        Method -> form to draw, in order.
    """
    ax = new_axes(ax, width=0.9 + 0.75 * len(methods), height=3.2)
    for place, (method, form) in enumerate(methods.items()):
        values = condition_values(scores_table, metric, method, form).to_numpy(np.float64)
        if values.size == 0:
            continue
        colour = colours.get(method, QUIET)
        offsets = spread_evenly(values.size, 0.27)
        hollow = method == CEILING
        ax.scatter(
            place + offsets,
            values,
            s=13 if values.size < 200 else 6,
            facecolors="none" if hollow else colour,
            edgecolors=colour if hollow else "none",
            linewidths=0.7,
            alpha=0.75,
        )
        ax.plot([place - 0.34, place + 0.34], [np.median(values)] * 2, color=INK, linewidth=1.6)
    names = [method_name(m) for m in methods]
    ax.set_xticks(np.arange(len(methods)), names, rotation=38, ha="right", rotation_mode="anchor")
    ax.set_xlim(-0.6, len(methods) - 0.4)
    tidy(ax, grid="y", title=label)
    ax.tick_params(axis="x", length=0, labelcolor=INK)
    few_ticks(ax, "y")
    return ax


def dumbbells(
    series: Mapping[str, pd.Series],
    *,
    colours: Mapping[str, str],
    label: str,
    names: Mapping[str, str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw several methods condition by condition, sorted by the first one.

    Parameters
    ----------
    series
        Method -> values by condition; the first one gives the order, and a line joins it to the
        second. The replicate is drawn hollow.
    names
        Condition -> text under the axis; left out where there are too many to read.
    """
    first, *others = series
    ranked = series[first].dropna().sort_values(ascending=False)
    ax = new_axes(ax, width=min(11.2, max(5.0, 1.5 + 0.25 * len(ranked))), height=3.4)
    place = np.arange(len(ranked))
    if others:
        rival = series[others[0]].reindex(ranked.index).to_numpy(np.float64)
        ax.vlines(place, ranked.to_numpy(), rival, color="#c3cad3", linewidth=1.3, zorder=1)
    size = 34 if len(ranked) <= _NAMED_CONDITIONS else 22
    for method in [*reversed(others), first]:
        values = series[method].reindex(ranked.index).to_numpy(np.float64)
        hollow = method == CEILING
        ax.scatter(
            place,
            values,
            s=size,
            facecolors="none" if hollow else colours.get(method, QUIET),
            edgecolors=colours.get(method, QUIET) if hollow else PAPER,
            linewidths=1.1 if hollow else 0.5,
            zorder=3 if method == first else 2,
        )
    ax.set_ylabel(label)
    if names is not None and len(ranked) <= _NAMED_CONDITIONS:
        texts = [names[c] for c in ranked.index]
        ax.set_xticks(place, texts, rotation=55, ha="right", rotation_mode="anchor")
    else:
        ax.set_xticks([])
        ax.set_xlabel(f"{len(ranked)} conditions, best first")
    ax.set_xlim(-0.8, len(ranked) - 0.2)
    tidy(ax, grid="y")
    handles = [
        dot(colours.get(m, QUIET), method_name(m), hollow=m == CEILING) for m in [first, *others]
    ]
    key(ax, handles, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(handles))
    return ax
