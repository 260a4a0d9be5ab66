"""Figures of genes, predicted beside observed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scale.evaluate.pictures.subject import (
    Condition,
    Picture,
    Subject,
    has_row,
    picture_of,
    row_of,
)
from scale.evaluate.verdict import label_of
from scale.plot.bars import number
from scale.plot.canvas import dot, figure_key, new_figure
from scale.plot.cells import delta, effect, pearson


def draw_deltas(subject: Subject) -> list[Picture]:
    """Predicted against observed change for the best, median and worst condition."""
    return _three_scatters(
        subject,
        subject.evaluation.deltas,
        name="deltas",
        title="Predicted against observed change of expression",
        caption="One point per gene; mean over cells minus mean over control cells. Dashed: a "
        "perfect prediction.",
        unit="mean change (log1p)",
    )


def draw_fold_changes(subject: Subject) -> list[Picture]:
    """Predicted against observed log fold changes for the same conditions."""
    return _three_scatters(
        subject,
        subject.evaluation.fold_changes,
        name="fold-changes",
        title="Predicted against observed log fold changes",
        caption="One point per gene, as the gene test sees it. Genes without any expression on "
        "one side have no finite fold change and are counted in the corner.",
        unit="log2 fold change",
    )


def _three_scatters(
    subject: Subject,
    tables: dict[Condition, pd.DataFrame],
    *,
    name: str,
    title: str,
    caption: str,
    unit: str,
) -> list[Picture]:
    model = subject.model
    examples = {
        rank: condition
        for rank, condition in subject.examples().items()
        if has_row(tables, "observed", condition) and has_row(tables, model, condition)
    }
    if not examples:
        return []
    figure = new_figure(3.73 * len(examples), 3.85)
    axes = figure.subplots(1, len(examples), squeeze=False)[0]
    told = []
    for ax, (rank, condition) in zip(axes, examples.items(), strict=True):
        observed = row_of(tables, "observed", condition)
        predicted = row_of(tables, model, condition)
        delta(
            predicted,
            observed,
            colour=subject.colours[model],
            title=f"{rank}: {subject.name(condition)}",
            unit=unit,
            ax=ax,
        )
        finite = np.isfinite(observed.to_numpy()) & np.isfinite(predicted.to_numpy())
        r = pearson(observed.to_numpy()[finite], predicted.to_numpy()[finite])
        told.append(f"{rank.lower()} {subject.name(condition, 80)} r = {number(r)}")
    ranked = subject.ranking()
    by = "" if ranked is None else f" Conditions are ranked by {label_of(ranked[0]).lower()}."
    alt = f"{title} of {model}: {'; '.join(told)}."
    return [picture_of(name, f"{title}: {model}", caption + by, alt, figure)]


def draw_effects(subject: Subject) -> list[Picture]:
    """Genes that respond most, for the same conditions, with every model and a baseline."""
    examples = subject.examples()
    if not examples:
        return []
    deltas = subject.evaluation.deltas
    figure = new_figure(3.73 * len(examples), 4.1)
    axes = figure.subplots(1, len(examples), squeeze=False)[0]
    best = subject.best_baseline("pearson_delta")
    methods = ["observed", *([best] if best else []), *reversed(subject.models[:3])]
    for ax, (rank, condition) in zip(axes, examples.items(), strict=True):
        effect(
            {m: row_of(deltas, m, condition) for m in methods if has_row(deltas, m, condition)},
            colours=subject.colours,
            title=f"{rank}: {subject.name(condition)}",
            with_key=False,
            ax=ax,
        )
    figure_key(figure, [dot(subject.colours[m], m.replace("_", " "), size=6.5) for m in methods])
    return [
        picture_of(
            "effects",
            "The genes that respond most",
            "Bars: observed change of the sixteen genes that respond most. Dots: what was "
            "predicted for them.",
            "Observed change of the most responsive genes beside the predictions of "
            + ", ".join(m.replace("_", " ") for m in methods[1:])
            + " for the best, the median and the worst condition.",
            figure,
        )
    ]
