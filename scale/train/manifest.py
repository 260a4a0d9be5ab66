"""The files of a checkpoint: manifest, hashes, which one is the newest whole one, what is pruned.

A run keeps ``checkpoints/step_00001000/`` with manifest.json (format, step, sets seen, layout,
versions, size and sha256 of every other file), vocabulary.json, model.json (settings that rebuild
the model), state.json (position in the data, state of the loop) and ``weights/``; the text file
``checkpoints/last`` names the newest. A checkpoint is written under ``.partial`` and renamed when
it is complete, so a directory with the final name and a fitting manifest is whole. No file holds an
absolute path. Nothing here needs torch.
"""

from __future__ import annotations

import json
import logging
import shutil
from hashlib import file_digest
from pathlib import Path
from typing import Any

from scale.runtime import atomic_path, sync_directory
from scale.types import CheckpointError

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
MODEL = "model.json"
STATE = "state.json"
WEIGHTS = "weights"
_PREFIX = "step_"
_PARTIAL = ".partial"


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's directory.

    Examples
    --------
    >>> checkpoint_name(1000)
    'step_00001000'
    """
    return f"{_PREFIX}{step:08d}"


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    with path.open("rb") as handle:
        return {"size": path.stat().st_size, "sha256": file_digest(handle, "sha256").hexdigest()}


def start_partial(run_dir: Path, step: int) -> Path:
    """Make the empty directory that a checkpoint is written into, and return it."""
    partial = run_dir / "checkpoints" / (checkpoint_name(step) + _PARTIAL)
    for left in partial.parent.glob(f"{_PREFIX}*{_PARTIAL}"):
        shutil.rmtree(left)  # by a save that was killed; a run has one save at a time
    (partial / WEIGHTS).mkdir(parents=True)
    return partial


def finish_partial(partial: Path, *, keep_last: int) -> Path:
    """Give a complete checkpoint its name, point ``last`` to it and drop the oldest.

    Parameters
    ----------
    partial
        From :func:`start_partial`, with its manifest.
    keep_last
        Checkpoints that stay.
    """
    folder = partial.parent
    final = folder / partial.name.removesuffix(_PARTIAL)
    sync_directory(partial / WEIGHTS)
    sync_directory(partial)
    if final.exists():
        shutil.rmtree(final)  # a damaged one: training came here again from an earlier one
    partial.rename(final)
    sync_directory(folder)
    with atomic_path(folder / "last") as temporary:
        temporary.write_text(final.name + "\n")
    older = [path for path in list_checkpoints(folder.parent) if path.name < final.name]
    for path in older[: max(0, len(older) - (keep_last - 1))]:
        shutil.rmtree(path)
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the directories of a run's checkpoints, oldest first; they may be damaged."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.startswith(_PREFIX) and not path.name.endswith(_PARTIAL) and path.is_dir()
    )


def read_manifest(checkpoint: Path, *, verify: bool = True) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are what it says.

    Parameters
    ----------
    checkpoint
        Directory of one checkpoint.
    verify
        Also read every file and compare its sha256.

    Raises
    ------
    CheckpointError
        Naming the file that is missing, cut or changed, or a format this version cannot read.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} has no {MANIFEST}: it is no complete checkpoint")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format_version"]
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if version != FORMAT_VERSION:
        made_by = manifest.get("versions", {}).get("scale", "another version")
        raise CheckpointError(
            f"{checkpoint} has format {version} (made by scale {made_by}); this version reads "
            f"format {FORMAT_VERSION}"
        )
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(f"{checkpoint} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(
                f"{checkpoint} is damaged: {name} has {size:,} bytes, expected {expected['size']:,}"
            )
        if verify and (found := describe_file(file)["sha256"]) != expected["sha256"]:
            raise CheckpointError(
                f"{checkpoint} is damaged: {name} has sha256 {found[:12]}.., expected "
                f"{expected['sha256'][:12]}.."
            )
    return manifest


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None; damaged ones are skipped loudly."""
    listed = list_checkpoints(run_dir)
    for path in reversed(listed):
        try:
            read_manifest(path)
        except CheckpointError as error:
            logger.warning("%s; trying the one before it", error)
            continue
        if path != listed[-1]:
            logger.warning("%s is whole and is taken instead", path)
        return path
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except CheckpointError:
        return False
    return True


def find_checkpoint(run_or_checkpoint: Path) -> Path:
    """Return a whole checkpoint: the one named, or the newest whole one of a run.

    Raises
    ------
    CheckpointError
        If the one that was named is damaged, naming the newest whole one of its run; or if a run
        has no whole one.
    """
    if (run_or_checkpoint / MANIFEST).exists() or run_or_checkpoint.name.startswith(_PREFIX):
        try:
            read_manifest(run_or_checkpoint)
        except CheckpointError as error:
            listed = list_checkpoints(run_or_checkpoint.absolute().parent.parent)
            whole = next((path for path in reversed(listed) if _is_whole(path)), None)
            told = "no checkpoint of this run is whole" if whole is None else f"use {whole}"
            raise CheckpointError(f"{error}; {told}") from error
        return run_or_checkpoint
    found = newest_checkpoint(run_or_checkpoint)
    if found is None:
        raise CheckpointError(f"{run_or_checkpoint} has no complete checkpoint")
    return found
