"""Predicted cells on their way to a file: one block per condition, appended to an h5ad.

Apart from the predictor because it knows AnnData's layout on disk and nothing of models.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h5py
import pandas as pd
import scipy.sparse as sp
from anndata.io import sparse_dataset, write_elem


@dataclass(frozen=True, slots=True)
class Block:
    """Predicted cells of one request."""

    values: sp.csr_matrix
    obs: pd.DataFrame


class _FileThatMayFail(io.FileIO):
    """A file that remembers its first failed write and takes all later ones without effect.

    HDF5 cannot close a file on a full disk: it fails again in every flush and ends the process with
    a fault. Here it closes a file that will be thrown away, and the error is raised afterwards.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, which one call of the system may do in part."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and self.error is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size of the file."""
        if self.error is None:
            try:
                return super().truncate(size)
            except OSError as error:
                self.error = error
        return size or 0

    def check(self) -> None:
        """Raise what went wrong."""
        if self.error is not None:
            raise self.error


class H5adWriter:
    """An h5ad whose cells are appended block by block.

    Raises
    ------
    OSError
        From any method, if the disk is full.
    """

    def __init__(self, path: Path, genes: Sequence[str]) -> None:
        self._path = path
        self._genes = genes
        self._obs: list[pd.DataFrame] = []
        self.num_cells = 0

    def __enter__(self) -> Self:
        self._disk = _FileThatMayFail(self._path)
        self._file = h5py.File(self._disk, "w")
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._file.close()
        self._disk.close()
        if kind is None:
            self._disk.check()

    def append(self, block: Block) -> None:
        """Write the values of a block; its obs is kept until the end."""
        if not self._obs:
            write_elem(self._file, "X", block.values)
        else:
            sparse_dataset(self._file["X"]).append(block.values)
        self._obs.append(block.obs)
        self.num_cells += len(block.obs)
        self._disk.check()

    def finish(
        self, rename: Callable[[pd.DataFrame], pd.DataFrame], provenance: dict[str, Any]
    ) -> None:
        """Write what stands beside the values, so that the file is a whole AnnData."""
        write_elem(self._file, "obs", rename(pd.concat(self._obs, ignore_index=True)))
        write_elem(self._file, "var", pd.DataFrame(index=list(self._genes)))
        write_elem(self._file, "uns", {"scale": provenance})
        for name in ("obsm", "varm", "obsp", "varp", "layers"):
            write_elem(self._file, name, {})
        self._file.attrs["encoding-type"] = "anndata"
        self._file.attrs["encoding-version"] = "0.1.0"
