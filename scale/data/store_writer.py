"""The write side of a store: conditions in, a directory that is whole or absent out.

Everything is written into ``DIR.partial``, synced, and renamed to ``DIR`` at the end. An error on
the way (a full disk too) removes what was written; a process that was killed leaves a directory
without a manifest, which the next writer removes.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import shutil
import zlib
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from scale.config import Codec
from scale.data.codec import (
    CHUNK_CELLS,
    KIND_COUNTS,
    LARGEST_COUNT,
    LARGEST_ROW,
    NO_BATCH,
    CsrCounts,
    IntArray,
    encode_chunk,
)
from scale.data.genes import GeneVocabulary
from scale.data.store_files import (
    CHUNK_DTYPE,
    CONTROL_SHARD,
    MANIFEST,
    SCHEMA,
    SCHEMA_VERSION,
    SHARD_HEAD,
    SHARD_MAGIC,
    TREATED_SHARD,
    file_sha256,
    fingerprint,
    seal,
)
from scale.runtime import package_version, sync_directory, versions
from scale.types import Condition, Perturbation, SourceError, StoreError

logger = logging.getLogger(__name__)

_CELLS_PER_PART = 1 << 20
_COMPONENTS = pa.list_(
    pa.struct([("name", pa.string()), ("dose", pa.float64()), ("unit", pa.string())])
)


class _ShardFile:
    """A shard that is being written."""

    def __init__(self, root: Path, name: str, number: int, context: str | None) -> None:
        self.name, self.number, self.context = name, number, context
        self._path = root / name
        self._handle = self._path.open("xb", buffering=io.DEFAULT_BUFFER_SIZE * 16)
        self._digest = sha256()
        self.size = 0
        self._write(SHARD_HEAD.pack(SHARD_MAGIC, SCHEMA_VERSION, 0, 0))

    def _write(self, data: bytes) -> None:
        self._handle.write(data)
        self._digest.update(data)
        self.size += len(data)

    def append(self, blob: bytes) -> int:
        """Write a blob, padded to 8 bytes; return where it starts."""
        offset = self.size
        self._write(blob + bytes(-len(blob) % 8))
        return offset

    def close(self) -> dict[str, Any]:
        """Return the shard's entry in the manifest."""
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        return {"path": self.name, "size": self.size, "sha256": self._digest.hexdigest()}

    def abort(self) -> None:
        try:
            self._handle.close()
        except OSError as error:  # a full disk fails again when the buffer is flushed
            logger.debug("%s: %s", self._path, error)


class StoreWriter:
    """Write a store, one condition at a time in the order they are to have.

    Use it as a context manager: leaving it closes the store, an exception removes it.

    Parameters
    ----------
    path
        Directory of the store.
    genes
        The stored genes; columns of every matrix that is added.
    columns
        Columns of the source under ``perturbation``, ``cell_type``, ``batch``, ``dose``,
        ``library``, and the ``separator`` of combinations; None where there is none.
    control
        Label of the control in the source.
    codec
        Compression of treated chunks; control chunks have none.
    shard_bytes
        A shard that would grow beyond is ended.
    provenance
        What made the store, for ``prepare.json``: JSON values.
    gene_table
        One row per input gene: symbol, ensembl_id, column (-1 = not stored) and statistics; None =
        the stored genes only.
    library
        What total counts are counted over: ``{"over": "all" | sha256 of a gene list,
        "num_genes": int}``; None = the stored genes.
    overwrite
        Replace an existing store, once the new one is complete.
    batches
        Names by code, where cells carry batch codes of their own; None = those of the conditions.
    facts
        Further entries of the manifest: ``counts`` (``read`` or ``recovered``), ``condition_by``,
        ``shuffle_seed``.

    Raises
    ------
    StoreError
        If the directory exists, or another process is writing it.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        genes: GeneVocabulary,
        columns: dict[str, str | None],
        control: str,
        codec: Codec,
        shard_bytes: int,
        provenance: dict[str, Any],
        gene_table: pd.DataFrame | None = None,
        library: dict[str, Any] | None = None,
        overwrite: bool = False,
        batches: Sequence[str] | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self._genes, self._codec, self._shard_bytes = genes, codec, shard_bytes
        self._columns = {
            key: columns.get(key)
            for key in ("perturbation", "cell_type", "batch", "dose", "library", "separator")
        }
        self._control, self._provenance = control, provenance
        self._gene_table = _gene_table(genes, gene_table)
        self._library = library or {"over": genes.sha256, "num_genes": len(genes)}
        self._overwrite, self._batches = overwrite, None if batches is None else tuple(batches)
        self._facts = {
            "counts": "read",
            "condition_by": None,
            "shuffle_seed": None,
            **(facts or {}),
        }
        self._perturbations: dict[Perturbation, tuple[int, str]] = {}
        self._conditions: dict[Condition, dict[str, Any]] = {}
        self._chunks: list[npt.NDArray[np.void]] = []
        self._has_codes = False
        self._open_shards: dict[bool, _ShardFile] = {}
        self._files: list[tuple[int, dict[str, Any]]] = []
        self._num_shards = {False: 0, True: 0}
        self._cells: list[pd.DataFrame] = []
        self._num_parts = 0
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._replaced = self.path.with_name(self.path.name + ".replaced")
        self._lock: int | None = None
        self._start()

    # --- adding ---------------------------------------------------------------------------------

    def add(
        self,
        condition: Condition,
        label: str,
        counts: Any,
        library: npt.NDArray[Any],
        *,
        cells: pd.DataFrame | None = None,
        batch_codes: npt.NDArray[Any] | None = None,
    ) -> None:
        """Write a condition; its cells are stored in the order given, which should be random.

        Parameters
        ----------
        condition
            What the cells are; each condition is added once.
        label
            The source's text for the perturbation.
        counts
            CSR matrix, cells x stored genes, of non-negative integers.
        library
            Total counts of each cell over the library genes, at least 1.
        cells
            Barcode, source file and the like, one row per cell; kept but never read in training.
        batch_codes
            Index into ``batches`` for each cell (-1 = none), where the condition has no batch.

        Raises
        ------
        SourceError
            If the counts cannot be stored; the message names the condition and the cell.
        """
        if self._lock is None:
            raise StoreError(f"{self.path} is closed; nothing more can be added")
        try:
            self._add(condition, label, _checked(condition, counts, library, batch_codes), cells)
        except BaseException:
            self.abort()
            raise

    def _add(
        self, condition: Condition, label: str, counts: CsrCounts, cells: pd.DataFrame | None
    ) -> None:
        name = _describe(condition)
        if condition in self._conditions:
            raise SourceError(f"{name} was added before; give all its cells at once")
        if counts.indices_M.size and counts.indices_M.max() >= len(self._genes):
            raise SourceError(f"{name}: matrix has more columns than the {len(self._genes)} genes")
        if counts.batch_code_N is not None:
            self._has_codes = True
            known = counts.batch_code_N[counts.batch_code_N != NO_BATCH]
            if self._batches is None or known.max(initial=-1) >= len(self._batches):
                raise SourceError(f"{name}: batch codes need their names; give batches")
        number = sum(len(chunks) for chunks in self._chunks)
        if cells is not None:
            self._add_cells(cells, counts.num_cells, number, name)
        perturbation = self._perturbations.setdefault(
            condition.perturbation, (len(self._perturbations), label)
        )
        chunks = self._write_chunks(condition, counts)
        self._chunks.append(chunks)
        self._conditions[condition] = {
            "id": len(self._conditions),
            "cell_type": condition.cell_type,
            "perturbation": perturbation[0],
            "batch": condition.batch,
            "is_control": condition.is_control,
            "num_cells": counts.num_cells,
            "first_chunk": number,
            "num_chunks": len(chunks),
        }

    def _write_chunks(self, condition: Condition, counts: CsrCounts) -> npt.NDArray[np.void]:
        """Append the chunks of a condition to its shard; return their index entries."""
        codec = Codec.none if condition.is_control else self._codec
        starts = range(0, counts.num_cells, CHUNK_CELLS)
        chunks = np.zeros(len(starts), CHUNK_DTYPE)
        for i, start in enumerate(starts):
            part = counts.slice(start, min(start + CHUNK_CELLS, counts.num_cells))
            blob = encode_chunk(part, codec=codec)
            shard = self._shard(condition, len(blob))
            chunks[i] = (
                len(self._conditions),
                shard.number,
                part.num_cells,
                shard.append(blob),
                len(blob),
                zlib.crc32(blob),
                len(part.indices_M),
                0,
            )
        return chunks

    def _shard(self, condition: Condition, length: int) -> _ShardFile:
        """Return the shard for a blob: one cell type per treated shard."""
        is_control = condition.is_control
        context = None if is_control else condition.cell_type
        shard = self._open_shards.get(is_control)
        if shard is not None:
            is_full = shard.size > SHARD_HEAD.size and shard.size + length > self._shard_bytes
            if shard.context == context and not is_full:
                return shard
            self._files.append((shard.number, shard.close()))
        number = sum(self._num_shards.values())
        if number > np.iinfo(CHUNK_DTYPE["shard"]).max:
            raise StoreError(f"more than {number} shards; raise shard_bytes ({self._shard_bytes})")
        prefix = CONTROL_SHARD if is_control else TREATED_SHARD
        name = f"{prefix}{self._num_shards[is_control]:05d}.scl"
        self._num_shards[is_control] += 1
        self._open_shards[is_control] = _ShardFile(self._partial, name, number, context)
        return self._open_shards[is_control]

    def _add_cells(self, cells: pd.DataFrame, num_cells: int, chunk: int, name: str) -> None:
        if len(cells) != num_cells:
            raise SourceError(f"{name}: {len(cells)} rows about {num_cells} cells")
        position = np.arange(num_cells)
        place = pd.DataFrame(
            {
                "chunk": (chunk + position // CHUNK_CELLS).astype(np.uint32),
                "row": (position % CHUNK_CELLS).astype(np.uint16),
            }
        )
        self._cells.append(pd.concat([place, cells.reset_index(drop=True)], axis=1))
        if sum(len(part) for part in self._cells) >= _CELLS_PER_PART:
            self._flush_cells()

    def _flush_cells(self) -> None:
        if self._cells:
            (self._partial / "cells").mkdir(exist_ok=True)
            name = f"cells/part-{self._num_parts:05d}.parquet"
            self._write_table(name, pd.concat(self._cells, ignore_index=True))
            self._num_parts += 1
            self._cells = []

    # --- closing --------------------------------------------------------------------------------

    def close(self) -> None:
        """Write tables and manifest, and give the store its name."""
        if self._lock is None:
            return
        try:
            if not self._conditions:
                raise SourceError(f"no condition was added to {self.path}; a store needs cells")
            self._finish()
        except BaseException:
            self.abort()
            raise

    def _finish(self) -> None:
        for shard in self._open_shards.values():
            self._files.append((shard.number, shard.close()))
        self._open_shards = {}
        self._flush_cells()
        chunks = np.concatenate(self._chunks)
        np.save(self._partial / "chunks.npy", chunks)
        self._write_tables()
        prepared = {"provenance": self._provenance, "versions": versions()}
        (self._partial / "prepare.json").write_text(json.dumps(prepared, indent=1) + "\n")
        shards = [entry for _, entry in sorted(self._files, key=lambda file: file[0])]
        known = {entry["path"] for entry in shards}
        others = sorted(
            file.relative_to(self._partial).as_posix()
            for file in self._partial.rglob("*")
            if file.is_file()
        )
        files = shards + [self._entry(name) for name in others if name not in known]
        manifest = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "created_by": f"scale {package_version()}",
            "generation": 1,
            "kind": KIND_COUNTS,
            "chunk_cells": CHUNK_CELLS,
            "num_cells": sum(row["num_cells"] for row in self._conditions.values()),
            "num_conditions": len(self._conditions),
            "num_chunks": len(chunks),
            "num_genes": len(self._genes),
            "genes_sha256": self._genes.sha256,
            "library": self._library,
            "control": self._control,
            "columns": self._columns,
            **self._facts,
            "fingerprint": self._fingerprint(),
            "files": files,
        }
        self._sync(MANIFEST, seal(manifest))
        for folder in {(self._partial / file["path"]).parent for file in files} | {self._partial}:
            sync_directory(folder)
        self._rename()

    def _fingerprint(self) -> str:
        rows = [
            ([c.cell_type, c.perturbation.label, c.batch, c.is_control, row["num_cells"]], chunks)
            for (c, row), chunks in zip(self._conditions.items(), self._chunks, strict=True)
        ]
        facts = {
            "genes_sha256": self._genes.sha256,
            "library": self._library,
            "kind": KIND_COUNTS,
            "batches": list(self._batches or ()) if self._has_codes else [],
        }
        return fingerprint(facts, rows)

    def _write_tables(self) -> None:
        self._write_table("genes.parquet", self._gene_table)
        conditions = pd.DataFrame(list(self._conditions.values()))
        names = {
            "cell_type": sorted(set(conditions["cell_type"])),
            "batch": list(self._batches or sorted(set(conditions["batch"].dropna()))),
        }
        for kind, known in names.items():
            codes = {name: code for code, name in enumerate(known)}
            if unknown := set(conditions[kind].dropna()) - set(codes):
                raise SourceError(f"conditions of {kind} {unknown} that is not among {known[:10]}")
            conditions[kind] = [codes.get(name, -1) for name in conditions[kind]]
        small = {"id": "int32", "cell_type": "int32", "perturbation": "int32", "batch": "int32"}
        self._write_table("conditions.parquet", conditions.astype(small))
        rows = [(kind, code, name) for kind in names for code, name in enumerate(names[kind])]
        self._write_table("codes.parquet", pd.DataFrame(rows, columns=["kind", "code", "name"]))
        controls = {c.perturbation for c in self._conditions if c.is_control}
        components = [
            [{"name": c.name, "dose": c.dose, "unit": c.unit} for c in p.components]
            for p in self._perturbations
        ]
        table = pa.table(
            {
                "id": pa.array(range(len(components)), pa.int32()),
                "label": [label for _, label in self._perturbations.values()],
                "canonical": [p.label for p in self._perturbations],
                "components": pa.array(components, _COMPONENTS),
                "is_control": [p in controls for p in self._perturbations],
            }
        )
        pq.write_table(table, self._partial / "perturbations.parquet", compression="zstd")

    def _write_table(self, name: str, frame: pd.DataFrame) -> None:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        pq.write_table(table, self._partial / name, compression="zstd")

    def _entry(self, name: str) -> dict[str, Any]:
        path = self._partial / name
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        return {"path": name, "size": path.stat().st_size, "sha256": file_sha256(path)}

    def _sync(self, name: str, content: bytes) -> None:
        with (self._partial / name).open("xb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())

    # --- names ----------------------------------------------------------------------------------

    def _start(self) -> None:
        """Claim the name, and clear what a killed process left."""
        if self._replaced.exists() and not self.path.exists():
            self._replaced.rename(self.path)  # it was killed between its last two renames
        self._refuse_existing()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial.mkdir(exist_ok=True)
        lock = os.open(self._partial, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise StoreError(f"{self.path} is being written by another process") from error
        self._lock = lock
        for left in self._partial.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        (self._partial / "shards").mkdir()

    def _refuse_existing(self) -> None:
        if not self.path.exists():
            return
        if not self._overwrite:
            raise StoreError(f"{self.path} exists; choose another name, or set overwrite=true")
        if not (self.path / MANIFEST).exists() and (
            not self.path.is_dir() or any(self.path.iterdir())
        ):
            raise StoreError(f"{self.path} is no store; it is not overwritten, remove it yourself")

    def _rename(self) -> None:
        self._refuse_existing()
        if self.path.exists():
            if self._replaced.exists():
                shutil.rmtree(self._replaced)
            self.path.rename(self._replaced)
        self._partial.rename(self.path)
        sync_directory(self.path.parent)
        self._release()
        if self._replaced.exists():
            shutil.rmtree(self._replaced)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def abort(self) -> None:
        """Remove what was written; an existing store of this name stays."""
        if self._lock is None:
            return
        for shard in self._open_shards.values():
            shard.abort()
        self._open_shards = {}
        shutil.rmtree(self._partial, ignore_errors=True)
        if self._replaced.exists() and not self.path.exists():
            self._replaced.rename(self.path)
        self._release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


# --- checks -------------------------------------------------------------------------------------


def _describe(condition: Condition) -> str:
    batch = "" if condition.batch is None else f", {condition.batch}"
    return f"condition ({condition.cell_type}, {condition.perturbation.label}{batch})"


def _gene_table(genes: GeneVocabulary, table: pd.DataFrame | None) -> pd.DataFrame:
    """Return the table of input genes, with the columns that every store has."""
    if table is None:
        table = pd.DataFrame({"symbol": genes.symbols, "column": np.arange(len(genes))})
        table["ensembl_id"] = genes.ensembl_ids
    stored = table[table["column"] >= 0].sort_values("column")
    if tuple(stored["symbol"]) != genes.symbols:
        raise ValueError("gene_table: symbols by column are not the stored genes")
    table = table.astype({"column": np.int32})
    return table if "ensembl_id" in table else table.assign(ensembl_id=None)


def _checked(
    condition: Condition,
    counts: Any,
    library: npt.NDArray[Any],
    batch_codes: npt.NDArray[Any] | None,
) -> CsrCounts:
    """Return counts as the codec takes them: whole, positive, genes ascending, no duplicates."""
    name = _describe(condition)
    num_cells = counts.shape[0]
    if num_cells == 0 or len(library) != num_cells:
        raise SourceError(f"{name}: {len(library)} libraries for {num_cells} cells")
    if not counts.has_sorted_indices:
        counts = counts.sorted_indices()
    value = np.asarray(counts.data)
    row = np.repeat(np.arange(num_cells), np.diff(counts.indptr))

    def refuse(bad: npt.NDArray[np.bool_], what: str) -> None:
        if bad.any():
            i = int(np.argmax(bad))
            cell = i if len(bad) == num_cells and what.startswith("library") else int(row[i])
            raise SourceError(f"{name}, cell {cell}: {what}")

    if value.dtype.kind == "f":
        refuse(~np.isfinite(value), "count that is not finite")
        refuse(value != np.floor(value), "count that is not a whole number")
    refuse(value < 0, "negative count")
    refuse(value > LARGEST_COUNT, f"count above {LARGEST_COUNT}")
    refuse(
        (np.diff(counts.indices, prepend=-1) == 0) & (np.diff(row, prepend=-1) == 0), "gene twice"
    )
    library = np.asarray(library)
    refuse(~((library >= 1) & (library < 1 << 32)), "library is not between 1 and 2^32")
    kept = value > 0
    size = np.bincount(row[kept], minlength=num_cells)
    if size.max() > LARGEST_ROW:
        raise SourceError(
            f"{name}, cell {size.argmax()}: more than {LARGEST_ROW} genes with counts"
        )
    return CsrCounts(
        np.concatenate([[0], np.cumsum(size)]),
        counts.indices[kept].astype(np.int32),
        value[kept].astype(np.uint32),
        library.astype(np.uint32),
        None if batch_codes is None else _codes(name, np.asarray(batch_codes), num_cells),
    )


def _codes(name: str, codes: IntArray, num_cells: int) -> npt.NDArray[np.uint16]:
    if len(codes) != num_cells or codes.min() < -1 or codes.max() >= NO_BATCH:
        raise SourceError(
            f"{name}: {len(codes)} batch codes between {codes.min()} and {codes.max()}"
        )
    return np.where(codes < 0, NO_BATCH, codes).astype(np.uint16)
