"""Single cells out of mapped, uncompressed chunks: how control sets are drawn.

A control set takes a few rows of many chunks, so whole chunks are not parsed: compiled code finds
and copies the rows where they lie, about 1 microsecond per cell.

Shapes: N = cells, K = places of a cell in its chunk, M = non-zeros, E and F = exceptions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from scale.data.codec import compiled
from scale.data.compact import CompactCells
from scale.data.csr import IntArray
from scale.types import StoreError


def gather_rows(
    shards: Sequence[npt.NDArray[np.uint8]],
    shard_N: IntArray,
    offset_N: IntArray,
    row_N: IntArray,
    slot_N: IntArray,
    *,
    buffer: Tensor | None = None,
) -> CompactCells:
    """Join single cells that lie in mapped, uncompressed shards.

    Parameters
    ----------
    shards
        Mapped files whose chunks have been checked.
    shard_N, offset_N, row_N
        For each cell: index into ``shards``, byte offset of its chunk, row within the chunk.
    slot_N
        Row of the decoded result that each cell goes to.
    buffer
        Memory to write to; see :meth:`CompactCells.empty`.
    """
    order = np.argsort(shard_N, kind="stable")
    offset, row = offset_N[order].astype(np.int64), row_N[order].astype(np.int64)
    bounds = np.searchsorted(shard_N[order], np.arange(len(shards) + 1)).tolist()
    place_NK = np.zeros((len(row), _PLACES), dtype=np.int64)
    for shard, start, stop in zip(shards, bounds[:-1], bounds[1:], strict=True):
        if _place(shard, offset[start:stop], row[start:stop], place_NK[start:stop]) >= 0:
            raise StoreError("row of a chunk that is compressed or has fewer cells")
    _, m, _, e, _, f = place_NK.sum(axis=0).tolist()
    compact = CompactCells.empty(len(row), m, e, f, buffer=buffer)
    streams = compact.streams()
    streams.slot_N.numpy()[...] = slot_N[order]
    done = np.zeros(3, dtype=np.int64)
    for shard, start, stop in zip(shards, bounds[:-1], bounds[1:], strict=True):
        _copy(
            shard,
            offset[start:stop],
            row[start:stop],
            place_NK[start:stop],
            done,
            streams.library_N.numpy()[start:stop],
            streams.num_nonzero_N.numpy()[start:stop],
            streams.gap_M.numpy(),
            streams.count_M.numpy(),
            streams.gap_position_E.numpy(),
            streams.gap_high_E.numpy(),
            streams.count_position_F.numpy(),
            streams.count_high_F.numpy(),
        )
    return compact


_PLACES = 6  # first entry of a cell and their number: in the streams, in both lists of exceptions


@compiled
def _place(
    shard: npt.NDArray[np.uint8],
    offset_N: npt.NDArray[np.int64],
    row_N: npt.NDArray[np.int64],
    place_NK: npt.NDArray[np.int64],
) -> int:
    """Find each cell in its chunk; return -1, or the first cell that is not there."""
    for i in range(row_N.size):
        blob = shard[offset_N[i] :]
        n = np.int64(blob[8:10].view(np.uint16)[0])
        if row_N[i] < 0 or row_N[i] >= n or blob[6] != 0:
            return i
        sizes = blob[16:24].view(np.uint32)
        e, f = np.int64(sizes[0]), np.int64(sizes[1])
        lists = 32 + 4 * n
        position = blob[lists : lists + 4 * (e + f)].view(np.uint32)
        size = blob[lists + 4 * (e + f) : lists + 4 * (e + f) + 2 * n].view(np.uint16)
        start = np.int64(0)
        for row in range(row_N[i]):
            start += size[row]
        stop = start + size[row_N[i]]
        place_NK[i, 0], place_NK[i, 1] = start, stop - start
        place_NK[i, 2] = np.searchsorted(position[:e], start)
        place_NK[i, 3] = np.searchsorted(position[:e], stop) - place_NK[i, 2]
        place_NK[i, 4] = np.searchsorted(position[e:], start)
        place_NK[i, 5] = np.searchsorted(position[e:], stop) - place_NK[i, 4]
    return -1


@compiled
def _copy(
    shard: npt.NDArray[np.uint8],
    offset_N: npt.NDArray[np.int64],
    row_N: npt.NDArray[np.int64],
    place_NK: npt.NDArray[np.int64],
    done: npt.NDArray[np.int64],
    library_N: npt.NDArray[np.float32],
    num_nonzero_N: npt.NDArray[np.int32],
    gap_M: npt.NDArray[np.uint8],
    count_M: npt.NDArray[np.uint8],
    gap_position_E: npt.NDArray[np.int64],
    gap_high_E: npt.NDArray[np.int32],
    count_position_F: npt.NDArray[np.int64],
    count_high_F: npt.NDArray[np.int32],
) -> None:
    """Copy the cells behind what is ``done`` (entries, gap and count exceptions)."""
    for i in range(row_N.size):
        blob = shard[offset_N[i] :]
        n = np.int64(blob[8:10].view(np.uint16)[0])
        has_batch = np.int64(blob[7] & 1)
        head = blob[12:32].view(np.uint32)
        m, e, f = np.int64(head[0]), np.int64(head[1]), np.int64(head[2])
        position = blob[32 + 4 * n : 32 + 4 * (n + e + f)].view(np.uint32)
        short = 32 + 4 * (n + e + f) + 2 * n * (1 + has_batch)
        high = blob[short : short + 2 * (e + f)].view(np.uint16)
        start, size = place_NK[i, 0], place_NK[i, 1]
        stream = short + 2 * (e + f) + start
        to = done[0]
        library_N[i] = blob[32 + 4 * row_N[i] : 36 + 4 * row_N[i]].view(np.uint32)[0]
        num_nonzero_N[i] = size
        gap_M[to : to + size] = blob[stream : stream + size]
        count_M[to : to + size] = blob[stream + m : stream + m + size]
        for k in range(place_NK[i, 2], place_NK[i, 2] + place_NK[i, 3]):
            gap_position_E[done[1]] = to + position[k] - start
            gap_high_E[done[1]] = high[k]
            done[1] += 1
        for k in range(e + place_NK[i, 4], e + place_NK[i, 4] + place_NK[i, 5]):
            count_position_F[done[2]] = to + position[k] - start
            count_high_F[done[2]] = high[k]
            done[2] += 1
        done[0] += size
