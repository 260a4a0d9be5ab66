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
from scale.plot.canvas import dot, figure_key, method_name, new_figure, shorten
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
    """One row per model: its best, its median and its worst condition."""
    examples = {
        model: {
            rank: condition
            for rank, condition in subject.examples(model).items()
            if all(has_row(tables, m, condition) for m in ("observed", model))
        }
        for model in subject.shown
    }
    examples = {model: found for model, found in examples.items() if found}
    if not examples:
        return []
    num_columns = max(map(len, examples.values()))
    height = 3.85 if len(examples) == 1 else _ROW_HEIGHT * len(examples)
    figure = new_figure(3.73 * num_columns, height)
    grid = figure.subplots(len(examples), num_columns, squeeze=False)
    told = []
    for axes, (model, found) in zip(grid, examples.items(), strict=True):
        for ax in axes[len(found) :]:
            ax.set_axis_off()
        for ax, (rank, condition) in zip(axes, found.items(), strict=False):
            observed = row_of(tables, "observed", condition)
            predicted = row_of(tables, model, condition)
            words = f"{rank}: {subject.name(condition)}"
            delta(
                predicted,
                observed,
                colour=subject.colours[model],
                title=words if len(examples) == 1 else f"{shorten(model)}\n{words}",
                unit=unit,
                ax=ax,
            )
            finite = np.isfinite(observed.to_numpy()) & np.isfinite(predicted.to_numpy())
            r = pearson(observed.to_numpy()[finite], predicted.to_numpy()[finite])
            told.append(f"{model}, {rank.lower()} {subject.name(condition, 80)}, r = {number(r)}")
    alt = f"{title}: {'; '.join(told)}."
    return [picture_of(name, title, f"{caption} {_ranked(subject)}", alt, figure)]


_ROW_HEIGHT = 3.1
"""Inches of a row of scatters where there are several models."""


def _ranked(subject: Subject) -> str:
    """Say by which metric the conditions are ranked."""
    ranked = subject.ranking(subject.model)
    whose = "the model" if len(subject.shown) == 1 else "each model"
    by = "" if ranked is None else f" by {label_of(ranked[0]).lower()}"
    return f"The best, the median and the worst condition of {whose}{by}."


def draw_effects(subject: Subject) -> list[Picture]:
    """Genes that respond most, for the same conditions, with every model and a baseline."""
    examples = subject.examples(subject.model)
    if not examples:
        return []
    deltas = subject.evaluation.deltas
    figure = new_figure(3.73 * len(examples), 4.1)
    axes = figure.subplots(1, len(examples), squeeze=False)[0]
    best = subject.best_baseline("pearson_delta")
    methods = ["observed", *([best] if best else []), *reversed(subject.shown)]
    whose = "" if len(subject.shown) == 1 else f" The conditions are those of {subject.model}."
    for ax, (rank, condition) in zip(axes, examples.items(), strict=True):
        effect(
            {m: row_of(deltas, m, condition) for m in methods if has_row(deltas, m, condition)},
            colours=subject.colours,
            title=f"{rank}: {subject.name(condition)}",
            with_key=False,
            ax=ax,
        )
    named = ["observed", *subject.shown, *([best] if best else [])]
    figure_key(figure, [dot(subject.colours[m], method_name(m), size=6.5) for m in named])
    return [
        picture_of(
            "effects",
            "The genes that respond most",
            "Bars: observed change of the sixteen genes that respond most. Dots: what was "
            f"predicted for them.{whose}",
            "Observed change of the most responsive genes beside the predictions of "
            + ", ".join(map(method_name, named[1:]))
            + " for the best, the median and the worst condition.",
            figure,
        )
    ]
