"""Which genes, in which order: their names and hash, alignment to them, and the choice of HVG.

Everything that reads cells goes through a :class:`GeneVocabulary`, so that two matrices are never
joined by position. The choice of highly variable genes streams over the cells in one pass and keeps
three numbers per gene, because a screen does not fit in memory.

Shapes: G = genes, N = cells, M = stored counts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.special import ndtri

from scale.config import GeneFlavor
from scale.data.codec import compiled
from scale.types import SourceError

logger = logging.getLogger(__name__)

_NUM_BINS = 20
_TARGET_SUM = 10_000.0
_NEVER_SEEN = 1e-12
"""Mean that stands for 0 in a ratio."""
_NORMAL_QUARTILE = float(ndtri(0.75))
"""Median absolute deviation of a standard normal variable."""


@dataclass(frozen=True)
class GeneVocabulary:
    """Gene symbols in order.

    Parameters
    ----------
    symbols
        Unique names; the key of every alignment.
    ensembl_ids
        Identifiers in the same order, where the source has them.

    Examples
    --------
    >>> genes = GeneVocabulary(("TP53", "MYC"))
    >>> genes.align(["MYC", "EGFR"]).column_G.tolist()
    [-1, 0]
    """

    symbols: tuple[str, ...]
    ensembl_ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.symbols:
            raise SourceError("no genes; expected at least one name")
        if empty := [i for i, name in enumerate(self.symbols) if not name.strip()]:
            raise SourceError(f"{len(empty)} genes have no name, the first in column {empty[0]}")
        if repeated := [name for name, count in Counter(self.symbols).items() if count > 1]:
            raise SourceError(
                f"{len(repeated)} gene names occur more than once: {', '.join(repeated[:5])}; "
                "make them unique, or use a column with unique identifiers as var_names"
            )
        if self.ensembl_ids is not None and len(self.ensembl_ids) != len(self.symbols):
            raise SourceError(f"{len(self.ensembl_ids)} identifiers for {len(self.symbols)} genes")

    def __len__(self) -> int:
        return len(self.symbols)

    @cached_property
    def sha256(self) -> str:
        """Hash of the symbols in order."""
        return sha256("\n".join(self.symbols).encode()).hexdigest()

    def align(self, names: Sequence[str]) -> GeneAlignment:
        """Find each gene of the vocabulary in ``names``.

        Raises
        ------
        SourceError
            If a gene of the vocabulary stands more than once in ``names``.
        """
        position: dict[str, int] = {}
        repeated: list[str] = []
        wanted = set(self.symbols)
        for index, name in enumerate(names):
            if position.setdefault(name, index) != index and name in wanted:
                repeated.append(name)
        if repeated:
            raise SourceError(
                f"{len(repeated)} wanted genes occur more than once: {', '.join(repeated[:5])}"
            )
        return GeneAlignment(
            np.array([position.get(symbol, -1) for symbol in self.symbols], dtype=np.int64),
            tuple(symbol for symbol in self.symbols if symbol not in position),
            tuple(name for name in position if name not in wanted),
        )

    def take(self, columns: npt.NDArray[Any]) -> GeneVocabulary:
        """Return the genes at ``columns``, in that order."""
        ids = self.ensembl_ids
        return GeneVocabulary(
            tuple(self.symbols[c] for c in columns),
            None if ids is None else tuple(ids[c] for c in columns),
        )


@dataclass(frozen=True, slots=True)
class GeneAlignment:
    """Where the genes of a vocabulary are in another list of names.

    Parameters
    ----------
    column_G
        int64; position of each vocabulary gene in the names, -1 where it is missing.
    missing, extra
        Vocabulary genes that the names lack, and names that are in no vocabulary.
    """

    column_G: npt.NDArray[np.int64]
    missing: tuple[str, ...]
    extra: tuple[str, ...]

    def projection(self, num_names: int) -> npt.NDArray[np.int64]:
        """Return for each name its vocabulary index; the vocabulary's size where it has none.

        This is the column map that decodes a store with other genes (``num_names`` of them) into
        the order of the vocabulary.
        """
        column = np.full(num_names, len(self.column_G), dtype=np.int64)
        found = np.flatnonzero(self.column_G >= 0)
        column[self.column_G[found]] = found
        return column


class StreamingMoments:
    """Mean and variance per gene over a stream of cells, and the highly variable genes by them.

    The choice is that of ``scanpy.pp.highly_variable_genes`` after ``normalize_total`` and
    ``log1p``. Values are counts per 10,000 of the cell's library for flavor ``seurat``, and their
    log1p for ``cell_ranger``. Cells are added one by one: how a stream is cut into blocks changes
    no bit of the result.

    Parameters
    ----------
    num_genes
        Genes of the matrices that will come.
    flavor
        Rule of the choice.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> moments = StreamingMoments(2)
    >>> moments.update(csr_matrix([[1, 0], [3, 4]]), np.array([10_000, 10_000]))
    >>> moments.table()["mean"].tolist()
    [2.0, 2.0]
    """

    def __init__(self, num_genes: int, flavor: GeneFlavor = GeneFlavor.seurat) -> None:
        self.flavor = flavor
        self.num_cells = 0
        self._sum_G = np.zeros(num_genes)
        self._square_G = np.zeros(num_genes)
        self._nonzero_G = np.zeros(num_genes, dtype=np.int64)

    def update(self, counts: Any, library: npt.NDArray[Any]) -> None:
        """Add cells: a CSR matrix of counts, and their total counts (over all genes)."""
        num_genes = len(self._sum_G)
        if counts.shape != (len(library), num_genes):
            raise ValueError(
                f"counts {counts.shape} do not fit {len(library)} cells x {num_genes} genes"
            )
        _add_cells(
            counts.indptr,
            counts.indices,
            counts.data,
            _TARGET_SUM / np.maximum(np.asarray(library, dtype=np.float64), 1.0),
            self.flavor is GeneFlavor.cell_ranger,
            self._sum_G,
            self._square_G,
            self._nonzero_G,
        )
        self.num_cells += len(library)

    def add(self, other: StreamingMoments) -> None:
        """Add the cells that ``other`` has seen; sums depend on the order of parts, in rounding."""
        if other.flavor is not self.flavor or len(other._sum_G) != len(self._sum_G):
            raise ValueError("moments of other genes or of another flavor cannot be added")
        self._sum_G += other._sum_G
        self._square_G += other._square_G
        self._nonzero_G += other._nonzero_G
        self.num_cells += other.num_cells

    def sums(self) -> npt.NDArray[np.float64]:
        """Return per gene the sum of values, of their squares, and of what is not 0: [3, G]."""
        return np.stack([self._sum_G, self._square_G, self._nonzero_G])

    @classmethod
    def from_sums(
        cls, sums_3G: npt.NDArray[np.float64], num_cells: int, flavor: GeneFlavor
    ) -> StreamingMoments:
        """Undo :meth:`sums`."""
        moments = cls(sums_3G.shape[1], flavor)
        moments.num_cells = num_cells
        moments._sum_G, moments._square_G = sums_3G[0].copy(), sums_3G[1].copy()
        moments._nonzero_G = sums_3G[2].astype(np.int64)
        return moments

    def table(self) -> pd.DataFrame:
        """Return num_cells (with the gene), mean, variance and dispersion_norm per gene."""
        if self.num_cells < 2:
            raise SourceError(f"{self.num_cells} cells; a variance needs at least 2")
        mean_G = self._sum_G / self.num_cells
        # Sums of float64 lose at most a few units of 1e-16 x mean^2; counts are far above that.
        variance_G = (self._square_G - self.num_cells * mean_G**2) / (self.num_cells - 1)
        variance_G = np.maximum(variance_G, 0.0)
        normalise = {
            GeneFlavor.seurat: _seurat_dispersion,
            GeneFlavor.cell_ranger: _cell_ranger_dispersion,
        }[self.flavor]
        return pd.DataFrame(
            {
                "num_cells": self._nonzero_G,
                "mean": mean_G,
                "variance": variance_G,
                "dispersion_norm": normalise(mean_G, variance_G),
            }
        )

    def highly_variable(self, num: int) -> npt.NDArray[np.bool_]:
        """Return which genes are chosen: the ``num`` of largest normalised dispersion.

        Genes that tie with the last one are chosen too, as in scanpy. Genes without a normalised
        dispersion, such as those that never vary in flavor ``seurat``, are chosen only if ``num``
        is the number of all genes or more.
        """
        return most_variable(self.table()["dispersion_norm"].to_numpy(), num)


def most_variable(dispersion_norm_G: npt.NDArray[np.float64], num: int) -> npt.NDArray[np.bool_]:
    """Return which genes :meth:`StreamingMoments.highly_variable` chooses by these numbers."""
    defined = np.sort(dispersion_norm_G[~np.isnan(dispersion_norm_G)])[::-1]
    if num >= len(dispersion_norm_G):
        return np.ones(len(dispersion_norm_G), dtype=bool)
    if not len(defined):
        raise SourceError("no gene varies between cells; highly variable genes are undefined")
    cutoff = defined[min(num, len(defined)) - 1]
    return np.asarray(np.nan_to_num(dispersion_norm_G, nan=-np.inf, posinf=np.inf) >= cutoff)


@compiled
def _add_cells(
    indptr: npt.NDArray[Any],
    indices_M: npt.NDArray[Any],
    data_M: npt.NDArray[Any],
    scale_N: npt.NDArray[np.float64],
    is_log: bool,  # noqa: FBT001  numba compiles positional arguments
    sum_G: npt.NDArray[np.float64],
    square_G: npt.NDArray[np.float64],
    nonzero_G: npt.NDArray[np.int64],
) -> None:
    """Add to the sums per gene of the scaled values, of their squares, and of what is not 0."""
    for row in range(len(indptr) - 1):
        for i in range(indptr[row], indptr[row + 1]):
            value = data_M[i] * scale_N[row]
            if is_log:
                value = np.log1p(value)
            gene = indices_M[i]
            sum_G[gene] += value
            square_G[gene] += value * value
            nonzero_G[gene] += data_M[i] != 0


def _seurat_dispersion(
    mean_G: npt.NDArray[np.float64], variance_G: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the log dispersion, standardised among genes of similar mean (Satija et al. 2015)."""
    mean_G = np.where(mean_G == 0, _NEVER_SEEN, mean_G)
    dispersion_G = variance_G / mean_G
    dispersion_G = np.log(np.where(dispersion_G == 0, np.nan, dispersion_G))
    bins = pd.cut(pd.Series(np.log1p(mean_G)), bins=_NUM_BINS)
    groups = pd.Series(dispersion_G).groupby(bins, observed=True)
    average_G = groups.transform("mean").to_numpy(copy=True)
    spread_G = groups.transform("std").to_numpy(copy=True)
    # A gene alone in its bin gets 1: it has no peers to be compared with.
    alone_G = np.isnan(spread_G)
    spread_G[alone_G], average_G[alone_G] = average_G[alone_G], 0.0
    with np.errstate(divide="ignore", invalid="ignore"):  # peers that are all equal: undefined
        return np.asarray((dispersion_G - average_G) / spread_G)


def _cell_ranger_dispersion(
    mean_G: npt.NDArray[np.float64], variance_G: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the dispersion's distance from the median of its peers (Zheng et al. 2017).

    Peers lie between the same percentiles of the mean. Where many genes were never seen, the
    percentiles repeat and scanpy has no answer; then those genes are left out, as if
    ``scanpy.pp.filter_genes`` had run.
    """
    seen_G = mean_G > 0
    mean_G = np.where(seen_G, mean_G, _NEVER_SEEN)
    edges = _percentile_edges(mean_G)
    if len(np.unique(edges)) < len(edges):
        logger.warning(
            "%d of %d genes were never seen; cell_ranger compares the others only",
            int((~seen_G).sum()),
            len(seen_G),
        )
        edges = _percentile_edges(mean_G[seen_G])
        mean_G = np.where(seen_G, mean_G, np.nan)
        if len(np.unique(edges)) < len(edges):
            raise SourceError(
                f"genes.flavor=cell_ranger: the means of {int(seen_G.sum())} genes are too equal "
                "for its bins; use genes.flavor=seurat"
            )
    bins = pd.cut(pd.Series(mean_G), bins=edges.tolist())
    dispersion = pd.Series(variance_G / mean_G)
    distance = dispersion - dispersion.groupby(bins, observed=True).transform("median")
    spread = (distance.abs() / _NORMAL_QUARTILE).groupby(bins, observed=True).transform("median")
    return (distance / spread).to_numpy()


def _percentile_edges(mean_G: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if not len(mean_G):
        raise SourceError("no gene was seen in any cell; highly variable genes are undefined")
    return np.concatenate([[-np.inf], np.percentile(mean_G, np.arange(10, 105, 5)), [np.inf]])
