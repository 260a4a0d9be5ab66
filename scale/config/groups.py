"""Settings that come in groups: one folder of yaml, one dataclass, one section of the config.

A field without a default must be given by a yaml file or by the user. Dataclasses have slots, so
that a key which is no setting cannot be smuggled in, and are not frozen, because OmegaConf refuses
overrides of frozen ones.
"""

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
    ControlSplit,
    Device,
    GeneChoice,
    GeneFlavor,
    HeldoutControls,
    MatchBatch,
    Missing,
    Precision,
    Profile,
    ShortSets,
    SourceFormat,
    Unknown,
    WandbMode,
    Weighting,
)


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """What ``prepare`` reads."""

    format: SourceFormat = MISSING
    files: Any = field(default_factory=list)
    """A path or glob pattern, or a list of them; sorted by name."""
    metadata: str | None = None
    """Folder with the metadata tables of Tahoe-100M, for ``source=tahoe_parquet``."""
    num_cells: int = 25_000
    """Cells of the synthetic source, about."""

    def __post_init__(self) -> None:
        self.files = as_list("source.files", self.files)
        require_positive("source.num_cells", self.num_cells)


@dataclass(kw_only=True, slots=True)
class ColumnsConfig:
    """Columns of ``.obs`` in the source."""

    perturbation: str = MISSING
    """Column with the perturbation's label."""
    cell_type: str = MISSING
    """Column with the context: cell type or cell line."""
    batch: str | None = None
    """Column with the batch (plate, replicate, gem group), if any."""
    dose: str | None = None
    """Column with the dose, if it is not part of the label."""
    dose_unit: str | None = None
    """Unit of the dose column."""
    library: str | None = None
    """Column with a cell's total counts, for a matrix that was cut to some genes."""
    separator: str | None = None
    """Text between the names of a combination, as ``+`` in ``KLF1+CEBPE``; null = none."""


@dataclass(kw_only=True, slots=True)
class GenesConfig:
    """Which genes a store keeps."""

    choice: GeneChoice = GeneChoice.hvg
    num: int = 2000
    """Highly variable genes to keep; all if the source has no more."""
    file: str | None = None
    """Gene list, one symbol per line, for ``genes=list``."""
    max_missing: int = 0
    """Genes of the list that the source may lack; they are left out and named."""
    flavor: GeneFlavor = GeneFlavor.seurat
    """Rule by which genes count as highly variable."""
    split: str | None = None
    """TOML split: only its training conditions and their controls decide; null = all cells."""

    def __post_init__(self) -> None:
        require_positive("genes.num", self.num)
        require(self.max_missing >= 0, f"genes.max_missing ({self.max_missing}) is negative")
        if self.choice is GeneChoice.list:
            require(self.file is not None, "genes.choice is list: give genes.file")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which cells, and how they are put into sets."""

    store: str = MISSING
    """Directory of a store, or the address of a remote one (https://..., s3://...)."""
    split: str | None = None
    """What is held out: TOML file, or one that ships by name; null = all is training data."""
    unknown: Unknown = Unknown.error
    perturbation_features: str | None = None
    """File of vectors by perturbation (.npz); null = perturbations are learned by name alone."""
    heldout_controls: HeldoutControls = HeldoutControls.shared
    target_sum: float = 10_000.0
    """Counts per cell after normalisation."""
    value_scale: float = 1.0
    """log1p values are divided by this number."""
    weighting: Weighting = Weighting.cells
    control_fraction: float = 0.0
    """Share of sets whose target is control cells."""
    match_batch: MatchBatch = MatchBatch.prefer
    minimum_control_cells: int = 32
    """Cells below which the controls of all batches of the cell type are used."""
    short: ShortSets = ShortSets.mask
    reader_threads: int = 2
    prefetch_batches: int = 4
    """Micro-batches read ahead."""
    control_pool_bytes: int = 8 * 1024 * 1024 * 1024
    """Control cells up to this size are held in memory from the start, else read when drawn."""
    cache_dir: str | None = None
    """Folder for the shards of remote stores; null = scale/stores in the user's cache folder."""
    cache_bytes: int | None = None
    """Most bytes of cached shards; null = as much as the disk holds. Shards in use stay."""
    allow_plan_change: bool = False
    """Resume although a setting of the plan changed; starts at the next epoch boundary."""

    def __post_init__(self) -> None:
        require_positive("data.target_sum", self.target_sum)
        require_positive("data.value_scale", self.value_scale)
        require(
            0.0 <= self.control_fraction < 1.0,
            f"data.control_fraction ({self.control_fraction}) must be in [0, 1)",
        )
        require_positive("data.reader_threads", self.reader_threads)
        require_positive("data.prefetch_batches", self.prefetch_batches)
        require(
            self.control_pool_bytes >= 0,
            f"data.control_pool_bytes ({self.control_pool_bytes}) must not be negative",
        )
        if self.cache_bytes is not None:
            require_positive("data.cache_bytes", self.cache_bytes)
        require(
            self.minimum_control_cells >= 2,
            f"data.minimum_control_cells ({self.minimum_control_cells}) must be at least 2",
        )


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """How long, how much at once, and in which precision."""

    max_steps: int = MISSING
    """Optimizer steps."""
    sets_per_batch: int = MISSING
    """Sets per optimizer step, over all ranks."""
    sets_per_micro_batch: int | None = None
    """Sets per forward pass of a rank; null = all of its share."""
    precision: Precision = Precision.fp32
    device: Device = Device.auto
    seed: int = 0
    log_every_steps: int = 10
    max_hours: float | None = None
    """Stop with a checkpoint and status 75 after this wall time."""
    profile_steps: int = 0
    """Steps of which a trace is written, after the first ten of a start; 0 = none."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "sets_per_batch", "log_every_steps"):
            require_positive(f"trainer.{name}", getattr(self, name))
        require(
            self.profile_steps >= 0,
            f"trainer.profile_steps ({self.profile_steps}) must not be negative",
        )
        if self.sets_per_micro_batch is not None:
            require_positive("trainer.sets_per_micro_batch", self.sets_per_micro_batch)


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a cosine, and the moving average of weights."""

    lr: float | None = None
    """Peak learning rate; null = the model's, a third in finetune unless genes are replaced."""
    final_lr_fraction: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.01
    """On matrices only."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    clip_norm: float = 1.0
    """Global gradient norm."""
    ema_decay: float = 0.999
    """Of the moving average of weights that prediction uses."""

    def __post_init__(self) -> None:
        if self.lr is not None:
            require_positive("optimizer.lr", self.lr)
        require_fraction("optimizer.final_lr_fraction", self.final_lr_fraction)
        require_positive("optimizer.clip_norm", self.clip_norm)
        require_fraction("optimizer.ema_decay", self.ema_decay)
        require(len(self.betas) == 2, f"optimizer.betas ({self.betas}) must be two numbers")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the work; data parallel is what is left."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each set block; above 1, they share the cells of a set elsewhere."""
    pipeline_model_parallel_size: int = 1
    """Stages that the set blocks are split into; the encoder is on the first."""
    distributed_optimizer: bool = False
    """Spread optimizer state over data-parallel ranks."""
    recompute: bool = False
    """Compute activations of the set blocks twice to keep fewer of them."""
    timeout_seconds: float = 1800.0
    """Of collectives."""

    def __post_init__(self) -> None:
        require_positive("parallel.tensor_model_parallel_size", self.tensor_model_parallel_size)
        require_positive("parallel.pipeline_model_parallel_size", self.pipeline_model_parallel_size)
        require_positive("parallel.timeout_seconds", self.timeout_seconds)


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """When and on how much the held-out validation conditions are scored."""

    every_steps: int = 500
    max_sets_per_condition: int = 1

    def __post_init__(self) -> None:
        require_positive("validation.every_steps", self.every_steps)
        require_positive("validation.max_sets_per_condition", self.max_sets_per_condition)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_steps: int = 1000
    keep_last: int = 2
    resume: bool = True
    """Go on from the last checkpoint of a run of the same name and settings."""
    save_async: bool = False
    """Write beside the steps that follow, from a copy of the state in memory."""

    def __post_init__(self) -> None:
        require_positive("checkpoint.every_steps", self.every_steps)
        require_positive("checkpoint.keep_last", self.keep_last)


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """Where metrics go beside the console and metrics.jsonl."""

    wandb: WandbMode = WandbMode.none
    project: str = "scale"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class ProtocolConfig:
    """Rules of an evaluation."""

    profile: Profile = Profile.strict
    baselines: bool = True
    """Score the baselines beside the predictions; needs ``train``."""
    ceiling: bool = True
    """Score one half of the observed cells against the other."""
    num_splits: int = 3
    """Random halvings for the ceiling."""
    max_control_cells: int = 2000
    """Control cells per context used by the gene test and the distances."""
    min_cells: int = 30
    """Conditions with fewer observed cells are left out and listed.

    The mean of a few cells is noise. ``protocol=cell_eval`` and ``paper_pooled`` set 2.
    """
    min_significant: int = 10
    """Significant genes that a condition needs for the metrics of genes (``strict``)."""
    control_split: ControlSplit = ControlSplit.disjoint
    """``shared`` for predictions that do not say which controls they started from (``strict``)."""
    missing: Missing = Missing.error
    """What to do with conditions that a prediction does not have."""
    match_cells: bool = False
    """Draw as many cells of the larger side as the smaller one has.

    A prediction of more cells is then scored in two forms: the cells that were drawn, and the mean
    of all of them, which has less of the noise of a draw.
    """
    normalize: float | None = None
    """Both files hold counts: normalise them to this total and take log1p; null = they hold it."""
    cache: str | None = None
    """Folder where tests of the observed cells are kept for the next evaluation; null = none."""
    export_de: bool = False
    """Write the gene tests of the observed cells as cell-eval's tables."""

    def __post_init__(self) -> None:
        require_positive("protocol.num_splits", self.num_splits)
        require(
            self.min_significant >= 0,
            f"protocol.min_significant ({self.min_significant}) must not be negative",
        )
        if self.normalize is not None:
            require_positive("protocol.normalize", self.normalize)
        require(
            self.max_control_cells >= 10,
            f"protocol.max_control_cells ({self.max_control_cells}) must be at least 10",
        )
        require(self.min_cells >= 2, f"protocol.min_cells ({self.min_cells}) must be at least 2")
