"""Runs in the environment of cell-eval2: scores every pair of a folder and writes tables.

python run_cell_eval2.py FOLDER  (reads NAME.predicted.h5ad and NAME.observed.h5ad)
"""

import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import anndata as ad
from cell_eval2 import EvalConfig, compute_metrics

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
folder = Path(sys.argv[1])
preset = EvalConfig.from_preset("cell-eval-0.7.6")
for path in sorted(folder.glob("*.observed.h5ad")):
    name = path.name.removesuffix(".observed.h5ad")
    observed = ad.read_h5ad(path)
    # With exclusion on, labels none of which is a gene are an error.
    labels = set(observed.obs["perturbation"].astype(str))
    exclude = bool(labels & set(observed.var_names))
    config = replace(
        preset,
        pert_col="perturbation",
        control="control",
        device="cpu",
        num_threads=1,
        discrimination=replace(preset.discrimination, exclude_target_gene=exclude),
        de=replace(preset.de, backend="pdex"),  # "auto" is an error where there is a GPU
    )
    scores = compute_metrics(
        ad.read_h5ad(folder / f"{name}.predicted.h5ad"), observed, config=config
    )
    (folder / name).mkdir()
    scores.pivot(index="perturbation", on="metric", values="value").write_csv(
        folder / name / "results.csv"
    )
