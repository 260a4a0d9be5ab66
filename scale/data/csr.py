"""Counts of some cells as compressed rows, and what a store demands of them.

Shapes: N = cells, M = non-zeros, P = N + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scale.types import SourceError

LARGEST_COUNT = 1 << 24
"""The last integer that float32 holds exactly, and what a low byte and a 16-bit high part hold."""
LARGEST_ROW = 65_535
"""Non-zeros per cell that the format can hold."""
NO_BATCH = 65_535
"""Batch code of a cell without a batch."""


IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class CsrCounts:
    """Counts of some cells as compressed rows, genes ascending within a row.

    Parameters
    ----------
    indptr_P, indices_M, counts_M
        int64, int32, uint32; no stored zeros.
    library_N
        uint32, counts over the library genes, which may be more than the stored ones.
    batch_code_N
        uint16 code of each cell's batch where the condition does not fix it, else None.
    """

    indptr_P: npt.NDArray[np.int64]
    indices_M: npt.NDArray[np.int32]
    counts_M: npt.NDArray[np.uint32]
    library_N: npt.NDArray[np.uint32]
    batch_code_N: npt.NDArray[np.uint16] | None = None

    @property
    def num_cells(self) -> int:
        """Number of cells, N."""
        return len(self.library_N)

    def slice(self, start: int, stop: int) -> CsrCounts:
        """Return the cells from ``start`` to before ``stop``."""
        pointer = self.indptr_P[start : stop + 1]
        return CsrCounts(
            pointer - pointer[0],
            self.indices_M[pointer[0] : pointer[-1]],
            self.counts_M[pointer[0] : pointer[-1]],
            self.library_N[start:stop],
            None if self.batch_code_N is None else self.batch_code_N[start:stop],
        )

    def take(self, rows: IntArray) -> CsrCounts:
        """Return the cells at ``rows``, in that order."""
        size = np.diff(self.indptr_P)[rows]
        indptr = row_pointer(size)
        source = np.repeat(self.indptr_P[:-1][rows] - indptr[:-1], size) + np.arange(indptr[-1])
        return CsrCounts(
            indptr,
            self.indices_M[source],
            self.counts_M[source],
            self.library_N[rows],
            None if self.batch_code_N is None else self.batch_code_N[rows],
        )

    @classmethod
    def concatenate(cls, parts: Sequence[CsrCounts]) -> CsrCounts:
        """Return the cells of all parts, one part after the other; codes only if all have them."""
        if not parts:
            return cls(
                np.zeros(1, np.int64),
                np.empty(0, np.int32),
                np.empty(0, np.uint32),
                np.empty(0, np.uint32),
            )
        codes = [p.batch_code_N for p in parts if p.batch_code_N is not None]
        return cls(
            row_pointer(np.concatenate([np.diff(p.indptr_P) for p in parts])),
            np.concatenate([p.indices_M for p in parts]),
            np.concatenate([p.counts_M for p in parts]),
            np.concatenate([p.library_N for p in parts]),
            np.concatenate(codes) if len(codes) == len(parts) else None,
        )


def row_pointer(size: IntArray) -> npt.NDArray[np.int64]:
    """Return where each row starts, and the end of the last, for rows of given sizes."""
    pointer = np.zeros(len(size) + 1, np.int64)
    np.cumsum(size, out=pointer[1:])
    return pointer


def checked_counts(
    name: str,
    counts: Any,
    library: npt.NDArray[Any],
    batch_codes: npt.NDArray[Any] | None,
) -> CsrCounts:
    """Return a CSR matrix as the codec takes it: whole, positive, genes ascending, none twice.

    Parameters
    ----------
    name
        What the cells are, for messages.
    counts
        CSR matrix; stored zeros are left out.
    library
        Total counts of each cell.
    batch_codes
        Code of each cell, -1 = none; or None.

    Raises
    ------
    SourceError
        If the format cannot hold the counts; the message names the cell.
    """
    num_cells = counts.shape[0]
    if num_cells == 0 or len(library) != num_cells:
        raise SourceError(f"{name}: {len(library)} libraries for {num_cells} cells")
    if not counts.has_sorted_indices:
        counts = counts.sorted_indices()
    value, column = np.asarray(counts.data), np.asarray(counts.indices)
    indptr = np.asarray(counts.indptr, dtype=np.int64)
    library = np.asarray(library)

    def refuse(bad: npt.NDArray[np.bool_], what: str) -> None:
        if bad.any():
            entry = int(np.argmax(bad))
            cell = int(np.searchsorted(indptr, entry, side="right")) - 1
            raise SourceError(f"{name}, cell {cell}: {what}, gene {column[entry]}: {value[entry]}")

    if value.dtype.kind == "f":
        refuse(~np.isfinite(value), "a count that is not finite")
        refuse(value != np.floor(value), "a count that is not whole")
    refuse(value < 0, "a negative count")
    refuse(value > LARGEST_COUNT, f"a count above {LARGEST_COUNT}")
    is_repeated = np.zeros(len(column), dtype=bool)
    np.equal(column[1:], column[:-1], out=is_repeated[1:])
    is_repeated[indptr[:-1][np.diff(indptr) > 0]] = False
    refuse(is_repeated, "two counts of one gene")
    if (bad := ~((library >= 1) & (library < 1 << 32))).any():
        cell = int(np.argmax(bad))
        raise SourceError(f"{name}, cell {cell}: library {library[cell]}, not in 1 .. 2^32 - 1")
    if not value.all():
        kept = value != 0
        indptr = np.concatenate([[0], np.cumsum(kept)])[indptr]
        value, column = value[kept], column[kept]
    size = np.diff(indptr)
    if size.max() > LARGEST_ROW:
        raise SourceError(
            f"{name}, cell {size.argmax()}: more than {LARGEST_ROW} genes with counts"
        )
    return CsrCounts(
        indptr,
        column.astype(np.int32, copy=False),
        value.astype(np.uint32, copy=False),
        library.astype(np.uint32),
        None if batch_codes is None else _codes(name, np.asarray(batch_codes), num_cells),
    )


def _codes(name: str, codes: IntArray, num_cells: int) -> npt.NDArray[np.uint16]:
    if len(codes) != num_cells or codes.min() < -1 or codes.max() >= NO_BATCH:
        raise SourceError(
            f"{name}: {len(codes)} batch codes between {codes.min()} and {codes.max()}"
        )
    return np.where(codes < 0, NO_BATCH, codes).astype(np.uint16)
