"""Figures that compare methods: scaled scores, paired gains, gene lists, mean collapse."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from scale.evaluate.aggregate import unit_means
from scale.evaluate.pictures.subject import Picture, Subject, picture_of
from scale.evaluate.scaled import scaled_by_context
from scale.evaluate.statistics import t_interval
from scale.evaluate.verdict import against_best_baseline, is_claim, label_of
from scale.plot.bars import CEILING, condition_values, number
from scale.plot.canvas import Axes, Figure, dot, figure_key, method_name, new_figure, shorten
from scale.plot.comparison import collapse_plane, gains, overlap_curves, scaled
from scale.plot.heat import heat

_LIST_METRIC = re.compile(r"^(overlap|precision)_at_(\d+)$")


def draw_scaled(subject: Subject) -> list[Picture]:
    """Scaled scores of the claim metrics with intervals over units, then by context."""
    if "scaled" not in subject.aggregate:
        return []
    table = scaled_by_context(subject.aggregate, subject.scores)
    table = table[table["method"].isin(subject.shown)]
    metrics = [m for m in subject.headline if (table["metric"] == m).any()]
    if not metrics:
        return []
    return [
        *_scaled_bars(subject, table, [m for m in metrics if is_claim(m)] or metrics),
        *_scaled_heat(subject, table, metrics),
    ]


def _scaled_bars(subject: Subject, table: pd.DataFrame, metrics: list[str]) -> list[Picture]:
    rows, told = [], []
    ends = subject.aggregate.drop_duplicates("metric").set_index("metric")["baseline"].to_dict()
    for metric in metrics:
        label = f"{label_of(metric)}\n0 = {method_name(str(ends[metric]))}"
        for model in subject.shown:
            own = table[(table["metric"] == metric) & (table["method"] == model)]
            if own.empty:
                continue
            keys = zip(own["unit"].astype(str), own["context"].astype(str), strict=True)
            found = t_interval(unit_means(dict(zip(keys, own["scaled"], strict=True))))
            rows.append((label, model, found.mean, found.low, found.high))
            told.append(f"{label_of(metric)} of {model} {number(found.mean)}")
    frame = pd.DataFrame(rows, columns=["label", "method", "value", "low", "high"])
    axes = scaled(frame, colours=subject.colours)
    return [
        picture_of(
            "scaled",
            "Between the best baseline and a repeated experiment",
            "0 is the best baseline in its better form, 1 what a repeated experiment would reach; "
            "lines are intervals over independent units. Claim metrics without room between the "
            "two are left out: no model can be ranked on them.",
            "Scaled scores, 0 the best baseline, 1 a repeated experiment: " + "; ".join(told) + ".",
            figure_of(axes),
        )
    ]


def _scaled_heat(subject: Subject, table: pd.DataFrame, metrics: list[str]) -> list[Picture]:
    models = [m for m in subject.shown if (table["method"] == m).any()]
    num_columns = max(2, len(models))
    figure = new_figure(11.2, max(2.6, 1.7 + 0.3 * len(subject.contexts)))
    axes = figure.subplots(1, num_columns, squeeze=False)[0]
    for ax, model in zip(axes, models, strict=False):
        own = table[(table["method"] == model) & table["metric"].isin(metrics)]
        wide = own.pivot_table(index="context", columns="metric", values="scaled")
        wide = wide.reindex(index=subject.contexts, columns=metrics)
        wide.index = pd.Index([shorten(str(c), 16) for c in wide.index])
        wide.columns = pd.Index([label_of(m) for m in metrics])
        name = shorten(model, 30)
        heat(wide, label="scaled score", limits=(0.0, 1.0), title=name, ax=ax)
    for ax in axes[len(models) :]:
        ax.remove()
    return [
        picture_of(
            "scaled-contexts",
            "Scaled scores, context by context",
            "0 (palest) is the best baseline, 1 (darkest) a repeated experiment; beyond them the "
            "colour stays, the number goes on.",
            f"Heat maps of scaled scores, contexts against metrics, for {', '.join(models)}.",
            figure,
        )
    ]


def draw_gains(subject: Subject) -> list[Picture]:
    """Paired gain over the best baseline, unit by unit, one panel per claim metric."""
    panels: list[tuple[str, dict[str, pd.Series], dict[str, tuple[float, float, float]]]] = []
    told = []
    for metric in [m for m in subject.headline if is_claim(m)]:
        by_unit: dict[str, pd.Series] = {}
        intervals: dict[str, tuple[float, float, float]] = {}
        title = ""
        for model in subject.shown:
            c = against_best_baseline(subject.evaluation, model, metric, subject.baselines)
            if c is None or c.baseline is None or c.gains is None or not c.gains.by_unit:
                continue
            by_unit[model] = pd.Series(c.gains.by_unit, dtype=np.float64)
            intervals[model] = (c.gain, c.low, c.high)
            title = f"{label_of(metric)}\nover {method_name(c.baseline)}"
            told.append(f"{label_of(metric)} of {model} {number(c.gain)} over {c.baseline}")
        if by_unit:
            panels.append((title, by_unit, intervals))
    if not panels:
        return []
    num_units = max(len(s) for _, by_unit, _ in panels for s in by_unit.values())
    height = 1.25 + 0.23 * min(num_units, 60) + 0.25 * len(subject.shown)
    figure = new_figure(2.8 * max(len(panels), 2), height)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, by_unit, intervals) in zip(axes, panels, strict=True):
        gains(by_unit, intervals, colours=subject.colours, title=title, ax=ax)
    if len(subject.shown) > 1:
        figure_key(figure, [dot(subject.colours[m], m, size=6.5) for m in subject.shown])
    return [
        picture_of(
            "gains",
            "Paired gain over the best baseline, unit by unit",
            "Differences are taken condition by condition and averaged in each unit; right of the "
            "line the model is better, whichever direction of the metric is good. Diamond and bar, "
            "below: mean and interval over units.",
            "Mean paired gains: " + "; ".join(told) + ".",
            figure,
        )
    ]


def draw_lists(subject: Subject) -> list[Picture]:
    """Overlap and precision of gene lists over their length."""
    panels = []
    for kind, label in (("overlap", "share found again"), ("precision", "share that is right")):
        curves = {}
        for method in _with_best(subject, f"{kind}_at_N"):
            curve = _curve(subject, kind, method)
            if curve.notna().sum() > 1:
                curves[method] = curve
        if curves:
            panels.append((kind, label, curves))
    if not panels:
        return []
    figure = new_figure(5.5 * max(2, len(panels)), 3.4)
    axes = figure.subplots(1, max(2, len(panels)), squeeze=False)[0]
    told = []
    for ax, (kind, label, curves) in zip(axes, panels, strict=False):
        title = f"DE gene {kind} over the length of the list"
        overlap_curves(curves, colours=subject.colours, label=label, title=title, ax=ax)
        told += [
            f"{kind} of {method_name(m)} "
            + ", ".join(f"{number(float(v))} at {k}" for k, v in curve.items())
            for m, curve in curves.items()
        ]
    for ax in axes[len(panels) :]:
        ax.remove()
    return [
        picture_of(
            "lists",
            "Agreement of the gene lists over their length",
            "The first k significant genes by magnitude of the fold change, predicted and "
            "observed; a condition with fewer than k observed (right: predicted) ones takes part "
            "with all it has. Mean over the conditions of each context, then over contexts.",
            "; ".join(told) + ".",
            figure,
        )
    ]


def _with_best(subject: Subject, metric: str) -> list[str]:
    best = subject.best_baseline(metric)
    return [*subject.shown, *([best] if best else []), CEILING]


def _curve(subject: Subject, kind: str, method: str) -> pd.Series:
    """Mean over contexts by list length, of the form that has a gene test."""
    found = {}
    for metric in dict.fromkeys(subject.scores["metric"].astype(str)):
        match = _LIST_METRIC.match(metric)
        if match is None or match[1] != kind:
            continue
        values = condition_values(subject.scores, metric, method, "cells")
        found[int(match[2])] = values.groupby(level=0).mean().mean() if len(values) else np.nan
    return pd.Series(found, dtype=np.float64).sort_index()


def draw_collapse(subject: Subject) -> list[Picture]:
    """Spread over perturbations against variance within sets."""
    points = {}
    for method in [*subject.models, *subject.baselines]:
        facts = subject.evaluation.collapse.get(method, {})
        pair = [facts.get(k, np.nan) for k in ("within_variance_ratio", "spread_ratio")]
        x, y = (float(v) if isinstance(v, int | float) else np.nan for v in pair)
        if np.isfinite(x) and np.isfinite(y):
            points[method] = (x, y)
    if not points:
        return []
    axes = collapse_plane(points, colours=subject.colours)
    return [
        picture_of(
            "collapse",
            "Has a model collapsed to a mean?",
            "Up: how far the responses to different perturbations are apart, sampling noise taken "
            "out. Right: how much the cells of one predicted set differ. Both relative to the "
            "observed cells; shaded where a model gives one response, or one cell, for all.",
            "Variance within sets and spread over perturbations, relative to the observed: "
            + "; ".join(
                f"{method_name(m)} {number(x)} and {number(y)}" for m, (x, y) in points.items()
            )
            + ".",
            figure_of(axes),
        )
    ]


def figure_of(axes: Axes) -> Figure:
    """Return the figure that holds ``axes``."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure
