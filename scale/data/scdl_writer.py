"""Writing a BioNeMo SCDL archive, block by block of rows, as :mod:`scale.data.scdl` reads it.

Shapes: M = stored values of a block, P = its rows + 1.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scale.data.partial import PartialDirectory
from scale.data.scdl import CORE, FILES, HEADER, MAGIC, MEMMAP, NETWORK_ORDER, OBS, TYPES, VAR

_LAYOUT = "0.1.3"
"""Version of bionemo-scdl whose layout is written."""
_SCHEMA = (0, 1, 0)
_TABLE_TYPE = 8
"""How the header calls a table: an array of strings."""
_COPY_VALUES = 1 << 20


def smallest_type(largest: int) -> np.dtype[Any]:
    """Return the narrowest unsigned type of the format that holds a number."""
    return next(np.dtype(t) for t in ("<u1", "<u2", "<u4", "<u8") if largest <= np.iinfo(t).max)


class ScdlWriter:
    """Write an archive, some rows at a time; leaving the context gives it its name.

    Parameters
    ----------
    path
        The folder, which must not exist.
    var
        Table of the genes.
    num_rows, num_values
        What will come; they decide the width of the pointer.
    label
        What the archive calls its one part.
    overwrite
        Replace an archive of this name, once the new one is complete.

    Raises
    ------
    StoreError
        If the folder exists and may not be replaced.
    """

    def __init__(
        self,
        path: Path,
        *,
        var: pd.DataFrame,
        num_rows: int,
        num_values: int,
        label: str,
        overwrite: bool = False,
    ) -> None:
        self._var, self._num_rows, self._label = var, num_rows, label
        self._directory = PartialDirectory(path, overwrite=overwrite, mark=HEADER)
        folder = self._folder = self._directory.partial
        for name in (VAR, OBS):
            (folder / name).mkdir()
        dtypes = {"ROWPTR": smallest_type(num_values), "COLPTR": smallest_type(len(var) - 1)}
        self._data = _GrowingFile(folder / FILES["DATA"])
        self._rows = _GrowingFile(folder / FILES["ROWPTR"], dtypes["ROWPTR"])
        self._columns = _GrowingFile(folder / FILES["COLPTR"], dtypes["COLPTR"])
        self._rows.append(np.zeros(1, np.uint64))
        self._obs: pq.ParquetWriter | None = None

    def add(
        self,
        indptr_P: npt.NDArray[np.int64],
        columns_M: npt.NDArray[Any],
        counts_M: npt.NDArray[np.unsignedinteger[Any]],
        obs: pd.DataFrame,
    ) -> None:
        """Append rows and their lines of the table of cells."""
        self._rows.append((indptr_P[1:] + self._data.length).astype(np.uint64))
        self._columns.append(columns_M)
        self._data.append(counts_M)
        if self._obs is None:
            schema = pa.schema([(name, _arrow_type(obs[name])) for name in obs])
            self._obs = pq.ParquetWriter(_table_path(self._folder / OBS), schema)
        table = pa.Table.from_pandas(obs, self._obs.schema, preserve_index=False)
        self._obs.write_table(table)

    def close(self) -> None:
        """Write what is left and give the archive its name."""
        if self._obs is None or self._rows.length != self._num_rows + 1:
            raise ValueError(f"{self._rows.length - 1} rows were added, {self._num_rows} announced")
        self._obs.close()
        for array in (self._data, self._rows, self._columns):
            array.close()
        var = {name: pa.array(self._var[name], _arrow_type(self._var[name])) for name in self._var}
        pq.write_table(pa.table(var), _table_path(self._folder / VAR))
        for name in (VAR, OBS):
            folder = self._folder / name
            np.save(folder / "cumulative_sum_index.npy", np.array([-1, self._num_rows]))
            np.save(folder / "labels.npy", np.array([self._label]))  # fixed width: no pickle
            np.save(folder / "version.npy", np.array(_LAYOUT))
        (self._folder / "metadata.json").write_text(json.dumps({"num_rows": self._num_rows}))
        (self._folder / "version.json").write_text(json.dumps(_LAYOUT))
        (self._folder / HEADER).write_bytes(self._header())
        for file in self._folder.rglob("*"):
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        self._directory.commit()

    def _header(self) -> bytes:
        arrays = {"DATA": self._data, "ROWPTR": self._rows, "COLPTR": self._columns}
        code = {np.dtype(name): number for number, name in TYPES.items()}
        parts = [CORE.pack(MAGIC, *_SCHEMA, NETWORK_ORDER, MEMMAP, len(arrays))]
        for name, array in arrays.items():
            parts.append(_text(name) + struct.pack(">QIB", array.length, code[array.dtype], 0))
        parts.append(struct.pack(">I", 2))
        for name in (VAR, OBS):
            files = [f"{name}/{part}.npy" for part in ("cumulative_sum_index", "labels", "version")]
            files.append(f"{name}/{_table_path(Path(name)).name}")
            parts.append(_text(name) + struct.pack(">QII", self._num_rows, _TABLE_TYPE, len(files)))
            parts += [_text(file) for file in files]
            parts.append(b"\0")  # no shape
        return b"".join(parts)

    def abort(self) -> None:
        """Remove what was written."""
        self._directory.abort()
        for array in (self._data, self._rows, self._columns):
            array.close()
        if self._obs is not None:
            self._obs.close()

    def __enter__(self) -> ScdlWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


class _GrowingFile:
    """A flat file of unsigned numbers whose type is the narrowest that held them all so far."""

    def __init__(self, path: Path, dtype: np.dtype[Any] | None = None) -> None:
        self._path = path
        self.dtype = dtype or np.dtype("<u1")
        self.length = 0
        self._handle: BinaryIO = path.open("xb")

    def append(self, values: npt.NDArray[Any]) -> None:
        needed = smallest_type(int(values.max(initial=0)))
        if needed.itemsize > self.dtype.itemsize:
            self._widen(needed)
        self._handle.write(values.astype(self.dtype).tobytes())
        self.length += len(values)

    def _widen(self, dtype: np.dtype[Any]) -> None:
        """Write what is there again; at most three times, and mostly at the first large count."""
        self._handle.close()
        narrow = self._path.with_name(self._path.name + ".narrow")
        self._path.rename(narrow)
        self._handle = self._path.open("xb")
        for start in range(0, self.length, _COPY_VALUES):
            values = np.fromfile(
                narrow, self.dtype, _COPY_VALUES, offset=start * self.dtype.itemsize
            )
            self._handle.write(values.astype(dtype).tobytes())
        narrow.unlink()
        self.dtype = dtype

    def close(self) -> None:
        self._handle.close()


def _text(text: str) -> bytes:
    return struct.pack(">I", len(text)) + text.encode()


def _table_path(folder: Path) -> Path:
    return folder / "dataframe_0.parquet"


def _arrow_type(column: pd.Series[Any]) -> pa.DataType:
    return pa.string() if column.dtype == object else pa.from_numpy_dtype(column.dtype)
