"""arc-state on a real set of the quality benchmark: the same training cells, every learning rate.

It trains on the cells that ours trains on, with the width, depth, heads, set size and sets per step
of ``model=tiny``, until it has seen as many treated cells (quality_state.py). Its split file lists
the held-out conditions, whose cells its commands want to be there; it does not train on them. There
are no validation conditions to choose a rate by, which would be training cells lost: every rate is
predicted, and the one that is best on the held-out conditions themselves is told, in arc-state's
favour.
"""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from quality_real_sets import CONTEXT, CONTROL, LABEL, Judged, normalised
from quality_runs import STEPS, Done, kept
from quality_state import RATES, state_budget
from state_data import StateFiles
from state_runs import VERSION, run_state

BATCH = "batch"
METHOD = "arc-state"


def state_predictions(cut: Judged, seed: int) -> dict[str, Path]:
    """Return arc-state's predicted cells by ``arc-state-RATE``."""
    return {f"{METHOD}-{rate:g}": _run(cut, seed, rate).folder / "predicted.h5ad" for rate in RATES}


def _run(cut: Judged, seed: int, rate: float) -> Done:
    budget = state_budget(cut.data, STEPS)

    def make(folder: Path) -> float:
        record = run_state(write_cells(cut, folder), folder, budget, rate, seed)
        (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        return float(record["cpu_seconds_train"]) + float(record["cpu_seconds_predict"])

    steps = [budget.steps, budget.sets_per_step, budget.cells_per_set]
    return kept("real-state", [VERSION, str(cut.data.store), seed, rate, *steps], make)


def write_cells(cut: Judged, folder: Path) -> StateFiles:
    """Write training and held-out cells for arc-state, and its split file."""
    training, observed = ad.read_h5ad(cut.training_counts), ad.read_h5ad(cut.observed)
    held = observed[(observed.obs[LABEL] != CONTROL).to_numpy()]
    values = sp.vstack([normalised(training).X, held.X], format="csr")
    obs = pd.concat([part.obs[[CONTEXT, LABEL]].astype(str) for part in (training, held)])
    obs[BATCH] = obs[CONTEXT]
    cells = ad.AnnData(values, obs=obs, var=training.var[[]].copy())
    cells.obsm["X_hvg"] = np.asarray(values.todense())
    cells.uns["log1p"] = {}
    cells.write_h5ad(folder / "cells.h5ad")
    lines = [f'[datasets]\nreal = "{(folder / "cells.h5ad").resolve()}"\n']
    lines.append('[training]\nreal = "train"\n')
    for context, labels in held.obs.groupby(CONTEXT, observed=True)[LABEL].unique().items():
        lines.append(f'[fewshot."real.{context}"]\nval = []\ntest = {json.dumps([*labels])}\n')
    split = folder / "cells.toml"
    split.write_text("\n".join(lines))
    return StateFiles(split, split, LABEL, CONTEXT, BATCH, CONTROL, training.var_names.tolist())
