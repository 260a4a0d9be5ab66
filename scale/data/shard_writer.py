"""Shard files while they are written; ``shards`` says what they are and reads them."""

from __future__ import annotations

import io
import logging
import os
import struct
from hashlib import sha256
from pathlib import Path
from typing import Any

from scale.data.shards import CONTROL_SHARD, TREATED_SHARD
from scale.types import StoreError

logger = logging.getLogger(__name__)

_HEAD = struct.Struct("<4sHHQ")
_MAGIC = b"SCLS"
_VERSION = 1
_MOST_SHARDS = 1 << 16  # the index has 16 bits for the number of a shard
_BUFFER_BYTES = io.DEFAULT_BUFFER_SIZE * 16


def check_number(number: int, shard_bytes: int) -> None:
    """Refuse the number of a shard that the index cannot hold."""
    if number >= _MOST_SHARDS:
        raise StoreError(f"more than {_MOST_SHARDS:,} shards; raise shard_bytes ({shard_bytes:,})")


class ShardFile:
    """A shard that is being written.

    Parameters
    ----------
    root
        Directory of the store.
    name
        Of the file in it; what an earlier start has left there is lost.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self._path = root / name
        self._handle = self._path.open("wb", buffering=_BUFFER_BYTES)
        self._digest = sha256()
        self._size = 0
        self._write(_HEAD.pack(_MAGIC, _VERSION, 0, 0))

    def _write(self, data: bytes) -> None:
        self._handle.write(data)
        self._digest.update(data)
        self._size += len(data)

    def append(self, blob: bytes) -> int:
        """Write a chunk, padded to 8 bytes; return where it starts."""
        offset = self._size
        self._write(blob + bytes(-len(blob) % 8))
        return offset

    def close(self) -> dict[str, Any]:
        """Sync the file; return its entry in the manifest."""
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
        return {"path": self.name, "size": self._size, "sha256": self._digest.hexdigest()}

    def abort(self) -> None:
        """Close the file without a care for its content."""
        try:
            self._handle.close()
        except OSError as error:  # a full disk fails again when the buffer is flushed
            logger.debug("%s: %s", self._path, error)


class ShardWriter:
    """Write chunks to shards, control and treated apart, and one cell type per treated shard.

    Parameters
    ----------
    root
        Directory of the store that is being written.
    shard_bytes
        A shard is ended before it would hold more than this, counted before compression.
    """

    def __init__(self, root: Path, shard_bytes: int) -> None:
        self._root, self._shard_bytes = root, shard_bytes
        self._open: dict[bool, _OpenShard] = {}
        self._closed: list[tuple[int, dict[str, Any]]] = []
        self._num_shards = {False: 0, True: 0}
        (root / "shards").mkdir(exist_ok=True)

    def append(
        self, blob: bytes, num_bytes: int, *, cell_type: str, is_control: bool
    ) -> tuple[int, int]:
        """Write a chunk; return the number of its shard and where it starts.

        Parameters
        ----------
        blob
            The chunk.
        num_bytes
            Its size before compression.
        cell_type, is_control
            Of its condition.
        """
        context = None if is_control else cell_type
        shard = self._open.get(is_control)
        if shard is not None and (shard.context != context or num_bytes > shard.room):
            self._closed.append((shard.number, shard.file.close()))
            shard = None
        if shard is None:
            shard = self._open[is_control] = self._start(context, is_control=is_control)
        shard.room -= num_bytes
        return shard.number, shard.file.append(blob)

    def _start(self, context: str | None, *, is_control: bool) -> _OpenShard:
        number = sum(self._num_shards.values())
        check_number(number, self._shard_bytes)
        prefix = CONTROL_SHARD if is_control else TREATED_SHARD
        name = f"{prefix}{self._num_shards[is_control]:05d}.scl"
        self._num_shards[is_control] += 1
        return _OpenShard(ShardFile(self._root, name), number, context, self._shard_bytes)

    def close(self) -> list[dict[str, Any]]:
        """End all shards; return their entries in the manifest, in the order of their numbers."""
        for shard in self._open.values():
            self._closed.append((shard.number, shard.file.close()))
        self._open = {}
        return [entry for _, entry in sorted(self._closed, key=lambda closed: closed[0])]

    def abort(self) -> None:
        """Close all files without a care for their content."""
        for shard in self._open.values():
            shard.file.abort()
        self._open = {}


class _OpenShard:
    """A shard, its number, whose cells it is for, and how many bytes it may still take."""

    def __init__(self, file: ShardFile, number: int, context: str | None, room: int) -> None:
        self.file, self.number, self.context, self.room = file, number, context, room
