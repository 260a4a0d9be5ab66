"""From finished shards to a store: tables, chunk index, fingerprint, manifest.

Whatever writes shards (one condition after the other, many workers, a merge of stores) ends here,
so that equal cells get equal files and an equal fingerprint whoever wrote them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.data.codec import CHUNK_CELLS, KIND_COUNTS
from scale.data.genes import GeneVocabulary
from scale.data.store_files import (
    ADDED_COLUMNS,
    COLUMN_KEYS,
    MANIFEST,
    SCHEMA,
    SCHEMA_VERSION,
    file_sha256,
    fingerprint,
    seal,
)
from scale.data.tables import perturbation_table, write_conditions, write_table
from scale.runtime import package_version, sync_directory, versions
from scale.types import Condition, Perturbation, SourceError


@dataclass(frozen=True, slots=True)
class StoredCondition:
    """A condition whose chunks are written.

    Parameters
    ----------
    condition, label
        What the cells are, and the source's text for the perturbation.
    num_cells, num_chunks
        Size; its chunks follow those of the condition before.
    """

    condition: Condition
    label: str
    num_cells: int
    num_chunks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreContent:
    """All that a store says beside its shards and its table of cells.

    Parameters
    ----------
    genes, gene_table
        The stored genes, and one row per input gene with its ``column`` (-1 = not stored).
    conditions
        In the order of their ids.
    chunks
        Index entries in the order of the conditions; the field ``condition`` is filled in here.
    columns, control, library, provenance, facts
        See ``StoreWriter``.
    batches
        Names by code, where cells carry batch codes of their own; None = those of the conditions.
    has_codes
        Whether any chunk has batch codes.
    """

    genes: GeneVocabulary
    gene_table: pd.DataFrame
    conditions: Sequence[StoredCondition]
    chunks: npt.NDArray[np.void]
    columns: dict[str, str | None]
    control: str
    library: dict[str, Any]
    provenance: dict[str, Any]
    batches: tuple[str, ...] | None
    has_codes: bool
    facts: dict[str, Any] = field(default_factory=dict)


def write_content(partial: Path, content: StoreContent, written: Sequence[dict[str, Any]]) -> None:
    """Write everything but the shards into ``partial``, the manifest last, and sync it all.

    The directory is a whole store afterwards; it only has to be given its name.

    Parameters
    ----------
    partial
        Holds the shards, possibly ``cells/*.parquet``, and nothing that is not the store's.
    content
        What is written.
    written
        Entries of the manifest for files that have been hashed and synced by whoever wrote them:
        the shards, in the order of their numbers, and possibly others.
    """
    last_chunk = np.cumsum([stored.num_chunks for stored in content.conditions])
    if not len(last_chunk) or last_chunk[-1] != len(content.chunks):
        raise ValueError(f"{len(content.chunks)} chunks, the conditions have {last_chunk[-1:]}")
    chunks = content.chunks.copy()
    chunks["condition"] = np.searchsorted(last_chunk, np.arange(len(chunks)), side="right")
    np.save(partial / "chunks.npy", chunks)
    _write_tables(partial, content)
    prepared = {"provenance": content.provenance, "versions": versions()}
    (partial / "prepare.json").write_text(json.dumps(prepared, indent=1) + "\n")
    manifest = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "created_by": f"scale {package_version()}",
        "generation": 1,
        "kind": KIND_COUNTS,
        "chunk_cells": CHUNK_CELLS,
        "num_cells": sum(stored.num_cells for stored in content.conditions),
        "num_conditions": len(content.conditions),
        "num_chunks": len(chunks),
        "num_genes": len(content.genes),
        "genes_sha256": content.genes.sha256,
        "library": content.library,
        "control": content.control,
        "columns": {key: content.columns.get(key) for key in COLUMN_KEYS},
        "counts": "read",
        "condition_by": None,
        "shuffle_seed": None,
        **content.facts,
        "fingerprint": content_fingerprint(content),
        "files": [*written, *_other_files(partial, written)],
    }
    with (partial / MANIFEST).open("wb") as handle:
        handle.write(seal(manifest))
        handle.flush()
        os.fsync(handle.fileno())
    for folder in {(partial / file["path"]).parent for file in manifest["files"]} | {partial}:
        sync_directory(folder)


def content_fingerprint(content: StoreContent) -> str:
    """Return the fingerprint: the same for equal cells, however they were written."""
    rows, first = [], 0
    for stored in content.conditions:
        condition = stored.condition
        agents = [[c.name, c.dose, c.unit] for c in condition.perturbation.components]
        name = [condition.cell_type, agents, condition.batch, condition.is_control]
        rows.append((name, content.chunks[first : first + stored.num_chunks]))
        first += stored.num_chunks
    facts = {
        "genes_sha256": content.genes.sha256,
        "library": content.library,
        "kind": KIND_COUNTS,
        "batches": list(content.batches or ()) if content.has_codes else [],
    }
    return fingerprint(facts, rows)


def check_columns(columns: dict[str, str | None]) -> None:
    """Refuse source columns that would be lost beside those that ``to_anndata`` adds."""
    for key in ("perturbation", "cell_type", "batch", "dose"):
        if (name := columns.get(key)) in ADDED_COLUMNS and name != "condition":
            raise SourceError(
                f"columns.{key} is {name!r}, a name that stores use themselves "
                f"({', '.join(ADDED_COLUMNS)}); rename the column in the source"
            )


def file_entry(root: Path, name: str) -> dict[str, Any]:
    """Sync a file and return its entry in the manifest."""
    path = root / name
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    return {"path": name, "size": path.stat().st_size, "sha256": file_sha256(path)}


def _other_files(partial: Path, written: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    known = {entry["path"] for entry in written} | {MANIFEST}
    names = (file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file())
    return [file_entry(partial, name) for name in sorted(names) if name not in known]


def _write_tables(partial: Path, content: StoreContent) -> None:
    write_table(partial / "genes.parquet", content.gene_table)
    perturbations: dict[Perturbation, int] = {}
    labels: list[str] = []
    rows, first_chunk = [], 0
    for number, stored in enumerate(content.conditions):
        condition = stored.condition
        perturbation = perturbations.setdefault(condition.perturbation, len(perturbations))
        if perturbation == len(labels):
            labels.append(stored.label)
        rows.append(
            {
                "id": number,
                "cell_type": condition.cell_type,
                "perturbation": perturbation,
                "batch": condition.batch,
                "is_control": condition.is_control,
                "num_cells": stored.num_cells,
                "first_chunk": first_chunk,
                "num_chunks": stored.num_chunks,
            }
        )
        first_chunk += stored.num_chunks
    write_conditions(partial, rows, content.batches)
    controls = {
        stored.condition.perturbation
        for stored in content.conditions
        if stored.condition.is_control
    }
    is_control = np.array([perturbation in controls for perturbation in perturbations])
    table = perturbation_table(list(perturbations), labels, is_control)
    write_table(partial / "perturbations.parquet", table)
