#!/usr/bin/env python
"""Perturbations and cell lines that no training saw: ours beside the rule that is hard to beat.

scripts/benchmarks/quality_unseen.py [--quick] [--parts drugs lines] [--data-seeds 0 1 2]
    [--model-seeds 0 1 2] [--json FILE] [--set SETTING=VALUE ...]

``drugs``: a simulated screen whose drugs share programmes by mechanism; of each mechanism one drug
is held out in every line, and known by a fingerprint only: the bits of its mechanism, a fifth of
them lost, and some of its own. Rival: ``mechanism_mean``, the training drugs of the same mechanism
in the same line, which is told the mechanism outright. As ``cells`` it is cells of these drugs, as
many from each; as ``mean`` the exact mean of all of them, without the noise of a draw.

``lines``: a screen of which whole lines are held out, of which a model sees control cells at
prediction and nothing else. Rival: ``context_transfer``, the mean change of the drug in all
training lines.

Ours is ``scale pretrain`` of the tiny model, 500 steps of 12 sets of 32 cells. It predicts twice as
many cells as were observed, the most that ``scale evaluate`` takes: what it starts from is a draw
of control cells. A gain is the paired difference to the rival in its better form; its 95 % interval
is Student's over lines. Nothing here is biology.
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
from quality_atlas import screen_settings
from quality_runs import (
    LOWER_IS_BETTER,
    SPLIT,
    STEPS,
    Dataset,
    Done,
    Row,
    evaluate,
    kept,
    make_dataset,
    predict,
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
    num_mechanisms=NUM_MECHANISMS,
    num_inert=1,
    mean_library=1_250.0,
)
LINES = SimulationConfig(
    num_cells=16 * 12 * CELLS_OF_CONDITION * 4 // 3 // 2,
    num_lines=16,
    num_drugs=12,
    num_genes=500,
    mean_library=1_250.0,
)
NUM_HELD_LINES = 4
OF_MEANS = ("residual_pearson", "pearson_delta", "mse", "retrieval_l2", "discrimination")
SHOWN = (*OF_MEANS, "overlap_at_n", "energy_distance")
LEAN = ("protocol.ceiling=false",)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run: seeds, steps of a training, further settings of ``pretrain``."""

    parts: Sequence[str] = ("drugs", "lines")
    data_seeds: Sequence[int] = (0, 1, 2)
    model_seeds: Sequence[int] = (0, 1, 2)
    steps: int = STEPS
    training: Sequence[str] = ()


def run(settings: Settings) -> list[Row]:
    """Return the rows of all parts: ours, the rivals and the baselines of ``scale evaluate``."""
    parts = {"drugs": _drugs, "lines": _lines}
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
    predicted = _predicted(settings, data, [known])
    rival = mechanism_mean(data, next(iter(predicted.values())))
    drawn, exact = (MECHANISM_MEAN, 0), (f"{MECHANISM_MEAN} exact", 0)
    both = {drawn: rival.folder / "cells.h5ad", exact: rival.folder / "mean.h5ad"}
    rows = evaluate(data, {**predicted, **both}, LEAN).rows
    for place, row in enumerate(rows):
        if row.method == drawn[0]:
            rows[place] = replace(row, model_seed=None)
        elif row.method == exact[0]:
            of_means = {m: row.by_context[m] for m in OF_MEANS if m in row.by_context}
            rows[place] = Row(row.dataset, row.data_seed, None, drawn[0], "mean", of_means)
    return rows


def mechanism_mean(data: Dataset, like: Path) -> Done:
    """Predict each held-out drug by the training drugs of its mechanism in the same line.

    Parameters
    ----------
    data
        A dataset of :func:`unseen_drugs`.
    like
        Any prediction of its test conditions: as many cells are made, beside the same controls.
    """

    def make(folder: Path) -> float:
        cells = ad.read_h5ad(like)
        is_control = cells.obs["is_control"].to_numpy(bool)
        treated, trained = cells[~is_control], _training_cells(data)
        mechanisms = json.loads((data.store.parent / "mechanisms.json").read_text())
        drawn, means = [], []
        random = np.random.default_rng(data.seed)
        for (line, drug), rows in treated.obs.groupby(
            ["cell_line", "drug"], observed=True
        ).indices.items():
            same = (trained.obs["cell_line"] == line) & (
                trained.obs["drug"].map(mechanisms) == mechanisms[drug]
            )
            pool = trained[same.to_numpy()]
            mean_G, chosen = _mean_and_draw(pool, len(rows), random)
            drawn.append((rows, pool.X[chosen]))
            means.append((rows, sp.csr_matrix(np.tile(mean_G, (len(rows), 1)))))
        for name, parts in (("cells", drawn), ("mean", means)):
            made = ad.concat([_with_values(treated, parts), cells[is_control]])
            made.obs = made.obs.drop(columns="source_cell")  # no control cell is behind them
            made.uns["scale"] = {"target_sum": cells.uns["scale"]["target_sum"]}
            made.write_h5ad(folder / f"{name}.h5ad")
        return 0.0

    return kept("mechanism", [str(data.store), like.parent.name], make)


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


def _mean_and_draw(
    pool: ad.AnnData, size: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the drugs of their means, and rows of cells, as many of each drug."""
    of_drug = list(pool.obs.groupby("drug", observed=True).indices.values())
    mean_G = np.mean([np.asarray(pool.X[rows].mean(0)).ravel() for rows in of_drug], axis=0)
    each = -(-size // len(of_drug))
    drawn = [random.choice(rows, each, replace=each > len(rows)) for rows in of_drug]
    return mean_G.astype(np.float32), random.permutation(np.concatenate(drawn))[:size]


def _with_values(treated: ad.AnnData, parts: list[tuple[np.ndarray, sp.csr_matrix]]) -> ad.AnnData:
    """Return cells with the values of parts, each of some rows."""
    rows = np.concatenate([of for of, _ in parts])
    values = sp.vstack([x for _, x in parts], format="csr")[np.argsort(rows)]
    return ad.AnnData(values, treated.obs.copy(), treated.var.copy())


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
    data = unseen_lines(seed)
    predicted = _predicted(settings, data, ["data.heldout_controls=excluded"])
    return evaluate(data, predicted, LEAN).rows


# --- both -----------------------------------------------------------------------------------------


def _write_split(folder: Path, lines: Sequence[str]) -> None:
    head = ["[datasets]", 'synthetic = "."', "[training]", 'synthetic = "train"']
    (folder / SPLIT).write_text("\n".join([*head, *lines]) + "\n")


def _predicted(
    settings: Settings, data: Dataset, training: Sequence[str]
) -> dict[tuple[str, int], Path]:
    """Return what ours predicts with each model seed."""
    with CellSetStore.open(data.store) as store:
        table = store.conditions
        sizes = table.loc[~table["is_control"], "num_cells"]
    found = {}
    for seed in settings.model_seeds:
        given = [*training, *settings.training]
        trained = pretrain(data, seed, given, steps=settings.steps)
        done = predict(trained, data, [f"cells_per_condition={2 * int(sizes.min())}"])
        found[(OURS, seed)] = done.folder / "predicted.h5ad"
    return found


def gains(rows: Sequence[Row], rival: str) -> pd.DataFrame:
    """Return, by metric, the mean of ours and of a rival, and the gain with its interval."""
    told = []
    for metric in SHOWN:
        ours = _of_lines(rows, OURS, "cells", metric)
        sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
        forms = [_of_lines(rows, rival, form, metric) for form in ("cells", "mean")]
        theirs = max((f for f in forms if len(f)), key=lambda values: sign * values.mean())
        interval = t_interval((sign * (ours - theirs)).dropna().to_numpy())
        told.append(
            (metric, ours.mean(), theirs.mean(), interval.mean, interval.low, interval.high)
        )
    columns = ["metric", OURS, rival, "gain", "gain_low", "gain_high"]
    return pd.DataFrame(told, columns=columns).set_index("metric")


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
    rivals = {"drugs": MECHANISM_MEAN, "lines": "context_transfer"}
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
