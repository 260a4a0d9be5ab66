"""Shard files: chunks one after the other, opened for reading; ``shard_writer`` writes them.

A shard is a head of 16 bytes and chunks padded to 8; where a chunk starts is known to the index
only. Shards of treated cells hold one cell type each and are read; shards of control cells are not
compressed and are mapped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt


CONTROL_SHARD = "shards/control-"
TREATED_SHARD = "shards/treated-"


class Shards:
    """Open shard files: opened at first use, closed with the store or with this object."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.paths = [root / name for name in names]
        self.is_control = [name.startswith(CONTROL_SHARD) for name in names]
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}
        self._maps: dict[int, npt.NDArray[np.uint8]] = {}

    def read(self, shard: int, offset: int, length: int) -> bytes | memoryview:
        """Return bytes of a shard; fewer where the file ends."""
        if self.is_control[shard]:
            return self.mapped(shard)[offset : offset + length].data
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            with self._lock:
                descriptor = self._descriptors.get(shard)
                if descriptor is None:
                    descriptor = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
                    self._descriptors[shard] = descriptor
        return os.pread(descriptor, length, offset)

    def mapped(self, shard: int) -> npt.NDArray[np.uint8]:
        """Return a shard as a read-only map."""
        found = self._maps.get(shard)
        if found is None:
            with self._lock:
                found = self._maps.setdefault(
                    shard, np.asarray(np.memmap(self.paths[shard], np.uint8, "r"))
                )
        return found

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._maps.clear()

    def __del__(self) -> None:
        self.close()
