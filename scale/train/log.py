"""One dict per log step -> console line, ``metrics.jsonl``, wandb; and the clock of the loop."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scale.config import LogConfig, WandbMode
from scale.runtime import atomic_path, replace_nan

logger = logging.getLogger(__name__)

FIRST_STEPS = 10
"""Steps of a start that estimate and trace leave out: caches fill, kernels compile."""


class MetricLog:
    """Where the numbers of a run go; on other ranks than the first it does nothing.

    Parameters
    ----------
    run_dir
        Directory of the run.
    config
        Whether wandb is wanted.
    max_steps
        Last step of the run.
    first_step
        Steps that are done; lines of ``metrics.jsonl`` past it are dropped, so that steps stay
        unique when a run is resumed.
    is_writer
        Whether this is the rank that writes.
    settings
        Shown by wandb.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        *,
        max_steps: int,
        first_step: int = 0,
        is_writer: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._max_steps = max_steps
        self._is_writer = is_writer
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._wandb: Any = None
        if not is_writer:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._seconds_before = _keep_lines(self._path, first_step)
        if config.wandb is not WandbMode.none:
            self._wandb = _start_wandb(run_dir, config, settings or {})

    def write(self, step: int, metrics: Mapping[str, float], *, eta_seconds: float) -> None:
        """Write the metrics of a step, with names like ``train/loss``, to all places.

        Parameters
        ----------
        step
            Number of the step; one call per step.
        metrics
            Values by name.
        eta_seconds
            Shown on the console only.
        """
        if not self._is_writer:
            return
        seconds = self._seconds_before + time.monotonic() - self._started
        record = {
            "step": step,
            **{name: replace_nan(value) for name, value in metrics.items()},
            "time_seconds": round(seconds, 3),
        }
        with self._path.open("a") as handle:
            handle.write(json.dumps(record) + "\n")
        if "train/loss" in metrics:
            logger.info("%s", console_line(step, self._max_steps, metrics, eta_seconds))
        validation = [
            f"{name.removeprefix('val/').replace('_', ' ')} {value:.4g}"
            for name, value in metrics.items()
            if name.startswith("val/")
        ]
        if validation:
            logger.info(
                "step %d/%d | validation | %s", step, self._max_steps, " | ".join(validation)
            )
        self._tell_wandb(lambda: self._wandb.log(dict(metrics), step=step))

    def close(self) -> None:
        """Finish wandb, if it runs."""
        self._tell_wandb(lambda: self._wandb.finish())

    def _tell_wandb(self, action: Any) -> None:
        if self._wandb is None:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever fails there, the run goes on
            logger.warning("wandb failed and is left out from here on: %s", error)
            self._wandb = None


def _start_wandb(run_dir: Path, config: LogConfig, settings: Mapping[str, Any]) -> Any:
    try:
        import wandb

        return wandb.init(
            id=run_dir.name,
            name=run_dir.name,
            resume="allow",
            dir=str(run_dir),
            mode=config.wandb.value,
            project=config.project,
            entity=config.entity,
            tags=config.tags,
            config=dict(settings),
        )
    except Exception as error:  # noqa: BLE001 - whatever fails there, the run goes on
        logger.warning("wandb did not start (%s); metrics go to metrics.jsonl only", error)
        return None


def _keep_lines(path: Path, last_step: int) -> float:
    """Drop lines past a step, and one that was cut; return the seconds that the rest tells."""
    if not path.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= last_step:
            kept.append(line)
            seconds = record["time_seconds"]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept))
    return seconds


# --- the console --------------------------------------------------------------------------------


def console_line(
    step: int, max_steps: int, metrics: Mapping[str, float], eta_seconds: float
) -> str:
    """Return the line of a log step.

    Examples
    --------
    >>> console_line(
    ...     1200,
    ...     100000,
    ...     {
    ...         "train/loss": 0.0312,
    ...         "train/cells_per_second": 27841.0,
    ...         "train/data_wait_fraction": 0.02,
    ...         "train/lr": 3e-4,
    ...         "system/memory_gib": 18.24,
    ...     },
    ...     11520,
    ... )
    'step 1200/100000 | loss 0.0312 | 27.8k cells/s | data 2% | lr 3.0e-4 | 18.2 GiB | eta 3h12m'
    """
    rate = f"{metrics['train/lr']:.1e}".replace("e-0", "e-")
    return " | ".join(
        [
            f"step {step}/{max_steps}",
            f"loss {metrics['train/loss']:.3g}",
            f"{_thousands(metrics['train/cells_per_second'])} cells/s",
            f"data {metrics['train/data_wait_fraction']:.0%}",
            f"lr {rate}",
            f"{metrics['system/memory_gib']:.1f} GiB",
            f"eta {_duration(eta_seconds)}",
        ]
    )


def _thousands(value: float) -> str:
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.1f}k"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


# --- the clock ----------------------------------------------------------------------------------


class Clock:
    """Rates over the steps since the last log line: the whole loop, its data included.

    Validation and checkpoints stand aside of the rates and inside of the estimated end. A cell is a
    treated cell of a set; its control cell comes with it.
    """

    def __init__(self, done: int, max_steps: int) -> None:
        self._max_steps = max_steps
        self._step = done
        self._window = time.monotonic()
        self._marks = [(done, self._window)]
        self._restart()

    def _restart(self) -> None:
        self._steps, self._cells, self._waited, self._aside = 0, 0, 0.0, 0.0
        self._by_rank: list[float] = []

    def add(
        self, step: int, num_cells: int, data_wait_seconds: float, rank_seconds: Sequence[float]
    ) -> None:
        """Count a step that was done, with what each rank took before it waited for the others."""
        self._step = step
        self._steps += 1
        self._cells += num_cells
        self._waited += data_wait_seconds
        before = self._by_rank or [0.0] * len(rank_seconds)
        self._by_rank = [a + b for a, b in zip(before, rank_seconds, strict=True)]
        if step - self._marks[0][0] == FIRST_STEPS:
            self._marks.append((step, time.monotonic()))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep what happens in the ``with`` block out of the rates."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._aside += time.monotonic() - before

    def read(self) -> dict[str, float]:
        """Return the rates since the last call, and begin anew.

        Of several ranks the one that took longest over its own data and passes is named, with the
        seconds per step that it took more than the median rank.
        """
        now = time.monotonic()
        seconds = max(now - self._window - self._aside, 1e-9)
        steps = max(self._steps, 1)
        rates = {
            "train/cells_per_second": self._cells / seconds,
            "train/step_seconds": seconds / steps,
            "train/data_wait_fraction": min(1.0, self._waited / seconds),
        }
        if len(self._by_rank) > 1:
            slowest = max(self._by_rank)
            lag = (slowest - statistics.median(self._by_rank)) / steps
            rates["train/slowest_rank"] = self._by_rank.index(slowest)
            rates["train/slowest_rank_lag_seconds"] = lag
        self._window = now
        self._restart()
        return rates

    def eta_seconds(self) -> float:
        """Return the estimated time to the last step."""
        began, since = self._marks[-1]
        if began == self._step:
            began, since = self._marks[0]
        done = self._step - began
        if not done:
            return math.inf
        return (time.monotonic() - since) / done * (self._max_steps - self._step)
