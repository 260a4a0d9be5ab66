#!/usr/bin/env python
"""How well held-out responses are predicted: ours, its ablations, baselines and arc-state 0.11.1.

scripts/benchmarks/quality.py [--quick] [--parts NAME ...] [--data-seeds 0 1 2]
    [--model-seeds 0 1 2] [--jobs N] [--json FILE] [--figure FILE.png] [--set SETTING=VALUE ...]

Parts: ``fewshot``, ``composition`` (simulated screens, quality_atlas.py), ``by_plate`` (the
predictions of ``fewshot``, each condition against control cells of its own plate: against those of
both, what a plate does to its cells is a part of every change, and a mean of training changes
carries it over), ``ablations`` of the first two, and ``unseen``, ``transfer``, ``real``, which are
scripts of their own (quality_NAME.py).

``scale pretrain`` of the tiny model, 500 steps of 12 sets of 32 cells, and ``state tx train`` of
the same width, depth and heads see the same cells, split, sets and number of treated cells;
arc-state takes more steps for it, since it trains on control cells too (quality_state.py says how
its learning rate is chosen). Both train with all control cells, predict from those of fold 0 and
are judged by ``scale evaluate`` against those of fold 1, which is where all scores come from.
Tables give means over contexts with 95 % intervals (quality_gains.py). A baseline and ours have two
forms, cells and a mean without the noise of drawn cells (ours: of 1,000 predicted cells), and stand
in the one that is better on the metric; against arc-state, cells stand against cells. Matched in
size, not in effort: the tiny model and its rate were made on such cells. Nothing here is biology.

Runs are kept in .cache/benchmarks/quality, so that a stopped benchmark goes on. ``--quick``: one
short training (150 steps) beside the baselines, and arc-state only if it was trained before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from command import run_command
from machine import describe_machine
from quality_ablations import ON_COMPOSITION, ON_FEWSHOT, OURS, Variant
from quality_atlas import composition, fewshot
from quality_gains import SHOWN, TARGETS, Table, ablation, mean_of, summary
from quality_runs import (
    LOWER_IS_BETTER,
    STEPS,
    WORK,
    Dataset,
    Done,
    Predicted,
    Row,
    evaluate,
    predicted,
    pretrain,
)
from quality_state import best_kept, best_rate, read_record, state_run
from state_runs import ARC_STATE, VERSION

SIMULATED = ("fewshot", "composition", "by_plate", "ablations")
SCRIPTS = ("unseen", "transfer", "real")
BASELINES = ("perturbation_mean", "context_transfer", "additive")
"""Of which a claim must be above each; the second is what arc-state's papers call the first."""
NOT_SHOWN = ("context_mean", "other_perturbation", "oracle_mean")
"""Floors and ceilings, whose rows are in the JSON file."""
QUICK_STEPS = 150
Made = tuple[Dataset, str, int, Predicted]
Task = Callable[[], Made]
"""Makes a prediction of a dataset by a method with a model seed."""


@dataclass(slots=True)
class Plan:
    """What is run, and what it cost."""

    data_seeds: Sequence[int]
    model_seeds: Sequence[int]
    settings: Sequence[str]
    pool: ThreadPoolExecutor
    is_quick: bool = False
    trainings: list[dict[str, Any]] = field(default_factory=list)
    """What each training was and took."""

    @property
    def steps(self) -> int:
        """Optimizer steps of a training of ours."""
        return QUICK_STEPS if self.is_quick else STEPS

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """Return what a function says of each item, some at once."""
        return list(self.pool.map(function, items))

    def note(self, data: Dataset, method: str, seed: int, run: Done, facts: dict[str, Any]) -> None:
        """Keep what a training was and took."""
        place = {"dataset": data.name, "data_seed": data.seed, "model_seed": seed}
        cost = {"method": method, "cpu_seconds": run.cpu_seconds}
        self.trainings.append({**place, **cost, **facts})


# --- one family of datasets ---------------------------------------------------------------------


def compare(plan: Plan, make: Callable[[int], Dataset], settings: Sequence[str] = ()) -> list[Row]:
    """Return scores of ours, of arc-state and of the baselines on a family of datasets.

    ``settings`` are those of the evaluation.
    """
    datasets = plan.map(make, plan.data_seeds)
    tasks: list[Task] = [
        partial(ours, plan, data, seed, Variant(OURS))
        for data in datasets
        for seed in plan.model_seeds
    ]
    return judge(plan, datasets, tasks + states(plan, datasets), settings)


def ablate(plan: Plan, make: Callable[[int], Dataset], variants: Sequence[Variant]) -> list[Row]:
    """Return scores of ours and of its variants on a family of datasets."""
    datasets = plan.map(make, plan.data_seeds)
    tasks = [
        partial(ours, plan, data, seed, variant)
        for variant in (Variant(OURS), *variants)
        for data, seed in zip(datasets, cycle(plan.model_seeds), strict=False)
    ]
    lean = ("protocol.ceiling=false", "protocol.baselines=false")
    return judge(plan, datasets, tasks, lean)


def ours(plan: Plan, data: Dataset, seed: int, variant: Variant) -> Made:
    """Train and predict with a variant of this package's model."""
    run = pretrain(data, seed, [*plan.settings, *variant.settings], steps=plan.steps)
    started = json.loads((run.folder / "run.json").read_text())["starts"][-1]
    plan.note(data, variant.name, seed, run, {"parameters": started["parameters"]})
    return data, variant.name, seed, predicted(run, data)


def states(plan: Plan, datasets: Sequence[Dataset]) -> list[Task]:
    """Return the trainings of arc-state; in a quick run those that are there."""

    def made(data: Dataset, seed: int, run: Done) -> Made:
        plan.note(data, ARC_STATE, seed, run, read_record(run))
        return data, ARC_STATE, seed, Predicted(run.folder / "predicted.h5ad")

    pairs = [(data, seed) for data in datasets for seed in plan.model_seeds]
    if plan.is_quick:
        found = [(data, seed, best_kept(data, seed)) for data, seed in pairs]
        return [partial(made, d, seed, run) for d, seed, run in found if run is not None]
    rate = best_rate(datasets[0], plan.model_seeds[0], plan.pool)
    return [lambda d=d, seed=seed: made(d, seed, state_run(d, seed, rate)) for d, seed in pairs]


def judge(
    plan: Plan,
    datasets: Sequence[Dataset],
    tasks: Sequence[Task],
    settings: Sequence[str] = (),
) -> list[Row]:
    """Run the tasks, then one evaluation per dataset."""
    found: dict[Dataset, dict[tuple[str, int], Predicted]] = {data: {} for data in datasets}
    for data, method, seed, made in plan.map(lambda task: task(), tasks):
        found[data][(method, seed)] = made
    scores = plan.map(lambda data: evaluate(data, found[data], settings), datasets)
    return [row for each in scores for row in each.rows]


# --- what is shown ------------------------------------------------------------------------------


def show(title: str, rows: Sequence[Row]) -> Table:
    """Print a table of methods, each in its better form, and return it."""
    table = Table(rows)
    units, seeds = table.units(), {row.model_seed for row in rows if row.model_seed is not None}
    data_seeds = len({row.data_seed for row in rows})
    print(f"\n{title}: {data_seeds} data seeds, {len(units)} contexts, {len(seeds)} model seeds")
    print(f"{'':22}" + "".join(f"{metric:>22}" for metric in SHOWN))
    for method in told(table):
        cells = [
            str(mean_of(table, method, table.better_form(method, metric), metric))
            for metric in SHOWN
        ]
        print(f"{method[:21]:22}" + "".join(f"{cell:>22}" for cell in cells))
    return table


def told(table: Table) -> list[str]:
    """Return the methods to show: without those that answer other questions than how good."""
    return [method for method in table.methods if method not in NOT_SHOWN]


def show_gains(title: str, found: dict[str, Any]) -> None:
    """Print gains over arc-state, and what was not reached."""
    print(f"\n{title}: relative gain of {OURS} over {ARC_STATE} {VERSION} (positive is better)")
    for metric, least in TARGETS.items():
        value, low, high = (found[f"gain_{metric}{end}"] for end in ("", "_low", "_high"))
        text = "-" if value is None else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
        print(f"  {metric:20} {text:28} aimed at {least:+.2f}")
    missed = [name for name, is_reached in found["reached"].items() if not is_reached]
    print(f"  not reached: {', '.join(missed) or 'none'}")


def show_ablation(table: Table) -> dict[str, Any]:
    """Print what the default gains over each row, and return it."""
    print(f"relative gain of {OURS} over each row (positive: the default is better)")
    found = ablation(table, OURS)
    for method, gains in found.items():
        print(f"{method[:21]:22}" + "".join(f"{gains[metric]!s:>22}" for metric in TARGETS))
    return {
        method: {metric: [g.value, g.low, g.high] for metric, g in gains.items()}
        for method, gains in found.items()
    }


def draw(table: Table, path: Path) -> None:
    """Write bars of the metrics that are compared."""
    from scale.plot.bars import score_panels
    from scale.plot.canvas import method_colours, png

    rows = []
    for method in told(table):
        for metric in TARGETS:
            form = table.better_form(method, metric)
            found = mean_of(table, method, form, metric)
            ends = {"mean": found.value, "low": found.low, "high": found.high}
            better = "lower" if metric in LOWER_IS_BETTER else "higher"
            rows.append(
                {"method": method, "form": form, "metric": metric, "better": better, **ends}
            )
    models = [m for m in (OURS, ARC_STATE) if m in table.methods]
    colours = method_colours(models, [m for m in told(table) if m not in models])
    order = {method: colours[method] for method in told(table)}
    labels = {metric: metric.replace("_", " ") for metric in TARGETS}
    figure = score_panels(pd.DataFrame(rows), list(TARGETS), labels=labels, colours=order)
    path.write_bytes(png(figure))


# --- all ----------------------------------------------------------------------------------------


def simulated(plan: Plan, parts: Sequence[str], figure: Path | None) -> dict[str, Any]:
    """Run the parts on simulated screens and return their figures."""
    record: dict[str, Any] = {"rows": [], "summary": {}}
    families = {
        "fewshot": (fewshot, (), ON_FEWSHOT),
        "by_plate": (fewshot, ("batch_key=plate",), ()),
        "composition": (composition, (), ON_COMPOSITION),
    }
    for name, (make, settings, variants) in families.items():
        if name in parts:
            rows = [replace(row, dataset=name) for row in compare(plan, make, settings)]
            table = show(name, rows)
            record["rows"] += [row.record() for row in rows]
            if ARC_STATE in table.methods and not plan.is_quick:
                record["summary"][name] = summary(table, OURS, ARC_STATE, BASELINES)
                show_gains(name, record["summary"][name])
            if figure is not None and name == "fewshot":
                draw(table, figure)
        if "ablations" in parts and variants:
            table = show(f"ablations on {name}", ablate(plan, make, variants))
            record.setdefault("ablations", []).extend(row.record() for row in table.rows)
            record[f"ablation_gains_{name}"] = show_ablation(table)
    record["trainings"] = plan.trainings
    for name, costs in pd.DataFrame(plan.trainings).groupby("method", sort=False)["cpu_seconds"]:
        print(f"{name}: {costs.mean():.0f} CPU s a training, {len(costs)} trainings")
    return record


def script(part: str, *, is_quick: bool) -> Any:
    """Run the script of a part, show what it prints and return its figures."""
    log, figures = WORK / f"{part}.log", WORK / f"{part}.json"
    command = [sys.executable, str(Path(__file__).with_name(f"quality_{part}.py"))]
    run_command([*command, "--json", str(figures), *(["--quick"] if is_quick else [])], log)
    print(f"\n{part}\n{log.read_text()}")
    return json.loads(figures.read_text())


def main() -> None:
    """Run the parts, print their tables and write the figures where asked."""
    sys.stdout.reconfigure(line_buffering=True)  # of a log file too
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = (*SIMULATED, *SCRIPTS)
    parser.add_argument("--quick", action="store_true", help="one short training of fewshot")
    parser.add_argument("--parts", nargs="+", choices=parts)
    parser.add_argument("--data-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--set", nargs="+", default=[], help="settings of our pretrain")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--figure", type=Path, help="file for a figure (png) of the few-shot screen"
    )
    arguments = parser.parse_args()
    chosen = arguments.parts or (["fewshot"] if arguments.quick else list(parts))
    record: dict[str, Any] = {
        "machine": describe_machine(),
        "is_quick": arguments.quick,
        "arc_state_version": VERSION,
        "settings": arguments.set,
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        seeds = (arguments.data_seeds, arguments.model_seeds)
        if arguments.quick:
            seeds = (arguments.data_seeds[:1], arguments.model_seeds[:1])
        plan = Plan(*seeds, arguments.set, pool, arguments.quick)
        if any(part in SIMULATED for part in chosen):
            record |= simulated(plan, chosen, arguments.figure)
        others = [part for part in SCRIPTS if part in chosen]
        found = plan.map(partial(script, is_quick=plan.is_quick), others)
        record |= dict(zip(others, found, strict=True))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
