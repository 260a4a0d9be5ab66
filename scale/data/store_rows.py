"""A store read as one long table: counts, columns and names of any range of cells.

Cells are numbered condition by condition, in the order of the condition ids, as in
``CellSetStore.to_anndata``. Whatever copies a store into another form walks through it in this
order, a block at a time.

Shapes: N = cells of a range, C = conditions, P = C + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from scale.data.cell_table import CellTable, own_names
from scale.data.codec import CHUNK_CELLS
from scale.data.csr import CsrCounts, row_pointer
from scale.data.parquet_rows import ParquetRows
from scale.data.store import CellSetStore
from scale.types import StoreError

_BLOCK_VALUES = 1 << 22
"""Counts of a block: 50 MB as they are decoded."""
_MOST_CELLS = 1 << 16


class StoreRows:
    """The cells of an open store by their number in it."""

    def __init__(self, store: CellSetStore) -> None:
        self.store = store
        self.cells = CellTable(store)
        table = store.conditions
        self._start_P = row_pointer(table["num_cells"].to_numpy(np.int64))
        self._first_chunk_C = table["first_chunk"].to_numpy(np.int64)
        self.num_cells = int(self._start_P[-1])
        self.num_values = int(store.chunks["num_nonzero"].sum(dtype=np.int64))
        """Counts stored, of all cells."""
        self._names = CellNames.of(store)

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

    def read(self, start: int, stop: int) -> tuple[CsrCounts, npt.NDArray[np.uint16]]:
        """Return counts of a range, and the code of each cell's batch (or ``NO_BATCH``)."""
        condition_N, row_N = self.place(start, stop)
        conditions, first_C = np.unique(condition_N, return_index=True)
        parts, codes = [], []
        for condition, rows in zip(conditions.tolist(), np.split(row_N, first_C[1:]), strict=True):
            parts.append(self.store.read(condition, rows))
            codes.append(self.cells.batch_codes(condition, parts[-1]))
        return CsrCounts.concatenate(parts), np.concatenate(codes)

    def read_with_labels(self, start: int, stop: int) -> tuple[CsrCounts, pd.DataFrame]:
        """Return counts of a range, and what is known of the cells.

        The columns are those of ``CellSetStore.to_anndata``, names as plain texts, and ``barcode``
        where the store keeps the names that cells had in the source.
        """
        cells, code_N = self.read(start, stop)
        obs = self.cells.describe(*self.place(start, stop), cells.library_N, code_N)
        if self._names is not None and "barcode" not in obs:
            obs["barcode"] = self.barcodes(start, stop).astype(object)
        return cells, obs

    def barcodes(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        """Return the cells' names in the source where they were kept, else ``c<id>:<row>``."""
        condition_N, row_N = self.place(start, stop)
        if self._names is None:
            return own_names(condition_N, row_N).astype(np.str_)
        chunk_N = self._first_chunk_C[condition_N] + row_N // CHUNK_CELLS
        return self._names.read(start, chunk_N, row_N % CHUNK_CELLS)


class CellNames:
    """Names that cells had in the source, from the parts under ``cells/``; see :meth:`of`."""

    def __init__(self, folder: Path, rows: ParquetRows) -> None:
        self._folder, self._rows = folder, rows

    @classmethod
    def of(cls, store: CellSetStore) -> CellNames | None:
        """Return the names of a store's cells, or None if it does not have those of all cells.

        Raises
        ------
        StoreError
            If they are at another address: only what training needs is fetched.
        """
        names = [f["path"] for f in store.manifest["files"] if f["path"].startswith("cells/")]
        parts = [store.path / name for name in sorted(names)]
        if not all(part.exists() for part in parts):
            raise StoreError(
                f"{store.address}: the names of cells are not on this machine; copy the whole "
                "store here and read the copy"
            )
        if not parts or "barcode" not in pq.read_schema(parts[0]).names:
            return None
        rows = ParquetRows(parts, ("chunk", "row", "barcode"))
        is_complete = len(rows) == store.manifest["num_cells"]
        return cls(store.path / "cells", rows) if is_complete else None

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
