"""Runs in cell-eval's own environment: scores every pair of a folder and writes tables.

python run_cell_eval.py FOLDER  (reads NAME.predicted.h5ad and NAME.observed.h5ad)
"""

import sys
import warnings
from pathlib import Path

import anndata as ad
from cell_eval import MetricsEvaluator

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.observed.h5ad")):
    name = path.name.removesuffix(".observed.h5ad")
    evaluator = MetricsEvaluator(
        adata_pred=ad.read_h5ad(folder / f"{name}.predicted.h5ad"),
        adata_real=ad.read_h5ad(path),
        control_pert="control",
        pert_col="perturbation",
        num_threads=1,
        outdir=str(folder / name),
    )
    evaluator.compute(
        profile="full",
        skip_metrics=["pearson_edistance", "clustering_agreement"],
        break_on_error=True,
    )
