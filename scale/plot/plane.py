"""Figures of cells and conditions as points in a plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from scale.plot.canvas import (
    CONTROL,
    INK,
    OBSERVED,
    PAPER,
    RULE,
    Axes,
    Line2D,
    dot,
    key,
    method_colours,
    new_axes,
    tidy,
)

if TYPE_CHECKING:
    from anndata import AnnData

Floats = npt.NDArray[np.float64]


def principal_components(values: Any) -> tuple[Floats, Floats]:
    """Return two coordinates per cell and the share of variance of each.

    Signs are fixed (the largest loading is positive), so that equal data gives an equal picture.
    """
    dense = np.asarray(values.toarray() if sp.issparse(values) else values, dtype=np.float64)
    centred = dense - dense.mean(axis=0)
    left, size, right = np.linalg.svd(centred, full_matrices=False)
    sign = np.sign(right[np.arange(2), np.abs(right[:2]).argmax(axis=1)])
    share = size[:2] ** 2 / max(float((size**2).sum()), 1e-12)
    return left[:, :2] * size[:2] * sign, share


def embedding(
    cells: AnnData,
    *,
    method: str | None = None,
    context: str | None = None,
    coordinates: Floats | None = None,
    shares: Floats | None = None,
    colours: Mapping[str, str] | None = None,
    names: tuple[str, str] = ("PC 1", "PC 2"),
    title: str | None = None,
    with_key: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw control, observed and predicted cells in the plane of their first two components.

    Parameters
    ----------
    cells
        obs holds ``role`` (control, observed, predicted), ``method`` and ``context``.
    method
        Whose predicted cells; None = all.
    context
        Only cells of one context; None = all.
    coordinates, shares
        Of every cell of ``cells``, to draw several views of one plane; None = computed here from
        the cells shown.
    names
        Of the two axes.
    with_key
        Whether to draw a legend into the axes.
    """
    ax = new_axes(ax, width=3.8, height=3.6)
    role = cells.obs["role"].astype(str).to_numpy()
    shown = np.ones(len(role), dtype=bool)
    if method is not None:
        shown &= (role != "predicted") | (cells.obs["method"].astype(str) == method).to_numpy()
    if context is not None:
        shown &= (cells.obs["context"].astype(str) == context).to_numpy()
    if coordinates is None:
        coordinates = np.zeros((len(role), 2))
        coordinates[shown], shares = principal_components(cells.X[np.flatnonzero(shown)])
    colours = colours or method_colours([method or "predicted"])
    paint = {
        "control": (CONTROL, 0.55, 9.0),
        "observed": (OBSERVED, 0.7, 12.0),
        "predicted": (colours.get(method or "predicted", "#0072b2"), 0.7, 12.0),
    }
    handles: list[Line2D] = []
    for name, (colour, alpha, size) in paint.items():
        rows = shown & (role == name)
        if not rows.any():
            continue
        x, y = coordinates[rows].T
        ax.scatter(x, y, s=size, color=colour, alpha=alpha, linewidths=0, zorder=len(handles) + 1)
        handles.append(dot(colour, name))
    suffix = ["" if shares is None else f" ({shares[i]:.0%} of variance)" for i in range(2)]
    ax.set_xlabel(names[0] + suffix[0])
    ax.set_ylabel(names[1] + suffix[1])
    tidy(ax, title=title)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.margins(0.06)
    if with_key:
        key(ax, handles, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    return ax


def response_directions(change_PG: Floats) -> tuple[Floats, Floats]:
    """Return the two directions [2, G] in which responses are largest, and their shares.

    Zero stays zero (no mean is taken off), so that the control cells are the origin.
    """
    _, size, right = np.linalg.svd(change_PG, full_matrices=False)
    sign = np.sign(right[np.arange(2), np.abs(right[:2]).argmax(axis=1)])
    return right[:2] * sign[:, None], size[:2] ** 2 / max(float((size**2).sum()), 1e-12)


def response_map(
    observed_P2: Floats,
    predicted_P2: Floats,
    *,
    colour: str,
    names: tuple[str, str],
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw every condition twice, observed and predicted, with a line between the two.

    A model that gives one response to all perturbations has its points on one spot.
    """
    ax = new_axes(ax, width=3.8, height=3.6)
    ax.axhline(0, color=RULE, linewidth=0.8, zorder=0)
    ax.axvline(0, color=RULE, linewidth=0.8, zorder=0)
    for start, end in zip(observed_P2, predicted_P2, strict=True):
        ax.plot(*zip(start, end, strict=True), color="#c3cad3", linewidth=1.0, zorder=1)
    for points, paint in ((observed_P2, OBSERVED), (predicted_P2, colour)):
        ax.scatter(
            points[:, 0],
            points[:, 1],
            s=24,
            color=paint,
            edgecolors=PAPER,
            linewidths=0.4,
            zorder=2,
        )
    ax.plot(0, 0, marker="+", color=INK, markersize=8, markeredgewidth=1.2, zorder=3)
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    tidy(ax, title=title)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.margins(0.08)
    return ax
