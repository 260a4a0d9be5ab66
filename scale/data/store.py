"""The read side of a store: a directory of cells, grouped by condition, cut into chunks.

``manifest.json`` names every other file with its size and hash and is written last, so a directory
without one is no store. Treated cells lie in shards of one cell type each, so that the cells of a
held-out context are in files that training never opens; control cells lie in shards without
compression, which are mapped: the processes of a machine share one copy, and single rows are read
in place. Whatever was damaged is noticed: small files by their hash when a store is opened, shards
by their size then and by the checksum of each chunk that is read.

Shapes: N = cells.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from scale.data.codec import CHUNK_CELLS, CellChunk, parse_chunk
from scale.data.csr import CsrCounts, IntArray
from scale.data.genes import GeneVocabulary
from scale.data.shards import Shards
from scale.data.store_files import (
    ADDED_COLUMNS,
    CHUNK_DTYPE,
    MANIFEST,
    check_files,
    read_manifest,
)
from scale.data.tables import StoreTables
from scale.runtime import derive, mix64_array
from scale.types import Condition, Perturbation, StoreError

if TYPE_CHECKING:
    from anndata import AnnData
    from torch import Tensor

    from scale.data.compact import CompactCells

_FOLD_PURPOSE = 5  # purposes 1 to 4 are the plan's


@dataclass(frozen=True, slots=True, eq=False)
class CellSetStore:
    """Cells grouped by condition, read by chunk; safe to share between threads.

    Parameters
    ----------
    path
        The directory.
    manifest
        What ``manifest.json`` says.
    genes
        The stored genes.
    conditions
        One row per condition, index = condition id: cell_type, perturbation (id), batch (None where
        it is not part of the condition), is_control, num_cells, first_chunk, num_chunks.
    perturbations, labels
        By perturbation id: what was done, and the source's text for it.
    batches
        Names by batch code.
    chunks
        The chunk index, mapped: one entry of ``CHUNK_DTYPE`` per chunk.

    Examples
    --------
    >>> CellSetStore.open("no/such/store")
    Traceback (most recent call last):
    scale.types.StoreError: no/such/store is no store: it has no manifest.json
    """

    path: Path
    manifest: dict[str, Any]
    genes: GeneVocabulary
    conditions: pd.DataFrame
    perturbations: tuple[Perturbation, ...]
    labels: tuple[str, ...]
    batches: tuple[str, ...]
    chunks: npt.NDArray[np.void]
    _shards: Shards
    _is_checked: npt.NDArray[np.bool_]

    @classmethod
    def open(cls, path: Path | str, *, verify: Literal["index", "full"] = "index") -> CellSetStore:
        """Open a store.

        Parameters
        ----------
        path
            The directory.
        verify
            ``index`` checks sizes and the hashes of all small files, ``full`` every byte.

        Raises
        ------
        StoreError
            If there is no store, or a file is missing or damaged; the message names the file.
        """
        path = Path(path)
        manifest = read_manifest(path)
        check_files(path, manifest["files"], with_shards=verify == "full")
        tables = StoreTables.read(path)
        chunks = np.load(path / "chunks.npy", mmap_mode="r")
        shards = [f["path"] for f in manifest["files"] if f["path"].startswith("shards/")]
        if chunks.dtype != CHUNK_DTYPE or len(chunks) != manifest["num_chunks"]:
            raise StoreError(f"{path / 'chunks.npy'} does not fit the manifest")
        return cls(
            path,
            manifest,
            tables.genes,
            tables.conditions,
            tables.perturbations,
            tables.labels,
            tables.batches,
            chunks,
            Shards(path, shards),
            np.zeros(len(chunks), dtype=bool),
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the content; equal for equal cells wherever they lie."""
        return str(self.manifest["fingerprint"])

    @property
    def num_genes(self) -> int:
        """Number of stored genes."""
        return len(self.genes)

    @property
    def control(self) -> str:
        """Label of the control in the source."""
        return str(self.manifest["control"])

    @property
    def columns(self) -> dict[str, str | None]:
        """Columns of the source: perturbation, cell_type, batch, dose, library, and separator."""
        return dict(self.manifest["columns"])

    def condition(self, condition: int) -> Condition:
        """Return what condition number ``condition`` is."""
        row = self._row(condition)
        return Condition(
            row["cell_type"],
            self.perturbations[row["perturbation"]],
            row["batch"],
            row["is_control"],
        )

    def _row(self, condition: int) -> dict[str, Any]:
        """Return a row of the table of conditions."""
        table = self.conditions
        return {name: table.at[condition, name] for name in table.columns}

    def read_blob(self, chunk: int) -> bytes | memoryview:
        """Return the bytes of a chunk; a view of the mapped file for control chunks.

        Raises
        ------
        StoreError
            If the bytes are not those that were written; the message names shard, chunk and
            condition.
        """
        _, shard, _, offset, length, crc, _, _ = self.chunks[chunk].item()
        try:
            blob = self._shards.read(shard, offset, length)
        except OSError as error:
            raise StoreError(f"{self._name(chunk)} cannot be read: {error}") from error
        # Bytes of a mapped file are checked when first touched, and remembered.
        if not self._is_checked[chunk]:
            found = zlib.crc32(blob)
            if len(blob) != length or found != crc:
                raise StoreError(
                    f"{self._name(chunk)} is damaged: crc32 {found:08x} of {len(blob)} bytes, "
                    f"expected {crc:08x} of {length}; restore the shard from a copy"
                )
            self._is_checked[chunk] = self._shards.is_control[shard]
        return blob

    def read_chunk(self, chunk: int) -> CellChunk:
        """Return a chunk's streams, checked.

        Raises
        ------
        StoreError
            See :meth:`read_blob`.
        """
        blob = self.read_blob(chunk)
        try:
            parsed = parse_chunk(blob, num_genes=self.num_genes)
        except StoreError as error:
            raise StoreError(f"{self._name(chunk)}: {error}") from error
        entry = self.chunks[chunk]
        if parsed.num_cells != entry["num_cells"] or parsed.num_nonzero != entry["num_nonzero"]:
            raise StoreError(f"{self._name(chunk)} has other sizes than the index says")
        return parsed

    def _name(self, chunk: int) -> str:
        entry = self.chunks[chunk]
        condition = int(entry["condition"])
        what = self.condition(condition)
        batch = "" if what.batch is None else f", {what.batch}"
        return (
            f"{self._shards.paths[int(entry['shard'])]}: chunk {chunk} of condition {condition} "
            f"({what.cell_type}, {what.perturbation.label}{batch})"
        )

    def locate(self, condition: int, rows: IntArray) -> tuple[IntArray, IntArray]:
        """Return chunk number and row in the chunk for positions within a condition."""
        rows = np.asarray(rows)
        row = self._row(condition)
        first, size = int(row["first_chunk"]), int(row["num_cells"])
        if rows.size and not 0 <= rows.min() <= rows.max() < size:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a condition of {size} cells")
        return first + rows // CHUNK_CELLS, rows % CHUNK_CELLS

    def read(self, condition: int, rows: IntArray | None = None) -> CsrCounts:
        """Return counts of a condition.

        Parameters
        ----------
        condition
            Its id.
        rows
            Positions within the condition, in any order; None = all cells.
        """
        if rows is None:
            rows = np.arange(int(self._row(condition)["num_cells"]))
        chunk_N, row_N = self.locate(condition, rows)
        wanted, part_N = np.unique(chunk_N, return_inverse=True)
        parts = [self.read_chunk(int(chunk)).to_csr() for chunk in wanted]
        starts = np.cumsum([0] + [part.num_cells for part in parts])
        return CsrCounts.concatenate(parts).take(starts[part_N] + row_N)

    def gather(
        self, chunk_N: IntArray, row_N: IntArray, slot_N: IntArray, *, buffer: Tensor | None = None
    ) -> CompactCells:
        """Return single control cells, read in place from the mapped shards.

        Parameters
        ----------
        chunk_N, row_N
            Chunk number and row within it; see :meth:`locate`. The chunks must be control chunks.
        slot_N
            Row of the decoded result that each cell goes to.
        buffer
            Memory to write to.
        """
        from scale.data.gather import gather_rows

        for chunk in np.unique(chunk_N[~self._is_checked[chunk_N]]):
            self.read_chunk(int(chunk))
        shards, shard_N = np.unique(self.chunks["shard"][chunk_N], return_inverse=True)
        return gather_rows(
            [self._shards.mapped(int(shard)) for shard in shards],
            shard_N,
            self.chunks["offset"][chunk_N].astype(np.int64),
            row_N,
            slot_N,
            buffer=buffer,
        )

    def to_anndata(
        self, conditions: Sequence[int] | None = None, *, max_cells: int | None = None
    ) -> AnnData:
        """Return counts and metadata of some conditions.

        Parameters
        ----------
        conditions
            Condition ids; None = all.
        max_cells
            Cells taken of each condition: its first, which are a random sample of it.

        Returns
        -------
        AnnData
            ``X`` float32 CSR counts. ``obs`` under the source's column names: the perturbation
            (the source's text), cell type, batch and dose; and the columns of ``ADDED_COLUMNS``:
            counts over the library genes, condition id (not where the source has a column of
            this name), whether it is a control, ``c<id>:<row>``, and the half of its control pool
            (-1 for treated cells).
        """
        from anndata import AnnData

        table = self.conditions if conditions is None else self.conditions.loc[list(conditions)]
        sizes = table["num_cells"].to_numpy()
        if max_cells is not None:
            sizes = np.minimum(sizes, max_cells)
        parts = [self.read(c, np.arange(n)) for c, n in zip(table.index, sizes, strict=True)]
        cells = CsrCounts.concatenate(parts)
        matrix = sp.csr_matrix(
            (cells.counts_M.astype(np.float32), cells.indices_M, cells.indptr_P),
            shape=(cells.num_cells, self.num_genes),
        )
        var = pd.DataFrame(index=pd.Index(self.genes.symbols, dtype=object))
        if self.genes.ensembl_ids is not None:
            var["ensembl_id"] = list(self.genes.ensembl_ids)
        return AnnData(matrix, obs=self._describe(table, parts), var=var)

    def _describe(self, table: pd.DataFrame, parts: Sequence[CsrCounts]) -> pd.DataFrame:
        """Return what is known of the first cells of the conditions in ``table``."""
        sizes = [part.num_cells for part in parts]

        def spread(per_condition: Sequence[Any], dtype: Any = object) -> npt.NDArray[Any]:
            return np.repeat(np.array(per_condition, dtype), sizes)

        def join(per_cell: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
            return np.concatenate([np.empty(0, dtype), *per_cell])

        row_N = join([np.arange(size) for size in sizes], np.int64)
        number_N = spread(table.index.to_list(), np.int64)
        source = [f"c{c}:{r}" for c, r in zip(number_N.tolist(), row_N.tolist(), strict=True)]
        folds = [
            control_fold(self.condition(c), total)[:size]
            if is_control
            else np.full(size, -1, np.int8)
            for c, total, is_control, size in zip(
                table.index, table["num_cells"], table["is_control"], sizes, strict=True
            )
        ]
        batches = np.array([*self.batches, None], object)  # NO_BATCH is far behind: None
        batch = [
            np.full(part.num_cells, name, object)
            if part.batch_code_N is None
            else batches[np.minimum(part.batch_code_N, len(self.batches))]
            for name, part in zip(table["batch"], parts, strict=True)
        ]
        added = (
            join([part.library_N for part in parts], np.uint32),
            number_N,
            spread(table["is_control"].to_list(), bool),
            source,
            join(folds, np.int8),
        )
        obs = pd.DataFrame(
            dict(zip(ADDED_COLUMNS, added, strict=True)), index=pd.Index(source, dtype=object)
        )
        columns = self.columns
        if columns["dose"] is not None:
            obs[columns["dose"]] = spread(
                [_first_dose(self.perturbations[p]) for p in table["perturbation"]], np.float64
            )
        names = {
            "perturbation": spread([self.labels[p] for p in table["perturbation"]]),
            "cell_type": spread(table["cell_type"].to_list()),
            "batch": join(batch, object),
        }
        for key, values in names.items():
            if (name := columns[key]) is not None:
                obs[name] = pd.Categorical(values)
        return obs

    def verify(self) -> None:
        """Check every byte of every file.

        Raises
        ------
        StoreError
            Naming the first file that is not as it was written.
        """
        if read_manifest(self.path) != self.manifest:
            raise StoreError(f"{self.path / MANIFEST} is not that of the store that was opened")
        check_files(self.path, self.manifest["files"], with_shards=True)

    def close(self) -> None:
        """Close the shard files; they are opened again when needed."""
        self._shards.close()

    def __enter__(self) -> CellSetStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _first_dose(perturbation: Perturbation) -> float:
    doses = [c.dose for c in perturbation.components if c.dose is not None]
    return doses[0] if doses else np.nan


def control_fold(condition: Condition, num_cells: int) -> npt.NDArray[np.int8]:
    """Return 0 or 1 for each control cell: two random halves, the same in every store and run.

    Prediction starts from half 0 and evaluation may compare with half 1: changes of unrelated
    perturbations correlate by 0.55 to 0.79 through one shared control sample.
    """
    name = json.dumps([condition.cell_type, condition.perturbation.label, condition.batch])
    words = np.frombuffer(sha256(name.encode()).digest(), "<u8")
    key = np.uint64(derive(_FOLD_PURPOSE, *(int(word) for word in words)))
    order = np.argsort(mix64_array(np.arange(num_cells, dtype=np.uint64) ^ key), kind="stable")
    fold = np.ones(num_cells, dtype=np.int8)
    fold[order[: (num_cells + 1) // 2]] = 0
    return fold
