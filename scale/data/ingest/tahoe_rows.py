"""The lists of tokens and values of Tahoe-100M's rows, turned into rows of a count matrix.

Every entry of the input passes here, so lists are taken as flat arrays with offsets and go through
one compiled loop, batch by batch, while the decoded batch is still in the processor's cache.

Shapes: N = rows of a batch, L = entries of their lists, M = counts without the markers, G = genes,
T = tokens up to the largest, P = rows + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from scale.data.codec import compiled
from scale.data.csr import row_pointer
from scale.data.ingest.tahoe_tables import TahoeTables
from scale.data.tahoe import FIRST_TOKEN
from scale.types import SourceError

TOKENS, VALUES = "genes", "expressions"
_BATCH_ROWS = 512
_SPARE = 1.25
"""Room for entries in a block, in units of the file's mean; rows of a sample are alike."""


@dataclass(frozen=True, slots=True)
class _Lists:
    """A column of lists: the items of all rows, and where each row's begin and end."""

    offset_P: npt.NDArray[Any]
    item_L: npt.NDArray[Any]

    def row(self, row: int) -> npt.NDArray[Any]:
        return self.item_L[self.offset_P[row] : self.offset_P[row + 1]]


class TokenRows:
    """The counts of a file by ranges of rows; ascending ranges are decoded once.

    Parameters
    ----------
    parquet
        The open file, with lists of tokens and of values.
    name
        Its name, for messages.
    tables
        Which gene a token stands for.
    """

    def __init__(self, parquet: pq.ParquetFile, name: str, tables: TahoeTables) -> None:
        self._parquet = parquet
        self._name = name
        self._tables = tables
        self.dtype = np.dtype(parquet.schema_arrow.field(VALUES).type.value_type.to_pandas_dtype())
        groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
        self._start_P = row_pointer(np.array([group.num_rows for group in groups], np.int64))
        self.num_values = sum(_num_values(group) for group in groups)
        """Values in the file, markers included."""
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        self._at = -1
        """Row that is decoded next; -1 = none yet."""

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Return rows ``start`` to ``stop``, with ascending columns and the values as they are.

        Raises
        ------
        SourceError
            If a row is no list of known gene tokens, each once, with a whole number above 0.
        """
        indptr = np.zeros(stop - start + 1, dtype=np.int64)
        capacity = int(_SPARE * (stop - start) * self.num_values / self._start_P[-1])
        indices_M, values_M = np.empty(capacity, np.int32), np.empty(capacity, self.dtype)
        row = 0
        for batch in self._pieces(start, stop):
            tokens, values = (self._lists(batch, name, start + row) for name in (TOKENS, VALUES))
            needed = int(indptr[row]) + len(tokens.item_L)
            if needed > len(indices_M):
                indices_M, values_M = _grown(indices_M, needed), _grown(values_M, needed)
            faulty = _read_rows(
                *(tokens.offset_P, tokens.item_L, values.offset_P, values.item_L),
                *(self._tables.column_T, indptr[row:], indices_M, values_M),
            )
            if faulty >= 0:
                self._refuse(start + row + faulty, tokens.row(faulty), values.row(faulty))
            row += batch.num_rows
        end = int(indptr[-1])
        shape = (stop - start, len(self._tables.symbols))
        return sp.csr_matrix((values_M[:end], indices_M[:end], indptr), shape=shape)

    # --- decoding -------------------------------------------------------------------------------

    def _pieces(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a range; goes on where the range before ended."""
        group = self._group_of(start)
        if not self._start_P[group] <= self._at <= start:
            self._at, self._rest = int(self._start_P[group]), None
            self._batches = _decode(self._parquet, range(group, len(self._start_P) - 1))
        for end in (start, stop):
            while self._at < end:
                piece = self._next(end - self._at)
                self._at += piece.num_rows
                if end == stop:
                    yield piece

    def _next(self, num_rows: int) -> pa.RecordBatch:
        """Return the next rows, ``num_rows`` at most."""
        while not self._rest:
            try:
                self._rest = next(self._batches)
            except StopIteration:
                raise SourceError(
                    f"{self._name} ends after {self._at} rows; its footer says "
                    f"{self._start_P[-1]}. The file is damaged, fetch it again"
                ) from None
            except (pa.ArrowException, OSError) as error:
                raise SourceError(
                    f"{self._name}: rows from {self._at} on (row group {self._group_of(self._at)}) "
                    f"cannot be read ({error}); the file is damaged, fetch it again"
                ) from error
        piece, self._rest = self._rest.slice(0, num_rows), self._rest.slice(num_rows)
        return piece

    def _lists(self, batch: pa.RecordBatch, name: str, first_row: int) -> _Lists:
        column = batch.column(name)
        offset_P = column.offsets.to_numpy().astype(np.int64)
        items = column.values.slice(offset_P[0], offset_P[-1] - offset_P[0])
        offset_P = offset_P - offset_P[0]
        if column.null_count or items.null_count:
            is_null_N = column.is_null().to_numpy(zero_copy_only=False)
            has_null_L = items.is_null().to_numpy(zero_copy_only=False)
            row = int(np.flatnonzero(is_null_N)[0]) if column.null_count else len(is_null_N)
            if items.null_count:
                at = np.flatnonzero(has_null_L)[0]
                row = min(row, int(np.searchsorted(offset_P, at, side="right")) - 1)
            raise SourceError(
                f"{self._place(first_row + row)}: {name} is missing or has a missing entry (null); "
                "expected a list of numbers"
            )
        return _Lists(offset_P, items.to_numpy())

    # --- what is wrong with a row ---------------------------------------------------------------

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._start_P, row, side="right")) - 1

    def _place(self, row: int) -> str:
        return f"{self._name}: row group {self._group_of(row)}, row {row}"

    def _refuse(self, row: int, token_L: npt.NDArray[Any], value_L: npt.NDArray[Any]) -> NoReturn:
        """Raise the error for a row that :func:`_read_rows` could not use."""
        place = self._place(row)
        if len(token_L) != len(value_L):
            raise SourceError(
                f"{place}: {len(token_L):,} {TOKENS} but {len(value_L):,} {VALUES}; "
                "expected lists of one length"
            )
        column_T, is_gene_L = self._tables.column_T, token_L >= FIRST_TOKEN
        for at in np.flatnonzero(~is_gene_L & ~(value_L < 0)).tolist():
            raise SourceError(
                f"{place}: entry {at} has token {token_L[at]} with value {value_L[at]:g}; tokens "
                f"below {FIRST_TOKEN} are markers and have a value below 0"
            )
        is_known_L = token_L < len(column_T)
        is_known_L[is_known_L] = column_T[token_L[is_known_L]] >= 0
        for at in np.flatnonzero(is_gene_L & ~is_known_L).tolist():
            raise SourceError(
                f"{place}: entry {at} has token {token_L[at]}, which is no gene; "
                f"{self._tables.folder}/gene_metadata.parquet has {len(self._tables.symbols):,} "
                f"tokens from {FIRST_TOKEN} to {len(column_T) - 1}. Set source.metadata"
            )
        symbols = self._tables.symbols
        is_count_L = (value_L > 0) & (np.floor(value_L) == value_L)
        for at in np.flatnonzero(is_gene_L & ~is_count_L).tolist():
            raise SourceError(
                f"{place}: gene {symbols[column_T[token_L[at]]]!r} (token {token_L[at]}) has value "
                f"{value_L[at]:g}; expected counts, whole numbers above 0"
            )
        tokens, times = np.unique(token_L[is_gene_L], return_counts=True)
        token = int(tokens[times > 1][0])
        raise SourceError(
            f"{place}: gene {symbols[column_T[token]]!r} (token {token}) stands more than once; "
            "expected each gene once"
        )


def _decode(parquet: pq.ParquetFile, groups: range) -> Iterator[pa.RecordBatch]:
    """Yield the lists of row groups; one by one, so that no batch reaches into the next group."""
    for group in groups:
        yield from parquet.iter_batches(
            _BATCH_ROWS,
            row_groups=[group],
            columns=[TOKENS, VALUES],
            use_threads=False,  # prepare has a process per core
        )


def _num_values(group: pq.RowGroupMetaData) -> int:
    """Return how many values a row group has, from its footer."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    return int(next(c.num_values for c in chunks if c.path_in_schema.split(".")[0] == VALUES))


def _grown(array_M: npt.NDArray[Any], needed: int) -> npt.NDArray[Any]:
    larger_M = np.empty(2 * needed, array_M.dtype)
    larger_M[: len(array_M)] = array_M
    return larger_M


@compiled
def _ascends(token_L: npt.NDArray[Any]) -> bool:
    """Return whether every token is larger than the one before it."""
    is_larger = True
    for i in range(1, len(token_L)):
        is_larger &= bool(token_L[i] > token_L[i - 1])
    return is_larger


@compiled
def _copy_row(
    token_M: npt.NDArray[Any],
    value_M: npt.NDArray[Any],
    column_T: npt.NDArray[np.int32],
    index_M: npt.NDArray[np.int32],
    into_M: npt.NDArray[Any],
) -> bool:
    """Write a row without markers; return False if it is no row of counts.

    Each loop does one thing without a branch, so that it becomes vector instructions: half the time
    of a single loop.
    """
    if len(token_M) == 0:
        return True
    is_sound = _ascends(token_M) and bool(token_M[-1] < len(column_T))
    for i in range(len(value_M)):
        is_sound &= bool(value_M[i] > 0) & bool(np.floor(value_M[i]) == value_M[i])
    if not is_sound:
        return False
    for i in range(len(token_M)):
        column = column_T[token_M[i]]
        is_sound &= bool(column >= 0)
        index_M[i] = column
    into_M[:] = value_M
    return is_sound


@compiled
def _read_rows(
    token_offset_P: npt.NDArray[Any],
    token_L: npt.NDArray[Any],
    value_offset_P: npt.NDArray[Any],
    value_L: npt.NDArray[Any],
    column_T: npt.NDArray[np.int32],
    indptr: npt.NDArray[np.int64],
    indices_M: npt.NDArray[np.int32],
    values_M: npt.NDArray[Any],
) -> int:
    """Append rows to a matrix of which ``indptr[0]`` entries are there; return a faulty row or -1.

    Markers are dropped and the columns of a row sorted.
    """
    end = indptr[0]
    for row in range(len(token_offset_P) - 1):
        row_token_L = token_L[token_offset_P[row] : token_offset_P[row + 1]]
        row_value_L = value_L[value_offset_P[row] : value_offset_P[row + 1]]
        if len(row_token_L) != len(row_value_L):
            return row
        if not _ascends(row_token_L):
            order = np.argsort(row_token_L)
            row_token_L, row_value_L = row_token_L[order], row_value_L[order]
        first = 0
        while first < len(row_token_L) and row_token_L[first] < FIRST_TOKEN:
            if not row_value_L[first] < 0:
                return row
            first += 1
        num = len(row_token_L) - first
        is_sound = _copy_row(
            *(row_token_L[first:], row_value_L[first:], column_T),
            *(indices_M[end : end + num], values_M[end : end + num]),
        )
        if not is_sound:
            return row
        end += num
        indptr[row + 1] = end
    return -1
