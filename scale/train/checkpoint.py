"""What a checkpoint holds; save, load into the same or another layout, export for prediction.

``weights/`` holds Megatron's ``torch_dist`` shards: the model, its moving average and the
optimizer. They load into any number of ranks. Their ``.metadata`` is a pickle, so a sharded
checkpoint is trusted like code; what is passed on to others is ``export/``: the moving average as
safetensors, with json beside it.

No random state is kept: every draw of data and model is a function of the seed and counters.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.storage import WriteResult

from scale.config import ParallelConfig, Precision
from scale.runtime import World, versions, write_json
from scale.train import manifest as files
from scale.train import parallel
from scale.train.export import find_weights, is_export, read_average, read_record
from scale.train.manifest import read_manifest
from scale.train.record import ModelRecord, TrainingState, read_json
from scale.train.sharded import load_state, sharded_state, shards_of
from scale.train.shards import ShardWriter
from scale.types import CheckpointError, Vocabulary

if TYPE_CHECKING:
    from scale.model.model import ScaleModel
    from scale.train.engine import Engine

# --- training -----------------------------------------------------------------------------------


class CheckpointWrite:
    """A checkpoint from its first file to its name; making it is a collective of all ranks.

    ``write`` exchanges no messages and may run in a thread beside further steps; the other methods
    are collectives of all ranks, in the thread that trains.

    Parameters
    ----------
    run_dir
        Directory of the run, which every rank sees.
    engine
        Its weights, moving average and optimizer.
    state
        Where the run stands.
    record, vocabulary
        What the checkpoint says about the model.
    in_memory
        Copy the tensors to host memory now; without it they must not change before ``write`` ends.

    Raises
    ------
    CheckpointError
        On every rank, if its directory cannot be made.
    """

    def __init__(
        self,
        run_dir: Path,
        engine: Engine,
        state: TrainingState,
        *,
        record: ModelRecord,
        vocabulary: Vocabulary,
        in_memory: bool = False,
    ) -> None:
        self.name = files.checkpoint_name(state.step)
        self._layout = engine.layout
        self._vocabulary = vocabulary
        self._json = {files.MODEL: record.to_json(), files.STATE: asdict(state)}
        self._manifest = {
            "format_version": files.FORMAT_VERSION,
            "step": state.step,
            "consumed_sets": state.consumed_sets,
            "layout": engine.layout.record(),
            "optimizer": engine.optimizer_kind,
            "precision": engine.precision.value,
            "versions": versions(),
        }
        try:
            self._partial = parallel.on_first_rank(
                self._layout, lambda: files.start_partial(run_dir, state.step)
            )
        except OSError as error:
            raise CheckpointError(f"{self.name} could not be written: {error}") from error
        self._shards = ShardWriter(
            sharded_state(engine, is_loading=False),
            self._partial / files.WEIGHTS,
            in_memory=in_memory,
        )
        self._own = _Written()

    def write(self) -> None:
        """Write this rank's files, and take their hashes; a failure is told by :meth:`finish`."""
        try:
            self._own.results = self._shards.write()
            own = self._shards.own_files()
            if self._layout.is_writer:
                self._vocabulary.save(self._partial / files.VOCABULARY)
                for name, content in self._json.items():
                    write_json(self._partial / name, content)
                own += [self._partial / name for name in (files.VOCABULARY, *self._json)]
            self._own.entries = self._described(own)
        except (OSError, RuntimeError) as error:  # torch's writer of archives raises the latter
            self._own.failure = f"rank {self._layout.rank}: {error}"

    def finish(self, *, keep_last: int) -> Path:
        """Wait for all ranks, give the checkpoint its name and drop the oldest; return its path.

        Raises
        ------
        CheckpointError
            On every rank, if any could not write; what was there before is untouched.
        """
        every = parallel.gather_over_ranks(self._own)
        try:
            return parallel.on_first_rank(
                self._layout, lambda: self._complete(every, keep_last=keep_last)
            )
        except OSError as error:
            raise CheckpointError(f"{self.name} could not be written: {error}") from error

    def _complete(self, every: list[_Written], *, keep_last: int) -> Path:
        try:
            failures = [written.failure for written in every if written.failure]
            if failures:
                raise OSError("; ".join(failures))
            entries = {name: entry for written in every for name, entry in written.entries.items()}
            entries |= self._described(self._shards.complete([w.results for w in every]))
            manifest = {**self._manifest, "files": dict(sorted(entries.items()))}
            write_json(self._partial / files.MANIFEST, manifest)
            return files.finish_partial(self._partial, keep_last=keep_last)
        except OSError:
            # A full disk needs the room, and nothing of it can be used.
            shutil.rmtree(self._partial, ignore_errors=True)
            raise

    def _described(self, paths: list[Path]) -> dict[str, dict[str, Any]]:
        return {str(p.relative_to(self._partial)): files.describe_file(p) for p in paths}


@dataclass
class _Written:
    """What one rank tells the others of its files."""

    failure: str = ""
    results: list[WriteResult] = field(default_factory=list)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_checkpoint(checkpoint: Path, engine: Engine) -> TrainingState:
    """Load weights, average and optimizer into an engine of any layout; return where the run stood.

    Raises
    ------
    CheckpointError
        If the blocks had another precision: optimizer state would have no place, or be missing.
    """
    precision = read_manifest(checkpoint, verify=False)["precision"]
    if precision != engine.precision.value:
        raise CheckpointError(
            f"{checkpoint} has the optimizer state of {precision} blocks, this run has "
            f"{engine.precision.value}; keep trainer.precision={precision}, or use scale finetune, "
            "which loads weights only"
        )
    load_state(checkpoint / files.WEIGHTS, engine)
    return TrainingState(**read_json(checkpoint / files.STATE))


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
    """Copy whole weights into a model of any layout, of which each rank takes its share.

    A collective of all ranks.

    Raises
    ------
    CheckpointError
        If a weight is missing, left over, or has another shape.
    """
    taken = set()
    with torch.no_grad():
        for shard in shards_of(model):
            weight = whole.get(shard.key)
            if weight is None or tuple(weight.shape) != tuple(shard.global_shape):
                found = "missing" if weight is None else f"{tuple(weight.shape)}"
                raise CheckpointError(
                    f"the weights do not fit the model: {shard.key} is {found}, expected "
                    f"{tuple(shard.global_shape)}"
                )
            shard.data.copy_(weight[shard.global_slice()])
            taken.add(shard.key)
    every = parallel.gather_over_ranks(taken)  # a pipeline stage has some of the weights
    left = sorted(set(whole).difference(*every))
    if left:
        raise CheckpointError(f"the weights do not fit the model: no place for {', '.join(left)}")
