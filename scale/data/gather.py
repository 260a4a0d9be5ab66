"""Single cells out of uncompressed chunks, joined into one compact batch.

All cells of a batch come through here. A control set takes a few rows of many chunks, which are
read in place from the mapped shards; the chunks of a treated set are expanded first. Compiled code
finds the rows where they lie and copies them: nothing is done per chunk in Python.

Chunks start at multiples of 8, so that a source can be indexed as 16- and 32-bit words.

Shapes: N = cells, K = what is known of the place of a cell, M = non-zeros, E and F = exceptions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scale.data.codec import compiled
from scale.data.compact import CompactCells, CompactSizes
from scale.data.csr import IntArray
from scale.types import StoreError

Source = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

_PLACES = 12
(
    _FIRST,  # entries of the chunk before the cell
    _SIZE,  # entries of the cell
    _GAP_POSITION,  # word of its first gap exception's position
    _GAP_HIGH,  # half word of its high part
    _NUM_GAP,
    _COUNT_POSITION,
    _COUNT_HIGH,
    _NUM_COUNT,
    _GAP_STREAM,  # byte of its first gap
    _COUNT_STREAM,
    _LIBRARY,
    _BATCH,
) = range(_PLACES)


@dataclass(frozen=True, slots=True)
class FoundCells:
    """Cells and where they lie, sorted by source.

    Parameters
    ----------
    sizes
        What a compact batch of them holds.
    """

    sizes: CompactSizes
    _sources: Sequence[Source]
    _bounds: list[int]
    _order_N: Indices | None
    _place_NK: npt.NDArray[np.int64]

    @property
    def batch_code_N(self) -> Indices:
        """Batch code of each cell in the order asked for; -1 where its chunk has none."""
        found_N = self._place_NK[:, _BATCH]
        if self._order_N is None:
            return found_N
        code_N = np.empty_like(found_N)
        code_N[self._order_N] = found_N
        return code_N

    def copy(self, slot_N: IntArray, *, out: CompactCells | None = None) -> CompactCells:
        """Return the cells as a compact batch.

        Parameters
        ----------
        slot_N
            Row of the decoded result that each cell goes to; all distinct.
        out
            Unfilled streams of :attr:`sizes` to write to; None = new ones.
        """
        compact = CompactCells.empty(self.sizes) if out is None else out
        streams = compact.streams()
        streams.slot_N.numpy()[...] = slot_N if self._order_N is None else slot_N[self._order_N]
        arrays = (
            streams.gap_M.numpy(),
            streams.count_M.numpy(),
            streams.gap_position_E.numpy(),
            streams.gap_high_E.numpy(),
            streams.count_position_F.numpy(),
            streams.count_high_F.numpy(),
        )
        library_N, num_nonzero_N = streams.library_N.numpy(), streams.num_nonzero_N.numpy()
        library_N[...] = self._place_NK[:, _LIBRARY]
        num_nonzero_N[...] = self._place_NK[:, _SIZE]
        done_3 = np.zeros(3, np.int64)
        for source, start, stop in zip(
            self._sources, self._bounds[:-1], self._bounds[1:], strict=True
        ):
            _copy(*_words(source), self._place_NK[start:stop], done_3, arrays)
        return compact


def find_cells(
    sources: Sequence[Source], source_N: Indices, start_N: Indices, row_N: Indices
) -> FoundCells:
    """Find single cells in uncompressed chunks.

    Parameters
    ----------
    sources
        Arrays of chunks that have been checked: mapped shards, or expanded chunks.
    source_N, start_N, row_N
        For each cell: index into ``sources``, byte at which its chunk starts, row in the chunk.

    Raises
    ------
    StoreError
        If a cell is in no uncompressed chunk.
    """
    order_N = None
    bounds = [0, len(row_N)]
    if len(sources) != 1:
        order_N = np.argsort(source_N, kind="stable")
        start_N, row_N = start_N[order_N], row_N[order_N]
        bounds = np.searchsorted(source_N[order_N], np.arange(len(sources) + 1)).tolist()
    place_NK = np.empty((len(row_N), _PLACES), np.int64)
    total_3 = np.zeros(3, np.int64)
    for source, start, stop in zip(sources, bounds[:-1], bounds[1:], strict=True):
        here = slice(start, stop)
        if not _place(*_words(source), start_N[here], row_N[here], place_NK[here], total_3):
            raise StoreError("row of a chunk that is compressed or has fewer cells")
    sizes = CompactSizes(len(row_N), *total_3.tolist())
    return FoundCells(sizes, sources, bounds, order_N, place_NK)


def _words(source: Source) -> tuple[Source, npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
    whole = source[: len(source) & -4]
    return source, whole.view(np.uint16), whole.view(np.uint32)


@compiled
def _place(
    source: Source,
    half_words: npt.NDArray[np.uint16],
    words: npt.NDArray[np.uint32],
    start_N: Indices,
    row_N: Indices,
    place_NK: npt.NDArray[np.int64],
    total_3: Indices,
) -> bool:
    """Find each cell in its chunk, and add to the totals; return whether all are there."""
    for i in range(row_N.size):
        start, row = start_N[i], row_N[i]
        if start < 0 or start & 7 or start + 32 > source.size:
            return False
        n = np.int64(half_words[start // 2 + 4])
        if source[start + 6] != 0 or row < 0 or row >= n:
            return False
        head = start // 4
        m, e, f = np.int64(words[head + 3]), np.int64(words[head + 4]), np.int64(words[head + 5])
        position = head + 8 + n
        size = 2 * (position + e + f)
        has_batch = np.int64(source[start + 7] & 1)
        high = size + n * (1 + has_batch)
        stream = 2 * (high + e + f)
        if stream + 2 * m > source.size:
            return False
        first = np.int64(0)
        for k in range(size, size + row):
            first += np.int64(half_words[k])
        num_entries = np.int64(half_words[size + row])
        place_NK[i, _BATCH] = half_words[size + n + row] if has_batch else -1
        gap, num_gap = _within(words, position, e, first, num_entries)
        count, num_count = _within(words, position + e, f, first, num_entries)
        place_NK[i, _FIRST], place_NK[i, _SIZE] = first, num_entries
        place_NK[i, _GAP_POSITION], place_NK[i, _GAP_HIGH] = position + gap, high + gap
        place_NK[i, _COUNT_POSITION] = position + e + count
        place_NK[i, _COUNT_HIGH] = high + e + count
        place_NK[i, _NUM_GAP], place_NK[i, _NUM_COUNT] = num_gap, num_count
        place_NK[i, _GAP_STREAM] = stream + first
        place_NK[i, _COUNT_STREAM] = stream + m + first
        place_NK[i, _LIBRARY] = words[head + 8 + row]
        total_3[0] += num_entries
        total_3[1] += num_gap
        total_3[2] += num_count
    return True


@compiled
def _within(
    words: npt.NDArray[np.uint32],
    begin: np.int64,
    length: np.int64,
    first: np.int64,
    num_entries: np.int64,
) -> tuple[np.int64, np.int64]:
    """Return the first of a list of positions that is in a cell, and how many are."""
    if length == 0:
        return length, length
    position = words[begin : begin + length]
    start = np.int64(np.searchsorted(position, first))
    stop = start
    while stop < length and position[stop] < first + num_entries:
        stop += 1
    return start, stop - start


@compiled
def _copy_bytes(target: Source, source: Source) -> None:
    """Copy without regard to overlap: ten times as fast as numba's assignment of a slice."""
    for k in range(target.size):
        target[k] = source[k]


@compiled
def _copy(
    source: Source,
    half_words: npt.NDArray[np.uint16],
    words: npt.NDArray[np.uint32],
    place_NK: npt.NDArray[np.int64],
    done_3: Indices,
    arrays: tuple[Any, ...],
) -> None:
    """Copy the cells behind what is done (entries, gap and count exceptions)."""
    gap_M, count_M, gap_position_E, gap_high_E, count_position_F, count_high_F = arrays
    to, next_gap, next_count = done_3[0], done_3[1], done_3[2]
    for i in range(len(place_NK)):
        size = place_NK[i, _SIZE]
        gap, count = place_NK[i, _GAP_STREAM], place_NK[i, _COUNT_STREAM]
        _copy_bytes(gap_M[to : to + size], source[gap : gap + size])
        _copy_bytes(count_M[to : to + size], source[count : count + size])
        moved = to - place_NK[i, _FIRST]
        for k in range(place_NK[i, _NUM_GAP]):
            gap_position_E[next_gap] = moved + words[place_NK[i, _GAP_POSITION] + k]
            gap_high_E[next_gap] = half_words[place_NK[i, _GAP_HIGH] + k]
            next_gap += 1
        for k in range(place_NK[i, _NUM_COUNT]):
            count_position_F[next_count] = moved + words[place_NK[i, _COUNT_POSITION] + k]
            count_high_F[next_count] = half_words[place_NK[i, _COUNT_HIGH] + k]
            next_count += 1
        to += size
    done_3[0], done_3[1], done_3[2] = to, next_gap, next_count
