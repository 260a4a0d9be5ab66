"""All settings of each task: one root dataclass per task, built from the groups."""

# No `from __future__ import annotations`: OmegaConf reads the annotations at run time.

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from scale.config.checks import (
    as_list,
    require,
    require_fraction,
    require_positive,
)
from scale.config.choices import (
    Codec,
    ConditionBy,
    CountsPolicy,
    Device,
    KeepCells,
    Restart,
)
from scale.config.groups import (
    CheckpointConfig,
    ColumnsConfig,
    DataConfig,
    GenesConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    ProtocolConfig,
    SourceConfig,
    TrainerConfig,
    ValidationConfig,
)
from scale.config.model import ModelConfig, ObjectiveConfig


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Settings of ``scale prepare``."""

    name: str = MISSING
    run_dir: str = MISSING
    store: str = MISSING
    """Directory to write."""
    source: SourceConfig = MISSING
    columns: ColumnsConfig = MISSING
    control: str = MISSING
    """Label of the control in the perturbation column, exact after stripping."""
    where: dict[str, list[str]] = field(default_factory=dict)
    """Column -> allowed values; other cells are left out and counted."""
    counts: str = "auto"
    """Where the counts are: auto, X, layers/NAME or raw/X."""
    counts_policy: CountsPolicy = CountsPolicy.recover
    genes: GenesConfig = MISSING
    condition_by: ConditionBy = ConditionBy.auto
    minimum_cells: int = 16
    """Treated conditions with fewer cells are dropped and listed."""
    codec: Codec = Codec.zstd
    shard_bytes: int = 512 * 1024 * 1024
    """A shard is ended before it would hold more than this, counted before compression."""
    memory_bytes: int = 4 * 1024 * 1024 * 1024
    """Memory of all workers together, less what Python and libraries take."""
    num_workers: int | None = None
    """Processes; null = one per core, and one for small inputs. No store depends on it."""
    keep_cells: KeepCells = KeepCells.barcode
    restart: Restart = Restart.resume
    overwrite: bool = False
    verify: str | None = None
    """A store to check byte by byte, and stop."""
    export: str | None = None
    """Write ``store`` as NAME.h5ad or as a BioNeMo archive NAME.scdl, and stop."""
    merge: list[str] = field(default_factory=list)
    """Stores to join into ``store`` without reading their cells, and stop."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("minimum_cells", self.minimum_cells)
        require_positive("shard_bytes", self.shard_bytes)
        require_positive("memory_bytes", self.memory_bytes)
        if self.num_workers is not None:
            require_positive("num_workers", self.num_workers)


@dataclass(kw_only=True, slots=True)
class FeaturesConfig:
    """Settings of ``scale features``."""

    name: str = MISSING
    run_dir: str = MISSING
    input: str = MISSING
    """Table of perturbations (.csv, .tsv), or .npz with arrays names and vectors."""
    output: str | None = None
    """File to write; null = features.npz in the run directory."""
    name_column: str = "name"
    """Column with the name of a drug or gene, as the perturbations of the store have it."""
    smiles_column: str | None = None
    """Column with the structure, for a Morgan fingerprint."""
    label_columns: list[str] = field(default_factory=list)
    """Columns with labels (mechanism, target); with neither, all columns are numbers."""
    label_separator: str | None = None
    """Text between several labels of a perturbation, as a comma; null = one label each."""
    fingerprint_radius: int = 2
    """Bonds around an atom."""
    fingerprint_bits: int = 1024
    like: str | None = None
    """A file made before, whose labels and sizes the new one is to have."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(
            self.fingerprint_radius >= 0,
            f"fingerprint_radius ({self.fingerprint_radius}) must not be negative",
        )
        require_positive("fingerprint_bits", self.fingerprint_bits)


@dataclass(kw_only=True, slots=True)
class PretrainConfig:
    """Settings of ``scale pretrain``."""

    name: str = MISSING
    run_dir: str = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    objective: ObjectiveConfig = MISSING
    trainer: TrainerConfig = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = MISSING
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = MISSING


@dataclass(kw_only=True, slots=True)
class FinetuneConfig:
    """Settings of ``scale finetune``; the model is the checkpoint's."""

    name: str = MISSING
    run_dir: str = MISSING
    start_from: str = MISSING
    """Run directory or checkpoint to start from."""
    freeze_encoder: bool = False
    replace_genes: bool = False
    """Use the store's gene list; layers that touch genes start anew where a gene is new."""
    data: DataConfig = MISSING
    objective: ObjectiveConfig = MISSING
    trainer: TrainerConfig = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = MISSING
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = MISSING


@dataclass(kw_only=True, slots=True)
class PredictConfig:
    """Settings of ``scale predict``."""

    name: str = MISSING
    run_dir: str = MISSING
    checkpoint: str = MISSING
    """Run directory or checkpoint."""
    input: str | None = None
    """h5ad with control cells (counts, or log1p values on the model's scale)."""
    store: str | None = None
    """Store to predict the held-out conditions of, in place of ``input``; may be remote."""
    split: str | None = None
    """TOML file; with ``store``, null = the run's own."""
    part: str = "test"
    """Part of the split to predict: val or test."""
    output: str | None = None
    """h5ad to write; null = predicted.h5ad in the run directory."""
    conditions: str | None = None
    """TSV with columns cell_type, perturbation, and optionally dose, num_cells."""
    perturbations: list[str] = field(default_factory=list)
    """Labels to simulate; empty = all that the model knows."""
    perturbation_features: str | None = None
    """File of vectors (.npz) for perturbations that the model was not trained on."""
    perturbation_key: str | None = None
    """Columns of the input; null = as in training."""
    cell_type_key: str | None = None
    batch_key: str | None = None
    library_key: str | None = None
    """Column with total counts, for a matrix that was cut to some genes."""
    control: str | None = None
    cells_per_condition: int | None = None
    """null = as many as observed in the input, else as its controls."""
    include_control: bool = True
    max_missing_genes: float = 0.1
    """Fraction of the model's genes that the input may lack."""
    num_steps: int | None = None
    guidance: float = 1.0
    sets_per_batch: int = 8
    overwrite: bool = False
    device: Device = Device.auto
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            (self.input is None) != (self.store is None),
            "give either input (an h5ad) or store (a store, for the held-out part of a split)",
        )
        require(self.part in ("val", "test"), f"part ({self.part!r}) must be val or test")
        require_fraction("max_missing_genes", self.max_missing_genes)
        require_positive("sets_per_batch", self.sets_per_batch)
        if self.cells_per_condition is not None:
            require_positive("cells_per_condition", self.cells_per_condition)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Settings of ``scale evaluate``."""

    name: str = MISSING
    run_dir: str = MISSING
    predicted: Any = MISSING
    """h5ad with predictions as PATH or METHOD=PATH, or a list of them."""
    observed: str = MISSING
    """h5ad with the observed cells and their controls, or a store (which may be remote)."""
    train: str | None = None
    """h5ad with training cells, or a store, for the baselines; null = ``observed`` if a store."""
    split: str | None = None
    """TOML file; needed with a store, says which of its conditions are scored."""
    part: str = "test"
    """Part of the split to score: val or test."""
    training_run: str | None = None
    """Run directory whose loss curves the report shows."""
    perturbation_key: str | None = None
    """Columns of ``.obs``; null = as the store has them."""
    cell_type_key: str | None = None
    control: str | None = None
    """Label of the control; null = as the store has it."""
    unit_key: str | None = None
    """Column of the independent unit (cell line, donor); null = the cell type."""
    batch_key: str | None = None
    """Column of the batch (plate): conditions are compared with control cells of their own batch.

    A context is then a cell type in a batch. null = with those of all batches, so that the effect
    of a batch on its cells counts as one of the perturbation.
    """
    protocol: ProtocolConfig = MISSING
    overwrite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.predicted = as_list("predicted", self.predicted)
        require(bool(self.predicted), "predicted is empty; give at least one h5ad")
        require(self.part in ("val", "test"), f"part ({self.part!r}) must be val or test")


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    """Settings of ``scale demo``."""

    name: str = MISSING
    run_dir: str = MISSING
    steps: int = 500
    """Optimizer steps of the pretraining."""
    finetune_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive("steps", self.steps)
        require_positive("finetune_steps", self.finetune_steps)


@dataclass(kw_only=True, slots=True)
class InfoConfig:
    """Settings of ``scale info``."""

    name: str = MISSING
    run_dir: str = MISSING
    model: ModelConfig | None = None
    """A preset to count; null = none."""
    num_genes: int = 2000
    """Genes that the preset is counted with."""
    store: str | None = None
    """Directory or address of a store to describe."""
    split: str | None = None
    """Split to describe, and with ``store`` to compare with it: TOML file, or one that ships."""
    run: str | None = None
    """Run directory to describe."""

    def __post_init__(self) -> None:
        require_positive("num_genes", self.num_genes)


SCHEMAS: dict[str, type] = {
    "prepare": PrepareConfig,
    "features": FeaturesConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "demo": DemoConfig,
    "info": InfoConfig,
}
