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
import pandas as pd
import scipy.sparse as sp
from quality_real_sets import CONTEXT, CONTROL, LABEL, Judged, normalised
from quality_state import RATES, kept_files, run_on
from state_data import StateFiles, write_values
from state_runs import ARC_STATE

BATCH = "batch"


def state_predictions(cut: Judged, seed: int) -> dict[str, Path]:
    """Return arc-state's predicted cells by ``arc-state-RATE``."""
    files = kept_files(cut.data, lambda folder: write_cells(cut, folder))
    runs = {rate: run_on(files, cut.data, seed, rate) for rate in RATES}
    return {f"{ARC_STATE}-{r:g}": run.folder / "predicted.h5ad" for r, run in runs.items()}


def write_cells(cut: Judged, folder: Path) -> StateFiles:
    """Write training and held-out cells for arc-state, and its split file."""
    training, observed = ad.read_h5ad(cut.training_counts), ad.read_h5ad(cut.observed)
    held = observed[(observed.obs[LABEL] != CONTROL).to_numpy()]
    values = sp.vstack([normalised(training).X, held.X], format="csr")
    obs = pd.concat([part.obs[[CONTEXT, LABEL]].astype(str) for part in (training, held)])
    obs[BATCH] = obs[CONTEXT]
    cells, split = folder / "cells.h5ad", folder / "cells.toml"
    write_values(values, obs, training.var_names, cells)
    lines = [f'[datasets]\nreal = "{cells.resolve()}"\n', '[training]\nreal = "train"\n']
    for context, labels in held.obs.groupby(CONTEXT, observed=True)[LABEL].unique().items():
        lines.append(f'[fewshot."real.{context}"]\nval = []\ntest = {json.dumps([*labels])}\n')
    split.write_text("\n".join(lines))
    return StateFiles(split, split, LABEL, CONTEXT, BATCH, CONTROL, training.var_names.tolist())
