"""A batch in host memory as it travels: one buffer, one copy to the device.

The cells are compact, as they are stored; the tables say how many cells each set has and what is
known of its condition.

Shapes: B = sets, S = cells per set, U = cells of the summary draw, J = components, K = J + 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scale.data.compact import CompactCells, CompactSizes

_NUM_OWN = 5  # cell type, batch, is_control, condition, set number


@dataclass(frozen=True, slots=True)
class HostBatch:
    """Tables and compact cells of a batch in one buffer, of which all parts are views.

    Parameters
    ----------
    buffer
        uint8: number int64[B, K], count int64[B, 3], dose float32[B, J], then treated cells (of B
        sets of S slots) and control cells (of B sets of S slots followed by B sets of U slots).
        Each part starts at a multiple of 8.
    num_sets, num_components
        B and J.
    treated_sizes, control_sizes
        What the two compact batches hold.
    """

    buffer: Tensor
    num_sets: int
    num_components: int
    treated_sizes: CompactSizes
    control_sizes: CompactSizes

    @classmethod
    def empty(
        cls,
        num_sets: int,
        num_components: int,
        treated_sizes: CompactSizes,
        control_sizes: CompactSizes,
        *,
        allocate: Callable[[int], Tensor],
    ) -> HostBatch:
        """Return an unfilled batch over the bytes that ``allocate`` gives."""
        sizes = (num_sets, num_components, treated_sizes, control_sizes)
        unplaced = cls(torch.empty(0, dtype=torch.uint8), *sizes)
        return replace(unplaced, buffer=allocate(unplaced._starts[-1]))

    @property
    def _starts(self) -> list[int]:
        """Return where each part starts, and the end of the last."""
        num_sets, num_components = self.num_sets, self.num_components
        starts = [0]
        for size in (
            8 * num_sets * (num_components + _NUM_OWN),
            8 * num_sets * 3,
            4 * num_sets * num_components,
            self.treated_sizes.num_bytes,
            self.control_sizes.num_bytes,
        ):
            starts.append(starts[-1] + -(-size // 8) * 8)
        return starts

    def _table(self, part: int, dtype: torch.dtype, num_columns: int) -> Tensor:
        start = self._starts[part]
        stop = start + dtype.itemsize * self.num_sets * num_columns
        return self.buffer[start:stop].view(dtype).view(self.num_sets, num_columns)

    @property
    def number_BK(self) -> Tensor:
        """Components (J columns), cell type, batch, is_control, condition, set number."""
        return self._table(0, torch.int64, self.num_components + _NUM_OWN)

    @property
    def count_B3(self) -> Tensor:
        """Treated, control and summary cells of each set."""
        return self._table(1, torch.int64, 3)

    @property
    def dose_BJ(self) -> Tensor:
        """See :class:`scale.types.Batch`."""
        return self._table(2, torch.float32, self.num_components)

    @property
    def treated(self) -> CompactCells:
        """Treated cells; slot b S + i is cell i of set b."""
        return CompactCells.empty(self.treated_sizes, buffer=self.buffer[self._starts[3] :])

    @property
    def control(self) -> CompactCells:
        """Control cells, then those of the summary draw."""
        return CompactCells.empty(self.control_sizes, buffer=self.buffer[self._starts[4] :])

    def to(self, device: torch.device) -> HostBatch:
        """Return the batch on ``device``: one copy, which nothing waits for."""
        return replace(self, buffer=self.buffer.to(device, non_blocking=True))
