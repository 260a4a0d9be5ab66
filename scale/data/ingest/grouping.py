"""Cells regrouped by condition and shuffled within it, in bounded memory.

A stream cut every 64 cells would make chunks of neighbours in the file: same well, same
sub-library. So all cells are gathered by condition first, and put in an order that depends on the
seed and the number of the cell in the source alone. What does not fit the memory goes to a spill
file, in runs sorted by condition; the cells that come out do not depend on how often that happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import zstandard

from scale.runtime import derive, mix64_array

_SHUFFLE = 0x5348
"""Word of the key that orders the cells of a condition."""
_COMPRESSION_LEVEL = 1


@dataclass(frozen=True, slots=True)
class GroupedCells:
    """Cells with their counts. N = cells.

    Parameters
    ----------
    condition_N, ordinal_N
        Number of the condition, and of the cell in the whole source.
    batch_N
        Number of the batch, -1 = none.
    library_N
        Total counts.
    counts
        N x stored genes, uint32 CSR with sorted rows.
    """

    condition_N: npt.NDArray[np.int32]
    ordinal_N: npt.NDArray[np.uint64]
    batch_N: npt.NDArray[np.int32]
    library_N: npt.NDArray[np.uint32]
    counts: sp.csr_matrix

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        matrix = (self.counts.data, self.counts.indices, self.counts.indptr)
        tables = (self.condition_N, self.ordinal_N, self.batch_N, self.library_N)
        return sum(array.nbytes for array in (*matrix, *tables))

    def take(self, rows: npt.NDArray[np.int64] | slice) -> GroupedCells:
        """Return some of the cells, in the order of ``rows``."""
        return GroupedCells(
            self.condition_N[rows],
            self.ordinal_N[rows],
            self.batch_N[rows],
            self.library_N[rows],
            self.counts[rows],
        )

    @classmethod
    def concatenate(cls, parts: list[GroupedCells]) -> GroupedCells:
        """Return the cells of all parts."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([p.condition_N for p in parts]),
            np.concatenate([p.ordinal_N for p in parts]),
            np.concatenate([p.batch_N for p in parts]),
            np.concatenate([p.library_N for p in parts]),
            sp.vstack([p.counts for p in parts], format="csr"),
        )


@dataclass(frozen=True, slots=True)
class _Run:
    """Part of the spill file that was written at once: one segment per condition in it."""

    condition_C: npt.NDArray[np.int32]
    offset_C: npt.NDArray[np.int64]
    """One entry more than conditions: the end of the last segment."""


class CellGroups:
    """Gathers blocks of cells and returns them condition by condition.

    Parameters
    ----------
    num_conditions, num_genes
        Sizes of the numbers that will come.
    seed
        Seed of the order of the cells within a condition.
    memory_bytes
        Cells are held up to this size; those beyond go to the spill file.
    spill_dir
        Folder for the spill file, which the caller removes.
    """

    def __init__(
        self,
        num_conditions: int,
        num_genes: int,
        *,
        seed: int,
        memory_bytes: int,
        spill_dir: Path,
    ) -> None:
        self.num_cells_C = np.zeros(num_conditions, dtype=np.int64)
        """Cells per condition so far."""
        self.spilled_bytes = 0
        self._num_genes = num_genes
        self._key = derive(seed, _SHUFFLE)
        self._memory_bytes = memory_bytes
        self._spill_dir = spill_dir
        self._held: list[GroupedCells] = []
        self._held_bytes = 0
        self._runs: list[_Run] = []

    def add(self, cells: GroupedCells) -> None:
        """Take a block of cells; every cell of the source may come once."""
        self.num_cells_C += np.bincount(cells.condition_N, minlength=len(self.num_cells_C))
        self._held.append(cells)
        self._held_bytes += cells.num_bytes
        if self._held_bytes > self._memory_bytes:
            self._spill()

    def read(self, conditions: npt.NDArray[np.int64]) -> Iterator[GroupedCells]:
        """Yield the cells of each of the ``conditions`` (ascending), in their final order."""
        if not self._runs:
            yield from self._read_held(conditions)
            return
        if self._held:
            self._spill()
        with self._spill_file.open("rb") as handle:
            for condition in conditions.tolist():
                parts = [self._read_segment(handle, run, condition) for run in self._runs]
                yield self._sorted(GroupedCells.concatenate([p for p in parts if p is not None]))

    def _read_held(self, conditions: npt.NDArray[np.int64]) -> Iterator[GroupedCells]:
        held = self._sorted(GroupedCells.concatenate(self._held))
        self._held = [held]
        for condition in conditions.tolist():
            first, last = np.searchsorted(held.condition_N, [condition, condition + 1]).tolist()
            yield held.take(slice(first, last))

    # --- order and spill ------------------------------------------------------------------------

    def _sorted(self, cells: GroupedCells) -> GroupedCells:
        """Return the cells by condition, and within it by a keyed hash of their number."""
        hash_N = mix64_array(cells.ordinal_N ^ np.uint64(self._key))
        return cells.take(np.lexsort((cells.ordinal_N, hash_N, cells.condition_N)))

    def _spill(self) -> None:
        """Append the held cells to the spill file, sorted by condition."""
        cells = GroupedCells.concatenate(self._held)
        self._held, self._held_bytes = [], 0
        cells = cells.take(np.argsort(cells.condition_N, kind="stable"))
        condition_C, first_C = np.unique(cells.condition_N, return_index=True)
        stop_C = [*first_C[1:].tolist(), len(cells.condition_N)]
        compressor = zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL)
        offsets = [self.spilled_bytes]
        with self._spill_file.open("ab") as handle:
            for first, stop in zip(first_C.tolist(), stop_C, strict=True):
                blob = compressor.compress(_pack(cells.take(slice(first, stop))))
                handle.write(blob)
                offsets.append(offsets[-1] + len(blob))
        self.spilled_bytes = offsets[-1]
        self._runs.append(_Run(condition_C, np.array(offsets, dtype=np.int64)))

    def _read_segment(self, handle: BinaryIO, run: _Run, condition: int) -> GroupedCells | None:
        at = int(np.searchsorted(run.condition_C, condition))
        if at == len(run.condition_C) or run.condition_C[at] != condition:
            return None
        first, last = run.offset_C[at : at + 2].tolist()
        handle.seek(first)
        blob = zstandard.ZstdDecompressor().decompress(handle.read(last - first))
        return _unpack(blob, condition, self._num_genes)

    @property
    def _spill_file(self) -> Path:
        return self._spill_dir / "cells.zst"


def _pack(cells: GroupedCells) -> bytes:
    """Return the cells of one condition as bytes."""
    counts = cells.counts
    head = np.array([len(cells.ordinal_N), len(counts.data)], dtype=np.int64)
    return b"".join(
        array.tobytes()
        for array in (
            head,
            cells.ordinal_N,
            np.diff(counts.indptr).astype(np.uint32),
            cells.batch_N,
            cells.library_N,
            counts.indices.astype(np.uint32),
            counts.data,
        )
    )


def _unpack(blob: bytes, condition: int, num_genes: int) -> GroupedCells:
    """Undo :func:`_pack`."""
    num_cells, num_stored = np.frombuffer(blob, np.int64, 2).tolist()
    offset = 16

    def read(dtype: type[np.generic], count: int) -> npt.NDArray[np.generic]:
        nonlocal offset
        array = np.frombuffer(blob, dtype, count, offset)
        offset += array.nbytes
        return array

    ordinal_N = read(np.uint64, num_cells)
    indptr = np.concatenate([[0], np.cumsum(read(np.uint32, num_cells), dtype=np.int64)])
    batch_N, library_N = read(np.int32, num_cells), read(np.uint32, num_cells)
    indices, data = read(np.uint32, num_stored).astype(np.int32), read(np.uint32, num_stored)
    return GroupedCells(
        np.full(num_cells, condition, dtype=np.int32),
        ordinal_N.astype(np.uint64),
        batch_N.astype(np.int32),
        library_N.astype(np.uint32),
        sp.csr_matrix((data, indices, indptr), shape=(num_cells, num_genes)),
    )
