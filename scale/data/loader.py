"""From the plan to batches on the device.

A reader turns set numbers into compact cells (as they are stored, a tenth of their dense size) and
those into a :class:`scale.types.Batch`. On a CPU both happen in the reader threads; with CUDA the
compact cells are pinned, copied and decoded on the device. The heavy calls (pread, crc32, zstd,
numba) free the interpreter lock, so that threads are enough: no worker processes, no pickling, no
shared memory.

Shapes: B = sets, S = cells per set, U = cells of the summary draw, G = genes, J = components,
N = cells of the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scale.data.codec import CHUNK_CELLS, CellChunk
from scale.data.compact import (
    CompactCells,
    Projection,
    compact_from_chunks,
    decode,
    decode_numba,
)
from scale.data.draws import Integers
from scale.data.prefetch import Prefetcher
from scale.data.sampler import SetBlock, SetPlan
from scale.data.store import CellSetStore
from scale.data.vocabulary import ConditionTable
from scale.types import Batch


@dataclass(frozen=True, slots=True)
class Normalisation:
    """How counts become values, and which genes they are of."""

    target_sum: float
    value_scale: float
    projection: Projection | None = None


@dataclass(frozen=True, slots=True)
class HostBatch:
    """A batch in host memory as it is stored, on its way to the device.

    Parameters
    ----------
    treated, control
        Cells of B sets of S slots, and of B sets of S slots followed by B sets of U slots.
    count_B3
        Treated, control and summary cells of each set.
    number_BK
        component (J columns), cell type, batch, is_control, condition, set number.
    dose_BJ
        See :class:`scale.types.Batch`.
    """

    treated: CompactCells
    control: CompactCells
    count_B3: Tensor
    number_BK: Tensor
    dose_BJ: Tensor


class SetReader:
    """Batches of a plan, read on call; safe to call from several threads.

    Parameters
    ----------
    store
        Open store.
    plan
        Which cells are in which set.
    table
        What a batch says of each condition.
    normalisation
        How counts become values.
    device
        Where batches are wanted.
    """

    def __init__(
        self,
        store: CellSetStore,
        plan: SetPlan,
        table: ConditionTable,
        normalisation: Normalisation,
        *,
        device: torch.device,
    ) -> None:
        self._store, self._plan, self._table = store, plan, table
        self._normalisation = normalisation
        self._device = device
        self._on_host = device.type == "cpu"
        self._first_chunk = store.conditions["first_chunk"].to_numpy(np.int64)
        self.was_read = np.zeros(len(store.chunks), np.bool_)
        """Chunks that cells were taken from so far."""
        self._running: weakref.WeakSet[Prefetcher[Integers, Any]] = weakref.WeakSet()

    def batch(self, set_index_B: Integers) -> Batch:
        """Return the batch of some sets, given by their number in the whole run."""
        return self.to_device(self.read(set_index_B))

    def batches(
        self, jobs: Iterator[Integers], *, num_threads: int, depth: int
    ) -> Generator[Batch, None, None]:
        """Yield the batch of each job, read ahead by threads.

        Closing the iterator, dropping it or an error ends the threads.
        """
        # on a CPU the threads decode too; on CUDA the consumer's stream does
        work: Callable[[Integers], Batch | HostBatch] = self.batch if self._on_host else self.read
        with Prefetcher(jobs, work, num_threads=num_threads, depth=depth) as ready:
            self._running.add(ready)
            for result in ready:
                yield result if isinstance(result, Batch) else self.to_device(result)

    def close(self) -> None:
        """End the threads of all iterators."""
        for prefetcher in list(self._running):
            prefetcher.close()

    # --- plan to host batch -----------------------------------------------------------------------

    def read(self, set_index_B: Integers) -> HostBatch:
        """Return some sets as they are stored; pinned where the device is CUDA."""
        if self._on_host:
            return self._read(set_index_B)
        # a thread starts on device 0, where pinning would open a context for every rank
        with torch.cuda.device(self._device):
            return self._read(set_index_B)

    def _read(self, set_index_B: Integers) -> HostBatch:
        block = self._plan.block(set_index_B)
        treated, codes = self._read_treated(block)
        for b, code_N in enumerate(codes):
            if code_N is not None:
                self._plan.match_batches(block, b, int(set_index_B[b]), code_N, self._store.batches)
        control = self._read_control(block)
        condition_B, table = block.condition_B, self._table
        number_BK = np.column_stack(
            [
                table.component[condition_B],
                table.cell_type[condition_B],
                table.batch[condition_B],
                block.is_control_B,
                condition_B,
                set_index_B,
            ]
        )
        counts = (block.treated_count_B, block.control_count_B, block.summary_count_B)
        small = [np.column_stack(counts), number_BK.astype(np.int64), table.dose[condition_B]]
        tensors = [torch.from_numpy(array) for array in small]
        if not self._on_host:
            tensors = [tensor.pin_memory() for tensor in tensors]
        return HostBatch(treated, control, *tensors)

    def _buffer(self, num_bytes: int) -> Tensor | None:
        if self._on_host:
            return None
        # torch keeps pinned blocks, and gives one out again only when its copy is done
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def _read_treated(
        self, block: SetBlock
    ) -> tuple[CompactCells, list[npt.NDArray[np.uint16] | None]]:
        """Return the treated cells, and for each set the batch codes where they must be matched."""
        set_N, place_N = np.nonzero(block.treated_row_BS >= 0)
        row_N = block.treated_row_BS[set_N, place_N]
        chunk_N = self._first_chunk[block.condition_B[set_N]] + row_N // CHUNK_CELLS
        slot_N = set_N * block.treated_row_BS.shape[1] + place_N
        turn_N = np.zeros_like(row_N)
        if self._plan.has_repeats:
            turn_N = _occurrence(set_N, row_N)
            order = np.lexsort((place_N, chunk_N, turn_N, set_N))
            set_N, row_N, chunk_N, slot_N, turn_N = (
                a[order] for a in (set_N, row_N, chunk_N, slot_N, turn_N)
            )
        # cells of a chunk stand side by side; a new run starts where one of these changes
        changes = [np.diff(a) != 0 for a in (chunk_N, set_N, turn_N)]
        begin = np.flatnonzero(np.logical_or.reduce(changes)) + 1
        chunks: list[CellChunk] = []
        known: dict[int, CellChunk] = {}
        for rows, chunk_id in zip(
            np.split(row_N % CHUNK_CELLS, begin), chunk_N[[0, *begin]].tolist(), strict=True
        ):
            if chunk_id not in known:
                known[chunk_id] = self._store.read_chunk(chunk_id)
            chunk = known[chunk_id]
            is_whole = len(rows) == chunk.num_cells and bool((np.diff(rows) == 1).all())
            chunks.append(chunk if is_whole else chunk.select_rows(rows))
        self.was_read[list(known)] = True
        num_bytes = CompactCells.size_bytes(
            len(slot_N),
            sum(c.num_nonzero for c in chunks),
            sum(len(c.gap_position_E) for c in chunks),
            sum(len(c.count_position_F) for c in chunks),
        )
        slots = np.split(slot_N, begin)
        cells = compact_from_chunks(chunks, slots, buffer=self._buffer(num_bytes))
        return cells, self._codes(block, chunks, set_N[[0, *begin]])

    def _codes(
        self, block: SetBlock, chunks: list[CellChunk], set_of_chunk: Integers
    ) -> list[npt.NDArray[np.uint16] | None]:
        codes: list[npt.NDArray[np.uint16] | None] = [None] * len(block.condition_B)
        for b in np.flatnonzero(self._plan.is_by_cell[block.condition_B]).tolist():
            own = [chunks[i].batch_code_N for i in np.flatnonzero(set_of_chunk == b).tolist()]
            known = [code_N for code_N in own if code_N is not None]
            codes[b] = np.concatenate(known) if len(known) == len(own) else None
        return codes

    def _read_control(self, block: SetBlock) -> CompactCells:
        is_control_BS, is_summary_BU = block.control_row_BS >= 0, block.summary_row_BU >= 0
        condition_N = np.concatenate(
            [block.control_condition_BS[is_control_BS], block.summary_condition_BU[is_summary_BU]]
        )
        row_N = np.concatenate(
            [block.control_row_BS[is_control_BS], block.summary_row_BU[is_summary_BU]]
        )
        slot_N = np.concatenate(
            [
                np.flatnonzero(is_control_BS),
                block.control_row_BS.size + np.flatnonzero(is_summary_BU),
            ]
        )
        chunk_N = self._first_chunk[condition_N] + row_N // CHUNK_CELLS
        cells = self._store.gather(chunk_N, row_N % CHUNK_CELLS, slot_N)
        self.was_read[chunk_N] = True
        if self._on_host:
            return cells
        return CompactCells(
            cells.buffer.pin_memory(),
            cells.num_cells,
            cells.num_nonzero,
            cells.num_gap_exceptions,
            cells.num_count_exceptions,
        )

    # --- host batch to device ---------------------------------------------------------------------

    def to_device(self, host: HostBatch) -> Batch:
        """Return the batch on the reader's device, decoded there."""
        device = self._device
        treated, control = host.treated, host.control
        count_B3, number_BK, dose_BJ = host.count_B3, host.number_BK, host.dose_BJ
        if not self._on_host:
            treated = treated.to(device, non_blocking=True)
            control = control.to(device, non_blocking=True)
            count_B3 = count_B3.to(device, non_blocking=True)
            number_BK = number_BK.to(device, non_blocking=True)
            dose_BJ = dose_BJ.to(device, non_blocking=True)
        num_sets, num_components = dose_BJ.shape
        size, summary_size = self._plan.set_size, self._plan.num_summary_cells
        treated_RG, treated_library_R = self._decode(treated, num_sets * size)
        control_RG, control_library_R = self._decode(control, num_sets * (size + summary_size))
        num_genes = treated_RG.shape[1]
        masks = [
            torch.arange(width, device=device) < count_B3[:, k, None]
            for k, width in enumerate((size, size, summary_size))
        ]
        own_KB = number_BK[:, num_components:].T.contiguous()
        cell_type_B, batch_B, is_control_B, condition_B, set_index_B = own_KB
        return Batch(
            control_BSG=control_RG[: num_sets * size].view(num_sets, size, num_genes),
            control_mask_BS=masks[1],
            summary_BUG=control_RG[num_sets * size :].view(num_sets, summary_size, num_genes),
            summary_mask_BU=masks[2],
            treated_BSG=treated_RG.view(num_sets, size, num_genes),
            treated_mask_BS=masks[0],
            control_library_BS=control_library_R[: num_sets * size].view(num_sets, size),
            treated_library_BS=treated_library_R.view(num_sets, size),
            component_BJ=number_BK[:, :num_components].contiguous(),
            dose_BJ=dose_BJ,
            cell_type_B=cell_type_B,
            batch_B=batch_B,
            is_control_B=is_control_B.bool(),
            condition_B=condition_B,
            set_index_B=set_index_B,
        )

    def _decode(self, cells: CompactCells, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return values and library sizes of all slots; slots without a cell are 0."""
        how = self._normalisation
        value_RG = (decode_numba if self._on_host else decode)(
            cells,
            num_rows=num_rows,
            num_genes=self._store.num_genes,
            target_sum=how.target_sum,
            value_scale=how.value_scale,
            projection=how.projection,
        )
        streams = cells.streams()
        library_R = torch.zeros(num_rows, device=self._device)
        return value_RG, library_R.index_copy_(0, streams.slot_N, streams.library_N)


def _occurrence(set_N: Integers, row_N: Integers) -> Integers:
    """Return how often the same row stood in the same set before."""
    order = np.lexsort((row_N, set_N))
    is_new = np.ones(len(row_N), np.bool_)
    is_new[1:] = (np.diff(set_N[order]) != 0) | (np.diff(row_N[order]) != 0)
    position = np.arange(len(row_N))
    turn_N = np.empty_like(row_N)
    turn_N[order] = position - np.maximum.accumulate(np.where(is_new, position, 0))
    return turn_N
