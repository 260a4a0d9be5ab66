"""The (epoch, index) contract of BioNeMo over the sets of a run.

Not the training path: it is for runs whose loop is not this package's.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from scale.data.module import CellSetDataModule
from scale.types import Batch


class EpochIndex(Protocol):
    """Anything with an epoch and an index, as bionemo-core's ``EpochIndex``."""

    epoch: int
    idx: int


class CellSetDataset:
    """One training set per (epoch, index): a pure function with a length that never changes.

    It is what bionemo-core's ``MultiEpochDatasetResampler`` asks of a dataset.
    """

    def __init__(self, module: CellSetDataModule) -> None:
        self._reader = module.train_reader
        self._length = module.train_plan.num_sets_per_epoch

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: EpochIndex) -> Batch:
        """Return a batch of one set."""
        if not 0 <= index.idx < self._length:
            raise IndexError(f"set {index.idx} of {self._length}")
        return self._reader.batch(np.array([index.epoch * self._length + index.idx]))
