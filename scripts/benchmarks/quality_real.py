#!/usr/bin/env python
"""Quality on two real sets: doubles from singles, and a held-out replicate of a knock-out.

scripts/benchmarks/quality_real.py [--quick] [--seeds 0 1 2] [--sets doubles,replicates]
    [--arc-state] [--json FILE] [SETTING=VALUE ...]

``scale pretrain`` (tiny, 500 steps), ``scale predict`` and ``scale evaluate`` on what
quality_real_sets.py cuts from the cells in ../shared/data; settings are those of ``pretrain``, in
place of the set's own: ``experiment=pretrain_replicates`` for the knock-outs, chosen among ten on
seeds 0 and 1, so that seed 2 is the test of that choice. Each seed draws new halves of the controls
and new weights. Scores of a condition are averaged over the seeds; a gain is the paired difference
to a rival (in its better form on that metric), averaged over the replicates of a gene; its 95 %
interval is Student's over the doubles or genes. Baselines have a form that is their exact mean;
ours has one too, the mean of 2,000 predicted cells per condition. Both sets are of one cell line
each: an interval says nothing about another.

``ceiling``: half of the observed cells and controls predict the other half, corrected to all cells
where that is known to be right (correlations, squared errors); a metric on which even the ceiling
does not beat the rival with an interval above 0 cannot tell models apart, and the table says so.
``--arc-state`` trains arc-state 0.11.1 too, on the knock-outs, as it has no rule for doubles: its
cells against ours, at the rate of three that is best on the held-out conditions
(quality_real_state.py).
``strong``: knock-outs with at least 10 significant genes in each of their training replicates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from machine import describe_machine
from quality_real_sets import CONTEXT, CONTROL, K562, LABEL, LIBRARY, SETS, Judged, RealSet, judged
from quality_real_state import state_predictions
from quality_runs import (
    CELLS,
    LOWER_IS_BETTER,
    MANY,
    METRICS,
    STEPS,
    Row,
    pretrain,
    read_scores,
    run_scale,
)
from state_runs import ARC_STATE

from scale.evaluate.aggregate import full_depth
from scale.evaluate.statistics import Interval, outcome_of, t_interval

UNDEFINED = "undefined"
OURS, CEILING = "ours", "replicate"
CELLS_OF_MEAN = 2_000
METHODS = (
    *(OURS, "control_copy", "perturbation_mean", "context_transfer", "additive", "linear"),
    *("stronger_single", "mean_of_doubles", ARC_STATE, CEILING),
)
TOLD = (
    *("pearson_delta", "residual_pearson", "residual_two_way", "overlap_at_n", "precision_at_n"),
    *("discrimination", "retrieval_l2", "mse", "energy_distance"),
)
"""Metrics that are compared, in the order of the table."""
NAMES = {**METRICS, "residual_two_way": "residual_pearson_two_way"}
KEY = ["context", "perturbation"]


@dataclass(frozen=True, slots=True)
class Gain:
    """What one method gains over another on one metric; positive = better."""

    subset: str
    metric: str
    ours: float
    rival: float
    rival_name: str
    ceiling: float
    gain: Interval
    headroom: Interval
    """What the ceiling gains over the rival."""

    @property
    def verdict(self) -> str:
        """better, worse, or why the data cannot tell."""
        outcome = outcome_of(self.gain.low, self.gain.high)
        if outcome != "open":
            return outcome
        if not np.isfinite(self.gain.mean):
            return UNDEFINED
        told = outcome_of(self.headroom.low, self.headroom.high) == "better"
        return "cannot tell" if told else "cannot tell: no headroom"

    def record(self) -> dict[str, Any]:
        """Return the gain for a JSON file."""
        values = {
            "ours": self.ours,
            "rival": self.rival,
            "ceiling": self.ceiling,
            "gain": self.gain.mean,
            "gain_low": self.gain.low,
            "gain_high": self.gain.high,
            "headroom": self.headroom.mean,
            "headroom_low": self.headroom.low,
            "headroom_high": self.headroom.high,
        }
        numbers = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
        facts = {"rival_name": self.rival_name, "subset": self.subset, "metric": self.metric}
        facts["verdict"] = self.verdict
        return {**facts, **numbers, "num_units": self.gain.num_units}


@dataclass(frozen=True, slots=True)
class Result:
    """What was found on one real set."""

    real: RealSet
    rows: list[Row]
    by_condition: pd.DataFrame
    """method, form, metric, seed, context, perturbation, is_strong, value."""
    cpu_seconds: float
    """Of all trainings."""

    def gains(self) -> list[Gain]:
        """Return ours against the rival, on all conditions and on the strong ones."""
        table = self.by_condition
        subsets = {"all": table}
        if 0 < table["is_strong"].sum() < len(table):
            subsets["strong"] = table[table["is_strong"]]
        rivals = [*self.real.rivals, *({ARC_STATE} & set(table["method"]))]
        return [
            gain(_comparable(part, rival), name, metric, rival)
            for rival in rivals
            for name, part in subsets.items()
            for metric in TOLD
        ]


def _comparable(table: pd.DataFrame, rival: str) -> pd.DataFrame:
    """Return what stands against a rival: cells alone against arc-state's."""
    return table[table["form"] == CELLS] if rival == ARC_STATE else table


# --- runs -----------------------------------------------------------------------------------------


def missing(real: RealSet) -> str:
    """Return why a set cannot be used; empty if it can."""
    if real.path.is_file():
        return ""
    return f"{real.name} is left out: {real.path} is not there, and does not come with the package"


def run(
    real: RealSet,
    seeds: Sequence[int],
    settings: Sequence[str],
    *,
    steps: int,
    arc_state: bool = False,
) -> Result:
    """Train, predict and judge once per seed."""
    rows, tables, seconds = [], [], 0.0
    for seed in seeds:
        cut = judged(real, seed)
        training = pretrain(cut.data, seed, settings, steps=steps)
        seconds += training.cpu_seconds
        many = _predict(cut, training.folder, [f"cells_per_condition={CELLS_OF_MEAN}"])
        predicted = {f"m_{name}": path for name, path in cut.drawn.items()}
        predicted |= {f"m_{OURS}": _predict(cut, training.folder), f"{MANY}{OURS}": many}
        if arc_state:
            predicted |= {f"m_{n}": path for n, path in state_predictions(cut, seed).items()}
        found, table = _evaluate(cut, predicted, seed)
        rows += found
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    if arc_state:
        table, rows = _best_rate(table, rows)
    return Result(real, rows, table, seconds)


def _best_rate(table: pd.DataFrame, rows: list[Row]) -> tuple[pd.DataFrame, list[Row]]:
    """Keep the rate of arc-state that has the best Pearson delta, as ``arc-state``."""
    is_state = table["method"].str.startswith(ARC_STATE)
    scores = table[is_state & (table["metric"] == "pearson_delta")]
    best = scores.groupby("method")["value"].mean().idxmax()
    print(f"{ARC_STATE}: best rate {best.rpartition('-')[2]}")
    table = table[~is_state | (table["method"] == best)].replace({"method": {best: ARC_STATE}})
    kept = [row for row in rows if row.method == best or not row.method.startswith(ARC_STATE)]
    return table, [replace(row, method=ARC_STATE) if row.method == best else row for row in kept]


def _predict(cut: Judged, training: Path, settings: Sequence[str] = ()) -> Path:
    given = [f"checkpoint={training}", f"input={cut.controls}", f"conditions={cut.conditions}"]
    keys = [f"perturbation_key={LABEL}", f"cell_type_key={CONTEXT}", f"library_key={LIBRARY}"]
    keys += [f"control={CONTROL}", "include_control=false", "overwrite=true"]
    return run_scale("predict", [*given, *keys, *settings]).folder / "predicted.h5ad"


def _evaluate(cut: Judged, predicted: dict[str, Path], seed: int) -> tuple[list[Row], pd.DataFrame]:
    names = {name: (name.partition("_")[2], seed) for name in predicted}
    files = ",".join(f"{name}={path}" for name, path in predicted.items())
    given = [f"predicted=[{files}]", f"observed={cut.observed}", f"seed={seed}"]
    given += [f"train={cut.training}", f"control={CONTROL}", "overwrite=true"]
    given += [f"perturbation_key={LABEL}", f"cell_type_key={CONTEXT}", "protocol.match_cells=true"]
    parts = ("config", "data", "evaluate", "tasks")
    done = run_scale("evaluate", given, parts=parts)
    rows = read_scores(done.folder, cut.data, names).rows
    table = pd.read_parquet(done.folder / "scores.parquet")
    table["metric"] = table["metric"].map({there: here for here, there in NAMES.items()})
    is_drawn = table["method"].str.startswith(MANY) & (table["form"] == CELLS)
    table = table[table["metric"].notna() & ~is_drawn]
    table["method"] = table["method"].replace({k: name for k, (name, _) in names.items()})
    table = table[table["method"].map(_is_told)]
    held = pd.read_csv(cut.conditions, sep="\t").rename(columns={"cell_type": CONTEXT})
    table = table.merge(held[[*KEY, "is_strong"]], on=KEY).assign(seed=seed)
    columns = ["method", "form", "metric", "seed", *KEY, "is_strong", "value"]
    return [row for row in rows if _is_told(row.method)], table[columns]


def _is_told(method: str) -> bool:
    return method in METHODS or method.startswith(ARC_STATE)


# --- what can be told -----------------------------------------------------------------------------


def values_of(table: pd.DataFrame, method: str, metric: str) -> pd.Series:
    """Return a method's values by condition, averaged over seeds, in its better form.

    A condition counts only where every seed defines it. The ceiling is corrected to all cells; for
    a correlation below 0, and for lists of genes, there is no correction.
    """
    rows = table[(table["method"] == method) & (table["metric"] == metric)]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    best = pd.Series(index=pd.MultiIndex.from_tuples([], names=KEY), dtype=np.float64)
    for _, part in rows.groupby("form"):
        kept = part.groupby(KEY)["value"].agg(lambda v: v.mean(skipna=False)).dropna()
        if best.empty or sign * kept.mean() > sign * best.mean():
            best = kept
    if method == CEILING:
        best = best.map(lambda value: full_depth(NAMES[metric], value)).fillna(best)
    return best


def gain(table: pd.DataFrame, subset: str, metric: str, rival: str) -> Gain:
    """Return the paired gains of ours and of the ceiling over a rival."""
    own, other, ceiling = (values_of(table, m, metric) for m in (OURS, rival, CEILING))
    both = own.index.intersection(other.index)
    return Gain(
        subset=subset,
        metric=metric,
        ours=_mean(own.reindex(both)),
        rival=_mean(other.reindex(both)),
        rival_name=rival,
        ceiling=_mean(ceiling.reindex(both)),
        gain=paired(own, other, metric),
        headroom=paired(ceiling, other, metric),
    )


def _mean(values: pd.Series) -> float:
    """Return the mean over perturbations of their mean over contexts."""
    return float(values.groupby(level="perturbation").mean().mean())


def paired(own: pd.Series, other: pd.Series, metric: str) -> Interval:
    """Return the gain of one over the other, averaged by perturbation, with its interval."""
    difference = (own - other).dropna() * (-1.0 if metric in LOWER_IS_BETTER else 1.0)
    if difference.empty:
        return t_interval(np.zeros(0))
    return t_interval(difference.groupby(level="perturbation").mean().to_numpy(np.float64))


# --- what is shown --------------------------------------------------------------------------------


def show(result: Result) -> None:
    """Print means of methods, then gains and what they allow to say."""
    table, real = result.by_condition, result.real
    seeds, conditions = table["seed"].nunique(), table[KEY].drop_duplicates()
    told = f"{len(conditions)} conditions of {conditions['perturbation'].nunique()} {real.unit}"
    print(f"\n{real.title}; {told}, {seeds} seeds; training {result.cpu_seconds / seeds:.0f} CPU s")
    print(f"{'':18}" + "".join(f"{metric[:15]:>17}" for metric in TOLD))
    for method in METHODS:
        means = [values_of(table, method, metric).mean() for metric in TOLD]
        if np.isfinite(means).any():
            print(f"{method:18}" + "".join(f"{_text(value):>17}" for value in means))
    for rival, gains in groupby(result.gains(), key=lambda found: found.rival_name):
        found = list(gains)
        print(f"gain over {rival}, 95 % interval over {real.unit}")
        for each in found:
            if each.verdict != UNDEFINED:
                print(f"  {sentence(each)}")
        undefined = [f"{g.metric} ({g.subset})" for g in found if g.verdict == UNDEFINED]
        if undefined:
            print(f"  cannot tell: {', '.join(undefined)}: too few significant genes, or no rival")


def sentence(found: Gain) -> str:
    """Return what a gain allows to say."""
    place = f"{found.metric} ({found.subset}):"
    interval = f"[{found.gain.low:+.3g}, {found.gain.high:+.3g}]"
    values = f"{_text(found.ours)} against {_text(found.rival)}, ceiling {_text(found.ceiling)}"
    return f"{place:30} {found.verdict}: {found.gain.mean:+.3g} {interval}; {values}"


def _text(value: float) -> str:
    return (
        "-" if not np.isfinite(value) else f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed of the doubles, 60 steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", default=None, help="names of sets, default all")
    parser.add_argument("--arc-state", action="store_true", help="train arc-state as well")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("settings", nargs="*", help="settings of pretrain instead of the set's")
    options = parser.parse_args()
    wanted = (options.sets or ("doubles" if options.quick else "doubles,replicates")).split(",")
    seeds = options.seeds[:1] if options.quick else options.seeds
    steps = 60 if options.quick else STEPS
    figures: dict[str, Any] = {"machine": describe_machine(), "steps": steps, "rows": []}
    for real in (r for r in SETS if r.name in wanted):
        if reason := missing(real):
            print(reason)
            continue
        settings = options.settings or real.settings
        wants_state = options.arc_state and real is not K562
        result = run(real, seeds, settings, steps=steps, arc_state=wants_state)
        show(result)
        figures["rows"] += [row.record() for row in result.rows]
        figures[f"{real.name}_gains"] = [found.record() for found in result.gains()]
        figures[f"{real.name}_training_cpu_seconds"] = result.cpu_seconds
        figures[f"{real.name}_settings"] = [*settings]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
