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
    examples = {
        rank: condition
        for rank, condition in subject.examples().items()
        if all(has_row(tables, m, condition) for m in ("observed", subject.model))
    }
    if not examples:
        return []
    models = subject.shown
    figure = new_figure(3.73 * len(examples), 3.85 * len(models))
    axes = figure.subplots(len(models), len(examples), squeeze=False)
    told = []
    for row, model in enumerate(models):
        for ax, (rank, condition) in zip(axes[row], examples.items(), strict=True):
            if not has_row(tables, model, condition):
                ax.set_axis_off()
                continue
            observed = row_of(tables, "observed", condition)
            predicted = row_of(tables, model, condition)
            words = f"{rank}: {subject.name(condition)}"
            delta(
                predicted,
                observed,
                colour=subject.colours[model],
                title=words if len(models) == 1 else f"{model}\n{words}",
                unit=unit,
                ax=ax,
            )
            finite = np.isfinite(observed.to_numpy()) & np.isfinite(predicted.to_numpy())
            r = pearson(observed.to_numpy()[finite], predicted.to_numpy()[finite])
            told.append(f"{model}, {rank.lower()} {subject.name(condition, 80)}, r = {number(r)}")
    ranked = subject.ranking()
    of_whom = "" if len(models) == 1 else f" of {subject.model}"
    by = "" if ranked is None else f" Conditions are ranked by {label_of(ranked[0]).lower()}"
    alt = f"{title}: {'; '.join(told)}."
    return [picture_of(name, title, f"{caption}{by}{of_whom}.", alt, figure)]


def draw_effects(subject: Subject) -> list[Picture]:
    """Genes that respond most, for the same conditions, with every model and a baseline."""
    examples = subject.examples()
    if not examples:
        return []
    deltas = subject.evaluation.deltas
    figure = new_figure(3.73 * len(examples), 4.1)
    axes = figure.subplots(1, len(examples), squeeze=False)[0]
    best = subject.best_baseline("pearson_delta")
    methods = ["observed", *([best] if best else []), *reversed(subject.shown)]
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
