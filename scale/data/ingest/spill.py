"""Spill files: the packed cells of a piece of the input, bucket by bucket.

A piece is read by one worker and leaves one file, in which the cells of a bucket are a segment of
their own with a crc32, and an index. The cells of a bucket are one segment of each file.

Shapes: S = segments, C = conditions with cells in the piece.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from scale.data.ingest.grouping import Buckets
from scale.data.ingest.packing import PackedCells
from scale.types import StoreError

SEGMENT_DTYPE = np.dtype(
    [
        ("bucket", "<i4"),
        ("piece", "<i4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("num_cells", "<i4"),
        ("crc32", "<u4"),
        ("num_bytes", "<i8"),
    ]
)
"""Where the cells of a bucket lie, and what they take in chunks that are not compressed, without
the heads of these."""


@dataclass(frozen=True, slots=True)
class SpillIndex:
    """What a spill file holds.

    Parameters
    ----------
    segments
        ``SEGMENT_DTYPE``, by bucket.
    condition_C, num_cells_C
        Conditions that have cells in it, and how many.
    """

    segments: npt.NDArray[np.void]
    condition_C: npt.NDArray[np.int32]
    num_cells_C: npt.NDArray[np.int64]

    @classmethod
    def read(cls, folder: Path, piece: int) -> SpillIndex:
        """Read the index of a spill file."""
        with np.load(folder / index_name(piece), allow_pickle=False) as arrays:
            return cls(arrays["segments"], arrays["condition_C"], arrays["num_cells_C"])


@dataclass(frozen=True, slots=True)
class Spilled:
    """What the spill left.

    Parameters
    ----------
    buckets
        The plan it followed.
    segments
        ``SEGMENT_DTYPE`` of all spill files, by bucket and piece.
    num_cells_C
        Cells per condition.
    dropped
        Cells left out on the way, by reason.
    hashes
        sha256 of the input files.
    """

    buckets: Buckets
    segments: npt.NDArray[np.void]
    num_cells_C: npt.NDArray[np.int64]
    dropped: Counter[str]
    hashes: list[str]


def spill_name(piece: int) -> str:
    """Return the name of the spill file of a piece."""
    return f"cells-{piece:06d}.bin"


def index_name(piece: int) -> str:
    """Return the name of its index."""
    return f"cells-{piece:06d}.npz"


def write_spill(
    folder: Path, piece: int, parts: list[PackedCells], buckets: Buckets
) -> dict[str, int]:
    """Write the cells of a piece and their index; return both files with their sizes.

    The list of parts is emptied on the way, so that cells are in memory twice and not thrice.
    """
    segments, condition_N = [], np.empty(0, np.int32)
    path = folder / spill_name(piece)
    with path.open("wb") as handle:
        if parts:
            cells = PackedCells.concatenate(parts)
            parts.clear()
            condition_N = cells.condition_N
            bucket_N = buckets.of(condition_N, cells.ordinal_N)
            order = np.argsort(bucket_N, kind="stable")
            cells = cells.take(order)
            own, first = np.unique(bucket_N[order], return_index=True)
            bounds = np.append(first, cells.num_cells)
            for bucket, part in zip(own.tolist(), cells.slices(bounds), strict=True):
                offset, crc = handle.tell(), 0
                for buffer in part.buffers():
                    crc = zlib.crc32(buffer, crc)
                    handle.write(buffer)
                facts = (handle.tell() - offset, part.num_cells, crc, part.num_bytes_in_chunks)
                segments.append((bucket, piece, offset, *facts))
        handle.flush()
        os.fsync(handle.fileno())
    condition_C, num_cells_C = np.unique(condition_N, return_counts=True)
    index = folder / index_name(piece)
    with index.open("wb") as handle:
        np.savez(
            handle,
            segments=np.array(segments, SEGMENT_DTYPE),
            condition_C=condition_C,
            num_cells_C=num_cells_C,
        )
        handle.flush()
        os.fsync(handle.fileno())
    return {file.name: file.stat().st_size for file in (path, index)}


def read_segments(folder: Path, segments: npt.NDArray[np.void]) -> Iterator[PackedCells]:
    """Yield the cells of segments.

    Raises
    ------
    StoreError
        If a segment is not what was written.
    """
    for segment in segments:
        path = folder / spill_name(int(segment["piece"]))
        with path.open("rb", buffering=0) as handle:
            blob = os.pread(handle.fileno(), int(segment["length"]), int(segment["offset"]))
        if len(blob) != segment["length"] or zlib.crc32(blob) != segment["crc32"]:
            raise StoreError(
                f"{path} is damaged at byte {int(segment['offset'])}; run prepare again"
            )
        yield PackedCells.from_bytes(blob)
