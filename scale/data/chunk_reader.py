"""Chunks of a store, read and checked.

Chunks of control cells lie in mapped shards and are used where they are; their checksum is
compared when one is first touched. Chunks of treated cells are read, those of a batch together, and
checked each time. Every error names shard, chunk and condition.

Shapes: N = cells, C = chunks.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from scale.data.buffers import BufferPool
from scale.data.codec import CellChunk, parse_chunk
from scale.data.expand import check_chunks, expand_chunk
from scale.data.gather import FoundCells, find_cells
from scale.data.shards import Neighbours, Shards
from scale.data.tables import StoreTables
from scale.types import StoreError

_CHUNKS_AHEAD = 256  # 12 MB at 2,000 genes
Answer = TypeVar("Answer")
Blob = bytes | memoryview
Integers = npt.NDArray[np.int64]


class ChunkReader:
    """The chunks of a store; safe to share between threads.

    Parameters
    ----------
    index
        One entry of ``CHUNK_DTYPE`` per chunk.
    shards
        Files of the chunks.
    tables
        Names of conditions for messages, and the stored genes.
    """

    def __init__(self, index: npt.NDArray[np.void], shards: Shards, tables: StoreTables) -> None:
        self.shards = shards
        self._index, self._tables = index, tables
        self._num_genes = len(tables.genes)
        self._is_checked = np.zeros(len(index), np.bool_)

    def read(self, chunk: int) -> Blob:
        """Return the bytes of a chunk, checked; a view of the mapped file for control chunks.

        Raises
        ------
        StoreError
            If the bytes are not those that were written.
        """
        _, shard, _, offset, length, crc, _, _ = self._index[chunk].item()
        is_control = self.shards.is_control[shard]
        blob: Blob
        if is_control:
            blob = self._ask(self.shards.mapped, chunk, shard)[offset : offset + length].data
        else:
            blob = self._ask(self.shards.read, chunk, shard, offset, offset + length)
        if not self._is_checked[chunk]:
            self._check(chunk, blob, length, crc)
            self._is_checked[chunk] = is_control
        return blob

    def parse(self, chunk: int) -> CellChunk:
        """Return the streams of a chunk, checked against each other and against the index.

        Raises
        ------
        StoreError
            See :meth:`read`.
        """
        blob = self.read(chunk)
        try:
            parsed = parse_chunk(blob, num_genes=self._num_genes)
        except StoreError as error:
            raise StoreError(f"{self._name(chunk)}: {error}") from error
        entry = self._index[chunk]
        if parsed.num_cells != entry["num_cells"] or parsed.num_nonzero != entry["num_nonzero"]:
            raise StoreError(f"{self._name(chunk)} has other sizes than the index says")
        return parsed

    def find_cells(self, chunk_N: Integers, row_N: Integers, buffers: BufferPool) -> FoundCells:
        """Return where single cells lie in memory; see :meth:`CellSetStore.find_cells`."""
        shard_N = self._index["shard"][chunk_N]
        start_N = self._index["offset"][chunk_N].astype(np.int64)
        is_mapped_N = self.shards.is_control[shard_N]
        for chunk in np.unique(chunk_N[is_mapped_N & ~self._is_checked[chunk_N]]).tolist():
            self.parse(chunk)
        mapped = np.unique(shard_N[is_mapped_N])
        sources = [
            self._ask(self.shards.mapped, int(chunk_N[np.argmax(shard_N == shard)]), shard)
            for shard in mapped.tolist()
        ]
        source_N = np.searchsorted(mapped, shard_N)
        if not is_mapped_N.all():
            is_read_N = ~is_mapped_N
            expanded, start_N[is_read_N] = self._expand(chunk_N[is_read_N], buffers)
            source_N[is_read_N] = len(sources)
            sources.append(expanded)
        return find_cells(sources, source_N, start_N, row_N)

    def load(self, chunk_C: Integers, is_stopped: threading.Event) -> None:
        """Read chunks of mapped shards from end to end, and check those that were not yet."""
        entry_C = self._index[chunk_C]
        order = np.lexsort((entry_C["offset"], entry_C["shard"]))
        chunks, entry_C = chunk_C[order].tolist(), entry_C[order]
        groups = Neighbours.groups(entry_C["shard"], entry_C["offset"], entry_C["length"])
        num_asked = 0
        for group in groups:
            for later in groups[num_asked:]:
                if later.first > group.first + _CHUNKS_AHEAD:
                    break
                self._ask(self.shards.will_need, chunks[later.first], *later[2:])
                num_asked += 1
            for chunk in chunks[group.first : group.stop]:
                if is_stopped.is_set():
                    return
                if not self._is_checked[chunk]:
                    self.parse(chunk)

    def _expand(
        self, chunk_N: Integers, buffers: BufferPool
    ) -> tuple[npt.NDArray[np.uint8], Integers]:
        """Return the chunks of some treated cells without compression, and the start of each."""
        # cells of a chunk mostly stand side by side
        chunk_C = np.unique(chunk_N[np.diff(chunk_N, prepend=-1) != 0])
        entry_C = self._index[chunk_C]
        # in the order of the files, so that neighbours are read at once
        order = np.lexsort((entry_C["offset"], entry_C["shard"]))
        entry_C = entry_C[order]
        room_C = (entry_C["length"] + 2 * entry_C["num_nonzero"].astype(np.int64) + 7) // 8 * 8
        start_C = np.cumsum(room_C) - room_C
        memory = buffers.take(int(room_C.sum())).numpy()
        chunks = chunk_C[order].tolist()
        sizes = (start_C.tolist(), entry_C["num_cells"].tolist(), entry_C["num_nonzero"].tolist())
        blobs = self._blobs(chunks, entry_C)
        for chunk, blob, start, num_cells, num_nonzero in zip(chunks, blobs, *sizes, strict=True):
            try:
                expand_chunk(blob, memory[start:], num_cells, num_nonzero)
            except StoreError as error:
                raise StoreError(f"{self._name(chunk)}: {error}") from error
        if fault := check_chunks(memory, start_C, num_genes=self._num_genes):
            raise StoreError(f"{self._name(chunks[fault[0]])}: {fault[1]}")
        place_C = np.empty_like(start_C)
        place_C[order] = start_C
        return memory, place_C[np.searchsorted(chunk_C, chunk_N)]

    def _blobs(self, chunks: list[int], entry_C: npt.NDArray[np.void]) -> Iterator[memoryview]:
        """Yield the bytes of chunks in the order of the files, checked."""
        begin, length, crc = (entry_C[name].tolist() for name in ("offset", "length", "crc32"))
        groups = Neighbours.groups(entry_C["shard"], entry_C["offset"], entry_C["length"])
        # all are asked for before the first is waited for: 42 against 130 us per chunk from a disk
        for group in groups:
            self._ask(self.shards.will_need, chunks[group.first], *group[2:])
        for group in groups:
            read = memoryview(self._ask(self.shards.read, chunks[group.first], *group[2:]))
            for c in range(group.first, group.stop):
                start = begin[c] - group.begin
                blob = read[start : start + length[c]]
                self._check(chunks[c], blob, length[c], crc[c])
                yield blob

    # --- bytes, and what is said of them ----------------------------------------------------------

    def _ask(self, request: Callable[..., Answer], chunk: int, *where: int) -> Answer:
        """Return what a file answers; its error names the chunk that was wanted."""
        try:
            return request(*where)
        except OSError as error:
            raise StoreError(f"{self._name(chunk)} cannot be read: {error}") from error

    def _check(self, chunk: int, blob: Blob, length: int, crc: int) -> None:
        """Compare the bytes of a chunk with what the index says of them."""
        found = zlib.crc32(blob)
        if len(blob) != length or found != crc:
            raise StoreError(
                f"{self._name(chunk)} is damaged: crc32 {found:08x} of {len(blob)} bytes, "
                f"expected {crc:08x} of {length}; restore the shard from a copy"
            )

    def _name(self, chunk: int) -> str:
        entry = self._index[chunk]
        condition = int(entry["condition"])
        row: dict[Any, Any] = {
            name: column.at[condition] for name, column in self._tables.conditions.items()
        }
        label = self._tables.perturbations[row["perturbation"]].label
        batch = "" if row["batch"] is None else f", {row['batch']}"
        return (
            f"{self.shards.paths[int(entry['shard'])]}: chunk {chunk} of condition {condition} "
            f"({row['cell_type']}, {label}{batch})"
        )
