"""From buckets to shards: cells sorted, cut into chunks, encoded, written, and listed.

One task writes the buckets that make about one shard. It holds one bucket at a time: the cells of
a condition that go on in the next bucket, fewer than a chunk, are carried over.

Shapes: N = cells of a bucket, C = conditions, K = chunks.
"""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from scale.config import Codec
from scale.data.codec import CHUNK_CELLS, encode_streams
from scale.data.csr import row_pointer
from scale.data.ingest.grouping import Buckets
from scale.data.ingest.kernels import hash_texts, unpad_texts
from scale.data.ingest.packing import PackedCells
from scale.data.ingest.spill import read_segments
from scale.data.ingest.workers import Report
from scale.data.shard_writer import ShardFile
from scale.data.store_files import CHUNK_DTYPE, file_sha256
from scale.draws import mix64_array


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """What all shard tasks share.

    Parameters
    ----------
    folder, store
        Where the spill files are, and the store that is being written.
    buckets
        The plan.
    is_kept_C, has_codes_C, is_control_C, first_chunk_C
        Per condition: whether it is stored, carries batch codes, is of control cells, and the
        number of its first chunk in the store.
    codec, shard_bytes
        Settings of ``prepare``.
    first_ordinals, file_names
        Of the input files, for the table of cells; no names = there is no such table.
    """

    folder: Path
    store: Path
    buckets: Buckets
    is_kept_C: npt.NDArray[np.bool_]
    has_codes_C: npt.NDArray[np.bool_]
    is_control_C: npt.NDArray[np.bool_]
    first_chunk_C: npt.NDArray[np.int64]
    codec: Codec
    shard_bytes: int
    first_ordinals: npt.NDArray[np.int64]
    file_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShardJob:
    """Buckets that are written together.

    Parameters
    ----------
    number, name
        Of the task, and of its shards without the ending.
    buckets
        Which.
    segments
        Their ``SEGMENT_DTYPE``, by bucket.
    """

    number: int
    name: str
    buckets: range
    segments: npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class WrittenShards:
    """Result of :func:`write_shards`.

    Parameters
    ----------
    files
        Files that were written, with their sizes.
    shards, cells
        Entries of the manifest.
    num_repeated
        Cells whose barcode another cell of the same condition has.
    """

    files: dict[str, int]
    shards: list[dict[str, Any]]
    cells: list[dict[str, Any]] = field(default_factory=list)
    num_repeated: int = 0


def chunks_name(task: int) -> str:
    """Return the name of the file with the index entries that a task has made."""
    return f"chunks-{task:05d}.npy"


def write_shards(settings: ShardSettings, job: ShardJob, report: Report) -> WrittenShards:
    """Write the shards of some buckets, their part of the index and of the table of cells."""
    task = _ShardTask(settings, job)
    try:
        _write_buckets(task, settings, job, report)
        return task.close()
    except BaseException:
        task.abort()
        raise


def _write_buckets(
    task: _ShardTask, settings: ShardSettings, job: ShardJob, report: Report
) -> None:
    carried: PackedCells | None = None
    for bucket in job.buckets:
        segments = job.segments[job.segments["bucket"] == bucket]
        parts = [_kept(settings, part) for part in read_segments(settings.folder, segments)]
        if carried is not None:
            parts.insert(0, carried)
        cells = PackedCells.concatenate(parts) if parts else None
        parts, carried = [], None  # in memory twice and not thrice
        if cells is None or not cells.num_cells:
            continue
        cells = cells.take(settings.buckets.order(cells.condition_N, cells.ordinal_N))
        stop = cells.num_cells
        if _goes_on(settings, int(cells.condition_N[-1]), bucket):
            stop -= stop % CHUNK_CELLS  # such a condition is alone in its bucket
            carried = next(cells.slices([stop, cells.num_cells]))
            cells = next(cells.slices([0, stop]))
        if stop:
            task.add(cells)
        report(int(segments["num_cells"].sum()))


def _kept(settings: ShardSettings, cells: PackedCells) -> PackedCells:
    """Leave out conditions that turned out to have too few cells."""
    is_kept_N = settings.is_kept_C[cells.condition_N]
    return cells if is_kept_N.all() else cells.take(np.flatnonzero(is_kept_N))


def _goes_on(settings: ShardSettings, condition: int, bucket: int) -> bool:
    """Return whether a condition has cells in the bucket behind this one."""
    plan = settings.buckets
    return bool(bucket < plan.first_C[condition] + plan.num_C[condition] - 1)


class _ShardTask:
    """The files of one task while they are written."""

    def __init__(self, settings: ShardSettings, job: ShardJob) -> None:
        self._settings, self._job = settings, job
        self._shards: list[dict[str, Any]] = []
        self._shard: ShardFile | None = None
        self._room = 0
        self._chunks: list[tuple[int, ...]] = []
        self._next_row: tuple[int, int] = (-1, 0)
        self._names = _CellTable(settings, job) if settings.file_names else None

    def add(self, cells: PackedCells) -> None:
        """Write sorted cells; the last condition is complete, or fills its last chunk."""
        condition_N = cells.condition_N
        starts = np.flatnonzero(np.diff(condition_N, prepend=-1))
        sizes = np.diff(np.append(starts, len(condition_N)))
        per_condition = -(-sizes // CHUNK_CELLS)
        inside = np.arange(per_condition.sum()) - np.repeat(
            row_pointer(per_condition)[:-1], per_condition
        )
        bounds = np.repeat(starts, per_condition) + inside * CHUNK_CELLS
        condition_K = condition_N[bounds]
        bounds = np.append(bounds, len(condition_N))
        has_codes = self._settings.has_codes_C[condition_K]
        is_control = self._settings.is_control_C[condition_K]
        for chunk, control in zip(
            cells.chunks(bounds, has_codes), is_control.tolist(), strict=True
        ):
            blob = encode_streams(chunk, codec=Codec.none if control else self._settings.codec)
            shard = self._shard_for(chunk.num_bytes)
            place = (0, len(self._shards), chunk.num_cells, shard.append(blob), len(blob))
            self._chunks.append((*place, zlib.crc32(blob), chunk.num_nonzero, 0))
        if self._names is not None:
            self._names.add(cells, starts)

    def _shard_for(self, num_bytes: int) -> ShardFile:
        """Return the shard that has room for so many bytes, counted before compression."""
        if self._shard is not None and num_bytes > self._room:
            self._shards.append(self._shard.close())
            self._shard = None
        if self._shard is None:
            part = f"-{len(self._shards)}" if self._shards else ""
            name = f"{self._job.name}{part}.scl"
            self._shard = ShardFile(self._settings.store, name)
            self._room = self._settings.shard_bytes
        self._room -= num_bytes
        return self._shard

    def close(self) -> WrittenShards:
        """Finish all files."""
        if self._shard is not None:
            self._shards.append(self._shard.close())
        path = self._settings.folder / chunks_name(self._job.number)
        with path.open("wb") as handle:
            np.save(handle, np.array(self._chunks, CHUNK_DTYPE))
            handle.flush()
            os.fsync(handle.fileno())
        entries = [] if self._names is None else [self._names.close()]
        store = self._settings.store.name
        files = {f"{store}/{entry['path']}": entry["size"] for entry in (*self._shards, *entries)}
        files[path.name] = path.stat().st_size
        repeated = 0 if self._names is None else self._names.num_repeated
        return WrittenShards(files, self._shards, entries, repeated)

    def abort(self) -> None:
        """Close all files without a care for their content."""
        if self._shard is not None:
            self._shard.abort()
        if self._names is not None:
            self._names.abort()


class _CellTable:
    """``cells/part-00000.parquet``: which cell of the source each stored one is."""

    def __init__(self, settings: ShardSettings, job: ShardJob) -> None:
        self.num_repeated = 0
        self._settings = settings
        self._name = f"cells/part-{job.number:05d}.parquet"
        self._condition, self._num_before = -1, 0
        self._seen = np.empty(0, np.uint64)
        self._writer: pq.ParquetWriter | None = None

    def add(self, cells: PackedCells, starts: npt.NDArray[np.int64]) -> None:
        """Write the rows of sorted cells, whose conditions begin at ``starts``."""
        sizes = np.diff(np.append(starts, cells.num_cells))
        conditions = cells.condition_N[starts]
        goes_on = conditions[0] == self._condition
        before = np.zeros(len(starts), np.int64)
        before[0] = self._num_before if goes_on else 0
        self._count_repeated(cells, goes_on=bool(goes_on))
        row_N = np.arange(cells.num_cells) - np.repeat(starts - before, sizes)
        self._condition, self._num_before = int(conditions[-1]), int(sizes[-1] + before[-1])
        chunk_N = np.repeat(self._settings.first_chunk_C[conditions], sizes) + row_N // CHUNK_CELLS
        ordinal_N = cells.ordinal_N.astype(np.int64)
        file_N = np.searchsorted(self._settings.first_ordinals, ordinal_N, side="right") - 1
        row_in_file_N = ordinal_N - self._settings.first_ordinals[file_N]
        table = pa.table(
            {
                "chunk": pa.array(chunk_N.astype(np.uint32)),
                "row": pa.array((row_N % CHUNK_CELLS).astype(np.uint16)),
                "barcode": _texts(cells.barcode_N),
                "source_file": pa.DictionaryArray.from_arrays(
                    pa.array(file_N.astype(np.int32)), pa.array(self._settings.file_names)
                ),
                "source_row": pa.array(row_in_file_N.astype(np.uint64)),
            }
        )
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._settings.store / self._name,
                table.schema,
                compression="zstd",
                use_dictionary=["source_file"],
                write_statistics=False,
            )
        self._writer.write_table(table)

    def _count_repeated(self, cells: PackedCells, *, goes_on: bool) -> None:
        """Count cells whose barcode was seen in their condition.

        Of a condition in several buckets eight bytes per cell are kept.
        """
        assert cells.barcode_N is not None
        mark_N = mix64_array(cells.condition_N.astype(np.uint64)) ^ hash_texts(
            _bytes_of(cells.barcode_N)
        )
        known = self._seen if goes_on else np.empty(0, np.uint64)
        seen = np.unique(np.concatenate([known, mark_N]))
        self.num_repeated += len(known) + len(mark_N) - len(seen)
        is_large = self._settings.buckets.num_C[cells.condition_N[-1]] > 1
        self._seen = seen if is_large else np.empty(0, np.uint64)

    def close(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        assert self._writer is not None
        self._writer.close()
        path = self._settings.store / self._name
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        return {"path": self._name, "size": path.stat().st_size, "sha256": file_sha256(path)}

    def abort(self) -> None:
        """Close the file without a care for its content."""
        if self._writer is not None:
            with suppress(OSError):  # a full disk fails again when the end is written
                self._writer.close()


def _bytes_of(text_N: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint8]:
    """Return fixed-width texts as rows of bytes."""
    return np.ascontiguousarray(text_N).view(np.uint8).reshape(len(text_N), -1)


def _texts(text_N: npt.NDArray[np.bytes_] | None) -> pa.Array:
    """Return fixed-width UTF-8 as an Arrow column."""
    assert text_N is not None
    byte_NW = _bytes_of(text_N)
    end_P = np.zeros(len(text_N) + 1, np.int32)
    content = np.empty(byte_NW.size, np.uint8)
    end = unpad_texts(byte_NW, end_P, content)
    buffers = (pa.py_buffer(end_P), pa.py_buffer(content[:end]))
    return pa.StringArray.from_buffers(len(text_N), *buffers)
