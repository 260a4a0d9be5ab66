"""A store as one h5ad, or as a BioNeMo SCDL archive: the same cells in the same order.

Both are written block by block, so that memory does not grow with the store, and appear under
their name when they are whole. The content is that of ``CellSetStore.to_anndata``, and the names
that cells had in the source, where the store keeps them.

Shapes: N = cells of the store, M = counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from scale.data.h5ad_writer import H5adWriter
from scale.data.scdl_writer import ScdlWriter
from scale.data.store import CellSetStore
from scale.data.store_rows import StoreRows
from scale.runtime import atomic_path
from scale.types import StoreError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, cells done and cells in all."""


def export_store(
    store: CellSetStore, target: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> int:
    """Write a store in another format and return the number of cells.

    Parameters
    ----------
    store
        Open store.
    target
        What to write: ``NAME.h5ad``, or ``NAME.scdl``, which is a folder.
    overwrite
        Replace what is there, once the new one is complete.
    progress
        Called after each block.

    Raises
    ------
    StoreError
        If the ending is another, or ``target`` exists.
    """
    if target.suffix not in (".h5ad", ".scdl"):
        raise StoreError(
            f"export={target}: the name must end in .h5ad or .scdl, which is the format"
        )
    rows = StoreRows(store)
    if target.suffix == ".scdl":
        _to_scdl(rows, target, overwrite=overwrite, progress=progress)
    else:
        _to_h5ad(rows, target, overwrite=overwrite, progress=progress)
    return rows.num_cells


def _to_scdl(rows: StoreRows, target: Path, *, overwrite: bool, progress: Progress | None) -> None:
    var = pd.DataFrame({"symbol": np.array(rows.store.genes.symbols, object)})
    if rows.store.genes.ensembl_ids is not None:
        var["ensembl_id"] = np.array(rows.store.genes.ensembl_ids, object)
    with ScdlWriter(
        target,
        var=var,
        num_rows=rows.num_cells,
        num_values=rows.num_values,
        label=rows.store.path.name,
        overwrite=overwrite,
    ) as writer:
        for start, stop in rows.ranges():
            cells, obs = rows.read_with_labels(start, stop)
            writer.add(cells.indptr_P, cells.indices_M, cells.counts_M, obs)
            if progress is not None:
                progress("write", stop, rows.num_cells)


def _to_h5ad(rows: StoreRows, target: Path, *, overwrite: bool, progress: Progress | None) -> None:
    if target.exists() and not overwrite:
        raise StoreError(f"{target} exists; choose another name, or set overwrite=true")
    store = rows.store
    var = pd.DataFrame(index=pd.Index(store.genes.symbols, dtype=object))
    if store.genes.ensembl_ids is not None:
        var["ensembl_id"] = np.array(store.genes.ensembl_ids, object)
    names = {
        "perturbation": set(rows.cells.by_condition["perturbation"]),
        "cell_type": set(rows.cells.by_condition["cell_type"]),
        "batch": set(store.batches),
    }
    categories = {
        column: sorted(found)
        for key, found in names.items()
        if (column := store.columns[key]) is not None
    }
    with (
        atomic_path(target) as partial,
        H5adWriter(
            partial,
            var=var,
            num_cells=rows.num_cells,
            num_values=rows.num_values,
            categories=categories,
        ) as writer,
    ):
        for start, stop in rows.ranges():
            cells, obs = rows.read_with_labels(start, stop)
            values_M = cells.counts_M.astype(np.float32)
            writer.add(cells.indptr_P, cells.indices_M, values_M, obs)
            if progress is not None:
                progress("write", stop, rows.num_cells)
