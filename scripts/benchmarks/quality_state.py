"""arc-state on a dataset of the quality benchmarks: as many treated cells seen, its best rate.

arc-state trains on control cells too, as targets; its steps are as many as it takes to see as many
treated cells as this package does in its own, so that it makes more of them. The width, depth and
heads of the set blocks, the cells per set and the sets per step are those of ``model=tiny``. Of
some learning rates the one with the least loss on the validation conditions is taken, on the first
seed of a dataset, and kept for the others.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

from quality_runs import STEPS, Dataset, Done, find_kept, kept
from state_data import StateFiles, export
from state_runs import VERSION, Budget, run_state

from scale.config import compose
from scale.data.split import Split
from scale.data.store import CellSetStore

RATES = (1e-4, 1e-3, 3e-3)
"""arc-state's default, made for far longer trainings, and ten and thirty times that."""
_HYDRA = threading.Lock()  # a composition is global to the process


def state_budget(data: Dataset, steps: int = STEPS) -> Budget:
    """Return the budget by which arc-state sees at least as many treated cells as we do."""
    with _HYDRA:
        config = compose("pretrain", ["model=tiny", f"data.store={data.store}"], run_dir="none")
    sets, size = config.trainer.sets_per_batch, config.model.set_size
    with CellSetStore.open(str(data.store)) as store:
        table = store.conditions
        part_C = Split.read(data.split).assign(table, store.perturbations, labels=store.labels)
    is_control_C = table["is_control"].to_numpy(dtype=bool)
    sets_C = -(-table["num_cells"].to_numpy() // size)
    treated = int(sets_C[~is_control_C & (part_C == "train")].sum())
    per_epoch = ceil((treated + int(sets_C[is_control_C].sum())) / sets)  # the last may be short
    return Budget(ceil(steps * sets / treated * per_epoch), sets, size, config.model)


def state_run(data: Dataset, seed: int, rate: float, *, steps: int = STEPS) -> Done:
    """Return a run of arc-state; its folder holds ``predicted.h5ad`` and ``record.json``."""
    files = kept_files(data, lambda folder: export(data.store, data.split, folder))
    return run_on(files, data, seed, rate, steps=steps)


def run_on(files: StateFiles, data: Dataset, seed: int, rate: float, *, steps: int = STEPS) -> Done:
    """Return a run of arc-state on files that were written for a dataset."""
    budget = state_budget(data, steps)

    def make(folder: Path) -> float:
        record = run_state(files, folder, budget, rate, seed)
        record |= {"seed": seed, "steps": budget.steps, "version": VERSION}
        (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        return float(record["cpu_seconds_train"]) + float(record["cpu_seconds_predict"])

    return kept("state", _key(data, seed, rate, budget), make)


def best_rate(data: Dataset, seed: int, pool: Executor) -> float:
    """Return the rate of the least validation loss."""
    runs = list(pool.map(lambda rate: state_run(data, seed, rate), RATES))
    return float(min((read_record(run) for run in runs), key=_loss)["learning_rate"])


def best_kept(data: Dataset, seed: int) -> Done | None:
    """Return the best of the runs that were made before, if there is one."""
    budget = state_budget(data)
    runs = [find_kept("state", _key(data, seed, rate, budget)) for rate in RATES]
    return min((run for run in runs if run), key=lambda run: _loss(read_record(run)), default=None)


def _key(data: Dataset, seed: int, rate: float, budget: Budget) -> list[Any]:
    sizes = [budget.model.hidden_size, budget.model.num_layers, budget.model.num_heads]
    steps = [budget.steps, budget.sets_per_step, budget.cells_per_set]
    return [VERSION, str(data.store), seed, rate, *steps, *sizes, budget.model.ffn_hidden_size]


def _loss(record: dict[str, Any]) -> float:
    return float(record["val_loss"])


def read_record(run: Done) -> dict[str, Any]:
    """Return what a run of arc-state cost and found."""
    record: dict[str, Any] = json.loads((run.folder / "record.json").read_text())
    return record


def kept_files(data: Dataset, write: Callable[[Path], StateFiles]) -> StateFiles:
    """Return the cells of a dataset as arc-state reads them, written once."""

    def make(folder: Path) -> float:
        begin = time.thread_time()
        files = asdict(write(folder))
        (folder / "files.json").write_text(json.dumps(files, default=str))
        return time.thread_time() - begin

    done = kept("state-cells", str(data.store), make)
    given = json.loads((done.folder / "files.json").read_text())
    paths = {name: Path(given[name]) for name in ("training", "prediction")}
    return StateFiles(**{**given, **paths})
