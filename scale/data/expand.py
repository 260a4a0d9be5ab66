"""Chunks without compression, side by side in memory: how the cells of a batch are read.

Apart from the codec because nothing is made per chunk: the bytes stay where they are written, and
compiled code checks all chunks of a batch in one call.

Shapes: C = chunks.
"""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt

from scale.config import Codec
from scale.data.codec import CODECS, FAULTS, HAS_BATCH, ChunkHead, compiled, find_fault
from scale.types import StoreError


def expand_chunk(
    blob: bytes | memoryview,
    out: npt.NDArray[np.uint8],
    num_cells: int,
    num_nonzero: int,
) -> int:
    """Write a chunk as it would be without compression; return its bytes.

    Parameters
    ----------
    blob
        A whole chunk.
    out
        Memory to write to; the length of the blob and two bytes per non-zero are enough.
    num_cells, num_nonzero
        What the index says of the chunk.

    Raises
    ------
    StoreError
        If the blob is not this chunk. What its lists say is left to :func:`check_chunks`.
    """
    head = ChunkHead.read(blob)
    if (head.num_cells, head.num_nonzero) != (num_cells, num_nonzero):
        raise StoreError("the chunk has other sizes than the index says")
    start = head.lists_end
    out[:start] = np.frombuffer(blob, np.uint8, start)
    out[6] = CODECS[Codec.none]
    out[24:32] = np.frombuffer(struct.pack("<2I", num_nonzero, num_nonzero), np.uint8)
    for raw in head.streams(blob):
        out[start : start + num_nonzero] = np.frombuffer(raw, np.uint8)
        start += num_nonzero
    return start


def check_chunks(
    chunks: npt.NDArray[np.uint8], start_C: npt.NDArray[np.int64], *, num_genes: int
) -> tuple[int, str] | None:
    """Return None if uncompressed chunks are sound, else number and fault of the first bad one.

    Parameters
    ----------
    chunks
        Whole chunks that :func:`expand_chunk` wrote.
    start_C
        Where each starts, a multiple of 8.
    num_genes
        Genes of the store.
    """
    chunk, fault = _first_fault(chunks, start_C, num_genes)
    if fault:
        return chunk, f"chunk contradicts itself: {FAULTS[fault]} ({num_genes} genes)"
    return None


@compiled
def _first_fault(
    chunks: npt.NDArray[np.uint8], start_C: npt.NDArray[np.int64], num_genes: int
) -> tuple[int, int]:
    """Return number and fault of the first chunk that is not sound; fault 0 = all are."""
    for c in range(start_C.size):
        blob = chunks[start_C[c] :]
        n = np.int64(blob[8:10].view(np.uint16)[0])
        has_batch = np.int64(blob[7] & HAS_BATCH)
        head = blob[12:24].view(np.uint32)
        m, e, f = np.int64(head[0]), np.int64(head[1]), np.int64(head[2])
        middle = 32 + 4 * (n + e + f)
        position = blob[32 + 4 * n : middle].view(np.uint32)
        size = blob[middle : middle + 2 * n].view(np.uint16)
        middle += 2 * n * (1 + has_batch)
        high = blob[middle : middle + 2 * e].view(np.uint16)
        middle += 2 * (e + f)
        fault = find_fault(
            size, blob[middle : middle + m], position[:e], high, position[e:], num_genes
        )
        if fault:
            return c, fault
    return 0, 0
