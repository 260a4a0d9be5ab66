"""Figures of genes and cells: what a perturbation changed, predicted against observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from scale.plot.canvas import (
    CONTROL,
    INK,
    LABEL_POINTS,
    OBSERVED,
    PAPER,
    QUIET,
    RULE,
    SMALL_POINTS,
    Axes,
    dot,
    few_ticks,
    heat_colours,
    key,
    method_colours,
    new_axes,
    tidy,
)
from scale.types import Perturbation, SourceError

if TYPE_CHECKING:
    from anndata import AnnData

Floats = npt.NDArray[np.float64]

_MANY_POINTS = 4000


def pretty(label: str) -> str:
    """Return a perturbation's label as one reads it aloud.

    Examples
    --------
    >>> pretty("[('Erdafitinib', 0.5, 'uM')]")
    'Erdafitinib 0.5 uM'
    """
    if not label.startswith("[("):
        return label
    try:
        components = Perturbation.parse(label).components
    except SourceError:
        return label
    return " + ".join(
        c.name if c.dose is None else f"{c.name} {c.dose:g} {c.unit or ''}".strip()
        for c in components
    )


def pearson(first: Floats, second: Floats) -> float:
    """Return Pearson's r, NaN where one side is constant."""
    a, b = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def mean_delta(
    adata: AnnData, perturbation: str, *, perturbation_key: str, control: str
) -> pd.Series:
    """Return the mean change of every gene against the control cells of ``adata``.

    Parameters
    ----------
    adata
        log1p values, with cells of the perturbation and of the control.
    perturbation, control
        Values of the column ``perturbation_key``.

    Raises
    ------
    ValueError
        If there are no cells of one of the two.
    """
    labels = adata.obs[perturbation_key].astype(str).to_numpy()
    means = []
    for label in (perturbation, control):
        rows = np.flatnonzero(labels == label)
        if rows.size == 0:
            raise ValueError(
                f"no cells of {label!r} in {perturbation_key!r}; it has "
                f"{', '.join(sorted(set(labels))[:10])}"
            )
        means.append(np.asarray(adata.X[rows].mean(axis=0), dtype=np.float64).ravel())
    return pd.Series(means[0] - means[1], index=adata.var_names, name=perturbation)


def delta(
    predicted: pd.Series,
    observed: pd.Series,
    *,
    colour: str | None = None,
    title: str | None = None,
    unit: str = "mean change (log1p)",
    num_labels: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """Draw predicted against observed change, one point per gene, with Pearson's r.

    Parameters
    ----------
    predicted, observed
        One number per gene; genes are matched by name, and those that are not finite on both
        sides are left out and counted.
    colour
        Of the points; the model's.
    num_labels
        Genes of largest observed change to name.

    Examples
    --------
    >>> change = pd.Series([0.0, 1.0, -1.0], index=["A", "B", "C"])
    >>> delta(change * 0.5, change).get_ylabel()
    'predicted mean change (log1p)'
    """
    ax = new_axes(ax, width=3.6, height=3.6)
    both = pd.concat({"observed": observed, "predicted": predicted}, axis=1, join="inner")
    finite = both.loc[np.isfinite(both.to_numpy(np.float64)).all(axis=1)]
    x, y = (finite[name].to_numpy(np.float64) for name in ("observed", "predicted"))
    limit = 1.12 * max(1e-6, float(np.abs([x, y]).max(initial=0.0)))
    colour = colour or method_colours(["model"])["model"]
    ax.axhline(0, color=RULE, linewidth=0.8, zorder=0)
    ax.axvline(0, color=RULE, linewidth=0.8, zorder=0)
    ax.plot([-limit, limit], [-limit, limit], color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    if len(x) > _MANY_POINTS:
        extent = (-limit, limit, -limit, limit)
        ax.hexbin(
            x,
            y,
            gridsize=56,
            bins="log",
            mincnt=1,
            cmap=heat_colours(),
            extent=extent,
            linewidths=0,
        )
    else:
        ax.scatter(x, y, s=11, color=colour, alpha=0.5, linewidths=0)
    ax.set_xlim(-limit, limit)
    ax.set_ylim(-limit, limit)
    ax.set_aspect("equal")
    few_ticks(ax, "x")
    few_ticks(ax, "y")
    lines = [f"r = {pearson(x, y):.2f}"]
    if len(finite) < len(both):
        lines.append(f"{len(both) - len(finite)} genes not finite")
    _corner(ax, "\n".join(lines))
    _name_extremes(ax, finite, num_labels, limit)
    ax.set_xlabel(f"observed {unit}")
    ax.set_ylabel(f"predicted {unit}")
    tidy(ax, title=title)
    return ax


def _corner(ax: Axes, text: str) -> None:
    ax.text(
        0.03,
        0.97,
        text,
        transform=ax.transAxes,
        ha="left",
        va="top",
        fontsize=LABEL_POINTS,
        color=INK,
        bbox={"boxstyle": "round,pad=0.25", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.8},
    )


def _name_extremes(ax: Axes, points: pd.DataFrame, count: int, limit: float) -> None:
    """Name the genes of largest observed change, none on top of another."""
    placed: list[tuple[float, float]] = []
    observed, predicted = points["observed"].to_dict(), points["predicted"].to_dict()
    order = points["observed"].abs().sort_values(ascending=False).index
    for gene in order[: 4 * count]:
        x, y = observed[gene], predicted[gene]
        if abs(x) < 0.3 * limit:  # the rest is in the cloud, where no name can be read
            break
        crowded = any(
            abs(y - other_y) < 0.13 * limit and abs(x - other_x) < 0.7 * limit
            for other_x, other_y in placed
        )
        in_the_corner = x < 0 and y > 0.7 * limit
        if crowded or in_the_corner or len(placed) == count:
            continue
        placed.append((x, y))
        is_left = x > 0.55 * limit or -0.55 * limit < x < 0  # away from the cloud, inside the frame
        ax.annotate(
            str(gene),
            (x, y),
            xytext=(-4 if is_left else 4, 3),
            textcoords="offset points",
            ha="right" if is_left else "left",
            fontsize=6.5,
            color=QUIET,
        )


def effect(
    changes: Mapping[str, pd.Series],
    *,
    num_genes: int = 16,
    colours: Mapping[str, str] | None = None,
    title: str | None = None,
    unit: str = "mean change (log1p)",
    with_key: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw the genes that respond most: the observed change as bars, predictions as dots.

    Parameters
    ----------
    changes
        Name -> one number per gene. The first entry (``observed``) ranks the genes.
    colours
        Name -> colour; None = the usual ones.

    Examples
    --------
    >>> change = pd.Series([0.0, 1.0, -1.0], index=["A", "B", "C"])
    >>> ax = effect({"observed": change, "model": change}, num_genes=2)
    >>> sorted(label.get_text() for label in ax.get_yticklabels())
    ['B', 'C']
    """
    ax = new_axes(ax, width=4.6, height=0.4 + 0.24 * num_genes)
    first, *others = changes
    colours = colours or method_colours(others)
    top = changes[first].abs().sort_values(ascending=False).index[:num_genes]
    ranked = changes[first].loc[top].sort_values()
    rows = np.arange(len(ranked))
    bar = colours.get(first, OBSERVED)
    ax.barh(rows, ranked.to_numpy(), height=0.66, color=bar, alpha=0.55, label=first)
    for name in others:
        values = changes[name].reindex(ranked.index).to_numpy(np.float64)
        ax.scatter(
            values, rows, s=30, color=colours[name], edgecolors=INK, linewidths=0.35, zorder=3
        )
    ax.axvline(0, color=QUIET, linewidth=0.8)
    ax.set_yticks(rows, [str(g) for g in ranked.index])
    ax.set_ylim(-0.7, len(ranked) - 0.3)
    ax.set_xlabel(unit)
    few_ticks(ax, "x")
    tidy(ax, grid="x", title=title)
    if with_key:
        key(ax, [dot(bar, first), *(dot(colours[n], n) for n in others)], loc="lower right")
    return ax


def distribution(
    cells: Mapping[str, AnnData | Floats],
    gene: str,
    *,
    colours: Mapping[str, str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw how one gene is distributed over cells; the share of zeros is written beside it.

    Parameters
    ----------
    cells
        Name -> AnnData (its column ``gene`` is read) or values, one per cell.
    gene
        Name of the gene.

    Examples
    --------
    >>> ax = distribution({"control": np.array([0.0, 1.0, 2.0])}, "A")
    >>> ax.get_xlabel()
    'A (log1p)'
    """
    ax = new_axes(ax, width=3.4, height=0.5 + 0.62 * len(cells))
    colours = colours or method_colours([n for n in cells if n not in ("control", "observed")])
    values = {name: _gene_values(source, gene) for name, source in cells.items()}
    top = max((float(v.max(initial=0.0)) for v in values.values()), default=0.0) or 1.0
    edges = np.linspace(0.0, top * 1.001, 31)
    peaks = {n: np.histogram(v[v > 0], edges)[0] / max(1, v.size) for n, v in values.items()}
    scale = 0.8 / max(1e-9, max(float(p.max(initial=0.0)) for p in peaks.values()))
    for row, (name, shares) in enumerate(reversed(peaks.items())):
        colour = colours.get(name, CONTROL)
        ax.stairs(row + scale * shares, edges, baseline=row, fill=True, color=colour, alpha=0.55)
        ax.stairs(row + scale * shares, edges, baseline=row, color=colour, linewidth=1.0)
        ax.axhline(row, color=RULE, linewidth=0.7, zorder=0)
        zeros = float(np.mean(values[name] == 0)) if values[name].size else float("nan")
        ax.text(
            1.0,
            row + 0.5,
            f"{zeros:.0%} zero",
            transform=ax.get_yaxis_transform(),
            ha="right",
            fontsize=SMALL_POINTS - 1,
            color=QUIET,
        )
    ax.set_yticks(np.arange(len(values)) + 0.3, list(reversed(values)))
    ax.set_ylim(-0.08, len(values))
    ax.set_xlim(0, top * 1.02)
    ax.set_xlabel(f"{gene} (log1p)")
    few_ticks(ax, "x")
    tidy(ax, title=title)
    ax.tick_params(axis="y", length=0)
    return ax


def _gene_values(source: AnnData | Floats, gene: str) -> Floats:
    if isinstance(source, np.ndarray):
        return source.astype(np.float64).ravel()
    if gene not in source.var_names:
        raise ValueError(f"no gene {gene!r} among the {source.n_vars} of the data")
    column: Any = source.X[:, source.var_names.get_loc(gene)]
    return np.asarray(column.toarray() if sp.issparse(column) else column, np.float64).ravel()
