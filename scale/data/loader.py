"""From the plan to batches on the device.

A reader turns set numbers into compact cells (as they are stored, a tenth of their dense size) and
those into a :class:`scale.types.Batch`. On a CPU both happen in the reader threads; with CUDA the
compact cells are pinned, copied and decoded on the device. The heavy calls (pread, crc32, zstd,
numba) free the interpreter lock, so that threads are enough: no worker processes, no pickling, no
shared memory.

Shapes: B = sets, S = cells per set, U = cells of the summary draw, G = genes, J = components,
N = cells of the batch, R = rows of a decoded result.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale.data.buffers import BufferPool
from scale.data.codec import CHUNK_CELLS
from scale.data.compact import CompactCells, Projection, decode, decode_numba
from scale.data.draws import Integers
from scale.data.gather import FoundCells
from scale.data.host_batch import HostBatch
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
        self._buffers = BufferPool()
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
        """End the threads of all iterators, and give free memory back."""
        for prefetcher in list(self._running):
            prefetcher.close()
        self._buffers.clear()

    # --- plan to host batch -----------------------------------------------------------------------

    def read(self, set_index_B: Integers) -> HostBatch:
        """Return some sets as they are stored; pinned where the device is CUDA."""
        if self._on_host:
            return self._read(set_index_B, self._buffers.take)
        # a thread starts on device 0, where pinning would open a context for every rank
        with torch.cuda.device(self._device):
            return self._read(set_index_B, _pinned)

    def _read(self, set_index_B: Integers, allocate: Callable[[int], Tensor]) -> HostBatch:
        block = self._plan.block(set_index_B)
        treated_slot_N, treated = self._find_treated(block)
        self._match_batches(block, set_index_B, treated_slot_N, treated)
        control_slot_N, control = self._find_control(block)
        condition_B, table = block.condition_B, self._table
        num_components = table.component.shape[1]
        host = HostBatch.empty(
            len(condition_B), num_components, treated.sizes, control.sizes, allocate=allocate
        )
        treated.copy(treated_slot_N, out=host.treated)
        control.copy(control_slot_N, out=host.control)
        number_BK = host.number_BK.numpy()
        number_BK[:, :num_components] = table.component[condition_B]
        for k, values_B in enumerate(
            (
                table.cell_type[condition_B],
                table.batch[condition_B],
                block.is_control_B,
                condition_B,
                set_index_B,
            )
        ):
            number_BK[:, num_components + k] = values_B
        counts = (block.treated_count_B, block.control_count_B, block.summary_count_B)
        for k, count_B in enumerate(counts):
            host.count_B3.numpy()[:, k] = count_B
        host.dose_BJ.numpy()[...] = table.dose[condition_B]
        return host

    def _find_treated(self, block: SetBlock) -> tuple[Integers, FoundCells]:
        slot_N = np.flatnonzero(block.treated_row_BS >= 0)
        row_N = block.treated_row_BS.ravel()[slot_N]
        condition_N = block.condition_B[slot_N // block.treated_row_BS.shape[1]]
        return slot_N, self._find(condition_N, row_N)

    def _find_control(self, block: SetBlock) -> tuple[Integers, FoundCells]:
        row_N = np.concatenate([block.control_row_BS, block.summary_row_BU], axis=None)
        slot_N = np.flatnonzero(row_N >= 0)
        condition_N = np.concatenate(
            [block.control_condition_BS, block.summary_condition_BU], axis=None
        )
        return slot_N, self._find(condition_N[slot_N], row_N[slot_N])

    def _find(self, condition_N: Integers, row_N: Integers) -> FoundCells:
        chunk_N = self._first_chunk[condition_N] + row_N // CHUNK_CELLS
        self.was_read[chunk_N] = True
        return self._store.find_cells(chunk_N, row_N % CHUNK_CELLS, buffers=self._buffers)

    def _match_batches(
        self, block: SetBlock, set_index_B: Integers, slot_N: Integers, treated: FoundCells
    ) -> None:
        """Draw the controls again where the cells of a set are of several batches."""
        by_cell = np.flatnonzero(self._plan.is_by_cell[block.condition_B]).tolist()
        if not by_cell:
            return
        set_N = slot_N // block.treated_row_BS.shape[1]
        code_N = treated.batch_code_N
        for b in by_cell:
            own_N = code_N[set_N == b]
            if self._plan.has_repeats:
                own_N = own_N[_order_of_repeats(block.treated_row_BS[b])]
            if (own_N >= 0).all():
                self._plan.match_batches(
                    block, b, int(set_index_B[b]), own_N.astype(np.uint16), self._store.batches
                )

    # --- host batch to device ---------------------------------------------------------------------

    def to_device(self, host: HostBatch) -> Batch:
        """Return the batch on the reader's device, decoded there."""
        if not self._on_host:
            host = host.to(self._device)
        num_sets, num_components = host.num_sets, host.num_components
        size, summary_size = self._plan.set_size, self._plan.num_summary_cells
        treated_RG, treated_library_R = self._decode(host.treated, num_sets * size)
        control_RG, control_library_R = self._decode(host.control, num_sets * (size + summary_size))
        num_genes = treated_RG.shape[1]
        count_B3, number_BK = host.count_B3, host.number_BK
        masks = [
            torch.arange(width, device=self._device) < count_B3[:, k, None]
            for k, width in enumerate((size, size, summary_size))
        ]
        own_KB = number_BK[:, num_components:].T.contiguous()
        cell_type_B, batch_B, is_control_B, condition_B, set_index_B = own_KB
        # no field is a view of the host batch, whose memory is wanted for the next one
        return Batch(
            control_BSG=control_RG[: num_sets * size].view(num_sets, size, num_genes),
            control_mask_BS=masks[1],
            summary_BUG=control_RG[num_sets * size :].view(num_sets, summary_size, num_genes),
            summary_mask_BU=masks[2],
            treated_BSG=treated_RG.view(num_sets, size, num_genes),
            treated_mask_BS=masks[0],
            control_library_BS=control_library_R[: num_sets * size].view(num_sets, size),
            treated_library_BS=treated_library_R.view(num_sets, size),
            component_BJ=number_BK[:, :num_components].clone(),
            dose_BJ=host.dose_BJ.clone(),
            cell_type_B=cell_type_B,
            batch_B=batch_B,
            is_control_B=is_control_B.bool(),
            condition_B=condition_B,
            set_index_B=set_index_B,
        )

    def _decode(self, cells: CompactCells, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return values and library sizes of all slots; slots without a cell are 0."""
        how, num_genes = self._normalisation, self._store.num_genes
        arguments: dict[str, Any] = {
            "num_rows": num_rows,
            "num_genes": num_genes,
            "target_sum": how.target_sum,
            "value_scale": how.value_scale,
            "projection": how.projection,
        }
        if self._on_host:
            width = num_genes if how.projection is None else how.projection.num_columns
            memory = self._buffers.take(4 * num_rows * width).view(torch.float32)
            value_RG = decode_numba(cells, out=memory.view(num_rows, width), **arguments)
        else:
            value_RG = decode(cells, **arguments)
        streams = cells.streams()
        library_R = torch.zeros(num_rows, device=self._device)
        return value_RG, library_R.index_copy_(0, streams.slot_N, streams.library_N)


def _pinned(num_bytes: int) -> Tensor:
    # torch keeps pinned blocks, and gives one out again only when its copy is done
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def _order_of_repeats(row_S: Integers) -> Integers:
    """Return the order in which the cells of a set with repeats are gone through.

    First every cell once, then those that stand in the set again, and so on; each time by chunk.
    """
    by_row = np.argsort(row_S, kind="stable")
    position = np.arange(len(row_S))
    is_new = np.diff(row_S[by_row], prepend=-1) != 0
    turn_S = np.empty_like(row_S)
    turn_S[by_row] = position - np.maximum.accumulate(np.where(is_new, position, 0))
    return np.lexsort((position, row_S // CHUNK_CELLS, turn_S))
