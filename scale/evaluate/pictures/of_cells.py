"""Figures of cells and conditions in a plane, and of genes over cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.evaluate.pictures.subject import Picture, Subject, picture_of, row_of
from scale.evaluate.verdict import label_of
from scale.plot.canvas import CAN_DRAW, Axes, Figure, dot, figure_key, new_figure, shorten
from scale.plot.cells import distribution
from scale.plot.plane import (
    embedding,
    principal_components,
    response_directions,
    response_map,
)
from scale.plot.summary import summary

if TYPE_CHECKING:
    from anndata import AnnData

Floats = npt.NDArray[np.float64]

_FEWEST_CONTROLS = 5
_FEWEST_CELLS = 20


def draw_cells(subject: Subject) -> list[Picture]:
    """Cells in two planes, conditions in one, and genes as distributions."""
    cells = subject.evaluation.cells
    if cells is None or cells.n_obs < 3:
        return []
    return [*_draw_planes(subject, cells), *_draw_distributions(subject, cells)]


def draw_summary(subject: Subject) -> Figure | None:
    """Return the one figure for a README: scores, cells, and the median condition."""
    if not CAN_DRAW:
        return None
    examples, cells = subject.examples(subject.model), subject.evaluation.cells
    tables = _changes(subject, subject.model)
    if not examples or tables is None or cells is None:
        return None
    condition = examples.get("Median") or next(iter(examples.values()))
    deltas = subject.evaluation.deltas
    preferred = ("pearson_delta", "overlap_at_N", "retrieval_l2", *subject.headline)
    metrics = [m for m in dict.fromkeys(preferred) if m in subject.headline][:2]
    observed_PG, _, genes = tables
    basis_2G, shares_2 = response_directions(observed_PG)
    centred, known = _against_control(cells, genes)
    first, second = (f"response {i + 1} ({shares_2[i]:.0%} of the change)" for i in range(2))
    return summary(
        subject.aggregate,
        cells[known],
        row_of(deltas, subject.model, condition),
        row_of(deltas, "observed", condition),
        method=subject.model,
        metrics=metrics,
        colours={m: subject.colours[m] for m in (*subject.order, "observed", "control")},
        labels={m: label_of(m) for m in metrics},
        condition=f"Median condition: {subject.name(condition)}",
        plane=(centred[known] @ basis_2G.T, (first, second)),
    )


def _drawn(cells: AnnData, model: str) -> bool:
    predicted = cells.obs["role"].astype(str) == "predicted"
    return bool((predicted & (cells.obs["method"].astype(str) == model)).any())


def _draw_planes(subject: Subject, cells: AnnData) -> list[Picture]:
    """Cells by principal components, then cells and conditions by the responses; a row a model."""
    models = [m for m in subject.shown if _drawn(cells, m)]
    if not models:
        return []
    changes = {m: _changes(subject, m) for m in models}
    num_panels = 3 if any(c is not None for c in changes.values()) else 1
    height = 3.9 if len(models) == 1 else 0.5 + _ROW_HEIGHT * len(models)
    figure = new_figure(3.73 * num_panels, height)
    grid = figure.subplots(len(models), num_panels, squeeze=False)
    plane = principal_components(cells.X)
    for axes, model in zip(grid, models, strict=True):
        whose = "" if len(models) == 1 else f"{shorten(model)}\n"
        embedding(
            cells,
            method=model,
            coordinates=plane[0],
            shares=plane[1],
            colours=subject.colours,
            title=f"{whose}Cells: principal components",
            with_key=False,
            ax=axes[0],
        )
        if (tables := changes[model]) is not None:
            _draw_responses(subject, cells, model, tables, whose, axes[1:])
        else:
            for ax in axes[1:]:
                ax.set_axis_off()
    caption = "A seeded sample of control, observed and predicted cells."
    if num_panels > 1:
        caption += (
            " Middle and right: the two directions of gene expression in which the observed "
            "responses are largest, control at the cross. Right: a line joins each condition as "
            "predicted to the same as observed; a model with one response for all has all its "
            "points on one spot."
        )
    handles = [dot(subject.colours[name], name, size=6.5) for name in ("control", "observed")]
    for model in models:
        name = "predicted" if len(models) == 1 else f"predicted by {model}"
        handles.append(dot(subject.colours[model], name, size=6.5))
    figure_key(figure, handles)
    return [
        picture_of(
            "cells",
            "Cells and conditions in a plane",
            caption,
            f"{cells.n_obs} sampled control, observed and predicted cells of {', '.join(models)} "
            "by their first two principal components, and cells and conditions along the largest "
            "observed responses.",
            figure,
        )
    ]


_ROW_HEIGHT = 2.9
"""Inches of a row of planes where there are several models."""


def _draw_responses(
    subject: Subject,
    cells: AnnData,
    model: str,
    tables: tuple[Floats, Floats, pd.Index],
    whose: str,
    axes: Sequence[Axes],
) -> None:
    """Draw cells less their control, and conditions, along the largest observed responses."""
    observed_PG, predicted_PG, genes = tables
    basis_2G, shares_2 = response_directions(observed_PG)
    first, second = (f"response {i + 1} ({shares_2[i]:.0%} of the change)" for i in range(2))
    centred, known = _against_control(cells, genes)
    embedding(
        cells[known],
        method=model,
        coordinates=centred[known] @ basis_2G.T,
        colours=subject.colours,
        names=(first, second),
        title=f"{whose}Cells: against their control",
        with_key=False,
        ax=axes[0],
    )
    response_map(
        observed_PG @ basis_2G.T,
        predicted_PG @ basis_2G.T,
        colour=subject.colours[model],
        names=(first, second),
        title=f"{whose}Conditions: mean change",
        ax=axes[1],
    )


def _changes(subject: Subject, model: str) -> tuple[Floats, Floats, pd.Index] | None:
    """Observed and predicted mean changes of all conditions, or None where there are too few."""
    observed: list[Floats] = []
    predicted: list[Floats] = []
    genes: pd.Index = pd.Index([], dtype=object)
    for context in subject.contexts:
        tables = [subject.evaluation.deltas.get((m, context)) for m in ("observed", model)]
        if tables[0] is None or tables[1] is None:
            continue
        labels = tables[0].index.intersection(tables[1].index)
        observed.append(tables[0].loc[labels].to_numpy(np.float64))
        predicted.append(tables[1].loc[labels].to_numpy(np.float64))
        genes = tables[0].columns
    if sum(len(block) for block in observed) < 3 or len(genes) < 3:
        return None
    return np.vstack(observed), np.vstack(predicted), genes


def _against_control(cells: AnnData, genes: pd.Index) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Values less the mean of the sampled control cells of the context; where there are some."""
    values = cells[:, genes].X
    dense = np.asarray(values.toarray() if hasattr(values, "toarray") else values, np.float64)
    context = cells.obs["context"].astype(str).to_numpy()
    is_control = (cells.obs["role"].astype(str) == "control").to_numpy()
    known = np.zeros(len(context), dtype=bool)
    for name in set(context):
        here = context == name
        if int((here & is_control).sum()) >= _FEWEST_CONTROLS:
            dense[here] -= dense[here & is_control].mean(axis=0)
            known |= here
    return dense, known


def _draw_distributions(subject: Subject, cells: AnnData) -> list[Picture]:
    """Genes that respond most: how control, observed and predicted cells are spread."""
    role, method = (cells.obs[name].astype(str) for name in ("role", "method"))
    predicted = {m: (role == "predicted") & (method == m) for m in subject.shown}
    names = list(predicted) if len(predicted) > 1 else ["predicted"]
    masks = [role == "control", role == "observed", *predicted.values()]
    groups = dict(zip(["control", "observed", *names], masks, strict=True))
    groups = {name: mask for name, mask in groups.items() if int(mask.sum()) >= _FEWEST_CELLS}
    tables = [t for (m, _), t in subject.evaluation.deltas.items() if m == "observed"]
    if len(groups) < 3 or not tables:
        return []
    strength = sum(np.abs(t).mean(axis=0) for t in tables)
    genes = [g for g in strength.sort_values(ascending=False).index if g in cells.var_names][:4]
    figure = new_figure(11.2, 0.7 + 0.6 * len(groups))
    axes = figure.subplots(1, len(genes), squeeze=False)[0]
    colours = {**subject.colours, "predicted": subject.colours[subject.model]}
    for place, (ax, gene) in enumerate(zip(axes, genes, strict=True)):
        values = {name: cells[mask.to_numpy()] for name, mask in groups.items()}
        distribution(values, str(gene), colours=colours, ax=ax)
        ax.set_yticklabels([] if place else [shorten(name, 16) for name in reversed(groups)])
    return [
        picture_of(
            "distributions",
            "Genes as distributions over cells",
            "The genes that respond most on average, in the sampled cells of all conditions. A "
            "prediction should have the observed width and share of zeros, not only its mean.",
            "Distributions of "
            + ", ".join(str(g) for g in genes)
            + f" in the cells of {', '.join(groups)}.",
            figure,
        )
    ]
