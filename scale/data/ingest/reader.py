"""A piece of an input file as blocks of checked cells: counts, totals, condition, batch.

What is left out on the way is counted by reason. Nothing here depends on how the input is cut into
pieces and blocks.

Shapes: N = cells of a file, R = cells of a block that are wanted, G = genes of the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from scale.data.csr import LARGEST_ROW
from scale.data.ingest.counts import MAX_COUNT, CountsPlace, check_counts, recover_counts
from scale.data.ingest.kernels import (
    ALL_GENES,
    ASCENDING,
    MIXED,
    NO_COUNT,
    NO_GENE,
    NOT_ASCENDING,
    SOUND,
    TOO_LONG,
    check_rows,
    pack_rows,
)
from scale.data.ingest.opened import opened
from scale.data.ingest.packing import PackedCells
from scale.data.ingest.source import Source
from scale.types import SourceError

EMPTY_LIBRARY = "no counts"
NOT_RECOVERED = "counts not recovered"
MAX_LIBRARY = 2**32 - 1
"""Largest total that a store holds."""
BLOCK_BYTES = 64 << 20
"""A block is read with its copies in about so much memory."""
LABEL_DTYPE = np.dtype([("condition", "<i4"), ("batch", "<u2"), ("library", "<f8")])
"""What is known of a cell before its counts are read: ``library`` is NaN without a column."""

Columns = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FileLook:
    """What the first look at a file found.

    Parameters
    ----------
    name, num_cells
        The file.
    place
        Where its counts are.
    column_G
        Position in the file of each gene of the vocabulary; None = the same order.
    num_nonzero
        Non-zeros per cell, about.
    is_whole
        The matrix can only be read as a whole (CSC).
    """

    name: str
    num_cells: int
    place: CountsPlace
    column_G: npt.NDArray[np.int32] | None
    num_nonzero: float
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """Cells of one file that one task reads.

    Parameters
    ----------
    number
        Of the piece.
    file, source, look
        Number of the file, the file, and what is known of it.
    start, stop
        Rows.
    first_ordinal
        Number in the whole source of the first cell of the file.
    """

    number: int
    file: int
    source: Source
    look: FileLook
    start: int
    stop: int
    first_ordinal: int


@dataclass(frozen=True, slots=True)
class Block:
    """Wanted cells of some rows.

    Parameters
    ----------
    row_R, at_R
        Their rows in the file and in ``matrix``.
    matrix
        Values that are to be counts, not checked yet.
    given_R
        Total counts from a column, or None.
    is_exact_R
        Cells whose counts are known; False where they could not be recovered.
    """

    row_R: Columns
    at_R: Columns
    matrix: sp.csr_matrix
    given_R: Floats | None
    is_exact_R: npt.NDArray[np.bool_]


class PieceReader:
    """Reads the wanted cells of a piece.

    Parameters
    ----------
    piece
        What is read.
    labels_N
        ``LABEL_DTYPE`` of the piece's cells.
    is_wanted_C
        Per condition, whether its cells are wanted.
    library_column
        Name of the column of total counts, for messages; None = there is none.
    block_cells
        Most cells of a block.
    """

    def __init__(
        self,
        piece: Piece,
        labels_N: npt.NDArray[np.void],
        is_wanted_C: npt.NDArray[np.bool_],
        *,
        library_column: str | None,
        block_cells: int,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        """Wanted cells left out so far, by reason."""
        self.num_tried = 0
        """Wanted cells so far."""
        self._piece = piece
        self._file = opened(piece.source)
        self._location = piece.look.place.location
        self._labels_N = labels_N
        self._library_column = library_column
        self._is_wanted_N = np.append(is_wanted_C, False)[labels_N["condition"]]
        info = self._file.matrix(self._location)
        bytes_per_cell = max(1, info.num_bytes // self._file.num_cells) * 4  # with its copies
        self._block_cells = max(1, min(block_cells, BLOCK_BYTES // bytes_per_cell))

    def totals(self, report: Callable[[int], None]) -> Iterator[tuple[sp.csr_matrix, Columns]]:
        """Yield checked cells, genes in the order of the vocabulary, and their total counts."""
        column_G = self._piece.look.column_G
        target = None if column_G is None else np.argsort(column_G).astype(np.int32)
        for block in self._blocks(report):
            total_R = np.empty(len(block.row_R), np.int64)
            checked = self._checked(block, partial(_sum_rows, total_R))
            used = self._used(checked, total_R)
            matrix = checked.matrix
            if len(used) < matrix.shape[0]:
                matrix = matrix[checked.at_R[used]]
            if target is not None:
                parts = (matrix.data, target[matrix.indices], matrix.indptr)
                matrix = sp.csr_matrix(parts, shape=matrix.shape)
            yield matrix, self._library(checked, total_R)[used]

    def cells(
        self, target_G: npt.NDArray[np.int32], report: Callable[[int], None]
    ) -> Iterator[PackedCells]:
        """Yield checked and packed cells.

        Parameters
        ----------
        target_G
            Stored column of each gene of the FILE; -1 = not stored.
        report
            Called with the cells that have been read since it last was.
        """
        packer = _Packer(target_G)
        for block in self._blocks(report):
            checked = self._checked(block, packer.pack)
            used = self._used(checked, packer.total_R)
            labels_R = self._labels_N[checked.row_R - self._piece.start]
            cells = packer.cells(
                (checked.row_R + self._piece.first_ordinal).astype(np.uint64),
                labels_R["condition"],
                self._library(checked, packer.total_R).astype(np.uint32),
                labels_R["batch"],
            )
            yield cells if len(used) == cells.num_cells else cells.take(used)

    # --- one block ------------------------------------------------------------------------------

    def _blocks(self, report: Callable[[int], None]) -> Iterator[Block]:
        piece, place = self._piece, self._piece.look.place
        for start in range(piece.start, piece.stop, self._block_cells):
            stop = min(start + self._block_cells, piece.stop)
            at_R = np.flatnonzero(self._is_wanted_N[start - piece.start : stop - piece.start])
            row_R = start + at_R
            self.num_tried += len(row_R)
            if len(row_R):
                matrix = self._file.rows(self._location, start, stop)
                given_R = self._given_totals(row_R)
                is_exact_R = np.ones(len(row_R), dtype=bool)
                if place.is_recovered:
                    recovered = recover_counts(matrix[at_R], given_R, place.target_sum)
                    matrix, is_exact_R = recovered.counts, recovered.is_exact_N
                    at_R = np.arange(len(row_R))
                yield Block(row_R, at_R, matrix, given_R, is_exact_R)
            report(stop - start)

    def _checked(self, block: Block, run: Callable[[Block], int]) -> Block:
        """Return a block for which ``run`` finds nothing to complain of; raise if there is none."""
        status = run(block)
        if status in (NO_COUNT, NOT_ASCENDING):
            # Tells what is wrong, or sorts the rows.
            matrix = check_counts(self._file, self._location, block.row_R, block.matrix[block.at_R])
            block = replace(block, matrix=matrix, at_R=np.arange(len(block.row_R)))
            status = run(block)
        if status == NO_GENE:
            indices_M = block.matrix.indices
            raise SourceError(
                f"{self._file.name}: {self._location} has impossible indices in the rows from "
                f"{block.row_R[0]} on ({indices_M.min()} to {indices_M.max()}); expected columns 0 "
                f"to {block.matrix.shape[1] - 1}"
            )
        if status == TOO_LONG:
            size_R = np.diff(block.matrix.indptr)[block.at_R]
            row = block.row_R[int(np.argmax(size_R))]
            raise SourceError(
                f"{self._file.name}: {self._location}, row {row} has counts of more than "
                f"{LARGEST_ROW:,} genes; a store holds no more of a cell. Cut the genes"
            )
        assert status == SOUND
        return block

    def _used(self, block: Block, total_R: Columns) -> Columns:
        """Return which cells are kept, and count the others."""
        has_counts_R = self._library(block, total_R) > 0
        self.dropped[NOT_RECOVERED] += int((~block.is_exact_R).sum())
        self.dropped[EMPTY_LIBRARY] += int((block.is_exact_R & ~has_counts_R).sum())
        return np.flatnonzero(block.is_exact_R & has_counts_R)

    def _library(self, block: Block, total_R: Columns) -> Columns:
        """Return total counts: over all genes of the matrix, or as a column gives them."""
        given_R = block.given_R
        if given_R is None:
            if (total_R > MAX_LIBRARY).any():
                row = block.row_R[int(np.argmax(total_R))]
                raise SourceError(
                    f"{self._file.name}: row {row} has {total_R.max():,} counts; a store holds up "
                    f"to {MAX_LIBRARY:,} of a cell"
                )
            return total_R
        bad = np.flatnonzero((given_R < total_R) & (given_R > 0))
        if len(bad):
            raise SourceError(
                f"{self._file.name}: columns.library is {given_R[bad[0]]:g} in row "
                f"{block.row_R[bad[0]]}, whose genes alone have {total_R[bad[0]]:,} counts; "
                "expected total counts over all genes"
            )
        return given_R.astype(np.int64)

    def _given_totals(self, row_R: Columns) -> Floats | None:
        """Return the library column for some rows, checked."""
        if self._library_column is None:
            return None
        given_R = self._labels_N["library"][row_R - self._piece.start]
        bad = np.flatnonzero(~np.isfinite(given_R) | (given_R < 0) | (given_R > MAX_LIBRARY))
        if len(bad):
            raise SourceError(
                f"{self._file.name}: column {self._library_column!r} (columns.library) is "
                f"{given_R[bad[0]]:g} in row {row_R[bad[0]]}; expected total counts"
            )
        return np.asarray(given_R)


def _sum_rows(total_R: Columns, block: Block) -> int:
    """Check the rows of a block and fill in their totals; return a status."""
    matrix = block.matrix
    values = _plain(matrix)
    sizes = (MAX_COUNT, matrix.shape[1])
    return int(check_rows(block.at_R, matrix.indptr, matrix.indices, values, *sizes, total_R))


class _Packer:
    """Turns blocks into packed cells; its arrays are those of the latest block."""

    def __init__(self, target_G: npt.NDArray[np.int32]) -> None:
        self.total_R = np.empty(0, np.int64)
        self._target_G = target_G
        if np.array_equal(target_G, np.arange(len(target_G))):
            self._order = ALL_GENES
        else:
            is_ascending = bool((np.diff(target_G[target_G >= 0]) > 0).all())
            self._order = ASCENDING if is_ascending else MIXED

    def pack(self, block: Block) -> int:
        """Write the streams of a block; return a status."""
        matrix = block.matrix
        num_cells, num_values = len(block.at_R), len(matrix.data)
        self.total_R = np.empty(num_cells, np.int64)
        # Room for the worst case; memory that nobody writes to is never taken.
        self._arrays: dict[str, npt.NDArray[Any]] = {
            "num_nonzero_N": np.empty(num_cells, np.uint16),
            "num_gap_high_N": np.empty(num_cells, np.uint16),
            "num_count_high_N": np.empty(num_cells, np.uint16),
            "gap_M": np.empty(num_values, np.uint8),
            "count_M": np.empty(num_values, np.uint8),
            "gap_place_E": np.empty(num_values, np.uint16),
            "gap_high_E": np.empty(num_values, np.uint16),
            "count_place_F": np.empty(num_values, np.uint16),
            "count_high_F": np.empty(num_values, np.uint16),
        }
        status, *ends = pack_rows(
            block.at_R,
            matrix.indptr,
            matrix.indices,
            _plain(matrix),
            MAX_COUNT,
            self._target_G,
            self._order,
            self.total_R,
            *self._arrays.values(),
        )
        self._ends = dict(zip("NMEF", (num_cells, *ends), strict=True))
        return int(status)

    def cells(
        self,
        ordinal_R: npt.NDArray[np.uint64],
        condition_R: npt.NDArray[np.int32],
        library_R: npt.NDArray[np.uint32],
        batch_R: npt.NDArray[np.uint16],
    ) -> PackedCells:
        """Return the cells of the latest block, in arrays of their own size."""
        streams: dict[str, Any] = {
            name: array[: self._ends[name[-1]]].copy() for name, array in self._arrays.items()
        }
        return PackedCells(
            ordinal_N=ordinal_R,
            condition_N=condition_R,
            library_N=library_R,
            batch_N=batch_R,
            **streams,
        )


def _plain(matrix: sp.csr_matrix) -> npt.NDArray[Any]:
    """Return the values in a type that compiled code knows."""
    values: npt.NDArray[Any] = matrix.data
    return values.astype(np.float32) if values.dtype == np.float16 else values
