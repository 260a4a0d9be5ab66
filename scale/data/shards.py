"""Shard files: chunks one after the other, opened for reading or being written.

A shard is a head of 16 bytes and chunks padded to 8; where a chunk starts is known to the index
only. Shards of treated cells hold one cell type each and are read; shards of control cells are not
compressed and are mapped.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import threading
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scale.types import StoreError

logger = logging.getLogger(__name__)

_HEAD = struct.Struct("<4sHHQ")
_MAGIC = b"SCLS"
CONTROL_SHARD = "shards/control-"
TREATED_SHARD = "shards/treated-"
_VERSION = 1
_MOST_SHARDS = 1 << 16  # the index has 16 bits for the number of a shard


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


class ShardWriter:
    """Write chunks to shards, control and treated apart, and one cell type per treated shard.

    Parameters
    ----------
    root
        Directory of the store that is being written.
    shard_bytes
        A shard that would grow beyond is ended.
    """

    def __init__(self, root: Path, shard_bytes: int) -> None:
        self._root, self._shard_bytes = root, shard_bytes
        self._open: dict[bool, _ShardFile] = {}
        self._closed: list[tuple[int, dict[str, Any]]] = []
        self._num_shards = {False: 0, True: 0}
        (root / "shards").mkdir()

    def append(self, blob: bytes, *, cell_type: str, is_control: bool) -> tuple[int, int]:
        """Write a chunk; return the number of its shard and where it starts."""
        context = None if is_control else cell_type
        shard = self._open.get(is_control)
        if shard is not None:
            is_full = shard.size > _HEAD.size and shard.size + len(blob) > self._shard_bytes
            if shard.context != context or is_full:
                self._closed.append((shard.number, shard.close()))
                shard = None
        if shard is None:
            shard = self._open[is_control] = self._start(context, is_control=is_control)
        return shard.number, shard.append(blob)

    def _start(self, context: str | None, *, is_control: bool) -> _ShardFile:
        number = sum(self._num_shards.values())
        if number >= _MOST_SHARDS:
            raise StoreError(f"more than {number} shards; raise shard_bytes ({self._shard_bytes})")
        prefix = CONTROL_SHARD if is_control else TREATED_SHARD
        name = f"{prefix}{self._num_shards[is_control]:05d}.scl"
        self._num_shards[is_control] += 1
        return _ShardFile(self._root, name, number, context)

    def close(self) -> list[dict[str, Any]]:
        """End all shards; return their entries in the manifest, in the order of their numbers."""
        for shard in self._open.values():
            self._closed.append((shard.number, shard.close()))
        self._open = {}
        return [entry for _, entry in sorted(self._closed, key=lambda closed: closed[0])]

    def abort(self) -> None:
        """Close all files without a care for their content."""
        for shard in self._open.values():
            shard.abort()
        self._open = {}


class _ShardFile:
    """A shard that is being written."""

    def __init__(self, root: Path, name: str, number: int, context: str | None) -> None:
        self.name, self.number, self.context = name, number, context
        self._path = root / name
        self._handle = self._path.open("xb", buffering=io.DEFAULT_BUFFER_SIZE * 16)
        self._digest = sha256()
        self.size = 0
        self._write(_HEAD.pack(_MAGIC, _VERSION, 0, 0))

    def _write(self, data: bytes) -> None:
        self._handle.write(data)
        self._digest.update(data)
        self.size += len(data)

    def append(self, blob: bytes) -> int:
        """Write a blob, padded to 8 bytes; return where it starts."""
        offset = self.size
        self._write(blob + bytes(-len(blob) % 8))
        return offset

    def close(self) -> dict[str, Any]:
        """Return the shard's entry in the manifest."""
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        return {"path": self.name, "size": self.size, "sha256": self._digest.hexdigest()}

    def abort(self) -> None:
        try:
            self._handle.close()
        except OSError as error:  # a full disk fails again when the buffer is flushed
            logger.debug("%s: %s", self._path, error)
