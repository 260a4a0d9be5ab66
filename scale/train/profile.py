"""A trace of some steps of a run: where their time goes, on the host and on the device.

``trainer.profile_steps=N`` writes, of the N steps after the first ten of a start, ``profile/`` in
the run directory: a trace that https://ui.perfetto.dev and chrome://tracing open, and a table of
the operators that took longest. Ranks do alike, so the first one alone is traced.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from scale.runtime import atomic_path
from scale.train.log import FIRST_STEPS

logger = logging.getLogger(__name__)

_TOP_OPERATORS = 40


class StepProfiler:
    """Traces steps of a run, if any are asked for.

    Parameters
    ----------
    run_dir
        Directory of the run.
    num_steps
        Steps to trace; 0 = none.
    first_step
        Steps that were done before this start.
    is_writer
        Whether this rank traces.
    """

    def __init__(self, run_dir: Path, num_steps: int, *, first_step: int, is_writer: bool) -> None:
        self._folder = run_dir / "profile"
        self._steps = range(0)
        if num_steps and is_writer:
            begin = first_step + FIRST_STEPS + 1
            self._steps = range(begin, begin + num_steps)
        self._last = 0
        self._profile: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace what happens in the ``with`` block, if it is a step that was asked for."""
        if number not in self._steps:
            yield
            return
        if self._profile is None:
            self._profile = profile(activities=_activities())
            self._profile.start()
        with record_function(f"step {number}"):
            yield
        self._last = number
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write what was traced; a run that ends before its time writes fewer steps."""
        if self._profile is None:
            if self._steps and self._last == 0:
                logger.warning(
                    "no trace: the run ended before step %d, the first that "
                    "trainer.profile_steps asks for",
                    self._steps[0],
                )
            return
        traced, self._profile = self._profile, None
        traced.stop()
        name = f"steps-{self._steps[0]}-{self._last}"
        trace = self._folder / f"{name}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        traced.export_chrome_trace(str(trace))
        with atomic_path(self._folder / f"{name}.txt") as temporary:
            temporary.write_text(_table(traced))
        logger.info("trace of steps %d to %d: %s", self._steps[0], self._last, trace)


def _activities() -> list[ProfilerActivity]:
    on_device = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *on_device]


def _table(traced: profile) -> str:
    """Return the operators by the time they took themselves, of the device if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table: str = traced.key_averages().table(
        sort_by=f"self_{device}_time_total", row_limit=_TOP_OPERATORS, max_name_column_width=60
    )
    return table
