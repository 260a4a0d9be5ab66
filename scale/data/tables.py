"""The parquet tables of a store, written and read: genes, perturbations, conditions, codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scale.data.genes import GeneVocabulary
from scale.types import Component, Perturbation, SourceError, StoreError

_COMPONENTS = pa.list_(
    pa.struct([("name", pa.string()), ("dose", pa.float64()), ("unit", pa.string())])
)
_KINDS = ("cell_type", "batch")


@dataclass(frozen=True, slots=True)
class StoreTables:
    """What the tables of a store say; see ``CellSetStore`` for the fields."""

    genes: GeneVocabulary
    conditions: pd.DataFrame
    perturbations: tuple[Perturbation, ...]
    labels: tuple[str, ...]
    batches: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> StoreTables:
        """Read the tables in the directory of a store; their hashes have been checked."""
        genes = pd.read_parquet(path / "genes.parquet")
        genes = genes[genes["column"] >= 0].sort_values("column")
        ids = None if genes["ensembl_id"].isna().any() else tuple(genes["ensembl_id"])
        codes = pq.read_table(path / "codes.parquet").to_pylist()
        names = {
            kind: tuple(row["name"] for row in codes if row["kind"] == kind) for kind in _KINDS
        }
        conditions = _numbered(pd.read_parquet(path / "conditions.parquet"), path)
        for kind in _KINDS:
            by_code = np.array([*names[kind], None], dtype=object)  # code -1 is the last: None
            conditions[kind] = by_code[conditions[kind].to_numpy()]
        perturbations = pq.read_table(path / "perturbations.parquet").to_pylist()
        return cls(
            GeneVocabulary(tuple(genes["symbol"]), ids),
            conditions,
            tuple(
                Perturbation(tuple(Component(**component) for component in row["components"]))
                for row in perturbations
            ),
            tuple(row["label"] for row in perturbations),
            names["batch"],
        )


def _numbered(conditions: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return the table of conditions by id; ids count from 0.

    A range is looked up by arithmetic. Any other index of pandas builds a hash table at its first
    look-up, and a second thread that comes meanwhile finds it half filled: KeyError for an id that
    is there.
    """
    ids = pd.RangeIndex(len(conditions), name="id")
    if not np.array_equal(conditions.pop("id"), ids):
        found = path / "conditions.parquet"
        raise StoreError(f"{found}: ids do not count from 0 to {len(ids) - 1}")
    return conditions.set_axis(ids)


def write_table(path: Path, table: pd.DataFrame | pa.Table) -> None:
    """Write a parquet file."""
    if isinstance(table, pd.DataFrame):
        table = pa.Table.from_pandas(table, preserve_index=False)
    pq.write_table(table, path, compression="zstd")


def checked_gene_table(genes: GeneVocabulary, table: pd.DataFrame | None) -> pd.DataFrame:
    """Return the table of input genes, checked, with the columns that every store has."""
    if table is None:
        table = pd.DataFrame({"symbol": genes.symbols, "column": np.arange(len(genes))})
        table["ensembl_id"] = genes.ensembl_ids
    stored = table[table["column"] >= 0].sort_values("column")
    if tuple(stored["symbol"]) != genes.symbols:
        raise ValueError("gene_table: symbols by column are not the stored genes")
    table = table.astype({"column": np.int32})
    return table if "ensembl_id" in table else table.assign(ensembl_id=None)


def write_conditions(
    path: Path, rows: Sequence[Mapping[str, Any]], batches: Sequence[str] | None
) -> None:
    """Write conditions.parquet with codes for names, and the names to codes.parquet.

    Parameters
    ----------
    path
        Directory of the store.
    rows
        The conditions; see ``CellSetStore.conditions``.
    batches
        Names of batches by code, or None for those of the conditions, sorted.
    """
    table = pd.DataFrame(list(rows))
    codes: list[tuple[str, int, str]] = []
    for kind in _KINDS:
        found = set(table[kind].dropna())
        known = sorted(found) if kind == "cell_type" or batches is None else list(batches)
        code = {name: i for i, name in enumerate(known)}
        if unknown := found - set(code):
            raise SourceError(f"{kind} {min(unknown)!r} of a condition is not among {known[:10]}")
        table[kind] = [code.get(name, -1) for name in table[kind]]
        codes += [(kind, i, name) for name, i in code.items()]
    ids = dict.fromkeys(("id", "cell_type", "perturbation", "batch"), np.int32)
    write_table(path / "conditions.parquet", table.astype(ids))
    write_table(path / "codes.parquet", pd.DataFrame(codes, columns=["kind", "code", "name"]))


def perturbation_table(
    perturbations: Sequence[Perturbation], labels: Sequence[str], is_control: npt.NDArray[np.bool_]
) -> pa.Table:
    """Return the table of perturbations, by id."""
    components = [
        [{"name": c.name, "dose": c.dose, "unit": c.unit} for c in perturbation.components]
        for perturbation in perturbations
    ]
    return pa.table(
        {
            "id": pa.array(range(len(components)), pa.int32()),
            "label": list(labels),
            "canonical": [perturbation.label for perturbation in perturbations],
            "components": pa.array(components, _COMPONENTS),
            "is_control": pa.array(is_control),
        }
    )
