"""The training loop, and nothing else: step, validate, log, save, stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scale.config import FinetuneConfig, PretrainConfig
from scale.runtime import StopSignal, peak_memory_bytes
from scale.train.accounting import Accounting
from scale.train.checkpoint import load_checkpoint
from scale.train.engine import Engine, StepResult
from scale.train.log import Clock, MetricLog
from scale.train.optim import learning_rate
from scale.train.parallel import Layout, micro_batch_sets
from scale.train.profile import StepProfiler
from scale.train.record import ModelRecord, TrainingState
from scale.train.saver import CheckpointSaver
from scale.train.watchdog import Watchdog
from scale.types import Vocabulary

if TYPE_CHECKING:
    from scale.data.module import CellSetDataModule
    from scale.model.model import ScaleModel

logger = logging.getLogger(__name__)

Validate = Callable[["ScaleModel", int], dict[str, float]]
"""(model with its moving average, step) -> metrics by name, as ``val/pearson_delta``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Last step that was done."""
    is_finished: bool
    """False if it was stopped on request, with a checkpoint."""
    reason: str
    checkpoint: Path
    """The checkpoint of the last step."""
    last: StepResult | None
    """None if there was nothing left to do."""


def train(
    config: PretrainConfig | FinetuneConfig,
    *,
    model: ScaleModel,
    record: ModelRecord,
    vocabulary: Vocabulary,
    data: CellSetDataModule,
    layout: Layout,
    accounting: Accounting,
    peak_lr: float,
    resume_from: Path | None,
    validate: Validate | None,
    stop: StopSignal,
    settings: dict[str, Any] | None = None,
) -> TrainResult:
    """Train to ``trainer.max_steps``, or until asked to stop; a collective of all ranks.

    Parameters
    ----------
    config
        Settings of the run.
    model, record, vocabulary
        The model, and what a checkpoint says about it.
    data
        Training batches and the position in them.
    layout
        From :func:`scale.train.parallel.start`.
    accounting
        What a cell costs; tells MFU.
    peak_lr
        Highest learning rate.
    resume_from
        A whole checkpoint of this run, or None to begin.
    validate
        Called with the moving average in place; None = no validation.
    stop
        Checked once per step; ranks agree in the step's message.
    settings
        Shown by wandb.

    Raises
    ------
    NonFiniteError
        If a loss or gradient is not finite; the last checkpoint is untouched.
    PeerError
        If another rank ended or does not answer.
    PlanError, CheckpointError
        If the checkpoint does not fit.
    """
    began = time.monotonic()
    engine = Engine(
        model,
        layout,
        config.optimizer,
        lr=peak_lr,
        precision=config.trainer.precision,
        distributed_optimizer=config.parallel.distributed_optimizer,
    )
    run = _Run(
        config,
        began=began,
        model=model,
        engine=engine,
        data=data,
        state=_state(resume_from, engine, data),
        accounting=accounting,
        peak_lr=peak_lr,
        validate=validate,
        stop=stop,
    )
    log = MetricLog(
        Path(config.run_dir),
        config.log,
        max_steps=config.trainer.max_steps,
        first_step=run.first_step,
        is_writer=layout.is_writer,
        settings=settings,
    )
    saver = CheckpointSaver(
        Path(config.run_dir), engine, config.checkpoint, record=record, vocabulary=vocabulary
    )
    with run.watchdog, saver:
        for step in range(run.first_step + 1, config.trainer.max_steps + 1):
            result = run.take(step)
            metrics = run.metrics(step, result)
            if metrics:
                log.write(step, metrics, eta_seconds=run.clock.eta_seconds())
            if run.save(step, result, saver):
                checkpoint = saver.finish()
                run.end(step)
                log.close()
                return TrainResult(
                    step=step,
                    is_finished=run.is_last(step),
                    reason=run.reason(step),
                    checkpoint=checkpoint,
                    last=result,
                )
    raise AssertionError("a finished run is not started again")


def _state(resume_from: Path | None, engine: Engine, data: CellSetDataModule) -> TrainingState:
    """Return where training goes on, with what the engine holds there."""
    if resume_from is None:
        return TrainingState(step=0, consumed_sets=0, data={})
    state = load_checkpoint(resume_from, engine)
    state = state.moved_to(data.check_state(state.data))
    logger.info("resumed from %s", resume_from)
    return state


class _Run:
    """One start of a run: what a step needs, and what is known of the steps so far.

    Parameters
    ----------
    config, model, engine, data, accounting, peak_lr, validate, stop
        As :func:`train` has them.
    began
        When it began, of the monotonic clock.
    state
        The last step that was done.
    """

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        *,
        began: float,
        model: ScaleModel,
        engine: Engine,
        data: CellSetDataModule,
        state: TrainingState,
        accounting: Accounting,
        peak_lr: float,
        validate: Validate | None,
        stop: StopSignal,
    ) -> None:
        trainer, layout = config.trainer, engine.layout
        self._began = began
        self._config = config
        self._model = model
        self._engine = engine
        self._data = data
        self._accounting = accounting
        self._peak_lr = peak_lr
        self._validate = validate
        self._stop = stop
        self._consumed_sets = state.consumed_sets
        self._save_seconds: dict[str, float] = {}
        self._out_of_time = False
        self._batches = data.train_batches(
            consumed_sets=state.consumed_sets,
            sets_per_batch=trainer.sets_per_batch,
            sets_per_micro_batch=micro_batch_sets(trainer, layout),
        )
        self._profiler = StepProfiler(
            Path(config.run_dir),
            trainer.profile_steps,
            first_step=state.step,
            is_writer=layout.is_writer,
        )
        self.first_step = state.step
        self.clock = Clock(state.step, trainer.max_steps)
        self.watchdog = Watchdog(
            Path(config.run_dir),
            rank=layout.rank,
            world_size=layout.world_size,
            timeout_seconds=config.parallel.timeout_seconds,
            step=state.step,
        )

    def is_last(self, step: int) -> bool:
        """Return whether training ends with a step by itself."""
        return step == self._config.trainer.max_steps

    def take(self, step: int) -> StepResult:
        """Read a batch and take a step on it."""
        max_hours = self._config.trainer.max_hours
        is_warm = step > self.first_step + 1  # the first one compiles, and fills caches
        with self._profiler.step(step):
            self.watchdog.beat(step - 1, "reading the next batch", is_limited=is_warm)
            asked = time.monotonic()
            micro_batches = next(self._batches)
            waited = time.monotonic() - asked
            hours = (asked - self._began) / 3600.0
            self._out_of_time = max_hours is not None and hours > max_hours
            self.watchdog.beat(step - 1, f"taking step {step}", is_limited=is_warm)
            result = self._engine.step(
                micro_batches,
                step=step,
                lr=self._rate(step),
                data_wait_seconds=waited,
                stop_requested=self._out_of_time or self._stop.received is not None,
            )
        self._consumed_sets += self._config.trainer.sets_per_batch
        self.clock.add(step, result.num_cells, result.data_wait_seconds, result.rank_seconds)
        return result

    def _rate(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self._peak_lr,
            warmup_steps=self._config.optimizer.warmup_steps,
            max_steps=self._config.trainer.max_steps,
            final_fraction=self._config.optimizer.final_lr_fraction,
        )

    def metrics(self, step: int, result: StepResult) -> dict[str, float]:
        """Return what the log says of a step; nothing of most."""
        metrics: dict[str, float] = {}
        is_told = step % self._config.trainer.log_every_steps == 0 or step == self.first_step + 1
        self.watchdog.beat(step, "logging")
        if is_told or self.is_last(step):
            rates = self.clock.read()
            metrics |= _told(result, self._rate(step)) | rates
            metrics |= self._accounting.metrics(rates["train/cells_per_second"])
            metrics |= self._save_seconds | _system(self._engine.layout)
            self._save_seconds = {}
        is_judged = step % self._config.validation.every_steps == 0 or self.is_last(step)
        if self._validate is not None and is_judged:
            self.watchdog.beat(step, "validating", is_limited=False)
            with self.clock.aside(), self._engine.averaged_weights():
                metrics |= self._validate(self._model, step)
        return metrics

    def save(self, step: int, result: StepResult, saver: CheckpointSaver) -> bool:
        """Save if it is time to, or if training ends with this step; return whether it does."""
        self.watchdog.beat(step, "saving a checkpoint")
        saver.poll()
        ends = self.is_last(step) or result.stop_requested
        if step % self._config.checkpoint.every_steps == 0 or ends:
            with self.clock.aside():
                began = time.monotonic()
                saver.save(
                    TrainingState(
                        step=step,
                        consumed_sets=self._consumed_sets,
                        data=self._data.state_dict(self._consumed_sets),
                    )
                )
                self._save_seconds = {"train/save_seconds": time.monotonic() - began}
        return ends

    def end(self, step: int) -> None:
        """Write the trace, if there is one."""
        self.watchdog.beat(step, "ending")
        self._profiler.close()

    def reason(self, step: int) -> str:
        """Return why training ends with a step."""
        if self.is_last(step):
            return "finished"
        if self._stop.received is not None:
            return f"stopped by {self._stop.received}"
        return "trainer.max_hours reached" if self._out_of_time else "stopped by another rank"


def _told(result: StepResult, lr: float) -> dict[str, float]:
    parts = {f"train/{name}": value for name, value in result.parts.items()}
    return {"train/loss": result.loss, **parts, "train/grad_norm": result.grad_norm, "train/lr": lr}


def _system(layout: Layout) -> dict[str, float]:
    """Return the peak memory: of the device, or of the process on a CPU."""
    is_cuda = layout.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(layout.device) if is_cuda else peak_memory_bytes()
    return {"system/memory_gib": peak / 2**30}
