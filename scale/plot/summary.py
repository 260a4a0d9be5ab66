"""The one figure that says what a model does: scores, cells and a condition it never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.plot.bars import scores
from scale.plot.canvas import INK, Figure, new_figure
from scale.plot.cells import delta
from scale.plot.plane import embedding

if TYPE_CHECKING:
    from anndata import AnnData

Floats = npt.NDArray[np.float64]


def summary(
    aggregate: pd.DataFrame,
    cells: AnnData,
    predicted: pd.Series,
    observed: pd.Series,
    *,
    method: str,
    metrics: Sequence[str],
    colours: Mapping[str, str],
    labels: Mapping[str, str] | None = None,
    condition: str = "held-out condition",
    context: str | None = None,
    plane: tuple[Floats, tuple[str, str]] | None = None,
) -> Figure:
    """Return one wide figure: key metrics, cells in the plane, a held-out change of expression.

    Parameters
    ----------
    aggregate
        Table with method, form, metric, mean, low, high, better.
    cells
        Control, observed and predicted cells (see :func:`scale.plot.embedding`).
    predicted, observed
        Mean change per gene of one held-out condition.
    method
        The model to show.
    metrics
        Two or three metrics for the bars.
    colours
        Method -> colour, in the order of the bars.
    labels
        Metric -> title.
    condition, context
        What the scatter shows; the context of the cells, None = all.
    plane
        Coordinates of every cell of ``cells`` and the names of the two axes; None = their
        principal components.
    """
    num_methods = aggregate["method"].nunique()
    figure = new_figure(13.2, max(4.2, 0.55 * num_methods + 0.9))
    left, middle, right = figure.subfigures(1, 3, squeeze=False, width_ratios=[1.18, 1.0, 1.0])[0]
    axes = left.subplots(len(metrics), 1, squeeze=False)[:, 0]
    for ax, metric in zip(axes, metrics, strict=True):
        title = (labels or {}).get(metric, metric)
        scores(aggregate, metric, colours=colours, label=title, ax=ax)
    where = f" in {context}" if context else ""
    coordinates, names = plane or (None, ("PC 1", "PC 2"))
    embedding(
        cells,
        method=method,
        context=context,
        coordinates=coordinates,
        names=names,
        colours=colours,
        title=f"Cells{where}",
        ax=middle.subplots(),
    )
    delta(
        predicted,
        observed,
        colour=colours.get(method),
        title=condition,
        ax=right.subplots(),
    )
    for letter, part in zip("abc", (left, middle, right), strict=True):
        part.text(0.005, 0.985, letter, fontsize=13, fontweight="bold", color=INK, va="top")
    return figure
