"""What a checkpoint holds; save, load into the same or another layout, export for prediction.

``weights/`` holds Megatron's ``torch_dist`` shards: the model, its moving average under keys that
begin with ``ema.``, and the optimizer. They load into any number of ranks. Their ``.metadata`` is a
pickle, so a sharded checkpoint is trusted like code; what is passed on to others is ``export/``:
the moving average as safetensors, with json beside it.

No random state is kept: every draw of data and model is a function of the seed and counters.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from scale.config import ParallelConfig, Precision
from scale.runtime import World, versions, write_json
from scale.train import manifest as files
from scale.train import optim, parallel
from scale.train.export import AVERAGE, find_weights, is_export, read_average, read_record
from scale.train.manifest import read_manifest
from scale.train.megatron_cpu import quiet_import
from scale.train.record import ModelRecord, TrainingState, read_json
from scale.types import CheckpointError, Vocabulary

if TYPE_CHECKING:
    from scale.model.model import ScaleModel
    from scale.train.engine import Engine

with quiet_import():
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.dist_checkpointing.strategies.torch import (
        MCoreSavePlanner,
        TorchDistSaveShardedStrategy,
        _replace_state_dict_keys_with_sharded_keys,
        mcore_to_pyt_state_dict,
    )

logger = logging.getLogger(__name__)

# One key per layer with its global number, so that single layers can be taken from a checkpoint.
_LAYOUT_METADATA = {
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
}


# --- training -----------------------------------------------------------------------------------


def save_checkpoint(
    run_dir: Path,
    engine: Engine,
    state: TrainingState,
    *,
    record: ModelRecord,
    vocabulary: Vocabulary,
    keep_last: int,
) -> Path:
    """Write a checkpoint, whole or not at all; a collective of all ranks. Return its directory.

    Raises
    ------
    CheckpointError
        If a rank could not write; what was there before is untouched.
    """
    layout, started = engine.layout, time.monotonic()
    partial = run_dir / "checkpoints" / (files.checkpoint_name(state.step) + ".partial")
    if layout.is_writer:
        partial = files.start_partial(run_dir, state.step)
    dist.barrier()
    save_weights(partial / files.WEIGHTS, engine)
    # Every rank hashes what it wrote; rank 0 also what is written once.
    own = [p for p in (partial / files.WEIGHTS).iterdir() if _writer_of(p) == layout.rank]
    entries = {f"{files.WEIGHTS}/{p.name}": files.describe_file(p) for p in own}
    gathered: list[dict[str, Any] | None] = [None] * layout.world_size
    dist.all_gather_object(gathered, entries)
    final = partial.with_suffix("")
    if layout.is_writer:
        vocabulary.save(partial / files.VOCABULARY)
        write_json(partial / files.MODEL, record.to_json())
        write_json(partial / files.STATE, asdict(state))
        described = {k: v for part in gathered if part is not None for k, v in part.items()}
        for name in (files.VOCABULARY, files.MODEL, files.STATE):
            described[name] = files.describe_file(partial / name)
        write_json(
            partial / files.MANIFEST,
            {
                "format_version": files.FORMAT_VERSION,
                "step": state.step,
                "consumed_sets": state.consumed_sets,
                "layout": layout.record(),
                "optimizer": engine.optimizer_kind,
                "precision": engine.precision.value,
                "versions": versions(),
                "files": dict(sorted(described.items())),
            },
        )
        final = files.finish_partial(partial, keep_last=keep_last)
        logger.info("saved %s in %.1f s", final.name, time.monotonic() - started)
    dist.barrier()
    return final


def load_checkpoint(checkpoint: Path, engine: Engine) -> TrainingState:
    """Load weights, average and optimizer into an engine of any layout; return where the run stood.

    Raises
    ------
    CheckpointError
        If the optimizer was of another kind: its state would have no place.
    """
    manifest = read_manifest(checkpoint, verify=False)
    if manifest["optimizer"] != engine.optimizer_kind:
        raise CheckpointError(
            f"{checkpoint} has the optimizer {manifest['optimizer']!r}, this run "
            f"{engine.optimizer_kind!r}; keep trainer.precision and parallel.distributed_optimizer "
            "as they were, or use scale finetune, which loads weights only"
        )
    load_weights(checkpoint / files.WEIGHTS, engine)
    return TrainingState(**read_json(checkpoint / files.STATE))


def save_weights(folder: Path, engine: Engine) -> None:
    """Write the shards of model, average and optimizer; a collective of all ranks."""
    try:
        dist_checkpointing.save(
            _sharded_state(engine, is_loading=False),
            str(folder),
            sharded_strategy=_InProcessSave("torch_dist", 1),
        )
    except CheckpointException as error:  # torch's, with the failure of each rank
        causes = "; ".join(f"rank {r}: {cause}" for r, (cause, _) in error.failures.items())
        raise CheckpointError(f"{folder.parent.name} could not be written: {causes}") from error
    except (CheckpointingException, OSError) as error:
        raise CheckpointError(f"{folder.parent.name} could not be written: {error}") from error


def load_weights(folder: Path, engine: Engine) -> None:
    """Read what :func:`save_weights` wrote, from any layout; a collective of all ranks."""
    if engine.distributed_optimizer:
        optim.prepare_spread_state(engine.optimizer)
    wanted = _sharded_state(engine, is_loading=True)
    try:
        with warnings.catch_warnings():
            # Megatron-core calls functions that torch has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load(wanted, str(folder))
    except CheckpointingException as error:
        raise CheckpointError(f"{folder} does not fit this model: {error}") from error
    engine.model.load_state_dict(loaded["model"])
    with torch.no_grad():
        for name, weight in engine.average.weights.items():
            weight.copy_(loaded["average"][name])
    if engine.distributed_optimizer:
        optim.load_spread_state(engine.optimizer, loaded["optimizer"])
        return
    with torch.no_grad():
        for kind, tensors in _optimizer_tensors(engine).items():
            for name, tensor in tensors.items():
                tensor.copy_(loaded["optimizer"][kind][name])
    for state in engine.optimizer.optimizer.state.values():
        state["step"].fill_(loaded["optimizer_steps"])


def _sharded_state(engine: Engine, *, is_loading: bool) -> dict[str, Any]:
    model: Any = engine.model
    entries = model.sharded_state_dict(metadata=dict(_LAYOUT_METADATA))
    # Buffers are no part of the average, but of the model that prediction rebuilds.
    average = {
        name: _renamed(entry, AVERAGE, engine.average.weights.get(name, entry.data))
        for name, entry in entries.items()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    state: dict[str, Any] = {"model": entries, "average": average}
    if engine.distributed_optimizer:
        optimizer: Any = engine.optimizer
        state["optimizer"] = optimizer.sharded_state_dict(
            entries, is_loading=is_loading, metadata=dict(_LAYOUT_METADATA)
        )
        return state
    # Not the wrapper's own: with fp32 beside bf16 weights it takes one for the other.
    state["optimizer"] = {
        kind: {
            name: _renamed(entries[name], f"optimizer.{kind}.", tensor)
            for name, tensor in tensors.items()
        }
        for kind, tensors in _optimizer_tensors(engine).items()
    }
    steps = {float(s["step"]) for s in engine.optimizer.optimizer.state.values()}
    state["optimizer_steps"] = max(steps, default=0.0)
    return state


def _optimizer_tensors(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Return moments, and fp32 copies of bf16 weights, by kind and name of the weight."""
    adamw = engine.optimizer.optimizer
    optim.initialise_state(adamw)
    tensors: dict[str, dict[str, Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}, "fp32": {}}
    for name, parameter in engine.model.named_parameters():
        if not parameter.requires_grad:
            continue
        main = getattr(parameter, "main_param", None)
        if main is not None:
            tensors["fp32"][name] = main
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[kind][name] = adamw.state[parameter if main is None else main][kind]
    return tensors


def _renamed(entry: Any, prefix: str, data: Tensor) -> Any:
    """Return the entry of a weight for a tensor that goes with it: same shards, own key."""
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, key=prefix + entry.key, data=data)
    return replace(entry, key=prefix + entry.key, data=data, dtype=data.dtype)


def _writer_of(path: Path) -> int:
    """Return the rank that wrote a file of ``weights/``: shards are called ``__<rank>_<n>``."""
    return int(path.name.split("_")[2]) if path.name.startswith("__") else 0


class _InProcessSave(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Writes shards from the training process.

    Megatron's own writer starts a manager process that imports the main script again (2-7 s for the
    first save), forks writers from a process with threads, and leaves orphans behind when a rank is
    killed. The files are the same.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path | str) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        save_tensors(
            mcore_to_pyt_state_dict(by_key, is_loading=False),
            storage_writer=FileSystemWriter(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


# --- prediction and finetuning ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model with its moving average, on a device, and what explains it."""

    model: ScaleModel
    vocabulary: Vocabulary
    record: ModelRecord
    sha256: str
    """Of the weights."""
    step: int


def load_for_prediction(path: Path, device: torch.device) -> LoadedModel:
    """Return the model of a run, a checkpoint or an export, in a world of one process.

    A run's ``export/`` is taken unless a checkpoint is newer (a run that is going on, or was
    killed). Nothing of an export is unpickled.

    Raises
    ------
    CheckpointError
        If there is nothing to load, or what there is, is damaged.
    """
    from scale.model.model import ScaleModel

    source = find_weights(path)
    record, vocabulary = read_record(source)
    whole = read_average(source)
    parallel.start(ParallelConfig(), World(0, 1, 0), seed=0, device=device, is_training=False)
    # bf16 arithmetic is slower than fp32 on most CPUs, and never more exact.
    precision = record.precision if device.type == "cuda" else Precision.fp32
    model = ScaleModel(record.model, record.objective, vocabulary, seed=0, precision=precision)
    place_weights(model, whole)
    about = read_json(source / (files.MODEL if is_export(source) else files.MANIFEST))
    return LoadedModel(
        model=model.to(device).eval(),
        vocabulary=vocabulary,
        record=record,
        sha256=about["weights_sha256"]
        if is_export(source)
        else files.describe_file(source / files.MANIFEST)["sha256"],
        step=int(about["step"]),
    )


def place_weights(model: nn.Module, whole: Mapping[str, Tensor]) -> None:
    """Copy whole weights into a model of any layout; each rank takes its share.

    Raises
    ------
    CheckpointError
        If a weight is missing, left over, or has another shape.
    """
    taken = set()
    with torch.no_grad():
        for shard in _shards(model):
            weight = whole.get(shard.key)
            if weight is None or tuple(weight.shape) != tuple(shard.global_shape):
                found = "missing" if weight is None else f"{tuple(weight.shape)}"
                raise CheckpointError(
                    f"the weights do not fit the model: {shard.key} is {found}, expected "
                    f"{tuple(shard.global_shape)}"
                )
            shard.data.copy_(weight[shard.global_slice()])
            taken.add(shard.key)
    left = sorted(set(whole) - taken)
    if left:
        raise CheckpointError(f"the weights do not fit the model: no place for {', '.join(left)}")


def _shards(model: Any) -> Iterator[ShardedTensor]:
    for entry in model.sharded_state_dict(metadata=dict(_LAYOUT_METADATA)).values():
        if isinstance(entry, ShardedTensorFactory):
            yield from entry.build()
        elif isinstance(entry, ShardedTensor):
            yield entry
