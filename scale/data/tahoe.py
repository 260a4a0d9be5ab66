"""The row schema of Tahoe-100M: cells as token lists in parquet, beside their metadata tables.

Apart because the schema has quirks of its own: a marker entry at the head of every row, gene tokens
that start at three, and a dose that is not in the row but in the table of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp

from scale.runtime import atomic_path

DOSE_UNIT = "uM"
FIRST_TOKEN = 3
"""Gene tokens start here; smaller ones are markers."""
MARKER = (1, -2.0)
"""Token and value of the entry at the head of every row, which is no gene."""


def write_tahoe_parquet(
    folder: Path,
    counts: sp.csr_matrix,
    obs: pd.DataFrame,
    genes: Sequence[str],
    mechanism: Mapping[str, str],
    *,
    rows_per_file: int = 10_000,
) -> None:
    """Write cells as ``data/*.parquet`` and the tables they refer to as ``metadata/*.parquet``.

    Parameters
    ----------
    folder
        Where to write.
    counts
        Cells x genes, integer counts.
    obs
        One row per cell: drug, dose (uM), cell_line, plate.
    genes
        Symbols in column order.
    mechanism
        Mechanism of action of every drug; a label that is missing is a control.
    rows_per_file
        Cells of a file.
    """
    samples = _samples(obs)
    for number, start in enumerate(range(0, len(obs), rows_per_file)):
        rows = slice(start, min(start + rows_per_file, len(obs)))
        with atomic_path(folder / "data" / f"train-{number:05d}.parquet") as path:
            pq.write_table(_rows(counts[rows], obs.iloc[rows], samples, mechanism, start), path)
    lines = sorted(set(obs["cell_line"]))
    tables = {
        "gene_metadata": pd.DataFrame(
            {
                "gene_symbol": list(genes),
                "ensembl_id": [f"ENSG{g:011d}" for g in range(len(genes))],
                "token_id": np.arange(len(genes)) + FIRST_TOKEN,
            }
        ),
        "sample_metadata": samples[["sample", "plate", "drug", "drugname_drugconc"]],
        "drug_metadata": pd.DataFrame({"drug": list(mechanism), "moa-fine": mechanism.values()}),
        "cell_line_metadata": pd.DataFrame({"cell_name": lines, "Cell_ID_Cellosaur": lines}),
    }
    for name, table in tables.items():
        with atomic_path(folder / "metadata" / f"{name}.parquet") as path:
            table.to_parquet(path, index=False)


def _samples(obs: pd.DataFrame) -> pd.DataFrame:
    """One row per (plate, drug, dose): a sample is a well."""
    keys = obs[["plate", "drug", "dose"]].drop_duplicates().reset_index(drop=True)
    keys["sample"] = [f"smp_{i:04d}" for i in range(len(keys))]
    keys["drugname_drugconc"] = [
        repr([(drug, float(dose), DOSE_UNIT)])
        for drug, dose in zip(keys["drug"], keys["dose"], strict=True)
    ]
    return keys


def _rows(
    counts: sp.csr_matrix,
    obs: pd.DataFrame,
    samples: pd.DataFrame,
    mechanism: Mapping[str, str],
    first_cell: int,
) -> pa.Table:
    sample = obs.merge(samples, on=["plate", "drug", "dose"], how="left")["sample"]
    tokens, values = [], []
    for a, b in zip(counts.indptr[:-1], counts.indptr[1:], strict=True):
        tokens.append(np.concatenate([MARKER[:1], counts.indices[a:b] + FIRST_TOKEN]))
        values.append(np.concatenate([MARKER[1:], counts.data[a:b]]))
    missing = pa.nulls(len(obs), pa.string())
    barcodes = [f"{i:09d}-lib_0001" for i in range(first_cell, first_cell + len(obs))]
    return pa.table(
        {
            "genes": pa.array(tokens, pa.list_(pa.int64())),
            "expressions": pa.array(values, pa.list_(pa.float32())),
            "drug": pa.array(obs["drug"]),
            "sample": pa.array(sample),
            "BARCODE_SUB_LIB_ID": pa.array(barcodes),
            "cell_line_id": pa.array(obs["cell_line"]),
            "moa-fine": pa.array([mechanism.get(drug, "unclear") for drug in obs["drug"]]),
            "canonical_smiles": missing,
            "pubchem_cid": missing,
            "plate": pa.array(obs["plate"]),
        }
    )
