#!/usr/bin/env python
"""Pretrain on an atlas, finetune on another with half its genes new, against training from scratch.

scripts/benchmarks/quality_transfer.py [--quick] [--seeds 0 1 2] [--json FILE] [SETTING=VALUE ...]

One simulated world of 10 cell lines x 32 drugs x 750 genes is cut into two atlases of other lines:
six lines, drugs 1 to 24, genes 1 to 500; and four lines, drugs 9 to 32, genes 251 to 750. So half
the genes of the second are new, as are a third of its drugs, its lines and its plates. In its last
two lines 17 of the 24 drugs are held out and predicted. ``scale pretrain`` (tiny, 500 steps) on the
first, ``scale finetune replace_genes=true`` on the second with K steps, and ``scale pretrain`` on
the second with K steps; settings are those of both trainings on the second. ``scale evaluate``
gives the scores.

Asked: is finetuning better than scratch at the same number of steps, and as good with half of them?
A gain is paired over the held-out lines of all seeds; its 95 % interval is Student's over them.
Nothing here is biology.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine
from quality_atlas import screen_settings
from quality_runs import (
    CELLS,
    LOWER_IS_BETTER,
    SPLIT,
    STEPS,
    Dataset,
    Predicted,
    Row,
    evaluate,
    finetune,
    make_dataset,
    predict,
    pretrain,
)

from scale.data.simulate import Atlas, SimulationConfig, simulate
from scale.evaluate.statistics import outcome_of, t_interval

# 96 cells of a condition and 512 controls of a line and plate.
WORLD = SimulationConfig(
    num_cells=40_960,
    num_lines=10,
    num_drugs=32,
    num_genes=750,
    mean_library=1_875.0,
    num_inert=4,
)
NUM_FIRST_LINES, NUM_DRUGS, NUM_GENES = 6, 24, 500
NUM_NEW_DRUGS, NUM_NEW_GENES = 8, 250
NUM_HELD_OUT_LINES, NUM_HELD_OUT_DRUGS = 2, 17
TOLD = (
    *("pearson_delta", "residual_pearson", "overlap_at_n", "precision_at_n"),
    *("discrimination", "mse", "energy_distance"),
)
FINETUNED, SCRATCH = "finetuned", "scratch"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    seeds: Sequence[int]
    steps: Sequence[int]
    """On the second atlas."""
    settings: Sequence[str] = ()
    pretraining_steps: int = STEPS


@dataclass(frozen=True, slots=True)
class Gain:
    """What finetuning with some steps gains over scratch with others; positive = better."""

    finetuned_steps: int
    scratch_steps: int
    metric: str
    finetuned: float
    scratch: float
    gain: float
    low: float
    high: float
    num_lines: int
    outcome: str
    """better, worse or open."""


def atlases(seed: int, world: SimulationConfig = WORLD) -> tuple[Dataset, Dataset]:
    """Return the atlas to pretrain on, without a split, and the one to finetune on."""
    config = replace(world, seed=seed)

    def write_first(folder: Path) -> list[str]:
        atlas = _simulated(config)
        lines, drugs = atlas.lines[:NUM_FIRST_LINES], atlas.drugs[:NUM_DRUGS]
        return _write(folder, atlas.part(lines, drugs, atlas.genes[:NUM_GENES]), "first")

    def write_second(folder: Path) -> list[str]:
        atlas = _simulated(config)
        lines, drugs = atlas.lines[NUM_FIRST_LINES:], atlas.drugs[NUM_NEW_DRUGS:]
        generator = np.random.default_rng([seed, 78])
        held_out = {
            line: sorted(generator.choice(drugs, NUM_HELD_OUT_DRUGS, replace=False).tolist())
            for line in lines[-NUM_HELD_OUT_LINES:]
        }
        _write_split(folder / SPLIT, held_out)
        return _write(folder, atlas.part(lines, drugs, atlas.genes[NUM_NEW_GENES:]), "second")

    return (
        make_dataset("first", seed, asdict(config), write_first),
        make_dataset("second", seed, asdict(config), write_second),
    )


@cache
def _simulated(config: SimulationConfig) -> Atlas:
    return simulate(config)


def _write(folder: Path, cells: Any, name: str) -> list[str]:
    """Write the cells, on plates of their own."""
    cells.obs["plate"] = [f"{name}-{plate}" for plate in cells.obs["plate"]]
    cells.write_h5ad(folder / "cells.h5ad")
    return screen_settings(folder / "cells.h5ad")


def _write_split(path: Path, held_out: dict[str, list[str]]) -> None:
    lines = ['[datasets]\nsynthetic = "."\n\n[training]\nsynthetic = "train"\n']
    for line, drugs in held_out.items():
        lines.append(f'[fewshot."synthetic.{line}"]\ntest = {json.dumps(drugs)}\n')
    path.write_text("\n".join(lines))


def run(plan: Plan) -> list[Row]:
    """Return scores on the second atlas; methods are ``finetuned K`` and ``scratch K``."""
    rows = []
    for seed in plan.seeds:
        first, second = atlases(seed)
        start = pretrain(first, seed, ["data.split=null"], steps=plan.pretraining_steps)
        predicted = {}
        for steps in plan.steps:
            settings = ["replace_genes=true", *plan.settings]
            runs = {
                FINETUNED: finetune(start, second, seed, settings, steps=steps),
                SCRATCH: pretrain(second, seed, plan.settings, steps=steps),
            }
            for name, done in runs.items():
                cells = predict(done, second).folder / "predicted.h5ad"
                predicted[(f"{name} {steps}", seed)] = Predicted(cells)
        rows += evaluate(second, predicted, ["protocol.ceiling=false"]).rows
    return rows


def gains(rows: Sequence[Row], plan: Plan) -> list[Gain]:
    """Return finetuned against scratch at the same number of steps, and with half of them."""
    pairs = [(k, k) for k in plan.steps]
    pairs += [(k, 2 * k) for k in plan.steps if 2 * k in plan.steps]
    return [_gain(rows, pair, metric) for pair in pairs for metric in TOLD]


def _gain(rows: Sequence[Row], steps: tuple[int, int], metric: str) -> Gain:
    ours, theirs = (
        _by_line(rows, f"{name} {number}", metric)
        for name, number in zip((FINETUNED, SCRATCH), steps, strict=True)
    )
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    found = t_interval(np.array([sign * (ours[line] - theirs[line]) for line in sorted(ours)]))
    return Gain(
        *(*steps, metric, _mean(ours.values()), _mean(theirs.values())),
        *(found.mean, found.low, found.high),
        *(found.num_units, outcome_of(found.low, found.high)),
    )


def _mean(values: Iterable[float]) -> float:
    """Return the mean of what is defined; NaN if nothing is."""
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else float("nan")


def _by_line(rows: Sequence[Row], method: str, metric: str) -> dict[tuple[int, str], float]:
    """Return the score of each held-out line of each seed."""
    return {
        (row.data_seed, line): value
        for row in rows
        if row.method == method and row.form == CELLS
        for line, value in row.by_context.get(metric, {}).items()
    }


def show(rows: Sequence[Row], found: Sequence[Gain]) -> None:
    """Print means of methods, then gains."""
    methods = dict.fromkeys(row.method for row in rows)
    print(f"{'':18}" + "".join(f"{metric[:15]:>17}" for metric in TOLD))
    for method in methods:
        means = [_mean(_by_line(rows, method, metric).values()) for metric in TOLD]
        print(f"{method:18}" + "".join(f"{value:>17.4f}" for value in means))
    for gain in found:
        place = f"finetuned {gain.finetuned_steps} against scratch {gain.scratch_steps}"
        values = f"{gain.finetuned:.4f} against {gain.scratch:.4f}"
        told = f"{gain.gain:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        print(f"{place:34} {gain.metric:18} {gain.outcome:7} {told}; {values}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, 100 steps, then 20")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("settings", nargs="*", help="settings of the training on the second atlas")
    options = parser.parse_args()
    plan = Plan(options.seeds, sorted(options.steps), options.settings)
    if options.quick:
        plan = Plan(options.seeds[:1], [20], options.settings, pretraining_steps=100)
    rows = run(plan)
    found = gains(rows, plan)
    show(rows, found)
    if options.json:
        figures = {
            "machine": describe_machine(),
            "steps": [*plan.steps],
            "pretraining_steps": plan.pretraining_steps,
            "rows": [row.record() for row in rows],
            "gains": [
                {name: _finite(getattr(gain, name)) for name in gain.__slots__} for gain in found
            ],
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


if __name__ == "__main__":
    main()
