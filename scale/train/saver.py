"""Saves of a run while it goes on: when a checkpoint is whole, and what happens when one fails."""

from __future__ import annotations

from pathlib import Path

from scale.config import CheckpointConfig
from scale.train.checkpoint import save_checkpoint
from scale.train.engine import Engine
from scale.train.record import ModelRecord, TrainingState
from scale.types import Vocabulary


class CheckpointSaver:
    """Writes the checkpoints of a run; every method is a collective of all ranks.

    Parameters
    ----------
    run_dir
        Directory of the run.
    engine
        Its weights, moving average and optimizer.
    config
        How many are kept.
    record, vocabulary
        What a checkpoint says about the model.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        config: CheckpointConfig,
        *,
        record: ModelRecord,
        vocabulary: Vocabulary,
    ) -> None:
        self._run_dir = run_dir
        self._engine = engine
        self._config = config
        self._record = record
        self._vocabulary = vocabulary
        self._last: Path | None = None

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint of the present weights."""
        self._last = save_checkpoint(
            self._run_dir,
            self._engine,
            state,
            record=self._record,
            vocabulary=self._vocabulary,
            keep_last=self._config.keep_last,
        )

    def finish(self) -> Path:
        """Wait until the last checkpoint is whole, and return it."""
        assert self._last is not None, "nothing was saved"
        return self._last
