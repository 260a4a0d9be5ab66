"""Figures of scores: over all conditions, and condition by condition."""

from __future__ import annotations

import pandas as pd

from scale.evaluate.pictures.of_comparisons import figure_of
from scale.evaluate.pictures.subject import Picture, Subject, picture_of
from scale.evaluate.verdict import label_of
from scale.plot.bars import (
    CEILING,
    better_forms,
    condition_values,
    dumbbells,
    number,
    score_panels,
    strip,
)
from scale.plot.canvas import method_name, new_figure, shorten
from scale.plot.curves import training_panels
from scale.plot.heat import heat


def draw_training(subject: Subject) -> list[Picture]:
    """Loss curves of the training run."""
    if subject.training_metrics is None or subject.training_metrics.empty:
        return []
    figure = training_panels(subject.training_metrics)
    if figure is None:
        return []
    last = subject.training_metrics.iloc[-1]
    loss = subject.training_metrics.get("train/loss")
    reached = (
        "" if loss is None else f", last training loss {number(float(loss.dropna().iloc[-1]))}"
    )
    return [
        picture_of(
            "training",
            "Training",
            "Pale: every logged step. Strong: running mean. Dots: validation conditions, which "
            "are never trained on.",
            f"Loss curves over {int(last['step']):,} optimizer steps{reached}.",
            figure,
        )
    ]


def draw_scores(subject: Subject) -> list[Picture]:
    """Bars of the headline metrics."""
    if not subject.headline:
        return []
    metrics = subject.headline
    figure = score_panels(
        subject.aggregate,
        metrics,
        labels={m: label_of(m) for m in metrics},
        colours={m: subject.colours[m] for m in subject.order},
        columns=min(4, len(metrics)),
    )
    told = [
        f"{label_of(m)}: "
        + ", ".join(
            f"{method_name(str(name))} {number(float(mean))}"
            for name, mean in better_forms(subject.aggregate, m)["mean"].to_dict().items()
        )
        for m in metrics
    ]
    return [
        picture_of(
            "scores",
            "Model, baselines and ceiling",
            "Mean over contexts; lines are intervals over independent units. A baseline is shown "
            "in its better form. The hatched bar is the replicate: what one half of the observed "
            "cells reaches as a prediction of the other half; the dashed line is the same carried "
            "to all cells, where that is possible. The arrow says which direction is good.",
            "Bars per metric. " + "; ".join(told) + ".",
            figure,
        )
    ]


def draw_overlap(subject: Subject) -> list[Picture]:
    """Overlap of significant genes, condition by condition."""
    metric = "overlap_at_N"
    first = subject.values(metric, subject.model)
    if first.empty:
        return []
    best = subject.best_baseline(metric)
    order = [subject.model, *([best] if best else []), *subject.shown[1:], CEILING]
    known = subject.rivals(metric)
    series = {m: known[m] for m in order if m in known}
    axes = dumbbells(
        series,
        colours=subject.colours,
        label="share found again",
        names={c: subject.name(c, 28) for c in first.index},
    )
    mean = {m: number(float(values.mean())) for m, values in series.items()}
    return [
        picture_of(
            "overlap",
            "Overlap of significant genes, condition by condition",
            "Among as many top predicted genes as there are observed significant ones, the share "
            "that is observed too. A line joins the model to the best baseline.",
            "Overlap of significant genes per condition; mean over conditions: "
            + ", ".join(f"{method_name(m)} {v}" for m, v in mean.items())
            + ".",
            figure_of(axes),
        )
    ]


def draw_strips(subject: Subject) -> list[Picture]:
    """Every condition as a dot, per headline metric."""
    metrics = [m for m in subject.headline if _varies(subject, m)][:3]
    if not metrics:
        return []
    figure = new_figure(3.73 * len(metrics), 3.5)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, metric in zip(axes, metrics, strict=True):
        strip(
            subject.scores,
            metric,
            subject.methods_of(metric),
            colours=subject.colours,
            label=subject.words(metric),
            ax=ax,
        )
    return [
        picture_of(
            "conditions",
            "Condition by condition",
            "One dot per condition; the line is the median.",
            "Scores of every condition for "
            + ", ".join(label_of(m).lower() for m in metrics)
            + f", one column of dots per method: {_named(subject, metrics[0])}.",
            figure,
        )
    ]


def _named(subject: Subject, metric: str) -> str:
    """Methods of a metric in the order in which they are drawn."""
    return ", ".join(map(method_name, subject.methods_of(metric)))


def _varies(subject: Subject, metric: str) -> bool:
    """Whether a metric has a number per condition, not one per context."""
    values = subject.values(metric, subject.model)
    return bool((values.groupby(level=0).nunique() > 1).any()) or len(values) < 3


def draw_contexts(subject: Subject) -> list[Picture]:
    """Means per context and method as heat maps."""
    metrics = [m for m in subject.headline if m in ("residual_pearson", "overlap_at_N")]
    metrics = (metrics or subject.headline)[:2]
    if not metrics:
        return []
    figure = new_figure(5.6 * len(metrics), max(2.6, 1.7 + 0.3 * len(subject.contexts)))
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for ax, metric in zip(axes, metrics, strict=True):
        methods = subject.methods_of(metric)
        columns = {}
        for method, form in methods.items():
            values = condition_values(subject.scores, metric, method, form)
            columns[method_name(method)] = values.groupby(level=0).mean()
        table = pd.DataFrame(columns).reindex(subject.contexts)
        table.index = pd.Index([shorten(str(c), 20) for c in table.index])
        better = str(subject.aggregate.loc[subject.aggregate["metric"] == metric, "better"].iloc[0])
        heat(
            table,
            label="mean over conditions",
            better=better,
            title=subject.words(metric),
            figure=figure,
            ax=ax,
        )
    return [
        picture_of(
            "contexts",
            "Context by context",
            "Mean over the conditions of a context; darker is better.",
            "Heat maps of contexts against methods for "
            + " and ".join(label_of(m).lower() for m in metrics)
            + f": {_named(subject, metrics[0])}; their means stand in the table of scores.",
            figure,
        )
    ]
