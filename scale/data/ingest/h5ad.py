"""Reading h5ad by blocks of rows: matrices, columns of ``.obs``, gene names, in bounded memory.

The files are read with h5py directly: a matrix is never held whole, except a CSC one, which can
only be cut by columns. One class serves files on disk and an AnnData in memory, which is laid out
as an HDF5 image first, so that there is one reader to trust.

Shapes: N = cells of a file, G = genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem, write_elem

from scale.data.ingest.labels import merge_equal, numbers_of, text_of
from scale.data.ingest.source import LOCATIONS, MatrixInfo, ObsColumn
from scale.types import SourceError, did_you_mean

if TYPE_CHECKING:
    from anndata import AnnData

_CACHE_BYTES, _CACHE_SLOTS = 1 << 20, 521
"""Of decompressed chunks: HDF5's defaults, taken where they are enough."""
_ENSEMBL_COLUMNS = ("ensembl_id", "ensembl_ids", "gene_ids", "gene_id")


class H5adFile:
    """An open h5ad; made by :meth:`H5adSource.open`."""

    def __init__(self, name: str, handle: h5py.File, *, memory_bytes: int) -> None:
        self.name = name
        self._handle = handle
        self._memory_bytes = memory_bytes
        self._matrices: dict[str, MatrixInfo] = {}
        self._datasets: dict[str, h5py.Dataset] = {}
        self._whole: dict[str, sp.csr_matrix] = {}
        if "obs" not in handle or "var" not in handle:
            raise SourceError(f"{name} is no h5ad: it has {_listed(handle)}; expected X, obs, var")
        for axis in ("obs", "var"):
            if not isinstance(handle[axis], h5py.Group):
                raise SourceError(
                    f"{name} was written by anndata before 0.7 (.{axis} is one table); "
                    "read it with anndata and write it again"
                )
        self.num_cells = _length(_index_of(handle["obs"]))
        if self.num_cells == 0:
            raise SourceError(f"{name} has no cells; expected at least one row in .obs")

    # --- tables ---------------------------------------------------------------------------------

    @property
    def columns(self) -> list[str]:
        """Names of the columns of ``.obs``."""
        obs = self._handle["obs"]
        hidden = {"__categories", str(obs.attrs.get("_index", "_index"))}
        return [name for name in obs if name not in hidden]

    def column(self, name: str, setting: str) -> ObsColumn:
        """Return a column as texts; ``setting`` is the key that an error message names."""
        values = self._column_values(name, setting)
        if isinstance(values, pd.Categorical):
            codes_N = np.asarray(values.codes, dtype=np.int32)
            uniques = values.categories
        else:
            found_N, uniques = pd.factorize(pd.Series(values), use_na_sentinel=True)
            codes_N = found_N.astype(np.int32)
        return merge_equal(codes_N, [text_of(value) for value in uniques])

    def numbers(
        self, name: str, setting: str, kept_N: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return a column as numbers; NaN where the value is missing or an empty text.

        Texts that are no numbers are an error in the cells under ``kept_N`` (None = all).
        """
        where = f"{self.name}: column {name!r} ({setting})"
        return numbers_of(self.column(name, setting), where, kept_N)

    def barcodes(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        """Return the names of the cells from row ``start`` to ``stop``."""
        index = _index_of(self._handle["obs"])
        if isinstance(index, h5py.Dataset):
            return np.array([text_of(value) for value in index[start:stop]], np.str_)
        return np.array([text_of(value) for value in read_elem(index)[start:stop]], np.str_)

    def _column_values(self, name: str, setting: str) -> Any:
        if name not in self.columns:
            raise SourceError(
                f"no column {name!r} in .obs of {self.name} ({did_you_mean(name, self.columns)}); "
                f"it has: {', '.join(self.columns)}. Set {setting}"
            )
        element = self._handle["obs"][name]
        if isinstance(element, h5py.Dataset) and "categories" in element.attrs:
            # the layout of anndata 0.7: codes here, categories elsewhere
            categories = self._handle[element.attrs["categories"]][:]
            names = pd.Index([text_of(value) for value in categories])
            return pd.Categorical.from_codes(element[:], names)
        return read_elem(element)

    def genes(self, location: str) -> list[str]:
        """Return the gene names that belong to a matrix."""
        return [text_of(value) for value in pd.Series(read_elem(_index_of(self._var(location))))]

    def ensembl_ids(self, location: str) -> list[str] | None:
        """Return Ensembl identifiers, if ``.var`` has them under a usual name."""
        var = self._var(location)
        for name in _ENSEMBL_COLUMNS:
            if name in var:
                values = [text_of(value) for value in pd.Series(read_elem(var[name]))]
                if all(value.startswith("ENS") for value in values):
                    return values
        return None

    def _var(self, location: str) -> h5py.Group:
        return self._handle["raw/var" if location == "raw/X" else "var"]

    # --- matrices -------------------------------------------------------------------------------

    def locations(self) -> list[str]:
        """Return the matrices of the file, those that hold counts by habit first."""
        layers = self._handle.get("layers", {})
        found = [f"layers/{name}" for name in layers if name == "counts"]
        found += [name for name in ("raw/X", "X") if name in self._handle]
        return found + [f"layers/{name}" for name in layers if name != "counts"]

    def matrix(self, location: str) -> MatrixInfo:
        """Return kind and size of the matrix at ``location``."""
        if location not in self._matrices:
            self._matrices[location] = self._inspect(location)
        return self._matrices[location]

    def _inspect(self, location: str) -> MatrixInfo:
        if location not in self.locations():
            raise SourceError(
                f"{self.name} has no matrix at {location!r}; it has "
                f"{', '.join(self.locations()) or 'none'}. Set counts ({LOCATIONS})"
            )
        element = self._handle[location]
        if isinstance(element, h5py.Dataset):
            if element.ndim != 2:
                raise SourceError(f"{self.name}: {location} has shape {element.shape}, not N x G")
            info = MatrixInfo(location, "dense", element.shape, element.dtype, element.size)
        else:
            kind = str(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "")))
            kind = kind.removesuffix("_matrix").removesuffix("_array")
            if kind not in ("csr", "csc"):
                raise SourceError(
                    f"{self.name}: {location} is stored as {kind or 'an unknown type'!r}; "
                    "expected csr, csc or a dense array"
                )
            shape = element.attrs["shape" if "shape" in element.attrs else "h5sparse_shape"]
            data = element["data"]
            info = MatrixInfo(
                location, kind, (int(shape[0]), int(shape[1])), data.dtype, data.shape[0]
            )
        if info.shape[0] != self.num_cells or info.shape[1] != len(self.genes(location)):
            raise SourceError(
                f"{self.name}: {location} is {info.shape[0]} x {info.shape[1]}, but the tables "
                f"have {self.num_cells} cells and {len(self.genes(location))} genes"
            )
        return info

    def rows(self, location: str, start: int, stop: int) -> sp.csr_matrix:
        """Return rows ``start`` to ``stop`` as CSR, with the values as they are stored."""
        info = self.matrix(location)
        try:
            if info.kind == "dense":
                return sp.csr_matrix(self._dataset(location)[start:stop])
            if info.kind == "csc":
                return self._from_columns(info)[start:stop]
            indptr = self._dataset(f"{location}/indptr")[start : stop + 1].astype(np.int64)
            first, last = int(indptr[0]), int(indptr[-1])
            data = self._dataset(f"{location}/data")[first:last]
            indices = self._dataset(f"{location}/indices")[first:last]
        except OSError as error:
            raise SourceError(
                f"{self.name}: rows {start} to {stop - 1} of {location} cannot be read ({error}); "
                "the file is damaged, fetch or write it again"
            ) from error
        indptr -= first
        in_range = not len(indices) or (indices.min() >= 0 and indices.max() < info.shape[1])
        if (
            (np.diff(indptr) < 0).any()
            or not indptr[-1] == len(indices) == len(data)
            or not in_range
        ):
            # scipy would read and write out of bounds
            raise SourceError(
                f"{self.name}: {location} has impossible indices in the rows from {start} on; "
                f"expected columns 0 to {info.shape[1] - 1}"
            )
        return sp.csr_matrix((data, indices, indptr), shape=(stop - start, info.shape[1]))

    def _dataset(self, path: str) -> h5py.Dataset:
        """Return an open dataset that keeps what it last decompressed.

        The next block begins in the middle of a chunk (of a row of chunks, where the matrix is
        dense). HDF5 forgets chunks of more than 1 MiB, and all when a dataset is closed.
        """
        if path not in self._datasets:
            dataset = self._handle[path]
            if dataset.chunks is not None:
                num_across = [
                    -(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)
                ]
                num_kept = int(np.prod(num_across[1:], dtype=np.int64))
                chunk_bytes = int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
                access = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
                num_bytes = min(max(_CACHE_BYTES, num_kept * chunk_bytes), self._memory_bytes // 8)
                access.set_chunk_cache(max(_CACHE_SLOTS, 2 * num_kept), num_bytes, 1.0)
                name = dataset.name.encode()
                del dataset  # an open dataset keeps the cache that it has
                dataset = h5py.Dataset(h5py.h5d.open(self._handle.id, name, access))
            self._datasets[path] = dataset
        return self._datasets[path]

    def _from_columns(self, info: MatrixInfo) -> sp.csr_matrix:
        """Return a CSC matrix as CSR, converted once, if it fits the memory."""
        if info.location not in self._whole:
            needed = 2 * info.num_bytes  # the columns as read, and the rows made from them
            if needed > self._memory_bytes:
                raise SourceError(
                    f"{self.name}: {info.location} is stored by columns (CSC) and needs "
                    f"{needed:,} bytes to be turned, above memory_bytes ({self._memory_bytes:,}); "
                    "write it as CSR (X = X.tocsr()) or give more memory_bytes"
                )
            element = self._handle[info.location]
            parts = (element["data"][:], element["indices"][:], element["indptr"][:])
            self._whole[info.location] = sp.csc_matrix(parts, shape=info.shape).tocsr()
        return self._whole[info.location]


class H5adSource:
    """A file to read, or an AnnData in memory; opened only while it is read."""

    def __init__(self, path: Path | AnnData, *, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self.path = path if isinstance(path, Path) else None
        self._image = None if isinstance(path, Path) else _image_of(path)
        self.name = str(path) if isinstance(path, Path) else "the AnnData"

    @contextmanager
    def open(self) -> Iterator[H5adFile]:
        """Open the source for reading."""
        if self._image is not None:
            yield H5adFile(self.name, self._image, memory_bytes=self._memory_bytes)
            return
        try:
            handle = h5py.File(self.path, "r")
        except OSError as error:
            raise SourceError(
                f"{self.name} cannot be opened as HDF5 ({error}); expected a whole h5ad"
            ) from error
        with handle:
            yield H5adFile(self.name, handle, memory_bytes=self._memory_bytes)


def _image_of(adata: AnnData) -> h5py.File:
    """Lay an AnnData out as an HDF5 file in memory."""
    handle = h5py.File(f"anndata-{id(adata)}", "w", driver="core", backing_store=False)
    write_elem(handle, "/", adata)
    return handle


def _index_of(frame: h5py.Group) -> h5py.Dataset | h5py.Group:
    """Return the row names of a table."""
    return frame[str(frame.attrs.get("_index", "_index"))]


def _length(element: h5py.Dataset | h5py.Group) -> int:
    """Return the length of a column: an array, or a group of codes or values with a mask."""
    if isinstance(element, h5py.Group):
        element = element["codes" if "codes" in element else "values"]
    return int(element.shape[0])


def _listed(group: h5py.Group) -> str:
    return ", ".join(group) or "nothing"
