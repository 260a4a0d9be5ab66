"""The files of a store: names, manifest with its hashes, index entry, fingerprint.

Apart from ``store.py`` because the read and the write side share it, and neither the other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from scale.data.codec import CHUNK_CELLS, KIND_COUNTS
from scale.types import StoreError

SCHEMA = "scale-store"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LARGE_FILES = ("shards/", "cells/")
"""Folders of the files that are not read as a whole when a store is opened."""
CHUNK_DTYPE = np.dtype(
    [
        ("condition", "<u4"),
        ("shard", "<u2"),
        ("num_cells", "<u2"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("num_nonzero", "<u4"),
        ("reserved", "<u4"),
    ]
)
COLUMN_KEYS = ("perturbation", "cell_type", "batch", "dose", "library", "separator")
"""What the manifest says of the source's columns."""
ADDED_COLUMNS = ("library", "condition", "is_control", "source_cell", "control_fold")
"""Columns that ``CellSetStore.to_anndata`` adds to those of the source."""

_BLOCK = 1 << 20


# --- the manifest -------------------------------------------------------------------------------


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the manifest as text that carries its own sha256, computed over zeros in its place."""
    empty = json.dumps({**manifest, "sha256": "0" * 64}, indent=1, allow_nan=False) + "\n"
    digest = sha256(empty.encode()).hexdigest()
    return empty.replace(f'"sha256": "{"0" * 64}"', f'"sha256": "{digest}"').encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a store; StoreError if there is none, or it is damaged or newer."""
    try:
        raw = (path / MANIFEST).read_bytes()
    except OSError as error:
        partial = path.with_name(path.name + ".partial")
        hint = f"; {partial} is unfinished, run prepare again" if partial.exists() else ""
        raise StoreError(f"{path} is no store: it has no {MANIFEST}{hint}") from error
    return parse_manifest(raw, str(path))


def parse_manifest(raw: bytes, path: str) -> dict[str, Any]:
    """Return what the text of a manifest says, checked; ``path`` is its store's, for messages."""
    damaged = f"{path}/{MANIFEST} is damaged; restore it from a copy, or run prepare again"
    try:
        manifest = json.loads(raw)
        digest = str(manifest["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(damaged) from error
    # The seal comes first: it is the same in every version, and a version number can be damaged.
    zeroed = raw.replace(b'"sha256": "' + digest.encode(), b'"sha256": "' + b"0" * 64)
    if sha256(zeroed).hexdigest() != digest:
        raise StoreError(damaged)
    found, version = manifest["schema"], manifest["schema_version"]
    if found != SCHEMA or version != SCHEMA_VERSION:
        raise StoreError(
            f"{path} is a {found} of version {version}, made by {manifest.get('created_by')}; "
            f"this version reads {SCHEMA} {SCHEMA_VERSION}: update the package"
        )
    if manifest["kind"] != KIND_COUNTS or manifest["chunk_cells"] != CHUNK_CELLS:
        raise StoreError(
            f"{path} is of kind {manifest['kind']} with chunks of {manifest['chunk_cells']} cells; "
            f"expected kind {KIND_COUNTS} (counts) with {CHUNK_CELLS}"
        )
    for file in manifest["files"]:
        parts = PurePosixPath(file["path"]).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise StoreError(f"{path}/{MANIFEST} names {file['path']!r}, which is not in the store")
    return dict(manifest)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    digest = sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_files(path: Path, files: Sequence[dict[str, Any]], *, with_shards: bool) -> None:
    """Compare sizes of all files, and hashes of the small ones or of all."""
    for file in files:
        target = path / file["path"]
        try:
            size = target.stat().st_size
        except OSError as error:
            raise StoreError(f"{target} is missing; {path} is not complete") from error
        if size != file["size"]:
            raise StoreError(f"{target} has {size} bytes, the manifest says {file['size']}")
        is_large = file["path"].startswith(LARGE_FILES)
        if (with_shards or not is_large) and (found := file_sha256(target)) != file["sha256"]:
            raise StoreError(
                f"{target} is damaged: sha256 {found[:12]}, the manifest says "
                f"{file['sha256'][:12]}; restore it from a copy, or run prepare again"
            )


# --- the content ----------------------------------------------------------------------------------


def fingerprint(
    facts: dict[str, Any], conditions: Sequence[tuple[list[Any], npt.NDArray[np.void]]]
) -> str:
    """Return the sha256 of a store's content.

    Parameters
    ----------
    facts
        What holds for all cells.
    conditions
        Names of each condition, with the index entries of its chunks. Neither the order of the
        conditions nor where a chunk lies enters the hash.
    """
    digest = sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())
    named = {json.dumps(name, separators=(",", ":")): chunks for name, chunks in conditions}
    for name in sorted(named):
        sizes = [named[name][field].tolist() for field in ("num_cells", "num_nonzero", "crc32")]
        digest.update(f"[{name},{json.dumps(sizes, separators=(',', ':'))}]".encode())
    return digest.hexdigest()
