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

from scale.data.chunk_reader import ChunkReader
from scale.data.codec import CHUNK_CELLS, CellChunk
from scale.data.csr import CsrCounts, IntArray
from scale.data.genes import GeneVocabulary
from scale.data.remote import RemoteFiles, is_remote
from scale.data.shards import Shards
from scale.data.store_files import (
    CHUNK_DTYPE,
    MANIFEST,
    check_files,
    read_manifest,
)
from scale.data.tables import StoreTables
from scale.draws import derive, mix64_array
from scale.types import Condition, Perturbation, StoreError

if TYPE_CHECKING:
    import threading

    from anndata import AnnData

    from scale.data.buffers import BufferPool
    from scale.data.gather import FoundCells

_FOLD_PURPOSE = 5  # purposes 1 to 4 are the plan's


@dataclass(frozen=True, slots=True, eq=False)
class CellSetStore:
    """Cells grouped by condition, read by chunk; safe to share between threads.

    Parameters
    ----------
    path
        The directory; of a remote store, the one that holds what was fetched of it.
    address
        Where the store was opened, for messages: the directory, or the remote address.
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
    address: str
    manifest: dict[str, Any]
    genes: GeneVocabulary
    conditions: pd.DataFrame
    perturbations: tuple[Perturbation, ...]
    labels: tuple[str, ...]
    batches: tuple[str, ...]
    chunks: npt.NDArray[np.void]
    _reader: ChunkReader
    _remote: RemoteFiles | None

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        verify: Literal["index", "full"] = "index",
        cache_dir: Path | str | None = None,
        cache_bytes: int | None = None,
    ) -> CellSetStore:
        """Open a store.

        Parameters
        ----------
        path
            The directory, or the address of a remote one (``https://...``, ``s3://...``).
        verify
            ``index`` checks sizes and the hashes of all small files, ``full`` every byte.
        cache_dir, cache_bytes
            Where the shards of a remote store are kept, and how much of them; see
            :class:`scale.data.remote.RemoteFiles`.

        Raises
        ------
        StoreError
            If there is no store, or a file is missing or damaged; the message names the file.
        """
        address, remote = str(path), None
        if is_remote(path):
            remote = RemoteFiles(address, cache_dir=cache_dir, cache_bytes=cache_bytes)
            address, path = remote.address, remote.path
        path = Path(path)
        manifest = read_manifest(path)
        if remote is None:
            check_files(path, manifest["files"], with_shards=verify == "full")
        elif verify == "full":
            remote.verify()
        tables = StoreTables.read(path)
        chunks = np.load(path / "chunks.npy", mmap_mode="r")
        shards = [f["path"] for f in manifest["files"] if f["path"].startswith("shards/")]
        if chunks.dtype != CHUNK_DTYPE or len(chunks) != manifest["num_chunks"]:
            raise StoreError(f"{path / 'chunks.npy'} does not fit the manifest")
        open_file = None if remote is None else remote.open
        return cls(
            path,
            address,
            manifest,
            tables.genes,
            tables.conditions,
            tables.perturbations,
            tables.labels,
            tables.batches,
            chunks,
            ChunkReader(chunks, Shards(path, shards, open_file), tables),
            remote,
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
        return self._reader.read(chunk)

    def read_chunk(self, chunk: int) -> CellChunk:
        """Return a chunk's streams, checked.

        Raises
        ------
        StoreError
            See :meth:`read_blob`.
        """
        return self._reader.parse(chunk)

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

    def find_cells(
        self,
        chunk_N: npt.NDArray[np.int64],
        row_N: npt.NDArray[np.int64],
        buffers: BufferPool,
    ) -> FoundCells:
        """Return where single cells lie in memory; chunks of treated cells are read for it.

        Parameters
        ----------
        chunk_N, row_N
            Chunk number and row within it; see :meth:`locate`.
        buffers
            Where memory for the chunks that are read is taken from.

        Raises
        ------
        StoreError
            See :meth:`read_blob`.
        """
        return self._reader.find_cells(chunk_N, row_N, buffers)

    def load_controls(self, chunk_C: npt.NDArray[np.int64], is_stopped: threading.Event) -> None:
        """Bring control chunks into memory, where they stay while there is room, and check them.

        Parameters
        ----------
        chunk_C
            Numbers of control chunks.
        is_stopped
            Ends the call early when it is set by another thread.

        Raises
        ------
        StoreError
            See :meth:`read_blob`.
        """
        self._reader.load(chunk_C, is_stopped)

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

        from scale.data.cell_table import describe_cells

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
        return AnnData(matrix, obs=describe_cells(self, table, parts), var=var)

    def verify(self) -> None:
        """Check every byte of every file.

        Raises
        ------
        StoreError
            Naming the first file that is not as it was written.
        """
        if read_manifest(self.path) != self.manifest:
            raise StoreError(f"{self.path / MANIFEST} is not that of the store that was opened")
        if self._remote is None:
            check_files(self.path, self.manifest["files"], with_shards=True)
        else:
            self._remote.verify()

    def close(self) -> None:
        """Close the shard files; they are opened again when needed."""
        self._reader.shards.close()

    def __enter__(self) -> CellSetStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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
