"""What every source of cells offers, whatever its format, and which files there are.

A format is one module beside this one with one class that has these methods; a new format needs
nothing else. Files are opened only while they are read, and again in each worker process.

Shapes: N = cells of a file, M = stored values, G = genes.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from scale.types import SourceError

LOCATIONS = "X, layers/NAME or raw/X"


@dataclass(frozen=True, slots=True)
class ObsColumn:
    """A column of ``.obs`` as texts.

    Parameters
    ----------
    codes_N
        Index into ``names`` per cell; -1 where the value is missing.
    names
        The distinct texts; whole numbers as decimal strings.
    """

    codes_N: npt.NDArray[np.int32]
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MatrixInfo:
    """What is known of a matrix before any of its values is read."""

    location: str
    kind: str
    """``csr``, ``csc`` or ``dense``."""
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    num_stored: int
    """Values in the file."""
    is_counts: bool = False
    """The format holds nothing but counts, so that their place need not be looked for."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrix in memory."""
        index_bytes = 0 if self.kind == "dense" else 4
        return self.num_stored * (self.dtype.itemsize + index_bytes)


class SourceFile(Protocol):
    """An open file of cells."""

    name: str
    num_cells: int

    @property
    def columns(self) -> list[str]:
        """Names of the columns that describe cells."""

    def column(self, name: str, setting: str) -> ObsColumn:
        """Return a column as texts; ``setting`` is the key that an error message names."""

    def numbers(
        self, name: str, setting: str, kept_N: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.float64]:
        """Return a column as numbers; NaN where the value is missing or an empty text.

        Texts that are no numbers are an error in the cells under ``kept_N`` (None = all).
        """

    def barcodes(self, start: int, stop: int) -> npt.NDArray[np.str_]:
        """Return the names of the cells from row ``start`` to ``stop``, as fixed-width text."""

    def genes(self, location: str) -> list[str]:
        """Return the gene names that belong to a matrix."""

    def ensembl_ids(self, location: str) -> list[str] | None:
        """Return Ensembl identifiers, if the file has them."""

    def locations(self) -> list[str]:
        """Return the matrices of the file, those that hold counts by habit first."""

    def matrix(self, location: str) -> MatrixInfo:
        """Return kind and size of the matrix at ``location``."""

    def rows(self, location: str, start: int, stop: int) -> sp.csr_matrix:
        """Return rows ``start`` to ``stop`` as CSR, with the values as they are stored.

        Called with ascending, adjacent ranges it reads nothing twice.
        """


class Source(Protocol):
    """A file that can be opened, here or (where ``path`` is given) in another process."""

    name: str
    path: Path | None

    def open(self) -> AbstractContextManager[SourceFile]:
        """Open the source for reading."""


def find_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files (or archives) behind paths and glob patterns, sorted by name, each once.

    The order decides the numbers of the cells, and with them how they are shuffled; it does not
    depend on the order of ``patterns``, nor on the folder as long as names differ.
    """
    if not patterns:
        raise SourceError("source.files is empty; give a path or a glob pattern of files")
    found: set[Path] = set()
    for pattern in patterns:
        is_pattern = not Path(pattern).exists()
        matches = [Path(p) for p in glob.glob(pattern, recursive=True)] if is_pattern else []  # noqa: PTH207
        files = matches if is_pattern else [Path(pattern)]
        if not files:
            raise SourceError(f"source.files: no file matches {pattern!r}")
        found.update(p.absolute() for p in files)
    return sorted(found, key=lambda path: (path.name, str(path)))
