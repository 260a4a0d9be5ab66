"""Several stores joined into one without reading their cells.

Shards are linked (or copied, between file systems) byte by byte; only what refers to them is
written anew: the chunk index, the tables, the names of the cells, the manifest. The result has the
fingerprint of a store that was written with all the conditions at once.

Shapes: K = chunks.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scale.data.partial import PartialDirectory
from scale.data.shards import CONTROL_SHARD, TREATED_SHARD
from scale.data.store import CellSetStore
from scale.data.store_content import StoreContent, StoredCondition, write_content
from scale.data.store_files import MANIFEST
from scale.data.tables import checked_gene_table
from scale.runtime import sync_directory
from scale.types import Condition, StoreError

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, cells done and cells in all."""

_MUST_AGREE = ("kind", "genes_sha256", "library", "control", "columns", "condition_by")
_MOST_SHARDS = 1 << 16  # the index has 16 bits for the number of a shard
_ADVICE = "prepare them together instead: source=store source.files=[{}]"


def merge_stores(
    paths: Sequence[Path],
    target: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Join stores that have no condition in common.

    Parameters
    ----------
    paths
        The stores, in the order in which their conditions are to come.
    target
        Directory of the new store; the others stay as they are.
    overwrite
        Replace a store of this name, once the new one is complete.
    progress
        Called after each store with its cells.

    Raises
    ------
    StoreError
        If there are fewer than two, or they differ in genes, library, control, columns or the key
        of conditions, or have a condition in common, or codes of batches that mean different names.
    """
    if len(paths) < 2:
        raise StoreError(f"merge={[str(path) for path in paths]}; give two stores or more")
    with ExitStack() as stack:
        stores = [stack.enter_context(CellSetStore.open(path)) for path in paths]
        _check_alike(stores)
        _check_conditions(stores)
        content = _joined(stores)
        directory = PartialDirectory(target, overwrite=overwrite, mark=MANIFEST)
        try:
            shards = _take_shards(stores, directory.partial, progress)
            _write_cells(stores, directory.partial)
            write_content(directory.partial, content, shards)
            directory.commit()
        finally:
            directory.abort()


# --- what must hold -----------------------------------------------------------------------------


def _check_alike(stores: Sequence[CellSetStore]) -> None:
    """Refuse stores that cannot be one, naming each difference."""
    first, differences = stores[0], []
    for other in stores[1:]:
        for key in _MUST_AGREE:
            ours, theirs = first.manifest.get(key), other.manifest.get(key)
            if ours == theirs:
                continue
            if key == "genes_sha256":
                common = len(set(first.genes.symbols) & set(other.genes.symbols))
                what = (
                    f"genes: {first.num_genes:,} and {other.num_genes:,}, {common:,} in common "
                    "(their order counts too)"
                )
            else:
                what = f"{key}: {ours!r} and {theirs!r}"
            differences.append(f"{first.path} and {other.path} differ in {what}")
    if differences:
        raise StoreError(
            f"{'; '.join(differences)}. Stores are merged as they are; give them equal settings, "
            f"or {_ADVICE.format(_names(stores))}"
        )


def _check_conditions(stores: Sequence[CellSetStore]) -> None:
    owner: dict[Any, CellSetStore] = {}
    shared: list[str] = []
    for store in stores:
        for number in store.conditions.index:
            condition = store.condition(int(number))
            if condition in owner:
                batch = "" if condition.batch is None else f", {condition.batch}"
                shared.append(f"({condition.cell_type}, {condition.perturbation.label}{batch})")
            owner.setdefault(condition, store)
    if shared:
        raise StoreError(
            f"{len(shared):,} conditions are in more than one store: {', '.join(shared[:3])}"
            f"{', ...' if len(shared) > 3 else ''}. Their cells would have to be shuffled "
            f"together; {_ADVICE.format(_names(stores))}"
        )


def _names(stores: Sequence[CellSetStore]) -> str:
    return ",".join(str(store.path) for store in stores)


# --- what is written anew -----------------------------------------------------------------------


def _joined(stores: Sequence[CellSetStore]) -> StoreContent:
    """Return the tables and the index of all stores, one after the other."""
    first = stores[0]
    total = sum(len(_shards_of(store)) for store in stores)
    if total > _MOST_SHARDS:
        raise StoreError(
            f"{total:,} shards in all, a store has {_MOST_SHARDS:,} at most; "
            f"{_ADVICE.format(_names(stores))} with a higher shard_bytes"
        )
    chunks, conditions, num_shards = [], [], 0
    for store in stores:
        entry_K = np.array(store.chunks)
        entry_K["shard"] += num_shards
        num_shards += len(_shards_of(store))
        chunks.append(entry_K)
        conditions += _conditions_of(store)
    has_codes = [_has_codes(store) for store in stores]
    counts = {str(store.manifest["counts"]) for store in stores}
    seeds = {store.manifest["shuffle_seed"] for store in stores}
    return StoreContent(
        genes=first.genes,
        gene_table=_gene_table(stores),
        conditions=conditions,
        chunks=np.concatenate(chunks),
        columns=first.columns,
        control=first.control,
        library=first.manifest["library"],
        provenance={"merged": [_describe(store) for store in stores]},
        batches=_joined_batches(stores, has_codes),
        has_codes=any(has_codes),
        facts={
            "generation": 1 + max(int(store.manifest["generation"]) for store in stores),
            "counts": "recovered" if "recovered" in counts else "read",
            "condition_by": first.manifest["condition_by"],
            "shuffle_seed": seeds.pop() if len(seeds) == 1 else None,
        },
    )


def _conditions_of(store: CellSetStore) -> list[StoredCondition]:
    columns = ("cell_type", "perturbation", "batch", "is_control", "num_cells", "num_chunks")
    return [
        StoredCondition(
            Condition(cell_type, store.perturbations[number], batch, is_control),
            store.labels[number],
            num_cells,
            num_chunks,
        )
        for cell_type, number, batch, is_control, num_cells, num_chunks in zip(
            *(store.conditions[name].tolist() for name in columns), strict=True
        )
    ]


def _describe(store: CellSetStore) -> dict[str, Any]:
    """Return where a part came from."""
    return {
        "store": store.path.name,
        "fingerprint": store.fingerprint,
        "generation": store.manifest["generation"],
        "num_cells": store.manifest["num_cells"],
        "prepared": json.loads((store.path / "prepare.json").read_text()),
    }


def _has_codes(store: CellSetStore) -> bool:
    """Return whether cells carry the codes of their batches: the chunks of a condition agree."""
    table = store.conditions
    without = table["first_chunk"][table["batch"].isna()]
    return any(store.read_chunk(int(chunk)).batch_code_N is not None for chunk in without)


def _joined_batches(stores: Sequence[CellSetStore], has_codes: Sequence[bool]) -> tuple[str, ...]:
    """Return the names of batches by code; codes inside chunks must keep their meaning."""
    base: tuple[str, ...] = ()
    for store, is_coded in zip(stores, has_codes, strict=True):
        if not is_coded:
            continue
        shorter, longer = sorted((base, store.batches), key=len)
        if longer[: len(shorter)] != shorter:
            raise StoreError(
                f"{store.path} numbers the batches of its cells in another way than the stores "
                f"before it ({', '.join(store.batches[:5])}, ... and {', '.join(base[:5])}, ...), "
                f"and the numbers are part of its shards; {_ADVICE.format(_names(stores))}"
            )
        base = longer
    others = {name for store in stores for name in store.batches} - set(base)
    return (*base, *sorted(others))


def _gene_table(stores: Sequence[CellSetStore]) -> pd.DataFrame:
    """Return the table of input genes where all stores had the same; else the stored genes.

    Statistics are left out: they were taken over other cells than those of the whole.
    """
    first = stores[0]
    columns = ["symbol", "ensembl_id", "column"]
    tables = [pd.read_parquet(store.path / "genes.parquet")[columns] for store in stores]
    is_equal = all(table.equals(tables[0]) for table in tables)
    return checked_gene_table(first.genes, tables[0] if is_equal else None)


# --- files --------------------------------------------------------------------------------------


def _shards_of(store: CellSetStore) -> list[dict[str, Any]]:
    return [file for file in store.manifest["files"] if file["path"].startswith("shards/")]


def _take_shards(
    stores: Sequence[CellSetStore], partial: Path, progress: Progress | None
) -> list[dict[str, Any]]:
    """Link or copy all shards under new numbers; return their entries in the manifest."""
    (partial / "shards").mkdir()
    entries: list[dict[str, Any]] = []
    numbers = {CONTROL_SHARD: 0, TREATED_SHARD: 0}
    total, done, num_copied = sum(int(s.manifest["num_cells"]) for s in stores), 0, 0
    for store in stores:
        for file in _shards_of(store):
            is_control = file["path"].startswith(CONTROL_SHARD)
            prefix = CONTROL_SHARD if is_control else TREATED_SHARD
            name = f"{prefix}{numbers[prefix]:05d}.scl"
            numbers[prefix] += 1
            num_copied += not _link(store.path / file["path"], partial / name)
            entries.append({**file, "path": name})
        done += int(store.manifest["num_cells"])
        if progress is not None:
            progress("merge", done, total)
    logger.info("shards: %d linked, %d copied", len(entries) - num_copied, num_copied)
    return entries


def _link(source: Path, target: Path) -> bool:
    """Give a file a second name; copy it where the file system cannot, and return False."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as handle:
            os.fsync(handle.fileno())
        return False
    return True


def _write_cells(stores: Sequence[CellSetStore], partial: Path) -> None:
    """Copy the names of cells with the new numbers of their chunks, if all stores have them."""
    parts = [sorted((store.path / "cells").glob("*.parquet")) for store in stores]
    if not all(parts):
        if any(parts):
            lacking = [str(s.path) for s, p in zip(stores, parts, strict=True) if not p]
            logger.warning("names of cells are left out: %s has none", ", ".join(lacking))
        return
    (partial / "cells").mkdir()
    number = first_chunk = 0
    for store, files in zip(stores, parts, strict=True):
        for file in files:
            _renumber(file, partial / f"cells/part-{number:05d}.parquet", first_chunk)
            number += 1
        first_chunk += len(store.chunks)
    sync_directory(partial / "cells")


def _renumber(source: Path, target: Path, first_chunk: int) -> None:
    with pq.ParquetFile(source) as file:
        schema = file.schema_arrow
        place = schema.get_field_index("chunk")
        offset = pa.scalar(first_chunk, schema.field(place).type)
        with pq.ParquetWriter(target, schema, compression="zstd") as writer:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                chunks = pc.add(table["chunk"], offset)
                writer.write_table(table.set_column(place, schema.field(place), chunks))
