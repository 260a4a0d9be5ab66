"""Cells on their way from a reader to a shard: the byte streams of the store, cell by cell.

From the reader on no cell is ever again a row of a matrix: what ``prepare`` sorts, spills and
joins are the streams that end up in chunks, so that writing a chunk is a copy. In contrast to a
chunk, a place of an exception counts from the start of its cell; that makes cells movable.

Shapes: N = cells, M = non-zeros, E = gap exceptions, F = count exceptions, R = cells taken,
P = N + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scale.data.codec import CHUNK_CELLS, CellChunk
from scale.data.csr import row_pointer
from scale.data.ingest.kernels import gather
from scale.types import StoreError


@dataclass(frozen=True, slots=True)
class PackedCells:
    """Some cells of a source.

    Parameters
    ----------
    ordinal_N
        Number of the cell in the whole source.
    condition_N, library_N, batch_N
        Number of its condition, total counts, batch code (``NO_BATCH`` = none).
    num_nonzero_N, num_gap_high_N, num_count_high_N
        Entries of each cell in the streams.
    gap_place_E, gap_high_E, count_place_F, count_high_F
        Exceptions: index of the entry in its cell, and the high part.
    gap_M, count_M
        The streams; see ``codec``.
    barcode_N
        Names of the cells in UTF-8, of one width; None where they are not kept.
    """

    ordinal_N: npt.NDArray[np.uint64]
    condition_N: npt.NDArray[np.int32]
    library_N: npt.NDArray[np.uint32]
    batch_N: npt.NDArray[np.uint16]
    num_nonzero_N: npt.NDArray[np.uint16]
    num_gap_high_N: npt.NDArray[np.uint16]
    num_count_high_N: npt.NDArray[np.uint16]
    gap_place_E: npt.NDArray[np.uint16]
    gap_high_E: npt.NDArray[np.uint16]
    count_place_F: npt.NDArray[np.uint16]
    count_high_F: npt.NDArray[np.uint16]
    gap_M: npt.NDArray[np.uint8]
    count_M: npt.NDArray[np.uint8]
    barcode_N: npt.NDArray[np.bytes_] | None = None

    @property
    def num_cells(self) -> int:
        """Number of cells, N."""
        return len(self.ordinal_N)

    @property
    def num_bytes_in_chunks(self) -> int:
        """Most bytes in chunks that are not compressed, without the heads of these."""
        exceptions = len(self.gap_high_E) + len(self.count_high_F)
        return 8 * self.num_cells + 6 * exceptions + 2 * len(self.gap_M)

    def _arrays(self) -> list[npt.NDArray[Any]]:
        arrays = [getattr(self, name) for name in _DTYPES]
        return arrays if self.barcode_N is None else [*arrays, self.barcode_N]

    # --- moving cells ---------------------------------------------------------------------------

    def take(self, row_R: npt.NDArray[np.int64]) -> PackedCells:
        """Return the cells at ``row_R``, in that order."""
        columns: dict[str, Any] = {}
        for size, names in _STREAMS.items():
            start_P = row_pointer(getattr(self, size))
            end = int((start_P[row_R + 1] - start_P[row_R]).sum())
            for name in names:
                source = getattr(self, name)
                columns[name] = np.empty(end, source.dtype)
                gather(row_R, start_P, source, columns[name])
        for name in _PER_CELL:
            columns[name] = getattr(self, name)[row_R]
        barcode = self.barcode_N
        return PackedCells(**columns, barcode_N=None if barcode is None else barcode[row_R])

    def slices(self, bounds: Sequence[int] | npt.NDArray[np.int64]) -> Iterator[PackedCells]:
        """Yield the cells between one bound and the next, as views."""
        at = np.asarray(bounds, dtype=np.int64)
        ends = {size: row_pointer(getattr(self, size))[at].tolist() for size in _STREAMS}
        for k, (start, stop) in enumerate(zip(at[:-1].tolist(), at[1:].tolist(), strict=True)):
            columns = {name: getattr(self, name)[start:stop] for name in _PER_CELL}
            for size, names in _STREAMS.items():
                first, last = ends[size][k : k + 2]
                columns |= {name: getattr(self, name)[first:last] for name in names}
            barcode = self.barcode_N
            yield PackedCells(**columns, barcode_N=None if barcode is None else barcode[start:stop])

    @classmethod
    def concatenate(cls, parts: Sequence[PackedCells]) -> PackedCells:
        """Return the cells of one part after the other; all have barcodes or none has."""
        if len(parts) == 1:
            return parts[0]
        names = [*_DTYPES] if parts[0].barcode_N is None else [*_DTYPES, "barcode_N"]
        return cls(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})

    # --- to chunks ------------------------------------------------------------------------------

    def chunks(
        self, bounds: npt.NDArray[np.int64], has_codes: npt.NDArray[np.bool_]
    ) -> Iterator[CellChunk]:
        """Yield the cells between one bound and the next as chunks, as far as possible as views.

        Parameters
        ----------
        bounds
            First cell of each chunk, and the end of the last; at most ``CHUNK_CELLS`` apart.
        has_codes
            Per chunk, whether it carries batch codes.
        """
        size = np.diff(bounds)
        if len(size) and not 1 <= size.min() <= size.max() <= CHUNK_CELLS:
            raise ValueError(f"chunks of {size.min()} to {size.max()} cells")
        start_P = row_pointer(self.num_nonzero_N)
        inside_N = start_P[:-1] - np.repeat(start_P[bounds[:-1]], size)
        position = {
            place: (getattr(self, place) + np.repeat(inside_N, getattr(self, number))).astype("<u4")
            for place, number in (
                ("gap_place_E", "num_gap_high_N"),
                ("count_place_F", "num_count_high_N"),
            )
        }
        m, e, f = (row_pointer(getattr(self, size))[bounds].tolist() for size in _STREAMS)
        n = bounds.tolist()
        for k in range(len(n) - 1):
            cells, values = slice(n[k], n[k + 1]), slice(m[k], m[k + 1])
            gaps, counts = slice(e[k], e[k + 1]), slice(f[k], f[k + 1])
            yield CellChunk(
                self.library_N[cells],
                self.num_nonzero_N[cells],
                self.batch_N[cells] if has_codes[k] else None,
                self.gap_M[values],
                self.count_M[values],
                position["gap_place_E"][gaps],
                self.gap_high_E[gaps],
                position["count_place_F"][counts],
                self.count_high_F[counts],
            )

    # --- to bytes and back ----------------------------------------------------------------------

    def buffers(self) -> list[memoryview]:
        """Return what :meth:`from_bytes` reads, without copies; arrays are aligned in the whole."""
        width = 0 if self.barcode_N is None else self.barcode_N.dtype.itemsize
        sizes = (self.num_cells, len(self.gap_M), len(self.gap_high_E), len(self.count_high_F))
        arrays = [np.array([*sizes, width], np.int64), *self._arrays()]
        return [np.ascontiguousarray(array).data for array in arrays if len(array)]

    @classmethod
    def from_bytes(cls, blob: bytes) -> PackedCells:
        """Undo :meth:`buffers`; the arrays are views of ``blob``."""
        *sizes, width = np.frombuffer(blob, np.int64, 5).tolist()
        length = dict(zip("NMEF", sizes, strict=True))
        dtypes = _DTYPES | ({"barcode_N": np.dtype(f"S{width}")} if width else {})
        offset, columns = 5 * 8, {}
        for name, dtype in dtypes.items():
            columns[name] = np.frombuffer(blob, dtype, length[name[-1]], offset)
            offset += columns[name].nbytes
        if offset != len(blob):
            raise StoreError(f"{len(blob)} bytes of cells, their head says {offset}")
        return cls(**columns)


_DTYPES: dict[str, np.dtype[Any]] = {
    "ordinal_N": np.dtype(np.uint64),
    "condition_N": np.dtype(np.int32),
    "library_N": np.dtype(np.uint32),
    "batch_N": np.dtype(np.uint16),
    "num_nonzero_N": np.dtype(np.uint16),
    "num_gap_high_N": np.dtype(np.uint16),
    "num_count_high_N": np.dtype(np.uint16),
    "gap_place_E": np.dtype(np.uint16),
    "gap_high_E": np.dtype(np.uint16),
    "count_place_F": np.dtype(np.uint16),
    "count_high_F": np.dtype(np.uint16),
    "gap_M": np.dtype(np.uint8),
    "count_M": np.dtype(np.uint8),
}
"""By falling item size, so that each array is aligned behind the one before."""
_PER_CELL = tuple(name for name in _DTYPES if name.endswith("_N"))
_STREAMS = {
    "num_nonzero_N": ("gap_M", "count_M"),
    "num_gap_high_N": ("gap_place_E", "gap_high_E"),
    "num_count_high_N": ("count_place_F", "count_high_F"),
}
"""Where cells say how many entries they have in a stream, and these streams."""
