"""Shard files: chunks one after the other, opened for reading; ``shard_writer`` writes them.

A shard is a head of 16 bytes and chunks padded to 8; where a chunk starts is known to the index
only. Shards of treated cells hold one cell type each and are read; shards of control cells are not
compressed and are mapped.

Shapes: C = chunks, K = groups of chunks.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scale.data.csr import IntArray

CONTROL_SHARD = "shards/control-"
TREATED_SHARD = "shards/treated-"
_PADDING = 7  # chunks start at multiples of 8


class _Descriptor:
    """An open file, closed when nobody uses it any more, threads in the middle of a read included.

    A number that was closed could be given to another file before the read.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class Shards:
    """Open shard files: opened at first use, closed with the store or with this object.

    Parameters
    ----------
    root
        Directory of the store.
    names
        Files in it, by number of the shard.
    open_file
        Returns a descriptor of a file by its name, for files that are not there yet.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        open_file: Callable[[str], int] | None = None,
    ) -> None:
        self.paths = [root / name for name in names]
        self._names, self._open_file = names, open_file
        self.is_control = np.array([name.startswith(CONTROL_SHARD) for name in names], np.bool_)
        self._lock = threading.Lock()
        self._descriptors: dict[int, _Descriptor] = {}
        self._maps: dict[int, npt.NDArray[np.uint8]] = {}

    def _opened(self, shard: int) -> _Descriptor:
        """Return the open file of a shard: the one place where a shard's path is opened."""
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            if self._open_file is None:
                number = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            else:  # may take minutes, so not while others wait for the lock
                number = self._open_file(self._names[shard])
            opened = _Descriptor(number)
            with self._lock:
                descriptor = self._descriptors.setdefault(shard, opened)
        return descriptor

    def read(self, shard: int, start: int, stop: int) -> bytes:
        """Return bytes of a shard; fewer where the file ends."""
        descriptor = self._opened(shard)  # held, so that it stays open
        return os.pread(descriptor.number, stop - start, start)

    def will_need(self, shard: int, start: int, stop: int) -> None:
        """Ask the system to read bytes of a shard ahead, where it can be asked."""
        if hasattr(os, "posix_fadvise"):
            descriptor = self._opened(shard)
            os.posix_fadvise(descriptor.number, start, stop - start, os.POSIX_FADV_WILLNEED)

    def mapped(self, shard: int) -> npt.NDArray[np.uint8]:
        """Return a shard as a read-only map."""
        found = self._maps.get(shard)
        if found is None:
            descriptor = self._opened(shard)
            with self._lock:
                found = self._maps.get(shard)
                if found is None:
                    try:
                        mapping = mmap.mmap(descriptor.number, 0, access=mmap.ACCESS_READ)
                    except ValueError as error:
                        raise OSError("the file is empty") from error
                    found = self._maps[shard] = np.frombuffer(mapping, np.uint8)
        return found

    def close(self) -> None:
        """Let go of all files; they are closed as soon as no thread reads them."""
        with self._lock:
            self._descriptors.clear()
            self._maps.clear()


class Neighbours(NamedTuple):
    """Chunks that lie side by side, to be read at once: those from ``first`` to before ``stop``."""

    first: int
    stop: int
    shard: int
    begin: int
    end: int

    @classmethod
    def groups(cls, shard_C: IntArray, begin_C: IntArray, length_C: IntArray) -> list[Neighbours]:
        """Return the groups of chunks that are sorted by shard and place.

        What lies between two chunks is in no group, however little it is: it may be held out.
        """
        end_C = begin_C.astype(np.int64) + length_C
        is_apart = (shard_C[1:] != shard_C[:-1]) | (begin_C[1:] > end_C[:-1] + _PADDING)
        first_K = np.concatenate([[0], np.flatnonzero(is_apart) + 1])
        stop_K = np.append(first_K[1:], len(shard_C))
        columns = (first_K, stop_K, shard_C[first_K], begin_C[first_K], end_C[stop_K - 1])
        return [cls(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
