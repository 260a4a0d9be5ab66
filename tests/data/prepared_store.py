"""Cells that can be told apart, prepared from any format, and what a store holds as a multiset."""

from __future__ import annotations

from collections import Counter

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scale.config import (
    ColumnsConfig,
    GeneChoice,
    GenesConfig,
    PrepareConfig,
    SourceConfig,
    SourceFormat,
)
from scale.data.ingest.prepare import prepare
from scale.data.store import CellSetStore
from scale.data.store_rows import StoreRows


def make_h5ad(path, *, num_cells=500, seed=0, drugs=("DMSO", "drugA", "drugB")):
    """Cells with doses, three batches, Ensembl ids and totals over more genes than there are."""
    rng = np.random.default_rng(seed)
    drug = rng.choice(drugs, num_cells)
    obs = pd.DataFrame(
        {
            "drug": pd.Categorical(drug),
            "line": pd.Categorical(rng.choice(["A549", "K562"], num_cells)),
            "plate": pd.Categorical(rng.choice(["p1", "p2", "p3"], num_cells)),
            "um": np.where(drug == "DMSO", np.nan, rng.choice([0.05, 5.0], num_cells)),
        },
        index=[f"{seed}-{i}" for i in range(num_cells)],
    )
    counts = rng.poisson(0.8, (num_cells, 30))
    counts[:, 0] = np.arange(num_cells) + 1
    obs["total"] = counts.sum(axis=1) + rng.integers(0, 9, num_cells)
    var = pd.DataFrame(index=[f"gene{g}" for g in range(30)])
    var["ensembl_id"] = [f"ENSG{g:011d}" for g in range(30)]
    ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var).write_h5ad(path)
    return path


def settings(store, source_format, files, **changes):
    columns = {
        "perturbation": "drug",
        "cell_type": "line",
        "batch": "plate",
        "dose": "um",
        "dose_unit": "uM",
        "library": "library" if source_format is SourceFormat.store else "total",
    }
    values = {
        "name": "test",
        "run_dir": "unused",
        "store": str(store),
        "source": SourceConfig(format=source_format, files=[str(file) for file in files]),
        "columns": ColumnsConfig(**columns),
        "control": "DMSO",
        "genes": GenesConfig(choice=GeneChoice.all),
        "minimum_cells": 1,
    }
    return PrepareConfig(**(values | changes))


def make(store, source_format, *files, **changes):
    prepare(settings(store, source_format, files, **changes))
    return CellSetStore.open(store, verify="full")


def cells_of(store, genes=slice(None)):
    """Multiset of (cell type, perturbation with dose and unit, batch, control, library, counts)."""
    rows = StoreRows(store)
    cells, code_N = rows.read(0, rows.num_cells)
    shape = (rows.num_cells, store.num_genes)
    counts = sp.csr_matrix((cells.counts_M, cells.indices_M, cells.indptr_P), shape).toarray()
    conditions = [store.condition(c) for c in rows.place(0, rows.num_cells)[0].tolist()]
    return Counter(
        (c.cell_type, c.perturbation, batch, bool(c.is_control), library, tuple(row))
        for c, batch, library, row in zip(
            conditions,
            rows.cells.batch_names(code_N).tolist(),
            cells.library_N.tolist(),
            counts[:, genes].tolist(),
            strict=True,
        )
    )
