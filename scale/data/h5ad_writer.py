"""An h5ad written block by block of rows, for matrices that do not fit in memory.

``AnnData.write_h5ad`` wants the whole matrix. The layout written here is that of anndata's
``on-disk format`` 0.1.0 (dataframe 0.2.0, csr_matrix 0.1.0, categorical 0.2.0).

Shapes: M = stored values of a block, P = its rows + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import write_elem

_CHUNK = 1 << 16
_EMPTY_GROUPS = ("layers", "obsm", "obsp", "uns", "varm", "varp")
_INDEX = "_index"


class H5adWriter:
    """Write an h5ad whose X is CSR; leaving the context closes it.

    Parameters
    ----------
    path
        The file, which must not exist.
    var
        Table of the genes.
    num_cells, num_values
        What will come.
    categories
        Column of ``.obs`` -> all its values; these columns become categorical.
    """

    def __init__(
        self,
        path: Path,
        *,
        var: pd.DataFrame,
        num_cells: int,
        num_values: int,
        categories: Mapping[str, Sequence[str]],
    ) -> None:
        self._num_cells, self._num_values = num_cells, num_values
        self._categories = categories
        self._cells_done = self._values_done = 0
        self._columns: dict[str, h5py.Dataset] = {}
        self._file = h5py.File(path, "x")
        _mark(self._file, "anndata", "0.1.0")
        write_elem(self._file, "var", var)
        for name in _EMPTY_GROUPS:
            write_elem(self._file, name, {})
        matrix = self._file.create_group("X")
        _mark(matrix, "csr_matrix", "0.1.0")
        matrix.attrs["shape"] = (num_cells, len(var))
        self._data = _array(matrix, "data", num_values, np.float32)
        self._indices = _array(matrix, "indices", num_values, np.int32)
        self._indptr = _array(matrix, "indptr", num_cells + 1, np.int64)

    def add(
        self,
        indptr_P: npt.NDArray[np.int64],
        columns_M: npt.NDArray[np.int32],
        values_M: npt.NDArray[np.float32],
        obs: pd.DataFrame,
    ) -> None:
        """Append rows and their lines of ``.obs``; all blocks have the same columns."""
        if not self._columns:
            self._make_columns(obs)
        cells = slice(self._cells_done, self._cells_done + len(obs))
        values = slice(self._values_done, self._values_done + len(values_M))
        self._data[values] = values_M
        self._indices[values] = columns_M
        self._indptr[cells.start + 1 : cells.stop + 1] = indptr_P[1:] + self._values_done
        for name, dataset in self._columns.items():
            if name in self._categories:
                dataset[cells] = self._codes(name, obs[name])
            else:
                dataset[cells] = (obs.index if name == _INDEX else obs[name]).to_numpy()
        self._cells_done, self._values_done = cells.stop, values.stop

    def _codes(self, name: str, values: pd.Series[str]) -> npt.NDArray[np.integer[Any]]:
        known = pd.CategoricalDtype(list(self._categories[name]))
        return values.astype(known).cat.codes.to_numpy()

    def _make_columns(self, obs: pd.DataFrame) -> None:
        """Lay out ``.obs``."""
        group = self._file.create_group("obs")
        _mark(group, "dataframe", "0.2.0")
        group.attrs["_index"] = _INDEX
        group.attrs["column-order"] = np.array(list(obs.columns), h5py.string_dtype())
        for name in (_INDEX, *obs.columns):
            if name in self._categories:
                column = group.create_group(name)
                _mark(column, "categorical", "0.2.0")
                column.attrs["ordered"] = False
                write_elem(column, "categories", np.array(self._categories[name], object))
                dtype = self._codes(name, obs[name]).dtype
                self._columns[name] = _array(column, "codes", self._num_cells, dtype)
            else:
                values = (obs.index if name == _INDEX else obs[name]).to_numpy()
                self._columns[name] = _array(group, name, self._num_cells, values.dtype)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> H5adWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        done = self._cells_done, self._values_done
        if kind is None and done != (self._num_cells, self._num_values):
            raise ValueError(f"{done} cells and values were added; {self._num_cells} announced")


def _array(group: h5py.Group, name: str, size: int, dtype: npt.DTypeLike) -> h5py.Dataset:
    """Make a compressed array of numbers, or one of texts."""
    is_text = np.dtype(dtype) == object
    dataset = group.create_dataset(
        name,
        size,
        h5py.string_dtype() if is_text else dtype,
        chunks=(min(size, _CHUNK),) if size else None,
        compression="gzip" if size else None,
        # 842 bytes and 65 us CPU per cell of 2,000 genes; level 4, h5py's default: 784 and 82
        compression_opts=1 if size else None,
        shuffle=bool(size) and not is_text,
    )
    _mark(dataset, "string-array" if is_text else "array", "0.2.0")
    return dataset


def _mark(element: h5py.Group | h5py.Dataset, kind: str, version: str) -> None:
    element.attrs["encoding-type"] = kind
    element.attrs["encoding-version"] = version
