"""What decides the content of a store: settings, inputs, versions.

A run goes on where another stopped only if all of this is equal; the same settings are written into
the store. How many processes work, with how much memory, in which run directory, is not among it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any

import zstandard

from scale.config import PrepareConfig
from scale.data.ingest.source import Source
from scale.runtime import package_version

_WITHOUT_EFFECT = (
    *("name", "run_dir", "store", "num_workers", "memory_bytes", "restart", "overwrite"),
    *("verify", "export", "merge"),
)


def content_settings(config: PrepareConfig) -> dict[str, Any]:
    """Return the settings that decide the content, as JSON values; files are listed elsewhere."""
    settings = dataclasses.asdict(config)
    for name in _WITHOUT_EFFECT:
        del settings[name]
    del settings["source"]["files"]
    return dict(json.loads(json.dumps(settings, default=_plain)))


def describe_identity(config: PrepareConfig, sources: Sequence[Source]) -> dict[str, Any]:
    """Return all that decides the content, by name: JSON values."""
    found: dict[str, Any] = {"scale": package_version(), "zstandard": zstandard.__version__}
    for name, value in content_settings(config).items():
        if isinstance(value, dict) and name != "where":
            found |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            found[name] = value
    for name in ("file", "split"):
        file = getattr(config.genes, name)
        if file is not None and Path(file).is_file():
            found[f"content of genes.{name}"] = sha256(Path(file).read_bytes()).hexdigest()
    if config.source.metadata is not None:
        found["tables in source.metadata"] = list(_stamp(Path(config.source.metadata)))
    for number, source in enumerate(sources):
        if source.path is not None:
            found[f"input {number}"] = [source.path.name, *_stamp(source.path)]
    return found


def _plain(value: object) -> Any:
    return value.value if isinstance(value, Enum) else str(value)


def _stamp(path: Path) -> tuple[int, int]:
    """Return size and time of change, of an archive those of all its files."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    facts = [file.stat() for file in files]
    return sum(f.st_size for f in facts), max((f.st_mtime_ns for f in facts), default=0)
