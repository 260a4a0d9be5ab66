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
    started = time.monotonic()
    trainer, run_dir = config.trainer, Path(config.run_dir)
    engine = Engine(
        model,
        layout,
        config.optimizer,
        lr=peak_lr,
        precision=trainer.precision,
        distributed_optimizer=config.parallel.distributed_optimizer,
    )
    state = TrainingState(step=0, consumed_sets=0, data={})
    if resume_from is not None:
        state = load_checkpoint(resume_from, engine)
        state = state.moved_to(data.check_state(state.data))
        logger.info("resumed from %s", resume_from)
    first_step, consumed_sets = state.step, state.consumed_sets
    batches = data.train_batches(
        consumed_sets=consumed_sets,
        sets_per_batch=trainer.sets_per_batch,
        sets_per_micro_batch=micro_batch_sets(trainer, layout),
    )
    log = MetricLog(
        run_dir,
        config.log,
        max_steps=trainer.max_steps,
        first_step=first_step,
        is_writer=layout.is_writer,
        settings=settings,
    )
    clock = Clock(first_step, trainer.max_steps)
    saver = CheckpointSaver(
        run_dir, engine, config.checkpoint, record=record, vocabulary=vocabulary
    )
    profiler = StepProfiler(
        run_dir, trainer.profile_steps, first_step=first_step, is_writer=layout.is_writer
    )
    watchdog = Watchdog(
        run_dir,
        rank=layout.rank,
        world_size=layout.world_size,
        timeout_seconds=config.parallel.timeout_seconds,
        step=first_step,
    )
    save_seconds: dict[str, float] = {}

    with watchdog, saver:
        for step in range(first_step + 1, trainer.max_steps + 1):
            lr = learning_rate(
                step,
                peak=peak_lr,
                warmup_steps=config.optimizer.warmup_steps,
                max_steps=trainer.max_steps,
                final_fraction=config.optimizer.final_lr_fraction,
            )
            is_warm = step > first_step + 1  # the first one compiles, and fills caches
            with profiler.step(step):
                watchdog.beat(step - 1, "reading the next batch", is_limited=is_warm)
                asked = time.monotonic()
                micro_batches = next(batches)
                waited = time.monotonic() - asked
                hours = (asked - started) / 3600.0
                out_of_time = trainer.max_hours is not None and hours > trainer.max_hours
                watchdog.beat(step - 1, f"taking step {step}", is_limited=is_warm)
                result = engine.step(
                    micro_batches,
                    step=step,
                    lr=lr,
                    data_wait_seconds=waited,
                    stop_requested=out_of_time or stop.received is not None,
                )
            watchdog.beat(step, "logging")
            consumed_sets += trainer.sets_per_batch
            clock.add(step, result.num_cells, result.data_wait_seconds, result.rank_seconds)
            is_last = step == trainer.max_steps
            metrics: dict[str, float] = {}

            if step % trainer.log_every_steps == 0 or step == first_step + 1 or is_last:
                rates = clock.read()
                metrics |= _told(result, lr) | rates
                metrics |= accounting.metrics(rates["train/cells_per_second"])
                metrics |= save_seconds | _system(layout)
                save_seconds = {}
            if validate is not None and (step % config.validation.every_steps == 0 or is_last):
                watchdog.beat(step, "validating", is_limited=False)
                with clock.aside(), engine.averaged_weights():
                    metrics |= validate(model, step)
            if metrics:
                log.write(step, metrics, eta_seconds=clock.eta_seconds())
            watchdog.beat(step, "saving a checkpoint")
            saver.poll()
            if step % config.checkpoint.every_steps == 0 or is_last or result.stop_requested:
                with clock.aside():
                    began = time.monotonic()
                    position = data.state_dict(consumed_sets)
                    saver.save(TrainingState(step=step, consumed_sets=consumed_sets, data=position))
                    save_seconds = {"train/save_seconds": time.monotonic() - began}
            if is_last or result.stop_requested:
                checkpoint = saver.finish()
                watchdog.beat(step, "ending")
                profiler.close()
                log.close()
                reason = "finished" if is_last else _reason(stop, out_of_time=out_of_time)
                return TrainResult(
                    step=step,
                    is_finished=is_last,
                    reason=reason,
                    checkpoint=checkpoint,
                    last=result,
                )
    raise AssertionError("a finished run is not started again")


def _told(result: StepResult, lr: float) -> dict[str, float]:
    parts = {f"train/{name}": value for name, value in result.parts.items()}
    return {"train/loss": result.loss, **parts, "train/grad_norm": result.grad_norm, "train/lr": lr}


def _system(layout: Layout) -> dict[str, float]:
    """Return the peak memory: of the device, or of the process on a CPU."""
    is_cuda = layout.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(layout.device) if is_cuda else peak_memory_bytes()
    return {"system/memory_gib": peak / 2**30}


def _reason(stop: StopSignal, *, out_of_time: bool) -> str:
    if stop.received is not None:
        return f"stopped by {stop.received}"
    return "trainer.max_hours reached" if out_of_time else "stopped by another rank"
