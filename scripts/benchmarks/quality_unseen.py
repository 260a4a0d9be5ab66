#!/usr/bin/env python
"""Perturbations and cell lines that no training saw: ours beside the rule that is hard to beat.

scripts/benchmarks/quality_unseen.py [--quick] [--parts drugs lines donors] [--data-seeds 0 1 2]
    [--model-seeds 0 1 2] [--json FILE] [--set SETTING=VALUE ...]

``drugs``: a simulated screen whose drugs share programmes by mechanism; of each mechanism one drug
is held out in every line, and known by a fingerprint only: the bits of its mechanism, a fifth of
them lost, and some of its own. Rival: ``mechanism_mean``, the training drugs of the same mechanism
in the same line, which is told the mechanism outright: cells of these drugs, as many from each, and
the mean of all of them.

``lines``: a screen of which whole lines are held out, of which a model sees control cells at
prediction and nothing else. Rival: ``context_transfer``, the mean change of the drug in all
training lines. What of a response is particular to a line is drawn, and not to be known.

``donors``: the same, where it is to be known: a response depends on how a donor mixes two states of
cells, and its control cells show the mixture (quality_atlas.py). Same rival.

All screens are of one plate. Changes are measured against the control cells of a line: with drugs
on several plates, what a plate does to its cells is a part of them, a rule of training means
carries it over, and a model that starts from control cells of the same plate does not.

Ours is ``scale pretrain`` of the tiny model, 500 steps of 12 sets of 32 cells: as many predicted
cells as observed ones, and the mean of 1,000. A gain is the paired difference of ours to the rival,
each in the form that is better on the metric; its 95 % interval is Student's over lines. Nothing
here is biology.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from machine import describe_machine
from quality_atlas import composition, screen_settings
from quality_runs import (
    CELLS,
    LOWER_IS_BETTER,
    MEAN,
    SPLIT,
    STEPS,
    Dataset,
    Predicted,
    Row,
    evaluate,
    kept,
    make_dataset,
    predicted,
    pretrain,
    run_scale,
)

from scale.data.simulate import Atlas, SimulationConfig, simulate
from scale.data.store import CellSetStore
from scale.evaluate.statistics import t_interval

OURS = "ours"
MECHANISM_MEAN = "mechanism_mean"
CELLS_OF_CONDITION = 128
NUM_MECHANISMS, NUM_BITS, BITS_OF_MECHANISM = 8, 128, 16
KEPT_BITS, OWN_BITS = 0.8, 0.05
"""Chance of a mechanism's bit in each of its drugs, and of any other bit."""
DRUGS = SimulationConfig(
    num_cells=5 * 32 * CELLS_OF_CONDITION * 4 // 3,
    num_lines=5,
    num_drugs=32,
    num_genes=500,
    num_plates=1,
    num_mechanisms=NUM_MECHANISMS,
    num_inert=1,
    mean_library=1_250.0,
)
LINES = SimulationConfig(
    num_cells=16 * 12 * CELLS_OF_CONDITION * 4 // 3 // 2,
    num_lines=16,
    num_drugs=12,
    num_genes=500,
    num_plates=1,
    mean_library=1_250.0,
)
NUM_HELD_LINES = 4
SHOWN = (
    *("residual_pearson", "pearson_delta", "mse", "retrieval_l2", "discrimination"),
    *("overlap_at_n", "energy_distance"),
)
LEAN = ("protocol.ceiling=false",)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run: seeds, steps of a training, further settings of ``pretrain``."""

    parts: Sequence[str] = ("drugs", "lines", "donors")
    data_seeds: Sequence[int] = (0, 1, 2)
    model_seeds: Sequence[int] = (0, 1, 2)
    steps: int = STEPS
    training: Sequence[str] = ()


def run(settings: Settings) -> list[Row]:
    """Return the rows of all parts: ours, the rivals and the baselines of ``scale evaluate``."""
    parts = {"drugs": _drugs, "lines": _lines, "donors": _donors}
    return [
        row
        for part in settings.parts
        for seed in settings.data_seeds
        for row in parts[part](settings, seed)
    ]


# --- drugs that no line has seen ------------------------------------------------------------------


def unseen_drugs(seed: int) -> Dataset:
    """Return a screen of which one drug of each mechanism is held out in all lines."""
    config = replace(DRUGS, seed=seed)

    def write(folder: Path) -> list[str]:
        atlas = simulate(config)
        mechanism_P = atlas.truth.mechanism_P
        held = [
            atlas.drugs[int(np.flatnonzero(mechanism_P == number)[-1])]
            for number in range(NUM_MECHANISMS)
        ]
        lines = [f'[fewshot."synthetic.{x}"]\ntest = {json.dumps(held)}' for x in atlas.lines]
        _write_split(folder, lines)
        mechanisms = dict(zip(atlas.drugs, mechanism_P.tolist(), strict=True))
        (folder / "mechanisms.json").write_text(json.dumps(mechanisms))
        np.savez(folder / "bits.npz", names=np.array(atlas.drugs), vectors=fingerprints(atlas))
        atlas.write_h5ad(folder / "cells.h5ad")
        return screen_settings(folder / "cells.h5ad")

    key = [asdict(config), NUM_BITS, BITS_OF_MECHANISM, KEPT_BITS, OWN_BITS]
    return make_dataset("unseen drugs", seed, key, write)


def fingerprints(atlas: Atlas) -> np.ndarray:
    """Return bits of each drug: most of those of its mechanism, and some of its own."""
    random = np.random.default_rng([atlas.config.seed, 5])
    bits_PV = random.random((len(atlas.drugs), NUM_BITS)) < OWN_BITS
    for number in range(atlas.config.num_mechanisms):
        drugs = np.flatnonzero(atlas.truth.mechanism_P == number)
        bits = random.choice(NUM_BITS, BITS_OF_MECHANISM, replace=False)
        bits_PV[np.ix_(drugs, bits)] |= random.random((len(drugs), len(bits))) < KEPT_BITS
    return bits_PV.astype(np.float32)


def _drugs(settings: Settings, seed: int) -> list[Row]:
    data = unseen_drugs(seed)
    bits = data.store.parent / "bits.npz"
    features = run_scale("features", [f"input={bits}"], parts=("config", "data", "tasks"))
    known = f"data.perturbation_features={features.folder / 'features.npz'}"
    made = _predicted(settings, data, [known])
    rival = {(MECHANISM_MEAN, 0): mechanism_mean(data, next(iter(made.values())).cells)}
    rows = evaluate(data, {**made, **rival}, LEAN).rows
    return [replace(r, model_seed=None) if r.method == MECHANISM_MEAN else r for r in rows]


def mechanism_mean(data: Dataset, like: Path) -> Predicted:
    """Predict each held-out drug by the training drugs of its mechanism in the same line.

    Parameters
    ----------
    data
        A dataset of :func:`unseen_drugs`.
    like
        Any prediction of its test conditions: as many cells are drawn, as many from each drug.
    """

    def make(folder: Path) -> float:
        cells = ad.read_h5ad(like)
        treated, trained = cells[~cells.obs["is_control"].to_numpy(bool)], _training_cells(data)
        mechanisms = json.loads((data.store.parent / "mechanisms.json").read_text())
        random = np.random.default_rng(data.seed)
        drawn, pools = [], []
        for (line, drug), rows in treated.obs.groupby(
            ["cell_line", "drug"], observed=True
        ).indices.items():
            is_same = (trained.obs["cell_line"] == line) & (
                trained.obs["drug"].map(mechanisms) == mechanisms[drug]
            )
            pool = trained[is_same.to_numpy()].copy()  # as many cells of each drug
            by_drug = [random.permutation(r) for r in pool.obs.groupby("drug").indices.values()]
            mixed = np.concatenate(list(zip(*by_drug, strict=True)))
            pool.obs["drug"] = drug
            drawn.append(pool[mixed[: len(rows)]])
            pools.append(pool)
        for name, parts in (("cells", drawn), ("many", pools)):
            made = ad.concat(parts, index_unique="-")
            made.obs = made.obs[["drug", "cell_line"]]
            made.uns["scale"] = {"target_sum": cells.uns["scale"]["target_sum"]}
            made.write_h5ad(folder / f"{name}.h5ad")
        return 0.0

    folder = kept("mechanism", [str(data.store), like.parent.name], make).folder
    return Predicted(folder / "cells.h5ad", folder / "many.h5ad")


def _training_cells(data: Dataset) -> ad.AnnData:
    """Return the treated training cells as log1p of counts per 10,000."""
    from scale.data.split import Split

    with CellSetStore.open(data.store) as store:
        table = store.conditions
        part_C = Split.read(data.split).assign(table, store.perturbations, labels=store.labels)
        is_wanted_C = (part_C == "train") & ~table["is_control"].to_numpy(bool)
        cells = store.to_anndata([int(c) for c in table.index[is_wanted_C]])
    counts = sp.csr_matrix(cells.X, dtype=np.float64)
    counts.data *= np.repeat(1e4 / np.asarray(counts.sum(1)).ravel(), np.diff(counts.indptr))
    cells.X = sp.csr_matrix(counts.log1p(), dtype=np.float32)
    return cells


# --- lines of which only control cells are known --------------------------------------------------


def unseen_lines(seed: int) -> Dataset:
    """Return a screen of which whole lines are held out."""
    config = replace(LINES, seed=seed)

    def write(folder: Path) -> list[str]:
        atlas = simulate(config)
        held = [f'"synthetic.{line}" = "test"' for line in atlas.lines[-NUM_HELD_LINES:]]
        _write_split(folder, ["[zeroshot]", *held])
        atlas.write_h5ad(folder / "cells.h5ad")
        return screen_settings(folder / "cells.h5ad")

    return make_dataset("unseen lines", seed, [asdict(config), NUM_HELD_LINES], write)


def _lines(settings: Settings, seed: int) -> list[Row]:
    return _from_controls(settings, unseen_lines(seed))


def _donors(settings: Settings, seed: int) -> list[Row]:
    return _from_controls(settings, composition(seed))


def _from_controls(settings: Settings, data: Dataset) -> list[Row]:
    """Return rows of held-out contexts, no cell of which training sees."""
    made = _predicted(settings, data, ["data.heldout_controls=excluded"])
    return evaluate(data, made, LEAN).rows


# --- both -----------------------------------------------------------------------------------------


def _write_split(folder: Path, lines: Sequence[str]) -> None:
    head = ["[datasets]", 'synthetic = "."', "[training]", 'synthetic = "train"']
    (folder / SPLIT).write_text("\n".join([*head, *lines]) + "\n")


def _predicted(
    settings: Settings, data: Dataset, training: Sequence[str]
) -> dict[tuple[str, int], Predicted]:
    """Return what ours predicts with each model seed."""
    given = [*training, *settings.training]
    return {
        (OURS, seed): predicted(pretrain(data, seed, given, steps=settings.steps), data)
        for seed in settings.model_seeds
    }


def gains(rows: Sequence[Row], rival: str) -> pd.DataFrame:
    """Return, by metric, the mean of ours and of a rival, and the gain with its interval."""
    told = []
    for metric in SHOWN:
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        ours, theirs = (_better_form(rows, method, metric) for method in (OURS, rival))
        interval = t_interval((sign * (ours - theirs)).dropna().to_numpy())
        told.append(
            (metric, ours.mean(), theirs.mean(), interval.mean, interval.low, interval.high)
        )
    columns = ["metric", OURS, rival, "gain", "gain_low", "gain_high"]
    return pd.DataFrame(told, columns=columns).set_index("metric")


def _better_form(rows: Sequence[Row], method: str, metric: str) -> pd.Series:
    """Return the values of a method by (data seed, line) in the form that is better on a metric."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    forms = [_of_lines(rows, method, form, metric) for form in (CELLS, MEAN)]
    return max((f for f in forms if len(f)), key=lambda values: sign * values.mean())


def _of_lines(rows: Sequence[Row], method: str, form: str, metric: str) -> pd.Series:
    """Return the mean over model seeds by (data seed, line)."""
    values: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        if (row.method, row.form) == (method, form):
            for line, value in row.by_context.get(metric, {}).items():
                values.setdefault((row.data_seed, line), []).append(value)
    return pd.Series({place: float(np.mean(found)) for place, found in values.items()}, dtype=float)


def main() -> None:
    """Run, print the gains and write the figures where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rivals = {
        "drugs": MECHANISM_MEAN,
        "lines": "context_transfer",
        "donors": "context_transfer",
    }
    parser.add_argument("--quick", action="store_true", help="one short training: does it run")
    parser.add_argument("--parts", nargs="+", choices=list(rivals), default=list(rivals))
    parser.add_argument("--data-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], help="settings of scale pretrain")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    settings = Settings(options.parts, options.data_seeds, options.model_seeds, STEPS, options.set)
    if options.quick:
        settings = Settings(options.parts[:1], options.data_seeds[:1], options.model_seeds[:1], 100)
    record: dict[str, Any] = {"machine": describe_machine(), "is_quick": options.quick}
    for part in settings.parts:
        rows = run(replace(settings, parts=(part,)))
        table = gains(rows, rivals[part])
        print(f"\nunseen {part}\n{table.round(4).to_string()}")
        record[part] = {
            "rows": [row.record() for row in rows],
            "gains": table.reset_index().to_dict("records"),
        }
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
