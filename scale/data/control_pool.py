"""The control cells that training draws from, brought into memory at its start.

Control cells are used in every set, and are a small part of an atlas (2 % of Tahoe-100M, 1.6 GB at
2,000 genes). They are mapped, so that the processes of a machine share one copy. Where they fit the
budget, a thread reads them once from end to end, at the speed of the disk and ahead of the draws,
and compares their checksums; else every chunk is read and checked when a cell of it is first drawn.
What is drawn, and every value, is the same either way.

Shapes: C = chunks.
"""

from __future__ import annotations

import logging
import threading

import numpy as np

from scale.data.draws import Integers
from scale.data.store import CellSetStore
from scale.types import StoreError

logger = logging.getLogger(__name__)


class ControlPool:
    """The control cells of some conditions.

    Parameters
    ----------
    store
        Open store.
    conditions
        Ids of the control conditions that may be drawn from.
    budget_bytes
        ``data.control_pool_bytes``.
    """

    def __init__(self, store: CellSetStore, conditions: Integers, budget_bytes: int) -> None:
        self._store, self._budget_bytes = store, budget_bytes
        table = store.conditions.loc[np.unique(conditions)]
        first = table["first_chunk"].to_numpy(np.int64)
        size = table["num_chunks"].to_numpy(np.int64)
        within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
        self._chunk_C = np.repeat(first, size) + within
        self.num_bytes = int(store.chunks["length"][self._chunk_C].sum(dtype=np.int64))
        self._is_stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def fits(self) -> bool:
        """Whether the cells are within the budget, and so are loaded at the start."""
        return self.num_bytes <= self._budget_bytes

    def load(self) -> None:
        """Begin to read and check the cells in a thread, if they fit."""
        if self.fits and self._thread is None:
            self._thread = threading.Thread(
                target=_load,
                args=(self._store, self._chunk_C, self._is_stopped),
                name="scale-control-pool",
                daemon=True,
            )
            self._thread.start()

    def join(self) -> None:
        """Wait until the cells are loaded."""
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """End the thread."""
        self._is_stopped.set()
        self.join()

    def describe(self) -> str:
        """Return size, budget and what follows of them, as one line."""
        size, budget = (f"{n / 1e6:,.1f} MB" for n in (self.num_bytes, self._budget_bytes))
        if self.fits:
            return (
                f"control pool: {size}, within data.control_pool_bytes ({budget}): loaded at the "
                "start, one copy for all processes of a machine"
            )
        return (
            f"control pool: {size}, above data.control_pool_bytes ({budget}): cells are read when "
            "they are first drawn"
        )


def _load(store: CellSetStore, chunk_C: Integers, is_stopped: threading.Event) -> None:
    try:
        store.load_controls(chunk_C, is_stopped)
    except StoreError as error:
        # raised again by the set that draws a cell of the chunk
        logger.warning("control cells cannot be loaded ahead: %s", error)
