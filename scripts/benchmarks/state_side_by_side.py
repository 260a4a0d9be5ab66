#!/usr/bin/env python
"""One report of the demo's model and of arc-state 0.11.1, trained on the same cells and split.

scripts/benchmarks/state_side_by_side.py [--quick] [--run DIR] [--folder DIR] [--json FILE]
    [--state DIR] [--lr RATE ...]

``scale demo`` simulates a drug screen, trains the tiny model and predicts the held-out conditions
of two cell lines (or take a finished run of it: ``--run runs/demo``). arc-state's ``state tx
train`` gets the same cells, the same few-shot split file and the same number of steps, of sets per
step and of cells per set, ``state tx predict`` the same held-out conditions, and ``scale evaluate``
judges both, with the baselines, in one report (FOLDER/report/report.html). It runs in the
environment that scripts/arc_state_environment makes; nothing uses the network.

Matched are the cells, the split, the treated cells seen in training, the width, depth and heads of
the set blocks, and the control cells: both train with all of them, predict from those of fold 0 and
are judged against fold 1, so the strict rules hold for both (arc-state names the control cell
behind each prediction). Not matched: this package spends most steps on four cell lines before it
meets the other two, arc-state sees all six in every step; objectives; and how much each was tuned:
the tiny model is made for such data, arc-state for atlases, larger sizes and far longer training.
Of two learning rates for it (its default and ten times that) the one with the lower loss on the
split's validation conditions is taken. Simulated cells, one seed, a training of minutes: it shows
that predictions of others can be judged beside ours, and says nothing about which model is better.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import ROOT, run_command
from machine import describe_machine
from state_runs import VERSION, Budget, run_state

from scale.config import FinetuneConfig, PretrainConfig, from_yaml
from scale.types import Vocabulary

if TYPE_CHECKING:
    from state_data import StateFiles

SCORES = (
    "residual_pearson",
    "retrieval_l2",
    "energy_ratio",
    "pearson_delta",
    "mse",
    "overlap_at_N",
    "precision_at_N",
    "discrimination_score_l1",
)


def run(command: list[str], log: Path) -> float:
    """Run a command with one thread, its words in ``log``; return its CPU seconds."""
    print(f"{log.stem}: {' '.join(command[:4])} ...", file=sys.stderr)
    return run_command(command, log).cpu


def read_budget(demo: Path) -> Budget:
    """Return what both trainings of a demo saw together."""
    first = from_yaml(demo / "pretrain" / "config.yaml", PretrainConfig)
    second = from_yaml(demo / "finetune" / "config.yaml", FinetuneConfig)
    if first.trainer.sets_per_batch != second.trainer.sets_per_batch:
        sys.exit("the demo's two trainings differ in trainer.sets_per_batch")
    return Budget(
        first.trainer.max_steps + second.trainer.max_steps,
        first.trainer.sets_per_batch,
        first.model.set_size,
        first.model,
    )


# --- arc-state ----------------------------------------------------------------------------------


def best_state(
    files: StateFiles, folder: Path, budget: Budget, rates: list[float]
) -> tuple[Path, dict[str, Any]]:
    """Train arc-state with each learning rate; return the predictions of the least val_loss."""
    trials = {}
    for rate in rates:
        place = folder / f"lr-{rate:g}"
        trials[place] = run_state(files, place, budget, rate)
    best = min(trials, key=lambda place: trials[place]["val_loss"])
    record = {"trials": list(trials.values()), "chosen": trials[best]["learning_rate"]}
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    return best / "predicted.h5ad", record


def read_state(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return what :func:`best_state` returned, of an earlier run."""
    record = json.loads((folder / "record.json").read_text())
    return folder / f"lr-{record['chosen']:g}" / "predicted.h5ad", record


# --- both ---------------------------------------------------------------------------------------


def side_by_side(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything and return the record."""
    from state_data import export  # slow to import, and not needed for --help

    from scale.model.sizes import count_parameters

    folder = arguments.folder.resolve() / ("quick" if arguments.quick else "whole")
    scale = [sys.executable, "-m", "scale"]
    record: dict[str, Any] = {"machine": describe_machine()}
    ours: dict[str, Any] = {}
    demo = arguments.run
    if demo is None:
        demo = folder / "demo"
        steps = ["steps=20", "finetune_steps=10"] if arguments.quick else []
        seconds = run([*scale, "demo", f"run_dir={demo}", *steps], folder / "demo.log")
        ours["cpu_seconds_all"] = round(seconds, 1)
    demo = demo.resolve()
    budget = read_budget(demo)
    vocabulary = Vocabulary.read(demo / "finetune" / "export" / "vocabulary.json")
    ours["parameters"] = count_parameters(budget.model, vocabulary)
    if arguments.state is None:
        files = export(demo / "store", demo / "fewshot.toml", folder / "cells")
        rates = arguments.lr[:1] if arguments.quick else arguments.lr
        output, theirs = best_state(files, folder / "state", budget, rates)
    else:
        output, theirs = read_state(arguments.state.resolve())
    report = folder / "report"
    predictions = f"scale={demo / 'predict' / 'predicted.h5ad'},arc-state={output}"
    run(
        [
            *scale,
            "evaluate",
            f"predicted=[{predictions}]",
            f"observed={demo / 'store'}",
            f"split={demo / 'fewshot.toml'}",
            f"run_dir={report}",
            "overwrite=true",
        ],
        folder / "evaluate.log",
    )
    means = json.loads((report / "summary.json").read_text())
    meta = json.loads((report / "meta.json").read_text())
    return record | {
        "note": "simulated cells, one seed, a training of minutes: no claim about either model",
        "is_quick": arguments.quick,
        "arc_state_version": VERSION,
        "matched": {
            "steps": budget.steps,
            "sets_per_step": budget.sets_per_step,
            "treated_cells_per_set": budget.cells_per_set,
            "treated_cells_seen": budget.treated_cells,
            "set_blocks": f"{budget.model.num_layers} layers of width {budget.model.hidden_size}",
            "cells_and_split": "the store and fewshot.toml of the demo",
            "controls": "all in training, fold 0 to predict from, fold 1 to compare with",
        },
        "not_matched": [
            "this package pretrains on four lines, then meets the two new ones in a sixth of the "
            "steps; arc-state trains on all six",
            "objectives, encoders and decoders, and how much each was tuned for such data",
        ],
        "scale": ours,
        "arc-state": theirs,
        "evaluation": {key: meta.get(key) for key in ("profile", "control_rule", "warnings")},
        "scores": {
            method: {name: values[name] for name in SCORES if name in values}
            for method, values in means.items()
        },
    }


def main() -> None:
    """Run, print the record and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="30 steps: does it run at all")
    parser.add_argument("--run", type=Path, help="a finished run of scale demo, to make none")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".cache" / "benchmarks" / "state_side_by_side"
    )
    parser.add_argument("--state", type=Path, help="FOLDER/state of an earlier run, to train none")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 1e-3], help="of arc-state")
    parser.add_argument("--json", type=Path, help="file for the record")
    arguments = parser.parse_args()
    record = side_by_side(arguments)
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if arguments.json is not None:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
