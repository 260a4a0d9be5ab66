"""The write side of a store: conditions in, a directory that is whole or absent out.

Chunks are appended to shards as conditions come; tables, index and at last the manifest are written
when the store is closed. Everything happens in ``DIR.partial`` until then.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.config import Codec
from scale.data.codec import CHUNK_CELLS, chunk_of, encode_streams
from scale.data.csr import NO_BATCH, CsrCounts, checked_counts
from scale.data.genes import GeneVocabulary
from scale.data.partial import PartialDirectory
from scale.data.shard_writer import ShardWriter
from scale.data.store_content import (
    StoreContent,
    StoredCondition,
    check_columns,
    write_content,
)
from scale.data.store_files import CHUNK_DTYPE, MANIFEST
from scale.data.tables import checked_gene_table, write_table
from scale.types import Condition, SourceError, StoreError

_CELLS_PER_PART = 1 << 20


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
        A shard is ended before it would hold more than this, counted before compression.
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
        self._genes, self._codec = genes, codec
        check_columns(columns)
        self._columns = columns
        self._control, self._provenance = control, provenance
        self._gene_table = checked_gene_table(genes, gene_table)
        self._library = library or {"over": genes.sha256, "num_genes": len(genes)}
        self._batches = None if batches is None else tuple(batches)
        self._facts = facts or {}
        self._conditions: dict[Condition, StoredCondition] = {}
        self._chunks: list[npt.NDArray[np.void]] = []
        self._num_chunks = 0
        self._has_codes = False
        self._cells: list[pd.DataFrame] = []
        self._num_unwritten, self._num_parts = 0, 0
        self._directory = PartialDirectory(self.path, overwrite=overwrite, mark=MANIFEST)
        self._partial = self._directory.partial
        try:
            self._shards = ShardWriter(self._partial, shard_bytes)
        except OSError:
            self._directory.abort()
            raise

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
        if not self._directory.is_open:
            raise StoreError(f"{self.path} is closed; nothing more can be added")
        try:
            checked = checked_counts(_describe(condition), counts, library, batch_codes)
            self._add(condition, label, checked, cells)
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
            if self._batches is None or known.max(initial=0) >= len(self._batches):
                raise SourceError(f"{name}: batch codes need their names; give batches")
        number = self._num_chunks
        if cells is not None:
            self._add_cells(cells, counts.num_cells, number, name)
        chunks = self._write_chunks(condition, counts)
        self._chunks.append(chunks)
        self._num_chunks += len(chunks)
        self._conditions[condition] = StoredCondition(
            condition, label, counts.num_cells, len(chunks)
        )

    def _write_chunks(self, condition: Condition, counts: CsrCounts) -> npt.NDArray[np.void]:
        """Append the chunks of a condition to its shard; return their index entries."""
        codec = Codec.none if condition.is_control else self._codec
        starts = range(0, counts.num_cells, CHUNK_CELLS)
        chunks = np.zeros(len(starts), CHUNK_DTYPE)
        for i, start in enumerate(starts):
            part = counts.slice(start, min(start + CHUNK_CELLS, counts.num_cells))
            chunk = chunk_of(part)
            blob = encode_streams(chunk, codec=codec)
            shard, offset = self._shards.append(
                blob,
                chunk.num_bytes,
                cell_type=condition.cell_type,
                is_control=condition.is_control,
            )
            chunks[i] = (
                0,
                shard,
                part.num_cells,
                offset,
                len(blob),
                zlib.crc32(blob),
                len(part.indices_M),
                0,
            )
        return chunks

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
        self._num_unwritten += num_cells
        if self._num_unwritten >= _CELLS_PER_PART:
            self._flush_cells()

    def _flush_cells(self) -> None:
        if self._cells:
            (self._partial / "cells").mkdir(exist_ok=True)
            name = f"cells/part-{self._num_parts:05d}.parquet"
            write_table(self._partial / name, pd.concat(self._cells, ignore_index=True))
            self._num_parts += 1
            self._cells, self._num_unwritten = [], 0

    # --- closing --------------------------------------------------------------------------------

    def close(self) -> None:
        """Write tables and manifest, and give the store its name."""
        if not self._directory.is_open:
            return
        try:
            if not self._conditions:
                raise SourceError(f"no condition was added to {self.path}; a store needs cells")
            self._finish()
        except BaseException:
            self.abort()
            raise

    def _finish(self) -> None:
        shards = self._shards.close()
        self._flush_cells()
        content = StoreContent(
            genes=self._genes,
            gene_table=self._gene_table,
            conditions=list(self._conditions.values()),
            chunks=np.concatenate(self._chunks),
            columns=self._columns,
            control=self._control,
            library=self._library,
            provenance=self._provenance,
            batches=self._batches,
            has_codes=self._has_codes,
            facts=self._facts,
        )
        write_content(self._partial, content, shards)
        self._directory.commit()

    def abort(self) -> None:
        """Remove what was written; an existing store of this name stays."""
        self._shards.abort()
        self._directory.abort()

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


def _describe(condition: Condition) -> str:
    batch = "" if condition.batch is None else f", {condition.batch}"
    return f"condition ({condition.cell_type}, {condition.perturbation.label}{batch})"
