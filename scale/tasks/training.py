"""What ``pretrain`` and ``finetune`` share: the run directory, ranks, resume, validation, export.

A run is identified by its directory: the same name with the same settings goes on where it stood,
with other settings it is an error.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale.config import (
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    from_yaml,
    to_yaml,
)
from scale.data.features import check_features, feature_rows, read_features
from scale.data.module import CellSetDataModule
from scale.data.split_file import find_split_file
from scale.model.model import ScaleModel
from scale.model.sizes import check_space, first_stage_layers
from scale.runtime import (
    EXIT_AGAIN,
    RunRecord,
    StopSignal,
    World,
    atomic_path,
    choose_device,
    keep_freed_memory,
    start_logging,
)
from scale.tasks.validation import Validation
from scale.train import parallel
from scale.train.accounting import Accounting, measure_ceiling
from scale.train.export import export_model, is_export, read_record
from scale.train.loop import Validate, train
from scale.train.manifest import MODEL, list_checkpoints, newest_checkpoint, read_manifest
from scale.train.parallel import (
    Layout,
    check_layout,
    idle_share,
    micro_batch_sets,
    on_first_rank,
)
from scale.train.record import ModelRecord, read_json
from scale.train.watchdog import naming_lost_ranks
from scale.types import CONTROL_COMPONENT, Vocabulary

logger = logging.getLogger(__name__)

Config = PretrainConfig | FinetuneConfig

_FREE = (
    *("trainer.max_steps", "trainer.max_hours", "trainer.log_every_steps"),
    *("trainer.sets_per_micro_batch", "trainer.device", "trainer.profile_steps"),
    *("data.store", "data.split", "data.perturbation_features"),
    *("data.reader_threads", "data.prefetch_batches"),
    *("data.allow_plan_change", "run_dir", "log.", "checkpoint.", "validation.", "parallel."),
)
"""Settings that may change when a run is resumed. Of a store, a split and features the content is
compared, not the path: the position in the data belongs to one plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A model before its first step, or around the weights of a checkpoint."""

    model: ScaleModel
    record: ModelRecord
    data: CellSetDataModule
    peak_lr: float


Prepare = Callable[[Any, Layout, "Resumed | None"], Prepared]
"""(settings, layout, checkpoint of this run or None) -> model and data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The checkpoint that a run goes on from, with what it says about the model."""

    checkpoint: Path
    record: ModelRecord
    vocabulary: Vocabulary


def run_training(task: str, config: Config, stop: StopSignal, prepare: Prepare) -> int:
    """Run or resume a training; return the exit status."""
    world, run_dir = World.from_env(), Path(config.run_dir)
    start_logging(run_dir / f"{task}.log", world)
    device = choose_device(config.trainer.device.value, world)
    keep_freed_memory()
    layout = parallel.start(config.parallel, world, seed=config.trainer.seed, device=device)
    try:
        with naming_lost_ranks(world.rank):
            checkpoint = on_first_rank(layout, lambda: _open_run(config, run_dir))
            if checkpoint is not None and _is_finished(checkpoint, config):
                on_first_rank(layout, lambda: _export(checkpoint, run_dir))
                logger.info(
                    "%s is finished (%d steps); a higher trainer.max_steps goes on",
                    run_dir,
                    config.trainer.max_steps,
                )
                return 0
            return _train(task, config, stop, prepare, layout, checkpoint)
    finally:
        parallel.stop()


def _train(
    task: str,
    config: Config,
    stop: StopSignal,
    prepare: Prepare,
    layout: Layout,
    checkpoint: Path | None,
) -> int:
    run_dir = Path(config.run_dir)
    resumed = None
    if checkpoint is not None:
        record, vocabulary = read_record(checkpoint)
        resumed = Resumed(checkpoint=checkpoint, record=record, vocabulary=vocabulary)
    prepared = prepare(config, layout, resumed)
    model, data = prepared.model, prepared.data
    accounting = _account(prepared, layout)
    run = RunRecord(
        run_dir,
        World(layout.rank, layout.world_size, 0),
        {
            "task": task,
            "layout": layout.record(),
            **accounting.record(),
            "device": str(layout.device),
            "seed": config.trainer.seed,
            "store_fingerprint": data.store.fingerprint,
            "split_sha256": data.train_plan.fields["split_sha256"],
            "resumed_from": None if checkpoint is None else checkpoint.name,
        },
    )
    try:
        for line in _describe(config, prepared, layout, accounting):
            logger.info("%s", line)
        result = train(
            config,
            model=model,
            record=prepared.record,
            vocabulary=data.vocabulary,
            data=data,
            layout=layout,
            accounting=accounting,
            peak_lr=prepared.peak_lr,
            resume_from=checkpoint,
            validate=_validation(config, prepared, layout),
            stop=stop,
            settings=_flat(config),
        )
    except BaseException as error:
        run.close(f"{type(error).__name__}: {error}")
        raise
    finally:
        data.close()
    if result.is_finished:
        on_first_rank(layout, lambda: _export(result.checkpoint, run_dir))
    run.close(result.reason, step=result.step)
    logger.info("%s after step %d; %s", result.reason, result.step, result.checkpoint)
    return 0 if result.is_finished else EXIT_AGAIN


# --- the run directory --------------------------------------------------------------------------


def _open_run(config: Config, run_dir: Path) -> Path | None:
    """Compare the settings with those of the run, keep them; return its newest whole checkpoint."""
    written = run_dir / "config.yaml"
    checkpoint = newest_checkpoint(run_dir)
    if written.exists() and list_checkpoints(run_dir):
        _compare(config, from_yaml(written, type(config)), run_dir)
    if checkpoint is not None and not config.checkpoint.resume:
        raise ValueError(
            f"{run_dir} has checkpoints ({checkpoint.name}) and checkpoint.resume is false; give "
            "another name=, or set checkpoint.resume=true"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(written) as temporary:
        temporary.write_text(to_yaml(config))
    if config.data.split is not None:
        with atomic_path(run_dir / "split.toml") as temporary:
            shutil.copyfile(find_split_file(config.data.split), temporary)
    return checkpoint


def _compare(config: Config, before: Config, run_dir: Path) -> None:
    ours, theirs = _flat(config), _flat(before)
    free = (*_FREE, "data.") if config.data.allow_plan_change else _FREE
    differing = [
        f"{key} {theirs.get(key)} -> {ours.get(key)}"
        for key in ours
        if ours[key] != theirs.get(key) and not key.startswith(free)
    ]
    if differing:
        raise ValueError(
            f"{run_dir} was made with other settings: {', '.join(differing)}; give another name="
        )


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return settings by full key."""
    flat: dict[str, Any] = {}
    values: Mapping[str, Any] = settings if isinstance(settings, dict) else asdict(settings)
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value.value if isinstance(value, Enum) else value
    return flat


def _is_finished(checkpoint: Path, config: Config) -> bool:
    return bool(read_manifest(checkpoint, verify=False)["step"] >= config.trainer.max_steps)


def _export(checkpoint: Path, run_dir: Path) -> None:
    """Write ``export/`` from the last checkpoint, unless it is there."""
    export = run_dir / "export"
    step = read_manifest(checkpoint, verify=False)["step"]
    if not is_export(export) or read_json(export / MODEL)["step"] != step:
        export_model(checkpoint, export)


# --- model and data -----------------------------------------------------------------------------


def open_data(
    config: DataConfig,
    model: ModelConfig,
    layout: Layout,
    *,
    seed: int,
    vocabulary: Vocabulary | None,
) -> CellSetDataModule:
    """Return the data module with this rank's share of the sets."""
    if vocabulary is not None:
        check_features(config.perturbation_features, vocabulary)
    return CellSetDataModule(
        config,
        set_size=model.set_size,
        num_summary_cells=model.num_summary_cells,
        seed=seed,
        vocabulary=vocabulary,
        data_parallel_rank=layout.data_parallel_rank,
        data_parallel_size=layout.data_parallel_size,
        device=layout.device,
    )


def build_model(
    record: ModelRecord,
    vocabulary: Vocabulary,
    layout: Layout,
    *,
    seed: int,
    recompute: bool = False,
) -> ScaleModel:
    """Return this rank's part of a model with initial weights, on the device."""
    model = ScaleModel(
        record.model,
        record.objective,
        vocabulary,
        seed=seed,
        precision=record.precision,
        recompute=recompute,
    )
    model.to(layout.device)
    return model


def set_statistics(model: ScaleModel, data: CellSetDataModule) -> None:
    """Give the model what it needs to know of the training cells, the same on all ranks."""
    statistics = data.statistics()
    model.set_statistics(statistics.mean_G, statistics.basis_GP, statistics.cells_KG)
    buffers = [model.mean_G, model.basis_GP]
    if model.latent is not None:
        buffers += model.latent.buffers(recurse=False)
    for buffer in buffers:
        dist.broadcast(buffer, src=0)


def set_features(model: ScaleModel, config: DataConfig) -> None:
    """Give the model the features of the perturbations it knows, where the run has a file."""
    table = read_features(config.perturbation_features)
    if table is None or not model.pre_process:
        return
    feature_CV = feature_rows(table, model.vocabulary)
    model.condition.set_features(torch.from_numpy(feature_CV))
    num_trained = len(model.vocabulary.components)
    logger.info(
        "features: %s; %d of the %d perturbations have them, %d more are known by them alone",
        table.describe(),
        int(feature_CV[:num_trained].any(1).sum()),
        num_trained - CONTROL_COMPONENT - 1,
        len(model.vocabulary.described),
    )


def check_sizes(config: Config, model: ModelConfig, layout: Layout) -> None:
    """Refuse sizes that the ranks cannot share, before anything is read."""
    check_layout(model, config.trainer, layout)
    check_space(config.objective, num_stages=layout.pipeline_model_parallel_size)


def _validation(config: Config, prepared: Prepared, layout: Layout) -> Validate | None:
    if not prepared.data.has_part("val"):
        logger.info(
            "split has no validation conditions: training runs without validation (the test split "
            "is never used for it)"
        )
        return None
    return Validation(
        prepared.data,
        config.validation,
        prepared.record.objective,
        sets_per_batch=micro_batch_sets(config.trainer, layout),
    )


def _stages(config: Config, prepared: Prepared, layout: Layout) -> list[str]:
    """Return how the set blocks are split and what the split costs, if there are stages."""
    num_stages = layout.pipeline_model_parallel_size
    if num_stages == 1:
        return []
    sizes, genes = prepared.record.model, len(prepared.data.vocabulary.genes)
    first = first_stage_layers(sizes, genes, num_stages)
    each = (sizes.num_layers - first) // (num_stages - 1)
    return [
        f"stages: the encoder and {first} set blocks, then {each} on each of the other "
        f"{num_stages - 1}; a stage waits {idle_share(config.trainer, layout):.0%} of a step "
        "(fewer sets per micro-batch: trainer.sets_per_micro_batch)"
    ]


def _account(prepared: Prepared, layout: Layout) -> Accounting:
    """Return what a cell costs, and on a GPU what the device can do."""
    is_cuda = layout.device.type == "cuda"
    return Accounting(
        num_parameters=prepared.model.num_parameters(),
        flops_per_cell=prepared.model.flops_per_cell(),
        world_size=layout.world_size,
        ceiling_tflops_per_second=(
            measure_ceiling(layout.device, prepared.record.precision) if is_cuda else None
        ),
    )


def _describe(
    config: Config, prepared: Prepared, layout: Layout, accounting: Accounting
) -> list[str]:
    sizes, sets = prepared.record.model, config.trainer.sets_per_batch
    return [
        f"model {accounting.describe()}",
        f"layout: {layout.describe()}",
        *_stages(config, prepared, layout),
        f"{sets * sizes.set_size:,} cells per step: {sets} sets of {sizes.set_size} treated cells, "
        f"{micro_batch_sets(config.trainer, layout)} sets per forward pass of a rank; each cell "
        "comes with a control cell",
        f"dtype {config.trainer.precision.value} (trainer.precision); losses and averages fp32",
        *prepared.data.describe(),
    ]
