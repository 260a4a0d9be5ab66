"""The cells of a store as arc-state reads them, and its predictions as ``scale evaluate`` does.

arc-state gets log1p of counts per 10,000 as float32, in X and dense in ``obsm["X_hvg"]`` (what its
setting ``embed_key=X_hvg`` trains on), and the split file of the run with the path of its cells.

Shapes: N = cells, G = genes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scale.data.store import CellSetStore

TARGET_SUM = 10_000.0


@dataclass(frozen=True, slots=True)
class StateFiles:
    """The split files that arc-state trains and predicts with, and the names of columns."""

    training: Path
    prediction: Path
    perturbation_key: str
    cell_type_key: str
    batch_key: str
    control: str
    genes: list[str]


def export(store_path: Path, split: Path, folder: Path) -> StateFiles:
    """Write cells and split files for arc-state.

    It trains with all control cells, as this package does, and predicts from a file without the
    control cells of fold 1, which the observed change is measured against.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with CellSetStore.open(str(store_path)) as store:
        cells = store.to_anndata()
        columns, control = store.columns, store.control
    keys = [str(columns[name]) for name in ("perturbation", "cell_type", "batch")]
    names = cells.obs.get("source_cell", cells.obs_names)
    counts = sp.csr_matrix(cells.X, dtype=np.float32)
    library_N = np.maximum(cells.obs["library"].to_numpy(np.float64), 1.0)
    values = counts.copy()
    factor = np.repeat(TARGET_SUM / library_N, np.diff(counts.indptr))
    values.data = np.log1p(counts.data * factor).astype(np.float32)
    obs = pd.DataFrame({key: cells.obs[key].astype(str).astype("category") for key in keys})
    obs.index = pd.Index(np.asarray(names, dtype=str))
    is_reference_N = cells.obs["control_fold"].to_numpy() == 1
    written = {}
    for name, is_in_N in (
        ("training", np.ones(len(obs), dtype=bool)),
        ("prediction", ~is_reference_N),
    ):
        write_values(values[is_in_N], obs[is_in_N], cells.var_names, folder / f"{name}.h5ad")
        written[name] = folder / f"{name}.toml"
        written[name].write_text(_with_path(split.read_text(), folder / f"{name}.h5ad"))
    genes = cells.var_names.tolist()
    return StateFiles(written["training"], written["prediction"], *keys, control, genes)


def write_values(values: sp.csr_matrix, obs: pd.DataFrame, genes: pd.Index, path: Path) -> None:
    """Write log1p values as arc-state reads them."""
    cells = ad.AnnData(X=values, obs=obs, var=pd.DataFrame(index=genes))
    cells.obsm["X_hvg"] = values.toarray()
    cells.uns["log1p"] = {}
    cells.write_h5ad(path)


def _with_path(split: str, cells: Path) -> str:
    """Return a split file whose only dataset is at ``cells``."""
    text, count = re.subn(
        r'(?m)^\[datasets\]\n(\S+) = ".*"$', rf'[datasets]\n\1 = "{cells.resolve()}"', split
    )
    if count != 1:
        raise ValueError("the split file has not one dataset under [datasets]")
    return text


def collect(predicted: Path, files: StateFiles, output: Path) -> int:
    """Write arc-state's treated cells, what they started from, and the controls of their lines.

    The control cells are the given ones, by which ``scale evaluate`` tells that the values are on
    the scale of the observed cells; under its strict rules they are not used otherwise.

    Parameters
    ----------
    predicted
        ``adata_pred.h5ad`` of ``state tx predict``.

    Returns
    -------
    int
        Number of predicted cells.
    """
    cells = ad.read_h5ad(predicted)
    cells = cells[(cells.obs[files.perturbation_key].astype(str) != files.control).to_numpy()]
    keys = [files.perturbation_key, files.cell_type_key, files.batch_key]
    obs = cells.obs[keys].astype(str)
    obs["source_cell"] = cells.obs["ctrl_cell_barcode"].astype(str)
    obs.index = pd.Index([f"predicted-{number}" for number in range(len(obs))])
    given = ad.read_h5ad(files.prediction.with_suffix(".h5ad"))
    is_control_N = (given.obs[files.perturbation_key].astype(str) == files.control).to_numpy()
    is_here_N = given.obs[files.cell_type_key].astype(str).isin(obs[files.cell_type_key]).to_numpy()
    controls = given[is_control_N & is_here_N]
    control_obs = controls.obs[keys].astype(str).assign(source_cell=controls.obs_names)
    values = [sp.csr_matrix(part.X, dtype=np.float32) for part in (cells, controls)]
    result = ad.AnnData(
        X=sp.vstack(values, format="csr"),
        obs=pd.concat([obs, control_obs]),
        var=pd.DataFrame(index=files.genes),
    )
    result.write_h5ad(output)
    return len(obs)
