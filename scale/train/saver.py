"""Saves of a run while it goes on: when a checkpoint is whole, and what happens when one fails.

A failed save is told and training goes on, since the next may succeed (a disk that was full for a
while); the second in a row ends the run, which would only get further from its last checkpoint.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from scale.config import CheckpointConfig
from scale.train.checkpoint import CheckpointWrite
from scale.train.engine import Engine, NonFiniteError
from scale.train.record import ModelRecord, TrainingState
from scale.types import CheckpointError, Vocabulary

logger = logging.getLogger(__name__)


@dataclass
class _Running:
    """A save that is written beside the steps."""

    write: CheckpointWrite
    future: Future[None]
    started: float
    waited_seconds: float
    """Time that training stood still for it."""


class CheckpointSaver:
    """Writes the checkpoints of a run; every method is a collective of all ranks.

    As a context manager it completes the save that is under way when training stops because
    something is not finite, which all ranks notice at the same step.

    With ``checkpoint.save_async`` the state is copied to host memory and written by a thread; all
    messages between ranks are sent by the thread that trains, at the same step on each. At most one
    save is under way: the next waits for it.

    Parameters
    ----------
    run_dir
        Directory of the run.
    engine
        Its weights, moving average and optimizer.
    config
        How many are kept, and whether training waits for them.
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
        self._thread = ThreadPoolExecutor(1, "checkpoint") if config.save_async else None
        self._running: _Running | None = None
        self._last: Path | None = None
        self._failure: CheckpointError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NonFiniteError):
            self._end_running()

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint of the present weights, or begin to.

        Raises
        ------
        CheckpointError
            If this save failed, or one that was under way, and the one before it had failed too.
        """
        self._end_running()
        started = time.monotonic()
        try:
            write = CheckpointWrite(
                self._run_dir,
                self._engine,
                state,
                record=self._record,
                vocabulary=self._vocabulary,
                in_memory=self._thread is not None,
            )
        except CheckpointError as error:
            self._failed(error)
            return
        if self._thread is not None:
            future = self._thread.submit(write.write)
            self._running = _Running(write, future, started, time.monotonic() - started)
            return
        write.write()
        if self._end(write):
            logger.info("saved %s in %.1f s", write.name, time.monotonic() - started)

    def poll(self) -> None:
        """Name the checkpoint that is under way if all ranks have written it; once per step.

        Raises
        ------
        CheckpointError
            If it failed, and the one before it had failed too.
        """
        if self._running is None:
            return
        is_written = torch.tensor(
            float(self._running.future.done()), device=self._engine.layout.device
        )
        dist.all_reduce(is_written, dist.ReduceOp.MIN)
        if is_written:
            self._end_running()

    def finish(self) -> Path:
        """Wait until the last checkpoint is whole, and return it.

        Raises
        ------
        CheckpointError
            If it failed.
        """
        self._end_running()
        if self._failure is not None:
            raise self._failure
        assert self._last is not None, "nothing was saved"
        return self._last

    def _end_running(self) -> None:
        """Wait for the save that is under way, if there is one."""
        running, self._running = self._running, None
        if running is None:
            return
        asked = time.monotonic()
        running.future.result()
        if self._end(running.write):
            now = time.monotonic()
            logger.info(
                "saved %s in %.1f s beside training, which waited %.1f s",
                running.write.name,
                now - running.started,
                running.waited_seconds + now - asked,
            )

    def _end(self, write: CheckpointWrite) -> bool:
        """Complete a checkpoint that this rank has written; return whether that was possible."""
        try:
            self._last = write.finish(keep_last=self._config.keep_last)
        except CheckpointError as error:
            self._failed(error)
            return False
        self._failure = None
        return True

    def _failed(self, error: CheckpointError) -> None:
        if self._failure is not None:
            raise CheckpointError(
                f"{error}; the save before it failed too, so training stops. Make room on the disk "
                "and start the run again: it goes on from its newest checkpoint"
            ) from error
        self._failure = error
        if self._engine.layout.is_writer:  # the error names the ranks, once is enough
            logger.error("%s; training goes on, older checkpoints are untouched", error)
