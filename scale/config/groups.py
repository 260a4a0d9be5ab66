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
    Backend,
    ControlSplit,
    Decoder,
    Device,
    Fusion,
    GeneChoice,
    GeneFlavor,
    Head,
    HeldoutControls,
    MatchBatch,
    Missing,
    Pairing,
    Precision,
    Prediction,
    Prior,
    Profile,
    ShortSets,
    SourceFormat,
    Space,
    TimeLaw,
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
class ModelConfig:
    """Sizes of the model (the yaml of a preset gives them all)."""

    hidden_size: int = MISSING
    """Width of the set blocks, D."""
    num_layers: int = MISSING
    """Set blocks, L."""
    num_heads: int = MISSING
    """Attention heads of a set block."""
    ffn_hidden_size: int = MISSING
    """Width of the SwiGLU in a set block, F."""
    set_size: int = MISSING
    """Cells per set, S."""
    num_summary_cells: int = MISSING
    """Cells of the summary draw, U."""
    lr: float = MISSING
    """Peak learning rate for this size."""
    gene_layers: int = 0
    """LLaMA layers inside a cell; 0 = one linear map."""
    gene_hidden_size: int = 0
    """Width of a gene-patch token, D_g."""
    gene_num_heads: int = 0
    """Attention heads of a gene block."""
    gene_patch_size: int = 50
    """Genes per patch token."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    condition_dropout: float = 0.1
    """Probability of hiding the whole perturbation of a set."""
    cell_type_dropout: float = 0.15
    """Probability of hiding the cell type of a set."""
    batch_dropout: float = 0.5
    """Probability of hiding the batch of a set."""
    identity_dropout: float = 0.15
    """Probability of hiding the name of a perturbation that has features."""
    fusion: Fusion = Fusion.seed_attention
    cell_attention: bool = True
    """Let the cells of a set see each other; without, each is transported by itself."""
    backend: Backend = Backend.auto

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "ffn_hidden_size", "set_size"):
            require_positive(f"model.{name}", getattr(self, name))
        require(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_heads "
            f"({self.num_heads})",
        )
        require(self.set_size >= 2, f"model.set_size ({self.set_size}) must be at least 2")
        require(
            self.num_summary_cells >= 1,
            f"model.num_summary_cells ({self.num_summary_cells}) must be at least 1",
        )
        if self.gene_layers:
            for name in ("gene_hidden_size", "gene_num_heads", "gene_patch_size"):
                require_positive(f"model.{name}", getattr(self, name))
            require(
                self.gene_hidden_size % self.gene_num_heads == 0,
                f"model.gene_hidden_size ({self.gene_hidden_size}) must be a multiple of "
                f"model.gene_num_heads ({self.gene_num_heads})",
            )
            require(
                self.hidden_size % self.gene_hidden_size == 0,
                f"model.hidden_size ({self.hidden_size}) must be a multiple of "
                f"model.gene_hidden_size ({self.gene_hidden_size})",
            )
        for name in (
            "condition_dropout",
            "cell_type_dropout",
            "batch_dropout",
            "identity_dropout",
        ):
            require_fraction(f"model.{name}", getattr(self, name))


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
class ObjectiveConfig:
    """What the model is trained to do."""

    space: Space = Space.gene
    prior: Prior = Prior.control
    prediction: Prediction = Prediction.endpoint
    head: Head = Head.residual
    pairing: Pairing = Pairing.ot
    time: TimeLaw = TimeLaw.mix
    zero_time_fraction: float = 0.5
    """Share of sets at path time 0 under ``mix``."""
    energy_weight: float = 1.0
    mean_weight: float = 1.0
    point_weight: float = 0.3
    mmd_weight: float = 0.0
    masked_gene_fraction: float = 0.0
    """Share of the input genes that are hidden from the network in training."""
    latent_size: int | None = None
    """Width of a cell in latent space."""
    decoder: Decoder | None = None
    """Latent endpoint -> cell."""
    reconstruction_weight: float = 0.0
    """Of the autoencoder's reconstruction (latent space)."""
    alignment_weight: float = 0.0
    """Of the kernel distance between latent cells and a normal law (latent space)."""
    num_steps: int = 1
    """Sampler steps at prediction."""

    def __post_init__(self) -> None:
        require_fraction("objective.zero_time_fraction", self.zero_time_fraction)
        weights = {
            f"objective.{name}": getattr(self, name)
            for name in ("energy_weight", "mean_weight", "point_weight", "mmd_weight")
        }
        for name, weight in weights.items():
            require(weight >= 0, f"{name} ({weight}) must not be negative")
        require(any(weights.values()), f"one of {', '.join(weights)} must be above 0")
        require_positive("objective.num_steps", self.num_steps)
        if self.time is TimeLaw.zero:
            require(self.num_steps == 1, "objective.time=zero allows objective.num_steps=1 only")


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
    """Peak learning rate; null = the model's, a third of it in finetune."""
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
    """Draw as many cells of the larger side as the smaller one has."""
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
