"""Figures of genes and cells, predicted beside observed."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from scale.plot.cells import (
    delta,
    distribution,
    effect,
    embedding,
    pearson,
    principal_components,
)

if TYPE_CHECKING:
    from anndata import AnnData


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
            ax=ax,
        )
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


def draw_cells(subject: Subject) -> list[Picture]:
    """Control, observed and predicted cells in one plane, and genes as distributions."""
    cells = subject.evaluation.cells
    if cells is None or cells.n_obs < 3:
        return []
    coordinates, shares = principal_components(cells.X)
    role = cells.obs["role"].astype(str)
    shown = [
        m for m in subject.models if ((role == "predicted") & (cells.obs["method"] == m)).any()
    ]
    views: list[tuple[str, str | None]] = [(m, None) for m in (shown or subject.models)[:3]]
    present = set(cells.obs["context"].astype(str))
    places = [c for c in subject.contexts if c in present]
    if len(views) == 1 and len(places) > 1:
        views += [(views[0][0], c) for c in places[:2]]
    figure = new_figure(3.73 * len(views), 3.9)
    axes = figure.subplots(1, len(views), squeeze=False)[0]
    for ax, (method, context) in zip(axes, views, strict=True):
        title = context or ("All contexts" if len(places) > 1 else places[0])
        embedding(
            cells,
            method=method,
            context=context,
            coordinates=coordinates if context is None else None,
            shares=shares if context is None else None,
            colours=subject.colours,
            title=title if len(subject.models) == 1 else f"{method}: {title}",
            with_key=False,
            ax=ax,
        )
    drawn = list(dict.fromkeys(method for method, _ in views))
    handles = [dot(subject.colours[name], name, size=6.5) for name in ("control", "observed")]
    handles += [
        dot(subject.colours[m], "predicted" if len(drawn) == 1 else f"predicted by {m}", size=6.5)
        for m in drawn
    ]
    figure_key(figure, handles)
    return [
        picture_of(
            "cells",
            "Cells in the plane of their first two principal components",
            "A seeded sample of control, observed and predicted cells. Where the prediction is "
            "good, its cells lie on observed ones and not on control cells; one that is a tight "
            "dot has lost the variety of cells.",
            f"Principal components of {cells.n_obs} sampled control, observed and predicted cells.",
            figure,
        ),
        *_draw_distributions(subject, cells, role),
    ]


def _draw_distributions(subject: Subject, cells: AnnData, role: pd.Series) -> list[Picture]:
    groups = {
        "control": role == "control",
        "observed": role == "observed",
        "predicted": (role == "predicted") & (cells.obs["method"].astype(str) == subject.model),
    }
    groups = {name: mask for name, mask in groups.items() if int(mask.sum()) >= 20}
    tables = [t for (m, _), t in subject.evaluation.deltas.items() if m == "observed"]
    if len(groups) < 3 or not tables:
        return []
    strength = sum(np.abs(t).mean(axis=0) for t in tables)
    genes = [g for g in strength.sort_values(ascending=False).index if g in cells.var_names][:4]
    figure = new_figure(11.2, 2.5)
    axes = figure.subplots(1, len(genes), squeeze=False)[0]
    colours = {**subject.colours, "predicted": subject.colours[subject.model]}
    for place, (ax, gene) in enumerate(zip(axes, genes, strict=True)):
        values = {name: cells[mask.to_numpy()] for name, mask in groups.items()}
        distribution(values, str(gene), colours=colours, ax=ax)
        if place:
            ax.set_yticklabels([])
    return [
        picture_of(
            "distributions",
            "Genes as distributions over cells",
            "The genes that respond most on average, in the sampled cells of all conditions. A "
            "prediction should have the observed width and share of zeros, not only its mean.",
            "Distributions of "
            + ", ".join(str(g) for g in genes)
            + " in control, observed and predicted cells.",
            figure,
        )
    ]
