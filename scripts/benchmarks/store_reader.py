"""Sets of cells from a store, through ``CellSetDataModule`` as training gets them.

Arguments of a reader: STORE dense|compact|chunks NUM_THREADS SETS_PER_BATCH

Sets of 256 treated cells of one condition with 256 controls of its line and plate, no summary draw.
``dense`` gives what cell-load gives, log-normalised float32 tensors with the condition of each set;
``compact`` stops before decoding, which is left to a GPU; ``chunks`` only reads, checks and
decompresses the chunks of the treated cells. The plan is in all figures.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from worker import fork_readers, serve

from scale.config import DataConfig
from scale.data.codec import CHUNK_CELLS
from scale.data.module import CellSetDataModule

SET_SIZE = 256


class Reader:
    """Counts the sets up, so that every round has others."""

    def __init__(self, store: str, num_threads: int, batch_size: int) -> None:
        config = DataConfig(store=store, reader_threads=num_threads)
        self.module = CellSetDataModule(config, set_size=SET_SIZE, num_summary_cells=0, seed=0)
        self.num_threads, self.batch_size = num_threads, batch_size
        self.position = 0
        self.last = torch.zeros(1)

    def jobs(self, num_sets: int) -> Iterator[np.ndarray]:
        """Yield the set numbers of each batch."""
        start, self.position = self.position, self.position + num_sets
        for first in range(start, self.position, self.batch_size):
            yield np.arange(first, first + self.batch_size)

    def dense(self, num_sets: int) -> int:
        """Read batches by threads; decoding is theirs."""
        cells = 0
        for batch in self.module.train_reader.batches(
            self.jobs(num_sets), num_threads=self.num_threads, depth=2 * self.num_threads
        ):
            cells += int(batch.treated_mask_BS.sum()) + int(batch.control_mask_BS.sum())
            self.last = batch.treated_BSG
        return cells

    def compact(self, num_sets: int) -> int:
        """Read batches as they are stored."""
        cells = 0
        for job in self.jobs(num_sets):
            host = self.module.train_reader.read(job)
            cells += int(host.count_B3.sum())
        return cells

    def chunks(self, num_sets: int) -> int:
        """Read the chunks of the treated cells."""
        store, plan = self.module.store, self.module.train_plan
        first_chunk = store.conditions["first_chunk"].to_numpy(np.int64)
        cells = 0
        for job in self.jobs(num_sets):
            block = plan.block(job)
            place_B, slot = np.nonzero(block.treated_row_BS >= 0)
            row = block.treated_row_BS[place_B, slot]
            chunk = first_chunk[block.condition_B[place_B]] + row // CHUNK_CELLS
            for number in np.unique(chunk).tolist():
                store.read_chunk(number)
            cells += len(row)
        return cells

    def facts(self) -> dict[str, float]:
        """Return what the last treated cells look like."""
        values = self.last[0]
        return {"mean": float(values.mean()), "nonzero": float((values > 0).float().mean())}


def main(arguments: list[str]) -> None:
    """Serve sets."""
    store, mode = arguments[:2]
    num_threads, batch_size = map(int, arguments[2:])
    torch.set_num_threads(1)
    reader = Reader(store, num_threads, batch_size)
    modes: dict[str, Callable[[int], int]] = {
        "dense": reader.dense,
        "compact": reader.compact,
        "chunks": reader.chunks,
    }
    serve(modes[mode], reader.facts, forget=lambda: None)  # it keeps none


fork_readers(main)
