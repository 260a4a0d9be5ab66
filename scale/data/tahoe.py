"""The row schema of Tahoe-100M: cells as token lists in parquet, beside their metadata tables.

Apart because the schema has quirks of its own: a marker entry at the head of every row, gene tokens
that start at three, and a dose that is not in the row but in the table of samples. This file knows
the schema and writes it; ``ingest/tahoe.py`` reads it.

Shapes: N = cells of a file, M = their stored values, L = M and the markers.
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
ROW_SCHEMA = pa.schema(
    [
        ("genes", pa.list_(pa.int64())),
        ("expressions", pa.list_(pa.float32())),
        ("drug", pa.string()),
        ("sample", pa.string()),
        ("BARCODE_SUB_LIB_ID", pa.string()),
        ("cell_line_id", pa.string()),
        ("moa-fine", pa.string()),
        ("canonical_smiles", pa.string()),
        ("pubchem_cid", pa.string()),
        ("plate", pa.string()),
    ]
)
"""Columns of the rows, as the Hugging Face dataset has them."""


def write_tahoe_parquet(
    folder: Path,
    counts: sp.csr_matrix,
    obs: pd.DataFrame,
    genes: Sequence[str],
    mechanism: Mapping[str, str],
    *,
    rows_per_file: int = 10_000,
    rows_per_group: int = 1_000,
    compression: str = "snappy",
) -> None:
    """Write cells as ``data/*.parquet`` and the tables they refer to as ``metadata/*.parquet``.

    Parameters
    ----------
    folder
        Where to write.
    counts
        Cells x genes, integer counts.
    obs
        One row per cell: drug, dose (uM), cell_line, plate; its index holds the barcodes.
    genes
        Symbols in column order.
    mechanism
        Mechanism of action of every drug; a label that is missing is a control.
    rows_per_file, rows_per_group
        Cells of a file, and of a row group within it.
    compression
        Codec of the parquet pages: snappy, zstd, gzip or none.
    """
    samples = _samples(obs)
    for number, start in enumerate(range(0, len(obs), rows_per_file)):
        rows = slice(start, min(start + rows_per_file, len(obs)))
        with atomic_path(folder / "data" / f"train-{number:05d}.parquet") as path:
            pq.write_table(
                _rows(counts[rows], obs.iloc[rows], samples, mechanism),
                path,
                row_group_size=rows_per_group,
                compression=compression,
            )
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
    counts: sp.csr_matrix, obs: pd.DataFrame, samples: pd.DataFrame, mechanism: Mapping[str, str]
) -> pa.Table:
    keys = obs[["plate", "drug", "dose"]].astype({"plate": str, "drug": str})
    offset_N1 = counts.indptr.astype(np.int64) + np.arange(len(obs) + 1)
    is_gene_L = np.ones(offset_N1[-1], dtype=bool)
    is_gene_L[offset_N1[:-1]] = False
    token_L = np.full(len(is_gene_L), MARKER[0], dtype=np.int64)
    token_L[is_gene_L] = counts.indices + FIRST_TOKEN
    value_L = np.full(len(is_gene_L), MARKER[1], dtype=np.float32)
    value_L[is_gene_L] = counts.data
    offsets = pa.array(offset_N1, pa.int32())
    columns = {
        "genes": pa.ListArray.from_arrays(offsets, token_L),
        "expressions": pa.ListArray.from_arrays(offsets, value_L),
        "drug": keys["drug"],
        "sample": keys.merge(samples, on=["plate", "drug", "dose"], how="left")["sample"],
        "BARCODE_SUB_LIB_ID": obs.index.astype(str),
        "cell_line_id": obs["cell_line"].astype(str),
        "moa-fine": [mechanism.get(drug, "unclear") for drug in keys["drug"]],
        "canonical_smiles": pa.nulls(len(obs)),
        "pubchem_cid": pa.nulls(len(obs)),
        "plate": keys["plate"],
    }
    arrays = [
        values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)
        for values, kind in zip(columns.values(), ROW_SCHEMA.types, strict=True)
    ]
    return pa.table(arrays, schema=ROW_SCHEMA)
