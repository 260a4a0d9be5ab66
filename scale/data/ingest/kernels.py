"""Loops over stored values that ``prepare`` runs for every value of its input, compiled.

Each does in one pass over memory what NumPy does in five to ten. They know nothing of files and
messages: a status and a position are returned, and the caller says what is wrong there.

Shapes: N = cells of a block, R = rows of it that are wanted, M = stored values, G = genes of the
file, E = gap exceptions, F = count exceptions,
K = stored values of one row, S = those of them that are stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scale.data.codec import compiled
from scale.data.csr import LARGEST_ROW

UNSORTED = -2
"""Answer of :func:`find_duplicate` for rows whose order it cannot use."""
SOUND, NO_COUNT, NOT_ASCENDING, NO_GENE, TOO_LONG = 0, 1, 2, 3, 4
"""Answers of :func:`check_rows` and :func:`pack_rows`."""
ALL_GENES, ASCENDING, MIXED = 0, 1, 2
"""Order of the stored columns: those of the file, some of them in its order, in another one."""


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
def _sum_row(
    indices_K: npt.NDArray[Any], data_K: npt.NDArray[Any], largest: int, num_genes: int
) -> tuple[int, np.int64, int]:
    """Return status, total and number of stored zeros of one row.

    Nothing is decided inside the loops, so that each step does eight values: 0.4 ns per value, as
    against 1.9 ns with a way out. What is not finite never equals a whole number.
    """
    bad, zeros, total = 0, 0, np.int64(0)
    for k in range(len(data_K)):
        count = np.int32(data_K[k])
        bad += (np.float64(count) != data_K[k]) | (count < 0) | (count > largest)
        zeros += count == 0
        total += count
    if bad:
        return NO_COUNT, total, zeros
    for k in range(1, len(indices_K)):
        bad += indices_K[k] <= indices_K[k - 1]
    if bad:
        return NOT_ASCENDING, total, zeros
    if len(indices_K) and (indices_K[0] < 0 or indices_K[-1] >= num_genes):
        return NO_GENE, total, zeros
    return SOUND, total, zeros


@compiled
def check_rows(
    row_R: npt.NDArray[np.int64],
    indptr: npt.NDArray[Any],
    indices_M: npt.NDArray[Any],
    data_M: npt.NDArray[Any],
    largest: int,
    num_genes: int,
    total_R: npt.NDArray[np.int64],
) -> int:
    """Fill the totals of rows of counts; return a status, ``SOUND`` if they are rows of counts."""
    for r in range(len(row_R)):
        first, last = indptr[row_R[r]], indptr[row_R[r] + 1]
        indices_K, data_K = indices_M[first:last], data_M[first:last]
        status, total_R[r], _ = _sum_row(indices_K, data_K, largest, num_genes)
        if status != SOUND:
            return status
    return SOUND


@compiled
def pack_rows(
    row_R: npt.NDArray[np.int64],
    indptr: npt.NDArray[Any],
    indices_M: npt.NDArray[Any],
    data_M: npt.NDArray[Any],
    largest: int,
    target_G: npt.NDArray[np.int32],
    order: int,
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
) -> tuple[int, int, int, int]:
    """Check rows, sum them over all genes and write those with a target as byte streams.

    ``target_G`` is the stored column of each gene of the file, -1 = not stored; ``order`` says how
    these columns go: ``ALL_GENES``, ``ASCENDING`` or ``MIXED``. Returns a status, and how many
    values, gap and count exceptions were written.
    """
    column_S = np.empty(len(target_G), np.int32)
    count_S = np.empty(len(target_G), np.int32)
    pair_S = np.empty(len(target_G), np.int64)
    end, end_gap, end_count = 0, 0, 0
    for r in range(len(row_R)):
        first, last = indptr[row_R[r]], indptr[row_R[r] + 1]
        indices_K, data_K = indices_M[first:last], data_M[first:last]
        status, total_R[r], zeros = _sum_row(indices_K, data_K, largest, len(target_G))
        if status != SOUND:
            return status, end, end_gap, end_count
        size = last - first
        if order == ALL_GENES and zeros == 0:
            for k in range(len(indices_K)):
                column_S[k] = indices_K[k]
                count_S[k] = np.int32(data_K[k])
        else:
            size = _choose(indices_K, data_K, target_G, column_S, count_S)
        if size > LARGEST_ROW:
            return TOO_LONG, end, end_gap, end_count
        if order == MIXED:
            for k in range(size):  # columns differ: the order of the pairs is that of the columns
                pair_S[k] = np.int64(column_S[k]) << 32 | np.int64(count_S[k])
            pair_S[:size].sort()
            for k in range(size):
                column_S[k] = pair_S[k] >> 32
                count_S[k] = pair_S[k] & 0xFFFFFFFF
        num_high = _write_low(
            column_S[:size], count_S[:size], gap_M[end : end + size], count_M[end : end + size]
        )
        first_gap, first_count = end_gap, end_count
        if num_high:
            before = np.int64(-1)
            for k in range(size):
                gap, less = column_S[k] - before - 1, count_S[k] - 1
                before = np.int64(column_S[k])
                if gap > 255:
                    gap_place_E[end_gap] = k
                    gap_high_E[end_gap] = gap >> 8
                    end_gap += 1
                if less > 255:
                    count_place_F[end_count] = k
                    count_high_F[end_count] = less >> 8
                    end_count += 1
        end += size
        size_R[r] = size
        num_gap_high_R[r] = end_gap - first_gap
        num_count_high_R[r] = end_count - first_count
    return SOUND, end, end_gap, end_count


@compiled
def _choose(
    indices_K: npt.NDArray[Any],
    data_K: npt.NDArray[Any],
    target_G: npt.NDArray[np.int32],
    column_S: npt.NDArray[np.int32],
    count_S: npt.NDArray[np.int32],
) -> int:
    """Write column and count of the entries that are stored; return how many they are."""
    size = 0
    for k in range(len(indices_K)):
        target = target_G[indices_K[k]]
        if target >= 0 and data_K[k] != 0:
            column_S[size] = target
            count_S[size] = np.int32(data_K[k])
            size += 1
    return size


@compiled
def _write_low(
    column_S: npt.NDArray[np.int32],
    count_S: npt.NDArray[np.int32],
    gap_S: npt.NDArray[np.uint8],
    less_S: npt.NDArray[np.uint8],
) -> int:
    """Write the low bytes of gaps and counts; return how many do not fit."""
    num_high = 0
    if len(column_S):
        gap_S[0] = column_S[0] & 255
        num_high += column_S[0] > 255
    for k in range(1, len(column_S)):
        gap = column_S[k] - column_S[k - 1] - 1
        gap_S[k] = gap & 255
        num_high += gap > 255
    for k in range(len(count_S)):
        less = count_S[k] - 1
        less_S[k] = less & 255
        num_high += less > 255
    return num_high


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
