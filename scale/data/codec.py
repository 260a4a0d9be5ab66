"""A chunk of cells as bytes: up to 64 cells of one condition, written and read as a whole.

A chunk holds two byte streams with one entry per non-zero count, ``gap`` (distance to the previous
gene of the cell, less one) and ``count`` (less one). What does not fit a byte stands in a side list
of (position, high part), so that decoding has no branch per entry and can run on a device. The
layout is little-endian and every array is aligned to its item size:

======================= ====================================================================
``SCLC`` u8 x4          version, kind, codec, flags (bit 0: batch codes)
u16 x2, u32 x5          cells n, 0; non-zeros m, exceptions e and f, bytes of the two streams
u32[n]                  library: counts of the cell over the library genes
u32[e], u32[f]          positions of gap and count exceptions, ascending
u16[n], (u16[n])        non-zeros per cell, batch codes
u16[e], u16[f]          high parts of gap and count exceptions
bytes, bytes            gap and count streams, u8[m] before compression
======================= ====================================================================

Shapes: N = cells, M = non-zeros, E = gap exceptions, F = count exceptions, P = N + 1.
"""

from __future__ import annotations

import logging
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import zstandard

from scale.config import Codec
from scale.data.csr import LARGEST_ROW, CsrCounts, row_pointer
from scale.types import StoreError

if sys.byteorder != "little":
    raise ImportError("stores are little-endian; this machine is not")

logger = logging.getLogger(__name__)

CHUNK_CELLS = 64
"""Cells per chunk. Larger chunks save no bytes, and a ragged condition wastes half of 256."""
KIND_COUNTS = 0
_HEAD = struct.Struct("<4s4B2H5I")
HEAD_BYTES = _HEAD.size
"""Of a chunk, before its arrays."""
_MAGIC = b"SCLC"
_VERSION = 1
CODECS = {Codec.none: 0, Codec.zstd: 1}
HAS_BATCH = 1
_MOST_GENES = 1 << 24
# Streams of counts have no phrases, and a match that is found costs more than the letters it
# replaces: few and long ones only. Against level 1, 2,000 genes: 269 for 279 bytes per cell, and
# faster both ways; levels 3 and 9 save nothing.
_ZSTD = {
    "strategy": zstandard.STRATEGY_FAST,
    "min_match": 7,
    "hash_log": 6,
    "chain_log": 6,
    "window_log": 18,
    "target_length": 0,
}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile with numba, without the interpreter lock, and keep the machine code on disk."""
    try:
        return cast(_Function, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # numba found no directory it may write its cache to
        logger.warning("numba cannot write a cache; set NUMBA_CACHE_DIR to save compile time")
        return cast(_Function, numba.njit(nogil=True)(function))


# --- what a chunk holds -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CellChunk:
    """The streams of a chunk, decompressed; see the module's text for their meaning."""

    library_N: npt.NDArray[np.uint32]
    num_nonzero_N: npt.NDArray[np.uint16]
    batch_code_N: npt.NDArray[np.uint16] | None
    gap_M: npt.NDArray[np.uint8]
    count_M: npt.NDArray[np.uint8]
    gap_position_E: npt.NDArray[np.uint32]
    gap_high_E: npt.NDArray[np.uint16]
    count_position_F: npt.NDArray[np.uint32]
    count_high_F: npt.NDArray[np.uint16]

    @property
    def num_cells(self) -> int:
        """Number of cells, N."""
        return len(self.library_N)

    @property
    def num_nonzero(self) -> int:
        """Number of stored counts, M."""
        return len(self.gap_M)

    @property
    def num_bytes(self) -> int:
        """Bytes of the chunk in a shard if it is not compressed."""
        codes = 0 if self.batch_code_N is None else 2 * self.num_cells
        exceptions = len(self.gap_high_E) + len(self.count_high_F)
        return _HEAD.size + 6 * self.num_cells + codes + 6 * exceptions + 2 * self.num_nonzero

    def to_csr(self) -> CsrCounts:
        """Return the counts as compressed rows."""
        size = self.num_nonzero_N.astype(np.int64)
        indptr = row_pointer(size)
        step = self.gap_M.astype(np.int64) + 1
        step[self.gap_position_E] += self.gap_high_E.astype(np.int64) << 8
        column = np.cumsum(step)
        before = np.concatenate([[0], column])[indptr[:-1]]
        counts = self.count_M.astype(np.uint32) + np.uint32(1)
        counts[self.count_position_F] += self.count_high_F.astype(np.uint32) << np.uint32(8)
        return CsrCounts(
            indptr,
            (column - np.repeat(before + 1, size)).astype(np.int32),
            counts,
            self.library_N,
            self.batch_code_N,
        )


# --- arrays to bytes ----------------------------------------------------------------------------


class _Compressors(threading.local):
    """One zstd context per thread: they cannot be shared."""

    def __init__(self) -> None:
        parameters = zstandard.ZstdCompressionParameters(**_ZSTD)
        self.write = zstandard.ZstdCompressor(compression_params=parameters)
        self.read = zstandard.ZstdDecompressor()


_compressors = _Compressors()


def encode_chunk(cells: CsrCounts, *, codec: Codec) -> bytes:
    """Return the blob of up to 64 cells; the counts must have been checked by the caller.

    Examples
    --------
    >>> cells = CsrCounts(
    ...     np.array([0, 2]), np.array([3, 700], np.int32), np.array([1, 5], np.uint32),
    ...     np.array([9], np.uint32),
    ... )
    >>> parse_chunk(encode_chunk(cells, codec=Codec.zstd)).to_csr().indices_M.tolist()
    [3, 700]
    """
    return encode_streams(chunk_of(cells), codec=codec)


def chunk_of(cells: CsrCounts) -> CellChunk:
    """Return the streams of up to 64 cells."""
    size = np.diff(cells.indptr_P)
    if not 1 <= len(size) <= CHUNK_CELLS or size.max() > LARGEST_ROW:
        raise ValueError(f"{len(size)} cells, most non-zeros {size.max(initial=0)}: no chunk")
    gap = cells.indices_M - 1
    gap[1:] -= cells.indices_M[:-1]
    first = cells.indptr_P[:-1][size > 0]
    gap[first] = cells.indices_M[first]
    less = cells.counts_M - np.uint32(1)
    gap_position = np.flatnonzero(gap > 255)
    count_position = np.flatnonzero(less > 255)
    return CellChunk(
        cells.library_N,
        size.astype(np.uint16),
        cells.batch_code_N,
        gap.astype(np.uint8),
        less.astype(np.uint8),
        gap_position.astype(np.uint32),
        (gap[gap_position] >> 8).astype(np.uint16),
        count_position.astype(np.uint32),
        (less[count_position] >> 8).astype(np.uint16),
    )


def encode_streams(chunk: CellChunk, *, codec: Codec) -> bytes:
    """Return the blob of a chunk: the one place that knows the layout."""
    streams: list[bytes] = [chunk.gap_M.tobytes(), chunk.count_M.tobytes()]
    if codec is Codec.zstd:
        streams = [_compressors.write.compress(stream) for stream in streams]
    codes = [] if chunk.batch_code_N is None else [chunk.batch_code_N]
    parts: list[npt.NDArray[Any]] = [
        *(chunk.library_N, chunk.gap_position_E, chunk.count_position_F),
        *(chunk.num_nonzero_N, *codes, chunk.gap_high_E, chunk.count_high_F),
    ]
    head = _HEAD.pack(
        _MAGIC,
        _VERSION,
        KIND_COUNTS,
        CODECS[codec],
        HAS_BATCH if codes else 0,
        chunk.num_cells,
        0,
        chunk.num_nonzero,
        len(chunk.gap_high_E),
        len(chunk.count_high_F),
        *(len(stream) for stream in streams),
    )
    return b"".join([head, *(part.tobytes() for part in parts), *streams])


# --- bytes to arrays ----------------------------------------------------------------------------


def parse_chunk(blob: bytes | memoryview, *, num_genes: int | None = None) -> CellChunk:
    """Return the streams of a blob, checked against each other.

    Parameters
    ----------
    blob
        A whole chunk. Streams that are not compressed become views of it.
    num_genes
        Genes of the store; with it, no cell may name a gene behind the last.

    Raises
    ------
    StoreError
        If the blob is no chunk, or its parts contradict each other.
    """
    head = ChunkHead.read(blob)
    n, e, f = head.num_cells, head.num_gap_exceptions, head.num_count_exceptions
    library, gap_position, count_position = _cut(blob, _HEAD.size, "<u4", (n, e, f))
    sizes = (n, n * head.has_batch, e, f)
    short = _cut(blob, _HEAD.size + 4 * (n + e + f), "<u2", sizes)
    gap, count = (np.frombuffer(raw, np.uint8) for raw in head.streams(blob))
    chunk = CellChunk(
        library,
        short[0],
        short[1] if head.has_batch else None,
        gap,
        count,
        gap_position,
        short[2],
        count_position,
        short[3],
    )
    fault = find_fault(
        chunk.num_nonzero_N,
        chunk.gap_M,
        gap_position,
        chunk.gap_high_E,
        count_position,
        _MOST_GENES if num_genes is None else num_genes,
    )
    if fault:
        raise StoreError(f"chunk contradicts itself: {FAULTS[fault]} ({num_genes} genes)")
    return chunk


@dataclass(frozen=True, slots=True)
class ChunkHead:
    """The first 32 bytes of a chunk, and where its parts lie."""

    codec: int
    has_batch: int
    num_cells: int
    num_nonzero: int
    num_gap_exceptions: int
    num_count_exceptions: int
    lists_end: int
    gap_end: int

    @classmethod
    def read(cls, blob: bytes | memoryview) -> ChunkHead:
        """Return the head of a blob whose length is what it says."""
        if len(blob) < _HEAD.size:
            raise StoreError(f"chunk of {len(blob)} bytes; a chunk has at least {_HEAD.size}")
        magic, version, kind, codec, flags, n, reserved, m, e, f, *stored = _HEAD.unpack_from(blob)
        if (magic, version, kind) != (_MAGIC, _VERSION, KIND_COUNTS) or codec not in (0, 1):
            raise StoreError(
                f"no chunk of counts: {magic!r}, version {version}, kind {kind}/{codec}"
            )
        has_batch = flags & HAS_BATCH
        lists_end = _HEAD.size + 4 * (n + e + f) + 2 * (n * (1 + has_batch) + e + f)
        expected = lists_end + sum(stored)
        if flags > HAS_BATCH or reserved or len(blob) != expected:
            raise StoreError(f"chunk of {len(blob)} bytes, its head says {expected}")
        return cls(codec, has_batch, n, m, e, f, lists_end, lists_end + stored[0])

    def streams(self, blob: bytes | memoryview) -> Iterator[bytes | memoryview]:
        """Yield gap and count stream, uncompressed."""
        view = memoryview(blob)
        for stored in (view[self.lists_end : self.gap_end], view[self.gap_end :]):
            yield _stream(stored, self.codec, self.num_nonzero)


def _cut(
    blob: bytes | memoryview, start: int, dtype: str, sizes: Sequence[int]
) -> list[npt.NDArray[Any]]:
    """Return adjacent arrays of one type."""
    whole = np.frombuffer(blob, dtype, sum(sizes), start)
    parts = []
    stop = 0
    for size in sizes:
        start, stop = stop, stop + size
        parts.append(whole[start:stop])
    return parts


def _stream(stored: memoryview, codec: int, size: int) -> bytes | memoryview:
    raw: bytes | memoryview
    if codec == CODECS[Codec.zstd]:
        try:
            found = zstandard.frame_content_size(stored)
            raw = _compressors.read.decompress(stored) if found == size else b""
        except zstandard.ZstdError as error:
            raise StoreError(f"chunk with a broken zstd stream: {error}") from error
    else:
        found, raw = len(stored), stored
    if found != size:
        raise StoreError(f"chunk with a stream of {found} entries, its head says {size}")
    return raw


FAULTS = (
    "",
    "non-zeros per cell do not add up",
    "positions of exceptions are not ascending or too large",
    "a cell names a gene behind the last",
)


@compiled
def find_fault(
    num_nonzero_N: npt.NDArray[np.uint16],
    gap_M: npt.NDArray[np.uint8],
    gap_position_E: npt.NDArray[np.uint32],
    gap_high_E: npt.NDArray[np.uint16],
    count_position_F: npt.NDArray[np.uint32],
    num_genes: int,
) -> int:
    """Return 0 for a sound chunk, else the index of the fault."""
    total = 0
    for size in num_nonzero_N:
        total += size
    if total != gap_M.size:
        return 1
    for position in (gap_position_E, count_position_F):
        last = -1
        for value in position:
            if value <= last or value >= total:
                return 2
            last = int(value)
    end, exception = np.int64(0), 0
    for size in num_nonzero_N:
        start, end = end, end + size
        column = sum_bytes(gap_M[start:end])
        while exception < gap_position_E.size and gap_position_E[exception] < end:
            column += np.int64(gap_high_E[exception]) << 8
            exception += 1
        if column + size > num_genes:
            return 3
    return 0


@compiled
def sum_bytes(gap_M: npt.NDArray[np.uint8]) -> np.int64:
    """Return the sum of at most 65,535 bytes."""
    total = np.uint32(0)
    for value in gap_M:
        total += np.uint32(value)
    return np.int64(total)
