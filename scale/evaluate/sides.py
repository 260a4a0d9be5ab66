"""One side of a comparison: what is computed once of the conditions of a context.

A side is made from cells, or from means alone (the ``mean`` form of a baseline, which has neither
dispersion nor a gene test). The observed side is made once and compared with every method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from scale.evaluate.distances import Space, within_distance
from scale.evaluate.statistics import (
    Floats,
    GeneTests,
    column_sums,
    gene_tests,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Control cells of one side of one context.

    Parameters
    ----------
    mean_G, variance_G, num_cells
        Over all control cells.
    tested
        The cells of the gene test, at most ``max_control_cells``.
    points
        Their coordinates, [cells, K].
    within
        Mean distance of two of them.
    """

    mean_G: Floats
    variance_G: Floats
    num_cells: int
    tested: sp.csr_matrix
    points: Floats
    within: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneTables:
    """What the cells of P conditions say of every gene: moments, zeros and the gene test."""

    mean_PG: Floats
    variance_PG: Floats
    zeros_PG: Floats
    tests: GeneTests


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """What is known of conditions whose cells are given."""

    variance_PG: Floats
    zeros_PG: Floats
    tests: GeneTests
    points: tuple[Floats, ...]
    within_P: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Means, and where there are cells what they tell, of the P conditions of a context."""

    mean_PG: Floats
    num_P: npt.NDArray[np.int64]
    control: Control
    cells: Cells | None

    @property
    def delta_PG(self) -> Floats:
        """Means minus the mean of the side's control."""
        return self.mean_PG - self.control.mean_G

    def take(self, places: Sequence[int]) -> Side:
        """Return the side of some of its conditions."""
        cells = self.cells
        if cells is not None:
            tests = cells.tests
            cells = Cells(
                variance_PG=cells.variance_PG[places],
                zeros_PG=cells.zeros_PG[places],
                tests=GeneTests(tests.p_PG[places], tests.fdr_PG[places], tests.lfc_PG[places]),
                points=tuple(cells.points[p] for p in places),
                within_P=cells.within_P[places],
            )
        return Side(
            mean_PG=self.mean_PG[places],
            num_P=self.num_P[places],
            control=self.control,
            cells=cells,
        )


def moments(cells: sp.csr_matrix) -> tuple[Floats, Floats]:
    """Return the mean and the unbiased variance of every gene."""
    count = cells.shape[0]
    mean_G = column_sums(cells) / count
    square_M = cells.data.astype(np.float64) ** 2
    square_G = np.bincount(cells.indices, square_M, minlength=cells.shape[1])
    variance_G = (square_G - count * mean_G**2) / max(count - 1, 1)
    return mean_G, np.maximum(variance_G, 0.0)


def _zero_share(cells: sp.csr_matrix) -> Floats:
    """Return the share of cells without the gene, of every gene; stored zeros are zeros."""
    stored_G = np.bincount(cells.indices[cells.data != 0], minlength=cells.shape[1])
    return np.asarray(1.0 - stored_G / cells.shape[0])


def make_control(
    cells: sp.csr_matrix, tested: sp.csr_matrix, sampled: sp.csr_matrix, space: Space
) -> Control:
    """Return control cells prepared for many conditions.

    Parameters
    ----------
    cells
        All of them, for the mean.
    tested, sampled
        Those of the gene test and those of the distances.
    space
        Of the distances.
    """
    mean_G, variance_G = moments(cells)
    points = space.project(sampled)
    return Control(
        mean_G=mean_G,
        variance_G=variance_G,
        num_cells=cells.shape[0],
        tested=tested,
        points=points,
        within=within_distance(points),
    )


def gene_tables(conditions: Sequence[sp.csr_matrix], control: sp.csr_matrix) -> GeneTables:
    """Return the tables of the cells of each condition, tested against ``control``."""
    pairs = [moments(c) for c in conditions]
    mean_PG = np.stack([mean_G for mean_G, _ in pairs])
    return GeneTables(
        mean_PG=mean_PG,
        variance_PG=np.stack([variance_G for _, variance_G in pairs]),
        zeros_PG=np.stack([_zero_share(c) for c in conditions]),
        tests=gene_tests(control, conditions, mean_PG),
    )


def side_of_cells(
    conditions: Sequence[sp.csr_matrix],
    control: Control,
    space: Space,
    *,
    max_points: int,
    tables: GeneTables | None = None,
) -> Side:
    """Return a side made from the cells of each condition, tested against ``control``.

    Distances use the first ``max_points`` cells of a condition; ``tables`` are those of
    :func:`gene_tables`, where they are known already.
    """
    tables = gene_tables(conditions, control.tested) if tables is None else tables
    points = tuple(space.project(c[:max_points]) for c in conditions)
    return Side(
        mean_PG=tables.mean_PG,
        num_P=np.array([c.shape[0] for c in conditions]),
        control=control,
        cells=Cells(
            variance_PG=tables.variance_PG,
            zeros_PG=tables.zeros_PG,
            tests=tables.tests,
            points=points,
            within_P=np.array([within_distance(x) for x in points]),
        ),
    )


def side_of_means(mean_PG: Floats, num_P: npt.NDArray[np.int64], control: Control) -> Side:
    """Return a side that knows means only."""
    return Side(mean_PG=mean_PG, num_P=num_P, control=control, cells=None)
