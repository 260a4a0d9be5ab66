"""The (epoch, index) contract of BioNeMo over the sets of a run.

Not the training path: it is for runs whose loop is not this package's.
"""

from __future__ import annotations

from typing import Protocol, SupportsIndex

import numpy as np

from scale.data.module import CellSetDataModule
from scale.types import Batch


class EpochIndex(Protocol):
    """Anything with an epoch and an index, as bionemo-core's ``EpochIndex``."""

    @property
    def epoch(self) -> int:
        """Pass over the sets, from 0."""

    @property
    def idx(self) -> int:
        """Set within the epoch."""


class CellSetDataset:
    """One training set per (epoch, index): a pure function with a length that never changes.

    It is what bionemo-core's ``MultiEpochDatasetResampler`` asks of a dataset. A plain number is a
    set of epoch 0, which is what its ``MultiEpochDatasetWrapper`` and PyTorch's ``DataLoader`` ask.
    """

    def __init__(self, module: CellSetDataModule) -> None:
        self._reader = module.train_reader
        self._length = module.train_plan.num_sets_per_epoch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: EpochIndex | SupportsIndex) -> Batch:
        """Return a batch of one set."""
        if isinstance(index, SupportsIndex):
            epoch, number = 0, index.__index__()
        else:
            epoch, number = int(index.epoch), int(index.idx)
        if epoch < 0 or not 0 <= number < self._length:
            raise IndexError(f"set {number} of {self._length}, epoch {epoch}")
        return self._reader.batch(np.array([epoch * self._length + number]))
