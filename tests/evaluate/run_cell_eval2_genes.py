"""Runs in the environment of cell-eval2: its metrics of one pair of tables of gene tests.

python run_cell_eval2_genes.py FOLDER  (reads predicted.parquet and observed.parquet)
"""

import json
import logging
import sys
from pathlib import Path

import polars as pl
from cell_eval2.de import prepare_de, resolve_target_genes
from cell_eval2.metrics.de import de_lfc_nmae, de_sig_agreement, de_sig_jaccard
from cell_eval2.metrics.direction import de_direction_fidelity_yield_raw, de_direction_reach

logging.disable(logging.WARNING)
folder = Path(sys.argv[1])
predicted, observed = (
    pl.read_parquet(folder / f"{side}.parquet") for side in ("predicted", "observed")
)
labels = sorted(observed["target"].unique().to_list())
prepared = prepare_de(
    predicted,
    observed,
    control="control",
    nan_lfc_policy="keep",
    target_resolution=resolve_target_genes(observed, labels),
)
found = {
    "jaccard": de_sig_jaccard(prepared),
    "matthews": de_sig_agreement(prepared, measure="mcc"),
    "fold_change_nmae": de_lfc_nmae(prepared, min_gate_size=1),
    "fold_change_nmae_of_10": de_lfc_nmae(prepared, min_gate_size=10),
    "direction_yield": de_direction_fidelity_yield_raw(prepared),
    "direction_reach": de_direction_reach(prepared, universe="adjudicated", corrected=False),
}
(folder / "found.json").write_text(json.dumps(found))
