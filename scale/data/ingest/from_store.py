"""A store as a source: to cut its genes again, to join stores that overlap, or to regroup them.

The columns are those that the store's own source had, and those of ``CellSetStore.to_anndata``:
``library`` holds the total counts, which a matrix that was cut to some genes no longer has.

Shapes: N = cells of the store, G = genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from scale.data.csr import NO_BATCH
from scale.data.ingest.labels import numbers_of, text_of
from scale.data.ingest.source import LOCATIONS, MatrixInfo, ObsColumn
from scale.data.store import CellSetStore
from scale.data.store_rows import StoreRows
from scale.types import SourceError, did_you_mean

_OWN_COLUMNS = ("library", "condition", "is_control")
_LOCATION = "X"


class StoreFile:
    """An open store; made by :meth:`StoreSource.open`."""

    def __init__(self, store: CellSetStore) -> None:
        self.name = store.address
        self._store = store
        self._rows = StoreRows(store)
        self.num_cells = self._rows.num_cells
        self._size_C = store.conditions["num_cells"].to_numpy(np.int64)
        source = {name: key for key, name in store.columns.items() if key != "separator" and name}
        self._keys = {name: name for name in _OWN_COLUMNS} | source
        """What a column's name stands for."""

    # --- tables ---------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """Names of the columns that describe cells."""
        return list(self._keys)

    def column(self, name: str, setting: str) -> ObsColumn:
        """Return a column as texts; ``setting`` is the key that an error message names."""
        key = self._key(name, setting)
        if key == "library":
            values, codes_N = np.unique(self._per_cell[0], return_inverse=True)
            return ObsColumn(codes_N.astype(np.int32), tuple(map(str, values.tolist())))
        if key == "batch":
            code_N = self._batch_codes()
            return ObsColumn(np.where(code_N == NO_BATCH, -1, code_N), self._store.batches)
        if key == "condition":
            return self._spread(np.arange(len(self._size_C)).tolist())
        return self._spread(self._rows.cells.by_condition[key].tolist())

    def numbers(
        self, name: str, setting: str, kept_N: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return a column as numbers; NaN where the value is missing or an empty text."""
        if self._key(name, setting) == "library":
            return self._per_cell[0].astype(np.float64)
        where = f"{self.name}: column {name!r} ({setting})"
        return numbers_of(self.column(name, setting), where, kept_N)

    def barcodes(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        """Return the names of the cells from row ``start`` to ``stop``.

        They are the source's where the store kept them, else ``c<id>:<row>``.
        """
        return self._rows.barcodes(start, stop)

    def _key(self, name: str, setting: str) -> str:
        if name not in self._keys:
            raise SourceError(
                f"no column {name!r} in the store {self.name} "
                f"({did_you_mean(name, self.columns)}); it has: {', '.join(self.columns)}. "
                f"Set {setting}"
            )
        return self._keys[name]

    def _spread(self, values: Sequence[object]) -> ObsColumn:
        """Return a column from one value per condition; NaN is missing."""
        texts = [None if value != value else text_of(value) for value in values]
        names = tuple(dict.fromkeys(text for text in texts if text is not None))
        code: dict[str | None, int] = {text: i for i, text in enumerate(names)}
        codes_C = np.array([code.get(text, -1) for text in texts], np.int32)
        return ObsColumn(np.repeat(codes_C, self._size_C), names)

    def _batch_codes(self) -> npt.NDArray[np.int32]:
        """Return the code of each cell's batch; cells are read only if conditions lack it."""
        code = {name: i for i, name in enumerate(self._store.batches)}
        batches = self._store.conditions["batch"]
        if batches.isna().any() and code:
            return self._per_cell[1].astype(np.int32)
        codes = np.array([code.get(name, NO_BATCH) for name in batches], np.int32)
        return np.repeat(codes, self._size_C)

    @cached_property
    def _per_cell(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
        """Library and batch code of all cells: the only labels that lie in the chunks."""
        library_N = np.empty(self.num_cells, np.uint32)
        code_N = np.empty(self.num_cells, np.uint16)
        table = self._store.conditions
        chunks = zip(table["first_chunk"].tolist(), table["num_chunks"].tolist(), strict=True)
        start = 0
        for condition, (first, number) in enumerate(chunks):
            for chunk in range(first, first + number):
                part = self._store.read_chunk(chunk)
                stop = start + part.num_cells
                library_N[start:stop] = part.library_N
                code_N[start:stop] = self._rows.cells.batch_codes(condition, part)
                start = stop
        return library_N, code_N

    # --- matrix ---------------------------------------------------------------------------------

    def genes(self, location: str) -> list[str]:
        """Return the stored genes."""
        self.matrix(location)
        return list(self._store.genes.symbols)

    def ensembl_ids(self, location: str) -> list[str] | None:
        """Return Ensembl identifiers, if the store has them."""
        self.matrix(location)
        ids = self._store.genes.ensembl_ids
        return None if ids is None else list(ids)

    def locations(self) -> list[str]:
        """Return the one matrix of a store."""
        return [_LOCATION]

    def matrix(self, location: str) -> MatrixInfo:
        """Return kind and size of the counts."""
        if location != _LOCATION:
            raise SourceError(
                f"{self.name} has no matrix at {location!r}; a store has {_LOCATION} alone. "
                f"Set counts=auto (of {LOCATIONS})"
            )
        shape = (self.num_cells, self._store.num_genes)
        num_values = self._rows.num_values
        return MatrixInfo(location, "csr", shape, np.dtype(np.uint32), num_values, is_counts=True)

    def rows(self, location: str, start: int, stop: int) -> sp.csr_matrix:
        """Return rows ``start`` to ``stop`` as CSR counts."""
        info = self.matrix(location)
        cells, _ = self._rows.read(start, stop)
        return sp.csr_matrix(
            (cells.counts_M, cells.indices_M, cells.indptr_P), shape=(stop - start, info.shape[1])
        )


class StoreSource:
    """A store to read; opened only while it is read."""

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.name = str(path)
        self._directory = path

    @contextmanager
    def open(self) -> Iterator[StoreFile]:
        """Open the source for reading.

        Raises
        ------
        StoreError
            If there is no store, or it is damaged.
        """
        with CellSetStore.open(self._directory) as store:
            yield StoreFile(store)
