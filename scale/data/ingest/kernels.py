"""Loops over stored values that ``prepare`` runs for every value of its input, compiled.

Each does in one pass over memory what NumPy does in five to ten. They know nothing of files and
messages: a status and a position are returned, and the caller says what is wrong there.

Shapes: N = cells of a block, R = rows of it that are wanted, M = stored values, G = genes of the
file, E = gap exceptions, F = count exceptions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scale.data.codec import compiled
from scale.data.csr import LARGEST_ROW

UNSORTED = -2
"""Answer of :func:`find_duplicate` for rows whose order it cannot use."""
SOUND, NO_COUNT, NOT_ASCENDING, TOO_LONG = 0, 1, 2, 3
"""Answers of :func:`check_rows` and :func:`pack_rows`."""


@compiled
def to_counts(data_M: npt.NDArray[Any], largest: float, count_M: npt.NDArray[np.uint32]) -> int:
    """Copy values as counts; return the position of the first that is none, or -1."""
    for i in range(len(data_M)):
        value = np.float64(data_M[i])
        if not (0.0 <= value <= largest) or value != np.floor(value):
            return i
        count_M[i] = np.uint32(value)
    return -1


@compiled
def find_duplicate(indptr: npt.NDArray[Any], indices_M: npt.NDArray[Any]) -> int:
    """Return the first entry whose column is that of the one before it in its row.

    -1 if there is none; ``UNSORTED`` if the columns of a row do not ascend.
    """
    for row in range(len(indptr) - 1):
        for i in range(indptr[row] + 1, indptr[row + 1]):
            if indices_M[i] < indices_M[i - 1]:
                return UNSORTED
            if indices_M[i] == indices_M[i - 1]:
                return i
    return -1


@compiled
def check_rows(
    row_R: npt.NDArray[np.int64],
    indptr: npt.NDArray[Any],
    indices_M: npt.NDArray[Any],
    data_M: npt.NDArray[Any],
    largest: float,
    total_R: npt.NDArray[np.int64],
) -> int:
    """Fill the totals of rows of counts; return a status, ``SOUND`` if they are rows of counts."""
    for r in range(len(row_R)):
        row = row_R[r]
        last = np.int64(-1)
        total = np.int64(0)
        for i in range(indptr[row], indptr[row + 1]):
            value = np.float64(data_M[i])
            if not (0.0 <= value <= largest) or value != np.floor(value):
                return NO_COUNT
            gene = np.int64(indices_M[i])
            if gene <= last:
                return NOT_ASCENDING
            last = gene
            total += np.int64(value)
        total_R[r] = total
    return SOUND


@compiled
def pack_rows(
    row_R: npt.NDArray[np.int64],
    indptr: npt.NDArray[Any],
    indices_M: npt.NDArray[Any],
    data_M: npt.NDArray[Any],
    largest: float,
    target_G: npt.NDArray[np.int32],
    is_ascending: bool,  # noqa: FBT001  numba compiles positional arguments
    total_R: npt.NDArray[np.int64],
    size_R: npt.NDArray[np.uint16],
    num_gap_high_R: npt.NDArray[np.uint16],
    num_count_high_R: npt.NDArray[np.uint16],
    gap_M: npt.NDArray[np.uint8],
    count_M: npt.NDArray[np.uint8],
    gap_place_E: npt.NDArray[np.uint16],
    gap_high_E: npt.NDArray[np.uint16],
    count_place_F: npt.NDArray[np.uint16],
    count_high_F: npt.NDArray[np.uint16],
) -> tuple[int, int, int, int, int]:
    """Check rows, sum them over all genes and write those with a target as byte streams.

    ``target_G`` is the stored column of each gene of the file, -1 = not stored; with
    ``is_ascending`` the columns keep the order of the file. Returns a status, the row it is about,
    and how many values, gap and count exceptions were written.
    """
    target_S = np.empty(len(target_G), np.int64)
    less_S = np.empty(len(target_G), np.int64)
    end, end_gap, end_count = 0, 0, 0
    for r in range(len(row_R)):
        row = row_R[r]
        last = np.int64(-1)
        total = np.int64(0)
        size = 0
        for i in range(indptr[row], indptr[row + 1]):
            value = np.float64(data_M[i])
            if not (0.0 <= value <= largest) or value != np.floor(value):
                return NO_COUNT, row, end, end_gap, end_count
            gene = np.int64(indices_M[i])
            if gene <= last:
                return NOT_ASCENDING, row, end, end_gap, end_count
            last = gene
            count = np.int64(value)
            total += count
            target = target_G[gene]
            if target >= 0 and count > 0:
                target_S[size] = target
                less_S[size] = count - 1
                size += 1
        if size > LARGEST_ROW:
            return TOO_LONG, row, end, end_gap, end_count
        if not is_ascending:
            order = np.argsort(target_S[:size])
            target_S[:size] = target_S[:size][order]
            less_S[:size] = less_S[:size][order]
        first_gap, first_count = end_gap, end_count
        before = np.int64(-1)
        for k in range(size):
            gap = target_S[k] - before - 1
            before = target_S[k]
            less = less_S[k]
            gap_M[end + k] = gap & 255
            count_M[end + k] = less & 255
            if gap > 255:
                gap_place_E[end_gap] = k
                gap_high_E[end_gap] = gap >> 8
                end_gap += 1
            if less > 255:
                count_place_F[end_count] = k
                count_high_F[end_count] = less >> 8
                end_count += 1
        end += size
        total_R[r] = total
        size_R[r] = size
        num_gap_high_R[r] = end_gap - first_gap
        num_count_high_R[r] = end_count - first_count
    return SOUND, -1, end, end_gap, end_count


@compiled
def gather(
    row_R: npt.NDArray[np.int64],
    start_N: npt.NDArray[np.int64],
    source: npt.NDArray[Any],
    out: npt.NDArray[Any],
) -> None:
    """Write the stretch of each row, from its start to the next row's, one after the other."""
    end = 0
    for r in range(len(row_R)):
        first, last = start_N[row_R[r]], start_N[row_R[r] + 1]
        size = last - first
        # Views, because only their indices are known not to be negative: a copy of 16 bytes a step.
        stretch, target = source[first:last], out[end : end + size]
        for k in range(size):
            target[k] = stretch[k]
        end += size


@compiled
def hash_texts(byte_NW: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each row of bytes, whatever zeros it is padded with (FNV-1a)."""
    hash_N = np.empty(byte_NW.shape[0], np.uint64)
    for row in range(byte_NW.shape[0]):
        value = np.uint64(0xCBF29CE484222325)
        for k in range(byte_NW.shape[1]):
            if byte_NW[row, k] != 0:
                value = (value ^ np.uint64(byte_NW[row, k])) * np.uint64(0x100000001B3)
        hash_N[row] = value
    return hash_N


@compiled
def unpad_texts(
    byte_NW: npt.NDArray[np.uint8], end_P: npt.NDArray[np.int32], out: npt.NDArray[np.uint8]
) -> int:
    """Write rows of bytes without the zeros behind them, and where each ends; return the end."""
    end = 0
    for row in range(byte_NW.shape[0]):
        size = byte_NW.shape[1]
        while size > 0 and byte_NW[row, size - 1] == 0:
            size -= 1
        for k in range(size):
            out[end + k] = byte_NW[row, k]
        end += size
        end_P[row + 1] = end
    return end
