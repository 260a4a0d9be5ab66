"""One round of plan.py in a process of its own: plan_process.py STORE NUM_BLOCKS."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from scale.config import DataConfig
from scale.data.module import CellSetDataModule
from scale.data.sampler import SetPlan

SETS_PER_BLOCK, EPOCHS = 16, 1_000


def memory_mb(name: str) -> float:
    """Return a line of /proc/self/status in MB of 10^6 bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {name}")


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def load_machine_code() -> None:
    """Ask a plan over two conditions for sets: its code is the same for any number of them."""
    names = {"cell_type": "line", "batch": "plate", "is_control": [False, True]}
    conditions = pd.DataFrame({**names, "num_cells": [256 * 5_000, 1_000]})
    plan = SetPlan(conditions, [0], [1], DataConfig(), set_size=256, num_summary_cells=256, seed=0)
    plan.block(np.arange(SETS_PER_BLOCK))


def main() -> None:
    """Measure and print one line."""
    store, num_blocks = sys.argv[1], int(sys.argv[2])
    start, start_private = memory_mb("VmRSS"), memory_mb("RssAnon")
    code_seconds = seconds(load_machine_code)
    before, before_private = memory_mb("VmRSS"), memory_mb("RssAnon")
    begin, cpu = time.perf_counter(), time.process_time()
    module = CellSetDataModule(DataConfig(store=store), set_size=256, num_summary_cells=256, seed=0)
    plan = module.train_plan
    open_seconds = time.perf_counter() - begin
    figures = {
        "startup_seconds": open_seconds + code_seconds,
        "open_seconds": open_seconds,
        "open_cpu_seconds": time.process_time() - cpu,
        "machine_code_seconds": code_seconds,
    }
    block = np.arange(SETS_PER_BLOCK)
    figures["resume_seconds"] = seconds(lambda: plan.block(block + 10**9))
    figures["resume_seconds_at_0"] = seconds(lambda: plan.block(block))
    last = plan.num_sets_per_epoch * EPOCHS - SETS_PER_BLOCK
    starts = np.random.default_rng(0).integers(0, last, num_blocks)
    begin, cpu = time.perf_counter(), time.process_time()
    for first in starts.tolist():
        plan.block(block + first)
    num_sets = num_blocks * SETS_PER_BLOCK
    figures["us_per_set"] = (time.process_time() - cpu) / num_sets * 1e6
    figures["wall_us_per_set"] = (time.perf_counter() - begin) / num_sets * 1e6
    figures["sets_per_epoch"] = plan.num_sets_per_epoch
    figures["resident_mb"] = memory_mb("VmRSS") - before
    figures["private_mb"] = memory_mb("RssAnon") - before_private
    figures["resident_with_machine_code_mb"] = memory_mb("VmRSS") - start
    figures["private_with_machine_code_mb"] = memory_mb("RssAnon") - start_private
    figures["plan_arrays_mb"] = sum(getattr(a, "nbytes", 0) for a in vars(plan).values()) / 1e6
    figures["process_resident_mb"] = memory_mb("VmRSS")
    print("RESULT" + json.dumps(figures))


main()
