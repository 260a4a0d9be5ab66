"""What is passed on for prediction: the moving average as safetensors, with json beside it.

``export/`` holds ``model.safetensors``, ``model.json`` and ``vocabulary.json``. It is made from a
checkpoint of any layout without starting ranks, and nothing in it is a pickle.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors

from scale.runtime import atomic_path, package_version, sync_directory, write_json
from scale.train import manifest as files
from scale.train.manifest import find_checkpoint, newest_checkpoint, read_manifest
from scale.train.record import ModelRecord, read_json
from scale.types import CheckpointError, Vocabulary

logger = logging.getLogger(__name__)

AVERAGE = "ema."
"""Begin of the keys under which a checkpoint holds the moving average."""
EXPORTED = "model.safetensors"


def is_export(source: Path) -> bool:
    """Return whether a directory is an export."""
    return (source / EXPORTED).is_file()


def find_weights(path: Path) -> Path:
    """Return the export or the whole checkpoint that stands for a run, checkpoint or export."""
    if (path / EXPORTED).is_file():
        return path
    export = path / "export"
    if not (export / EXPORTED).is_file():
        return find_checkpoint(path)
    step = int(read_json(export / files.MODEL)["step"])
    listed = files.list_checkpoints(path)
    if listed and listed[-1].name > files.checkpoint_name(step):
        newest = newest_checkpoint(path)
        if newest is not None and newest.name > files.checkpoint_name(step):
            logger.info("%s is newer than the export of step %d", newest, step)
            return newest
    return export


def read_record(source: Path) -> tuple[ModelRecord, Vocabulary]:
    """Return settings and names of a checkpoint or an export."""
    return ModelRecord.read(source / files.MODEL), Vocabulary.read(source / files.VOCABULARY)


def read_average(source: Path) -> dict[str, Tensor]:
    """Return the whole moving average of a checkpoint or an export, by name; needs no ranks.

    Raises
    ------
    CheckpointError
        If the weights of an export are not those that its model.json names.
    """
    exported = source / EXPORTED
    if not exported.is_file():
        return _read_whole(source / files.WEIGHTS, AVERAGE)
    expected = read_json(source / files.MODEL)["weights_sha256"]
    found = files.describe_file(exported)["sha256"]
    if found != expected:
        raise CheckpointError(
            f"{source} is damaged: {EXPORTED} has sha256 {found[:12]}.., expected {expected[:12]}.."
        )
    try:
        with safe_open(exported, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{exported} cannot be read ({error})") from error


def _read_whole(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of sharded weights whose keys begin with ``prefix``, put together."""
    reader = FileSystemReader(folder)
    whole = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load_tensors(whole, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in whole.items()}


def export_model(checkpoint: Path, export: Path) -> Path:
    """Write the moving average of a checkpoint for prediction elsewhere; return the directory.

    ``model.safetensors``, ``model.json`` and ``vocabulary.json`` are all that prediction needs.
    """
    manifest = read_manifest(checkpoint, verify=False)
    record, vocabulary = read_record(checkpoint)
    export.mkdir(parents=True, exist_ok=True)
    with atomic_path(export / files.VOCABULARY) as temporary:
        vocabulary.save(temporary)
    with atomic_path(export / EXPORTED) as temporary:
        save_file(read_average(checkpoint), temporary, metadata={"scale": package_version()})
        described = files.describe_file(temporary)
    write_json(
        export / files.MODEL,
        {
            **record.to_json(),
            "step": manifest["step"],
            "weights_sha256": described["sha256"],
            "genes_sha256": vocabulary.genes_sha256,
        },
    )
    sync_directory(export)
    return export
