"""A store read as one long table: counts, columns and names of any range of cells.

Cells are numbered condition by condition, in the order of the condition ids, as in
``CellSetStore.to_anndata``. Whatever copies a store into another form walks through it in this
order, a block at a time.

Shapes: N = cells of a range, C = conditions, P = N + 1 or C + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from scale.data.codec import CHUNK_CELLS
from scale.data.csr import NO_BATCH, CsrCounts, row_pointer
from scale.data.parquet_rows import ParquetRows
from scale.data.store import CellSetStore, control_fold
from scale.data.store_files import ADDED_COLUMNS
from scale.types import StoreError

_BLOCK_VALUES = 1 << 22
"""Counts of a block: 50 MB as they are decoded."""
_MOST_CELLS = 1 << 16


class StoreRows:
    """The cells of an open store by their number in it."""

    def __init__(self, store: CellSetStore) -> None:
        self.store = store
        table = store.conditions
        self._start_P = row_pointer(table["num_cells"].to_numpy(np.int64))
        self.num_cells = int(self._start_P[-1])
        self.num_values = int(store.chunks["num_nonzero"].sum(dtype=np.int64))
        """Counts stored, of all cells."""
        code = {name: i for i, name in enumerate(store.batches)}
        self._batch_code_C = np.array([code.get(b, NO_BATCH) for b in table["batch"]], np.uint16)
        self._first_chunk_C = table["first_chunk"].to_numpy(np.int64)
        self._by_condition = _columns_by_condition(store)
        self._names = CellNames.of(store)
        self._fold: tuple[int, npt.NDArray[np.int8]] = (-1, np.empty(0, np.int8))

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield first and last + 1 of blocks that fit in a modest memory, over all cells."""
        mean = max(1, self.num_values // self.num_cells)
        step = max(1, min(_MOST_CELLS, _BLOCK_VALUES // mean))
        for start in range(0, self.num_cells, step):
            yield start, min(start + step, self.num_cells)

    def place(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return condition and row within it of the cells from ``start`` to before ``stop``."""
        number_N = np.arange(start, stop)
        condition_N = np.searchsorted(self._start_P, number_N, side="right") - 1
        return condition_N, number_N - self._start_P[condition_N]

    def read(self, start: int, stop: int) -> CsrCounts:
        """Return counts of a range; every cell has the code of its batch, or ``NO_BATCH``."""
        condition_N, row_N = self.place(start, stop)
        conditions, first_C = np.unique(condition_N, return_index=True)
        parts = []
        for condition, rows in zip(conditions.tolist(), np.split(row_N, first_C[1:]), strict=True):
            part = self.store.read(condition, rows)
            code_N = part.batch_code_N
            if code_N is None:
                code_N = np.full(part.num_cells, self._batch_code_C[condition])
            parts.append(
                CsrCounts(part.indptr_P, part.indices_M, part.counts_M, part.library_N, code_N)
            )
        return CsrCounts.concatenate(parts)

    def describe(self, start: int, cells: CsrCounts) -> pd.DataFrame:
        """Return what is known of the cells that were read from ``start`` on.

        The columns are those of ``CellSetStore.to_anndata``, names as plain texts, and ``barcode``
        where the store keeps the names that cells had in the source.
        """
        stop = start + cells.num_cells
        condition_N, row_N = self.place(start, stop)
        is_control_N = self._by_condition["is_control"].to_numpy()[condition_N]
        own = own_names(condition_N, row_N)
        added = (
            cells.library_N,
            condition_N,
            is_control_N,
            own,
            self._folds(condition_N, row_N, is_control_N),
        )
        obs = pd.DataFrame(
            dict(zip(ADDED_COLUMNS, added, strict=True)), index=pd.Index(own, dtype=object)
        )
        columns = self.store.columns
        for key in ("dose", "perturbation", "cell_type"):
            if (name := columns[key]) is not None:
                obs[name] = self._by_condition[key].to_numpy()[condition_N]
        if (name := columns["batch"]) is not None and cells.batch_code_N is not None:
            obs[name] = self.batch_names(cells.batch_code_N)
        if self._names is not None and "barcode" not in obs:
            obs["barcode"] = self.barcodes(start, stop).astype(object)
        return obs

    def batch_names(self, code_N: npt.NDArray[np.uint16]) -> npt.NDArray[np.object_]:
        """Return the name behind each code; None where a cell has no batch."""
        names = np.array([*self.store.batches, None], object)
        return names[np.minimum(code_N, len(self.store.batches))]

    def by_condition(self, key: str) -> npt.NDArray[Any]:
        """Return label, cell_type, dose or is_control of each condition."""
        return self._by_condition[key].to_numpy()

    def barcodes(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        """Return the cells' names in the source where they were kept, else ``c<id>:<row>``."""
        condition_N, row_N = self.place(start, stop)
        if self._names is None:
            return own_names(condition_N, row_N).astype(np.str_)
        chunk_N = self._first_chunk_C[condition_N] + row_N // CHUNK_CELLS
        return self._names.read(start, chunk_N, row_N % CHUNK_CELLS)

    def _folds(
        self,
        condition_N: npt.NDArray[np.int64],
        row_N: npt.NDArray[np.int64],
        is_control_N: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.int8]:
        """Return the half of its control pool that each control cell is in; -1 for treated."""
        fold_N = np.full(len(condition_N), -1, np.int8)
        for condition in np.unique(condition_N[is_control_N]).tolist():
            if self._fold[0] != condition:
                size = int(self._start_P[condition + 1] - self._start_P[condition])
                self._fold = condition, control_fold(self.store.condition(condition), size)
            is_here = condition_N == condition
            fold_N[is_here] = self._fold[1][row_N[is_here]]
        return fold_N


def own_names(
    condition_N: npt.NDArray[np.int64], row_N: npt.NDArray[np.int64]
) -> npt.NDArray[np.object_]:
    """Return ``c<id>:<row>`` for each cell."""
    names = [f"c{c}:{r}" for c, r in zip(condition_N.tolist(), row_N.tolist(), strict=True)]
    return np.array(names, object)


def _columns_by_condition(store: CellSetStore) -> pd.DataFrame:
    """Return what all cells of a condition share, one row per condition."""
    table = store.conditions
    doses = []
    for perturbation in store.perturbations:
        given = [c.dose for c in perturbation.components if c.dose is not None]
        doses.append(given[0] if given else np.nan)
    number_C = table["perturbation"].to_numpy(np.int64)
    return pd.DataFrame(
        {
            "perturbation": np.array(store.labels, object)[number_C],
            "cell_type": table["cell_type"].to_numpy(object),
            "dose": np.array(doses, np.float64)[number_C],
            "is_control": table["is_control"].to_numpy(bool),
        }
    )


class CellNames:
    """Names that cells had in the source, from the parts under ``cells/``; see :meth:`of`."""

    def __init__(self, folder: Path, rows: ParquetRows) -> None:
        self._folder, self._rows = folder, rows

    @classmethod
    def of(cls, store: CellSetStore) -> CellNames | None:
        """Return the names of a store's cells, or None if it does not have those of all cells."""
        folder = store.path / "cells"
        parts = sorted(folder.glob("*.parquet"))
        if not parts or "barcode" not in pq.read_schema(parts[0]).names:
            return None
        rows = ParquetRows(parts, ("chunk", "row", "barcode"))
        return cls(folder, rows) if len(rows) == store.manifest["num_cells"] else None

    def read(
        self, start: int, chunk_N: npt.NDArray[np.int64], row_N: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.str_]:
        """Return the names of the cells from ``start`` on, which lie in these chunks and rows.

        Raises
        ------
        StoreError
            If the parts list the cells in another order than the store has them.
        """
        table = self._rows.read(start, start + len(chunk_N))
        for name, expected in (("chunk", chunk_N), ("row", row_N)):
            if not np.array_equal(table[name].to_numpy(), expected):
                raise StoreError(
                    f"{self._folder} does not list the cells in the order of the chunks; restore "
                    "it from a copy, or run prepare again"
                )
        return np.array(table["barcode"].to_pylist(), np.str_)
