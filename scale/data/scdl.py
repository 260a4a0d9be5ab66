"""BioNeMo's SCDL archive: a folder with a CSR matrix in three flat files, and tables in parquet.

It is an exchange format here: no compression, no groups, no sets. The layout is that of
bionemo-scdl 0.1.3 (schema 0.1.0): ``header.sch`` names the types of ``data.npy``, ``row_ptr.npy``
and ``col_ptr.npy``, which have no header of their own; ``var_features`` and ``obs_features`` hold
the tables in blocks of rows, one parquet file each. What is read is checked, and nothing is ever
unpickled: ``labels.npy``, which bionemo-scdl writes as a pickle, is not opened.

Shapes: N = cells, M = stored values, P = N + 1.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from scale.types import SourceError

HEADER = "header.sch"
VAR, OBS = "var_features", "obs_features"
MAGIC = b"SCDL"
CORE = struct.Struct(">4s3BBII")
NETWORK_ORDER, MEMMAP = 1, 1
FILES = {"DATA": "data.npy", "ROWPTR": "row_ptr.npy", "COLPTR": "col_ptr.npy"}
TYPES = {1: "<u1", 2: "<u2", 3: "<u4", 4: "<u8", 5: "<f2", 6: "<f4", 7: "<f8"}
_WITHOUT_HEADER = {"DATA": "<f4", "ROWPTR": "<u8", "COLPTR": "<u4"}


@dataclass(frozen=True, slots=True)
class FeatureBlock:
    """A table of the archive and the rows of the matrix it belongs to."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class CsrRows:
    """Some rows of the matrix, as they are stored."""

    indptr_P: npt.NDArray[np.int64]
    columns_M: npt.NDArray[np.int64]
    values_M: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class ScdlArchive:
    """An archive to read.

    Parameters
    ----------
    path
        The folder.
    num_rows, num_values
        Cells, and values stored.
    dtypes
        Of DATA, ROWPTR and COLPTR.
    var, obs
        Tables of genes and of cells, in the order of their rows.
    """

    path: Path
    num_rows: int
    num_values: int
    dtypes: dict[str, np.dtype[Any]]
    var: tuple[FeatureBlock, ...]
    obs: tuple[FeatureBlock, ...]

    @classmethod
    def open(cls, path: Path) -> ScdlArchive:
        """Look at an archive; its arrays are read later, by rows.

        Raises
        ------
        SourceError
            If a file is missing, or sizes contradict each other; the message names the file.
        """
        for name in FILES.values():
            if not (path / name).is_file():
                raise SourceError(
                    f"{path} is no SCDL archive: it has no {name}; expected a folder with "
                    f"{', '.join(FILES.values())}, {VAR} and {OBS}"
                )
        dtypes = _read_dtypes(path / HEADER)
        lengths = {key: _length(path / name, dtypes[key]) for key, name in FILES.items()}
        # The length of the pointer counts: header and metadata.json are stale once an archive
        # was joined to another.
        num_rows = lengths["ROWPTR"] - 1
        if num_rows < 1:
            raise SourceError(f"{path / FILES['ROWPTR']} holds no row; expected at least one cell")
        ends = [_read(path / FILES["ROWPTR"], dtypes["ROWPTR"], at, 1)[0] for at in (0, num_rows)]
        if not int(ends[0]) == 0 <= int(ends[1]) == lengths["DATA"] == lengths["COLPTR"]:
            raise SourceError(
                f"{path}: {FILES['ROWPTR']} goes from {ends[0]} to {ends[1]}, but there are "
                f"{lengths['DATA']} values in {FILES['DATA']} and {lengths['COLPTR']} in "
                f"{FILES['COLPTR']}; a file is cut, or {HEADER} names the wrong types"
            )
        return cls(
            path,
            num_rows,
            lengths["DATA"],
            dtypes,
            _read_blocks(path / VAR, num_rows),
            _read_blocks(path / OBS, num_rows),
        )

    def rows(self, start: int, stop: int) -> CsrRows:
        """Return the rows from ``start`` to before ``stop``, as they are stored.

        Raises
        ------
        SourceError
            If the pointer of the rows makes no sense.
        """
        file = self.path / FILES["ROWPTR"]
        pointer_P = _read(file, self.dtypes["ROWPTR"], start, stop - start + 1)
        # as unsigned numbers: what is beyond int64 is beyond the values too
        if (pointer_P[1:] < pointer_P[:-1]).any() or pointer_P[-1] > self.num_values:
            raise SourceError(
                f"{file} does not ascend, or goes beyond the {self.num_values} values, in the rows "
                f"from {start} to {stop - 1}; the file is damaged"
            )
        indptr_P = pointer_P.astype(np.int64)
        first, size = int(indptr_P[0]), int(indptr_P[-1] - indptr_P[0])
        parts = {
            key: _read(self.path / FILES[key], self.dtypes[key], first, size)
            for key in ("COLPTR", "DATA")
        }
        # A column beyond int64 becomes negative, which the caller refuses like any other nonsense.
        return CsrRows(indptr_P - first, parts["COLPTR"].astype(np.int64), parts["DATA"])


# --- parts ------------------------------------------------------------------------------------


def _read_dtypes(file: Path) -> dict[str, np.dtype[Any]]:
    """Return the types of the arrays; those of old archives where there is no header."""
    if not file.exists():
        return {key: np.dtype(name) for key, name in _WITHOUT_HEADER.items()}
    raw = file.read_bytes()
    try:
        magic, *version, order, backend, num_arrays = CORE.unpack_from(raw)
        if magic != MAGIC or order != NETWORK_ORDER or backend != MEMMAP or version[0] > 0:
            raise SourceError(
                f"{file} starts with {raw[: CORE.size]!r}; expected SCDL, schema 0.x, network "
                "byte order and memory maps"
            )
        found: dict[str, np.dtype[Any]] = {}
        offset = CORE.size
        for _ in range(num_arrays):
            (size,) = struct.unpack_from(">I", raw, offset)
            name, _, code, has_shape = struct.unpack_from(f">{size}sQIB", raw, offset + 4)
            offset += 4 + size + 13
            if has_shape:
                (dims,) = struct.unpack_from(">I", raw, offset)
                offset += 4 + 4 * dims
            if code not in TYPES:
                raise SourceError(f"{file}: array {name!r} has type {code}; expected 1 to 7")
            found[name.decode()] = np.dtype(TYPES[code])
        return {key: found[key] for key in FILES}
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file} is damaged ({error}); fetch the archive again, or write it anew"
        ) from error


def _length(file: Path, dtype: np.dtype[Any]) -> int:
    length, rest = divmod(file.stat().st_size, dtype.itemsize)
    if rest:
        raise SourceError(
            f"{file} has {file.stat().st_size} bytes, no multiple of the {dtype.itemsize} of a "
            f"{dtype}; it is cut, or {HEADER} names the wrong type"
        )
    return length


def _read(file: Path, dtype: np.dtype[Any], start: int, count: int) -> npt.NDArray[Any]:
    """Return values of a flat file; read, not mapped, so that memory does not fill with pages."""
    values = np.fromfile(file, dtype, count, offset=start * dtype.itemsize)
    if len(values) != count:
        raise SourceError(f"{file} ends within the {count} values from {start} on; it is cut")
    return values


def _read_blocks(folder: Path, num_rows: int) -> tuple[FeatureBlock, ...]:
    """Return the tables of one axis and their rows; none if the archive has no such tables."""
    tables = sorted(folder.rglob("*.parquet"))
    if not tables:
        return ()
    file = folder / "cumulative_sum_index.npy"
    try:
        ends = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise SourceError(f"{file} cannot be read ({error}); expected an array of rows") from error
    is_whole = ends.ndim == 1 and ends.dtype.kind in "iu" and len(ends) == len(tables) + 1
    if not is_whole or (np.diff(np.maximum(ends, 0)) < 0).any() or int(ends[-1]) != num_rows:
        raise SourceError(
            f"{file} holds {ends.tolist() if ends.size < 10 else ends.shape}; expected "
            f"{len(tables) + 1} ascending numbers up to {num_rows}, for the {len(tables)} tables "
            "beside it"
        )
    for table, size in zip(tables, np.diff(np.maximum(ends, 0)).tolist(), strict=True):
        found = _num_rows(table)
        if folder.name == OBS and found != size:
            raise SourceError(f"{table} has {found} rows, {file} says {size}; one of them is old")
    starts = np.maximum(ends[:-1], 0).tolist()
    return tuple(map(FeatureBlock, tables, starts, ends[1:].tolist()))


def _num_rows(table: Path) -> int:
    try:
        return int(pq.read_metadata(table).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{table} cannot be read as parquet ({error})") from error
