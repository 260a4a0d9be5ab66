"""The pieces of the quality benchmarks: runs of ``scale``, kept by what they were asked for.

Every run (a store, a training, a prediction, an evaluation) has a folder named by a hash of its
settings and of the source files that decide its numbers. A run that is there is not made again, so
that a stopped benchmark goes on where it was, and two benchmarks share what they have in common;
a changed line of the package makes its runs anew and leaves the old ones alone.

    data = make_dataset("fewshot", seed, key, write)     # write(folder) -> settings of prepare
    run = pretrain(data, seed, ["objective.time=zero"])
    rows = evaluate(data, {("ours", seed): predicted(run, data)})
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from command import ROOT, run_command

WORK = ROOT / ".cache" / "benchmarks" / "quality"
SPLIT = "split.toml"
STAMP = "made.json"
STEPS = 500
"""Optimizer steps of a training, of 12 sets of 32 cells: 192,000 treated cells."""

METRICS = {
    "pearson_delta": "pearson_delta",
    "overlap_at_n": "overlap_at_N",
    "precision_at_n": "precision_at_N",
    "discrimination": "discrimination_score_l1",
    "mse": "mse",
    "energy_distance": "energy_distance",
    "residual_pearson": "residual_pearson",
    "retrieval_l2": "retrieval_l2",
    "energy_ratio": "energy_ratio",
    "variance_log_ratio": "variance_log_ratio",
    "num_de_ratio": "num_significant_ratio",
}
"""Name here -> name in the tables of ``scale evaluate``."""
CELLS, MEAN = "cells", "mean"
"""Forms of a prediction: cells, and the mean of many more of them, where it has one."""
CELLS_OF_MEAN = 1_000
"""Cells of a condition whose mean is the second form of ours."""
LOWER_IS_BETTER = frozenset({"mse", "energy_distance", "energy_ratio"})
MANY = "many_"
"""How the report calls a prediction of more cells, of which only the mean is scored."""
_PREDICTION = ("config", "data", "model", "predict", "tasks", "train")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A prepared store, what is held out of it, and the seed of its cells."""

    name: str
    seed: int
    store: Path
    split: Path


@dataclass(frozen=True, slots=True)
class Done:
    """A finished run: its folder, and the CPU seconds that it took when it was made."""

    folder: Path
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    """Scores of one method on one dataset.

    Parameters
    ----------
    dataset, data_seed, model_seed, method
        What was scored; ``model_seed`` is None for a baseline.
    form
        ``cells``, or ``mean``: the exact mean of a baseline, or that of many predicted cells; it
        has no scores of cells.
    by_context
        Metric -> mean over the conditions of each context.
    within_variance_ratio
        Sum of the predicted variances within sets over that of the observed ones.
    """

    dataset: str
    data_seed: int
    model_seed: int | None
    method: str
    form: str
    by_context: dict[str, dict[str, float]]
    within_variance_ratio: float | None = None

    def mean(self, metric: str) -> float:
        """Return the mean over contexts; NaN if no context has it."""
        values = [v for v in self.by_context.get(metric, {}).values() if np.isfinite(v)]
        return float(np.mean(values)) if values else float("nan")

    def record(self) -> dict[str, Any]:
        """Return the row for a JSON file."""
        means = {name: self.mean(name) for name in METRICS}
        means["variance_ratio"] = float(np.exp(means["variance_log_ratio"]))
        return {
            "dataset": self.dataset,
            "data_seed": self.data_seed,
            "model_seed": self.model_seed,
            "method": self.method,
            "form": self.form,
            **{name: value if np.isfinite(value) else None for name, value in means.items()},
            "within_variance_ratio": self.within_variance_ratio,
        }


# --- runs that are kept -------------------------------------------------------------------------


@cache
def sources(*parts: str) -> str:
    """Return a hash of the package's files in these parts, and of all settings files."""
    found = hashlib.sha256()
    files = [ROOT / "scale" / f"{name}.py" for name in ("draws", "runtime", "types")]
    for part in parts:
        files += (ROOT / "scale" / part).rglob("*.py")
    files += (ROOT / "configs").rglob("*.yaml")
    for path in sorted(files):
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def kept(kind: str, key: Any, make: Callable[[Path], float]) -> Done:
    """Return the run of this kind and key, made by ``make(folder) -> CPU seconds`` if it is not.

    Processes and threads that want the same run wait for the one that makes it.
    """
    folder = _folder(kind, key)
    with _alone(folder):
        if (done := find_kept(kind, key)) is not None:
            return done
        folder.mkdir(parents=True, exist_ok=True)
        seconds = round(make(folder), 1)
        text = json.dumps({"cpu_seconds": seconds, "key": key}, indent=1, default=str)
        (folder / STAMP).write_text(text + "\n")
        return Done(folder, seconds)


def find_kept(kind: str, key: Any) -> Done | None:
    """Return the run of this kind and key, if it was made before."""
    stamp = _folder(kind, key) / STAMP
    if not stamp.exists():
        return None
    return Done(stamp.parent, float(json.loads(stamp.read_text())["cpu_seconds"]))


def _folder(kind: str, key: Any) -> Path:
    text = json.dumps(key, sort_keys=True, default=str)
    return WORK / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_scale(
    task: str, settings: Sequence[str], *, parts: tuple[str, ...] = _PREDICTION, key: Any = None
) -> Done:
    """Run ``scale TASK`` in a folder of its own, one thread.

    Parameters
    ----------
    settings
        Overrides; paths in them should be those of other runs, whose names say what is in them.
    parts
        Folders of the package whose files decide the numbers.
    key
        What else tells this run from others.
    """

    def make(folder: Path) -> float:
        print(f"{task}: {folder.name}", file=sys.stderr)
        command = [sys.executable, "-m", "scale", task, *settings, f"run_dir={folder}"]
        return run_command(command, folder / "words.log").cpu

    return kept(task, [task, list(settings), sources(*parts), key], make)


# --- data, training, prediction -----------------------------------------------------------------


def make_dataset(name: str, seed: int, key: Any, write: Callable[[Path], list[str]]) -> Dataset:
    """Return a dataset with its store.

    Parameters
    ----------
    name, seed
        As rows name it.
    key
        All that decides the cells and the split.
    write
        Writes the cells and ``split.toml`` into a folder and returns the settings of ``prepare``
        that read them.
    """

    def make(folder: Path) -> float:
        settings = [*write(folder), f"store={folder / 'store'}", f"run_dir={folder / 'prepare'}"]
        command = [sys.executable, "-m", "scale", "prepare", *settings, "overwrite=true"]
        return run_command(command, folder / "prepare.log").cpu

    done = kept("data", [name, seed, key], make)
    return Dataset(name, seed, done.folder / "store", done.folder / SPLIT)


def training_settings(data: Dataset, seed: int, steps: int = STEPS) -> list[str]:
    """Return the settings of a short training on a CPU, as in ``scale demo``."""
    return [
        f"data.store={data.store}",
        f"data.split={data.split}",
        f"trainer.max_steps={steps}",
        f"trainer.seed={seed}",
        "trainer.log_every_steps=50",
        f"validation.every_steps={steps}",
        f"checkpoint.every_steps={steps}",
        f"optimizer.warmup_steps={max(1, min(50, steps // 5))}",
        "optimizer.ema_decay=0.99",
    ]


def pretrain(data: Dataset, seed: int, settings: Sequence[str] = (), *, steps: int = STEPS) -> Done:
    """Train from scratch; ``settings`` come last and win."""
    return run_scale("pretrain", ["model=tiny", *training_settings(data, seed, steps), *settings])


def finetune(
    start: Done, data: Dataset, seed: int, settings: Sequence[str] = (), *, steps: int = STEPS
) -> Done:
    """Go on from a training with other data."""
    first = f"start_from={start.folder}"
    return run_scale("finetune", [first, *training_settings(data, seed, steps), *settings])


def predict(run: Done, data: Dataset, settings: Sequence[str] = ()) -> Done:
    """Predict the test conditions into ``predicted.h5ad`` of the run's folder."""
    given = [f"checkpoint={run.folder}", f"store={data.store}", f"split={data.split}"]
    return run_scale("predict", [*given, "overwrite=true", *settings])


@dataclass(frozen=True, slots=True)
class Predicted:
    """Files of a prediction.

    Parameters
    ----------
    cells
        As many cells as were observed.
    many
        More cells, of which the mean is scored and nothing else; None = no second form.
    """

    cells: Path
    many: Path | None = None


def predicted(run: Done, data: Dataset) -> Predicted:
    """Return both forms of what a training predicts for the test conditions."""
    many = predict(run, data, [f"cells_per_condition={CELLS_OF_MEAN}", "include_control=false"])
    return Predicted(predict(run, data).folder / "predicted.h5ad", many.folder / "predicted.h5ad")


# --- scores -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Scores:
    """Rows of an evaluation, and the table of conditions they are means of."""

    rows: list[Row] = field(default_factory=list)
    by_condition: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One row per method, model seed, form, context, perturbation and metric: value."""


def evaluate(
    data: Dataset, predicted: Mapping[tuple[str, int], Predicted], settings: Sequence[str] = ()
) -> Scores:
    """Judge predictions, by (method, model seed), with all baselines, in one evaluation."""
    names, files = {}, []
    for number, (method, made) in enumerate(predicted.items()):
        for name, path in ((f"m{number}", made.cells), (f"{MANY}{number}", made.many)):
            if path is not None:
                names[name] = method
                files.append(f"{name}={path}")
    given = [f"predicted=[{','.join(files)}]", f"observed={data.store}", f"split={data.split}"]
    given.append("protocol.match_cells=true")  # of many cells as many are drawn as were observed
    parts = ("config", "data", "evaluate", "tasks")
    done = run_scale("evaluate", [*given, "overwrite=true", *settings], parts=parts)
    return read_scores(done.folder, data, names)


def read_scores(folder: Path, data: Dataset, names: Mapping[str, tuple[str, int]]) -> Scores:
    """Return the scores of a report; ``names``: method in the report -> method, model seed."""
    here = {column: name for name, column in METRICS.items()}
    table = pd.read_parquet(folder / "scores.parquet")
    is_drawn = table["method"].str.startswith(MANY) & (table["form"] == CELLS)
    table = table[table["metric"].isin(list(here)) & ~is_drawn]
    table = table.assign(metric=table["metric"].map(here))
    collapse = json.loads((folder / "collapse.json").read_text())
    scores = Scores(by_condition=table.rename(columns={"method": "name"}))
    for (name, form), part in table.groupby(["method", "form"], sort=False):
        method, model_seed = names.get(name, (name, None))
        means = part.groupby(["metric", "unit"])["value"].mean()
        by_context = {metric: means[metric].to_dict() for metric in part["metric"].unique()}
        told = collapse.get(name, {}) if form == CELLS else {}
        place = (data.name, data.seed, model_seed, method, form)
        scores.rows.append(Row(*place, by_context, told.get("within_variance_ratio")))
    of_names = pd.DataFrame.from_dict(names, orient="index", columns=["method", "model_seed"])
    scores.by_condition = scores.by_condition.join(of_names, on="name")
    scores.by_condition["method"] = scores.by_condition["method"].fillna(
        scores.by_condition["name"]
    )
    return scores
