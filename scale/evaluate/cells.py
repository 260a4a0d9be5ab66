"""Cells of an input: in memory, or in an h5ad that stays on disk.

What is wanted is read by rows, so that a file is never held whole and cells of conditions that are
left out are never read.

Shapes: N = cells, G = genes, M = stored values, R = wanted cells.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]

_READ_VALUES = 1 << 21
"""Stored values read at a time: 16 MB."""
_SKIPPED_VALUES = 1 << 16
"""A gap between wanted cells up to this size is read and thrown away: faster than a new read."""


@dataclass(frozen=True, slots=True)
class _Sparse:
    """CSR arrays, in memory or on disk."""

    indptr_N: Rows
    indices_M: Any
    data_M: Any
    shape: tuple[int, int]

    def read(self, rows_R: Rows) -> sp.csr_matrix:
        """Return the wanted rows, in the wanted order."""
        length_R = self.indptr_N[rows_R + 1] - self.indptr_N[rows_R]
        indptr = np.concatenate([[0], np.cumsum(length_R)])
        small = indptr[-1] < np.iinfo(np.int32).max
        indices = np.empty(indptr[-1], dtype=np.int32 if small else np.int64)
        data = np.empty(indptr[-1], dtype=np.float32)
        order_R = np.argsort(rows_R, kind="stable")
        for wanted in self._pieces(rows_R[order_R]):
            part = order_R[wanted]
            first = self.indptr_N[rows_R[part[0]]]
            last = self.indptr_N[rows_R[part[-1]] + 1]
            data_M, indices_M = self.data_M[first:last], self.indices_M[first:last]
            places = (self.indptr_N[rows_R[part]] - first, indptr[part], length_R[part])
            for source, target, length in zip(*(p.tolist() for p in places), strict=True):
                data[target : target + length] = data_M[source : source + length]
                indices[target : target + length] = indices_M[source : source + length]
        shape = (len(rows_R), self.shape[1])
        return sp.csr_matrix((data, indices, indptr.astype(indices.dtype)), shape=shape)

    def _pieces(self, sorted_R: Rows) -> Iterator[slice]:
        """Cut sorted rows where a read would grow too long or skip too much."""
        start_R, stop_R = self.indptr_N[sorted_R], self.indptr_N[sorted_R + 1]
        gap = np.flatnonzero(start_R[1:] - stop_R[:-1] > _SKIPPED_VALUES) + 1
        for begin, end in zip([0, *gap], [*gap, len(sorted_R)], strict=True):
            while begin < end:
                limit = start_R[begin] + _READ_VALUES
                stop = int(np.searchsorted(stop_R[begin:end], limit, side="right"))
                stop = begin + max(stop, 1)
                yield slice(begin, stop)
                begin = stop

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        dtype: np.dtype[Any] = np.dtype(self.data_M.dtype)
        return dtype

    def cells_per_read(self) -> int:
        """How many cells are read at a time."""
        mean = max(1, int(self.indptr_N[-1]) // max(1, self.shape[0]))
        return max(1, _READ_VALUES // mean)


@dataclass(frozen=True, slots=True)
class _Dense:
    """A dense array, in memory or on disk."""

    values: Any
    shape: tuple[int, int]

    def read(self, rows_R: Rows) -> sp.csr_matrix:
        """Return the wanted rows, in the wanted order."""
        order_R = np.argsort(rows_R, kind="stable")
        sorted_R, size = rows_R[order_R], self.cells_per_read()
        blocks = [sp.csr_matrix((0, self.shape[1]), dtype=np.float32)]
        begin = 0
        while begin < len(sorted_R):
            first = sorted_R[begin]
            stop = int(np.searchsorted(sorted_R, first + size))
            wanted = sorted_R[begin:stop] - first
            block = np.asarray(self.values[first : first + wanted[-1] + 1])[wanted]
            blocks.append(sp.csr_matrix(block.astype(np.float32)))
            begin = stop
        matrix = sp.vstack(blocks, format="csr")
        place_R = np.argsort(order_R)
        return matrix if bool((place_R[1:] > place_R[:-1]).all()) else matrix[place_R]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the values."""
        dtype: np.dtype[Any] = np.dtype(self.values.dtype)
        return dtype

    def cells_per_read(self) -> int:
        """How many cells are read at a time."""
        return max(1, _READ_VALUES // max(1, self.shape[1]))


class CellMatrix:
    """Values of cells, read by rows as float32 CSR with sorted columns.

    Parameters
    ----------
    storage
        A matrix of scipy, a dense array, or what stands under ``X`` or a layer in an h5ad.
    name
        How messages call the input.
    columns
        The wanted column of each gene; None = as they are.
    target_sum
        Counts are read as log1p of counts per this total; None = as they are.
    """

    def __init__(
        self,
        storage: Any,
        name: str,
        *,
        columns: Rows | None = None,
        target_sum: float | None = None,
    ) -> None:
        self._storage = _storage(storage, name)
        self._columns, self._target_sum = columns, target_sum
        self.is_float16 = self._storage.dtype == np.float16
        rows, genes = self._storage.shape
        self.shape = (rows, genes if columns is None else len(columns))

    def __getitem__(self, rows: npt.NDArray[Any]) -> sp.csr_matrix:
        """Return the cells of row numbers, or of a mask."""
        return self.normalised(self.stored(rows))

    def stored(self, rows: npt.NDArray[Any]) -> sp.csr_matrix:
        """Return cells as they are stored, not normalised."""
        rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows.astype(np.int64)
        matrix = self._storage.read(rows)
        if self._columns is not None:
            matrix = matrix[:, self._columns]
        matrix.sum_duplicates()
        return matrix

    def normalised(self, stored: sp.csr_matrix) -> sp.csr_matrix:
        """Return what :meth:`__getitem__` makes of stored cells."""
        return stored if self._target_sum is None else _log_normalised(stored, self._target_sum)

    def take(self, rows: Rows) -> TakenCells:
        """Return some of the cells; they are read when they are asked for."""
        return TakenCells(self, rows)

    def pieces(self, rows: Rows) -> Iterator[Rows]:
        """Cut row numbers into parts that are read at once."""
        size = self._storage.cells_per_read()
        for begin in range(0, len(rows), size):
            yield rows[begin : begin + size]


@dataclass(frozen=True, slots=True)
class TakenCells:
    """Some rows of a matrix, read when they are asked for."""

    matrix: CellMatrix
    rows: Rows

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and genes."""
        return len(self.rows), self.matrix.shape[1]

    def __getitem__(self, rows: Rows) -> sp.csr_matrix:
        return self.matrix[self.rows[rows]]


def _log_normalised(counts: sp.csr_matrix, target_sum: float) -> sp.csr_matrix:
    """log1p of counts per ``target_sum``; the total of a cell is over the matrix' columns."""
    total_N = np.maximum(counts @ np.ones(counts.shape[1]), 1e-300)
    factor_M = np.repeat(target_sum / total_N, np.diff(counts.indptr))
    data_M = np.log1p(counts.data * factor_M).astype(np.float32)
    return sp.csr_matrix((data_M, counts.indices, counts.indptr), shape=counts.shape)


def _storage(stored: Any, name: str) -> _Sparse | _Dense:
    if hasattr(stored, "group"):  # the matrix of an AnnData that is backed by a file
        stored = stored.group
    if isinstance(stored, h5py.Group):
        shape = (int(stored.attrs["shape"][0]), int(stored.attrs["shape"][1]))
        if stored.attrs["encoding-type"] == "csr_matrix":
            indptr_N = np.asarray(stored["indptr"], dtype=np.int64)
            return _Sparse(indptr_N, stored["indices"], stored["data"], shape)
        logger.warning("%s: columns are stored (CSC), so the file is read whole; save CSR", name)
        arrays = tuple(stored[key][:] for key in ("data", "indices", "indptr"))
        stored = sp.csc_matrix(arrays, shape=shape)
    if not sp.issparse(stored):
        values = stored if isinstance(stored, h5py.Dataset) else np.asarray(stored)
        return _Dense(values, (int(values.shape[0]), int(values.shape[1])))
    # scipy reorders no float16
    csr = stored if stored.format == "csr" else sp.csr_matrix(stored.astype(np.float32))
    return _Sparse(csr.indptr.astype(np.int64), csr.indices, csr.data, csr.shape)


class CellSource:
    """One input: its cell table, its genes, and its matrices wherever they are.

    Parameters
    ----------
    obs
        One row per cell; columns may be added.
    genes
        Names, in the order of the columns.
    values
        ``X``: a matrix, an array, or what an h5ad holds.
    counts
        ``layers["counts"]``, or None.
    target_sum
        Counts per cell that a predictor says it normalised to, or None.
    """

    def __init__(
        self,
        obs: pd.DataFrame,
        genes: pd.Index,
        values: Any,
        counts: Any,
        *,
        target_sum: float | None = None,
        file: h5py.File | None = None,
    ) -> None:
        self.obs, self.genes, self.values, self.counts = obs, genes, values, counts
        self.target_sum = target_sum
        self._file = file

    @classmethod
    def of(cls, source: AnnData | CellSource | Path | str) -> CellSource:
        """Return an input: an h5ad is opened and stays on disk, an AnnData is taken as it is.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, or it holds no cells.
        """
        if isinstance(source, CellSource):
            return source
        if isinstance(source, str | Path):
            return cls._open(Path(source))
        counts = source.layers["counts"] if "counts" in source.layers else None  # noqa: SIM401
        return cls(
            source.obs,
            source.var_names.astype(str),
            source.X,
            counts,
            target_sum=_target_sum(source.uns.get("scale", {})),
        )

    @classmethod
    def _open(cls, path: Path) -> CellSource:
        from anndata.io import read_elem

        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; give the path of an h5ad")
        file = h5py.File(path, "r")
        if not {"X", "obs", "var"} <= set(file) or "encoding-type" not in file["obs"].attrs:
            found = ", ".join(sorted(file))
            file.close()
            raise ValueError(
                f"{path} holds {found or 'nothing'}; expected an h5ad with X, obs and var: read it "
                "with anndata and write it again"
            )
        return cls(
            read_elem(file["obs"]),
            read_elem(file["var"]).index.astype(str),
            file["X"],
            file.get("layers/counts"),
            target_sum=_target_sum(read_elem(file["uns/scale"]) if "uns/scale" in file else {}),
            file=file,
        )

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()


def _target_sum(written: Mapping[str, Any]) -> float | None:
    found = written.get("target_sum")
    return None if found is None else float(found)
