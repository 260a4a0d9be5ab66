"""Which genes, in which order: their names and hash, alignment to them, and the choice of HVG.

Everything that reads cells goes through a :class:`GeneVocabulary`, so that two matrices are never
joined by position. The choice of highly variable genes streams over the cells in one pass and keeps
three numbers per gene, because a screen does not fit in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.data.ingest.kernels import gene_moments
from scale.types import SourceError

_NUM_BINS = 20
_TARGET_SUM = 10_000.0


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

    The values are counts per 10,000 of the cell's library, not logarithms, as in the ``seurat``
    flavor of scanpy, to which the choice is equal.

    Parameters
    ----------
    num_genes
        Genes of the matrices that will come.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> moments = StreamingMoments(2)
    >>> moments.update(csr_matrix([[1, 0], [3, 4]]), np.array([10_000, 10_000]))
    >>> moments.table()["mean"].tolist()
    [2.0, 2.0]
    """

    def __init__(self, num_genes: int) -> None:
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
        scale_N = _TARGET_SUM / np.maximum(np.asarray(library, dtype=np.float64), 1.0)
        sum_G, square_G, nonzero_G = gene_moments(
            counts.indptr, counts.indices, counts.data, scale_N, num_genes
        )
        self._sum_G += sum_G
        self._square_G += square_G
        self._nonzero_G += nonzero_G
        self.num_cells += len(library)

    def merge(self, other: StreamingMoments) -> None:
        """Add the cells that ``other`` has seen."""
        self._sum_G += other._sum_G
        self._square_G += other._square_G
        self._nonzero_G += other._nonzero_G
        self.num_cells += other.num_cells

    def table(self) -> pd.DataFrame:
        """Return num_cells (with the gene), mean, variance and dispersion_norm per gene."""
        if self.num_cells < 2:
            raise SourceError(f"{self.num_cells} cells; a variance needs at least 2")
        mean = self._sum_G / self.num_cells
        # Sums of float64 lose at most a few units of 1e-16 x mean^2; counts are far above that.
        variance = (self._square_G - self.num_cells * mean**2) / (self.num_cells - 1)
        variance = np.maximum(variance, 0.0)
        return pd.DataFrame(
            {
                "num_cells": self._nonzero_G,
                "mean": mean,
                "variance": variance,
                "dispersion_norm": _normalised_dispersion(mean, variance),
            }
        )

    def highly_variable(self, num: int) -> npt.NDArray[np.bool_]:
        """Return which genes are chosen: the ``num`` of largest normalised dispersion.

        Genes that tie with the last one are chosen too, as in scanpy. Genes that never vary have no
        dispersion and are chosen only if there are fewer others than ``num``.
        """
        dispersion = self.table()["dispersion_norm"].to_numpy()
        defined = np.sort(dispersion[~np.isnan(dispersion)])[::-1]
        if num >= len(dispersion):
            return np.ones(len(dispersion), dtype=bool)
        if not len(defined):
            raise SourceError("no gene varies between cells; highly variable genes are undefined")
        cutoff = defined[min(num, len(defined)) - 1]
        return np.asarray(np.nan_to_num(dispersion, nan=-np.inf) >= cutoff)


def _normalised_dispersion(
    mean: npt.NDArray[np.float64], variance: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the log dispersion, standardised among genes of similar mean (Satija et al. 2015)."""
    mean = np.where(mean == 0, 1e-12, mean)
    dispersion = variance / mean
    dispersion = np.log(np.where(dispersion == 0, np.nan, dispersion))
    frame = pd.DataFrame({"mean": np.log1p(mean), "dispersion": dispersion})
    groups = frame.groupby(pd.cut(frame["mean"], bins=_NUM_BINS), observed=True)["dispersion"]
    average = groups.transform("mean").to_numpy(copy=True)
    spread = groups.transform("std").to_numpy(copy=True)
    # A gene alone in its bin gets 1: it has no peers to be compared with.
    alone = np.isnan(spread)
    spread[alone], average[alone] = average[alone], 0.0
    return np.asarray((dispersion - average) / spread)
