"""Every setting: its name, type, default, unit and check. The one door to Hydra and OmegaConf.

One root dataclass per task (``SCHEMAS``), built from group dataclasses. A group is one folder of
yaml, one dataclass and one section of the composed config. A field without a default must be given
by a yaml file or by the user. Dataclasses have slots, so that a key which is no setting cannot be
smuggled in, and are not frozen, because OmegaConf refuses overrides of frozen ones.
"""

# No `from __future__ import annotations`: OmegaConf reads the annotations at run time.

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scale.overrides import check_keys, explain


def _check(condition: bool, message: str) -> None:  # noqa: FBT001
    if not condition:
        raise ValueError(message)


def _as_list(name: str, value: Any) -> list[str]:
    """Accept one text where a list of texts is expected."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{name} ({value!r}) must be a text or a list of texts")
    return items


def _check_fraction(name: str, value: float) -> None:
    _check(0.0 <= value <= 1.0, f"{name} ({value}) must be between 0 and 1")


def _check_positive(name: str, value: float) -> None:
    _check(value > 0, f"{name} ({value}) must be above 0")


# --- choices ------------------------------------------------------------------------------------


class SourceFormat(Enum):
    """What ``prepare`` reads."""

    synthetic = "synthetic"
    h5ad = "h5ad"


class GeneChoice(Enum):
    """Which genes a store keeps."""

    hvg = "hvg"
    all = "all"
    list = "list"


class CountsPolicy(Enum):
    """What to do where a matrix holds no counts."""

    require = "require"
    recover = "recover"


class ConditionBy(Enum):
    """Whether the batch is part of the key of a treated condition."""

    auto = "auto"
    batch = "batch"
    perturbation = "perturbation"


class Codec(Enum):
    """Compression of treated chunks."""

    zstd = "zstd"
    none = "none"


class Backend(Enum):
    """Who provides the layers."""

    auto = "auto"
    local = "local"
    te = "te"


class Unknown(Enum):
    """What to do with names in a split that are not in the data."""

    error = "error"
    warn = "warn"


class HeldoutControls(Enum):
    """Whether controls of held-out contexts are seen in training."""

    shared = "shared"
    excluded = "excluded"


class Weighting(Enum):
    """How often a condition is drawn: by its cells, their square root, or equally."""

    cells = "cells"
    sqrt = "sqrt"
    conditions = "conditions"


class MatchBatch(Enum):
    """Whether controls come from the batch of the treated cells."""

    prefer = "prefer"
    require = "require"
    ignore = "ignore"


class ShortSets(Enum):
    """How a condition with fewer cells than a set is served."""

    mask = "mask"
    repeat = "repeat"


class Head(Enum):
    """What the endpoint is added to."""

    residual = "residual"
    direct = "direct"


class Pairing(Enum):
    """How control and treated cells of a set are paired."""

    ot = "ot"
    random = "random"


class TimeLaw(Enum):
    """Distribution of the path time of a set."""

    mix = "mix"
    uniform = "uniform"
    zero = "zero"


class Precision(Enum):
    """Number format of the blocks; losses and master weights are fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Device(Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class WandbMode(Enum):
    """Whether metrics also go to Weights & Biases."""

    none = "none"
    offline = "offline"
    online = "online"


class Profile(Enum):
    """Rules of the evaluation."""

    strict = "strict"
    cell_eval = "cell_eval"


# --- groups -------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """What ``prepare`` reads."""

    format: SourceFormat = MISSING
    files: Any = field(default_factory=list)
    """A path or glob pattern, or a list of them; sorted by name."""
    num_cells: int = 25_000
    """Cells of the synthetic source, about."""

    def __post_init__(self) -> None:
        self.files = _as_list("source.files", self.files)
        _check_positive("source.num_cells", self.num_cells)


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

    def __post_init__(self) -> None:
        _check_positive("genes.num", self.num)
        if self.choice is GeneChoice.list:
            _check(self.file is not None, "genes.choice is list: give genes.file")


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
    backend: Backend = Backend.auto

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "ffn_hidden_size", "set_size"):
            _check_positive(f"model.{name}", getattr(self, name))
        _check(
            self.hidden_size % self.num_heads == 0,
            f"model.hidden_size ({self.hidden_size}) must be a multiple of model.num_heads "
            f"({self.num_heads})",
        )
        _check(self.set_size >= 2, f"model.set_size ({self.set_size}) must be at least 2")
        _check(
            self.num_summary_cells >= 1,
            f"model.num_summary_cells ({self.num_summary_cells}) must be at least 1",
        )
        if self.gene_layers:
            for name in ("gene_hidden_size", "gene_num_heads", "gene_patch_size"):
                _check_positive(f"model.{name}", getattr(self, name))
            _check(
                self.gene_hidden_size % self.gene_num_heads == 0,
                f"model.gene_hidden_size ({self.gene_hidden_size}) must be a multiple of "
                f"model.gene_num_heads ({self.gene_num_heads})",
            )
            _check(
                self.hidden_size % self.gene_hidden_size == 0,
                f"model.hidden_size ({self.hidden_size}) must be a multiple of "
                f"model.gene_hidden_size ({self.gene_hidden_size})",
            )
        for name in ("condition_dropout", "cell_type_dropout", "batch_dropout"):
            _check_fraction(f"model.{name}", getattr(self, name))


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Which cells, and how they are put into sets."""

    store: str = MISSING
    """Directory of a store."""
    split: str | None = None
    """TOML file that says what is held out; null = everything is training data."""
    unknown: Unknown = Unknown.error
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
    allow_plan_change: bool = False
    """Resume although a setting of the plan changed; starts at the next epoch boundary."""

    def __post_init__(self) -> None:
        _check_positive("data.target_sum", self.target_sum)
        _check_positive("data.value_scale", self.value_scale)
        _check(
            0.0 <= self.control_fraction < 1.0,
            f"data.control_fraction ({self.control_fraction}) must be in [0, 1)",
        )
        _check_positive("data.reader_threads", self.reader_threads)
        _check_positive("data.prefetch_batches", self.prefetch_batches)
        _check(
            self.minimum_control_cells >= 2,
            f"data.minimum_control_cells ({self.minimum_control_cells}) must be at least 2",
        )


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """What the model is trained to do."""

    head: Head = Head.residual
    pairing: Pairing = Pairing.ot
    time: TimeLaw = TimeLaw.mix
    zero_time_fraction: float = 0.5
    """Share of sets at path time 0 under ``mix``."""
    energy_weight: float = 1.0
    mean_weight: float = 1.0
    point_weight: float = 0.3
    mmd_weight: float = 0.0
    num_steps: int = 1
    """Sampler steps at prediction."""

    def __post_init__(self) -> None:
        _check_fraction("objective.zero_time_fraction", self.zero_time_fraction)
        weights = {
            f"objective.{name}": getattr(self, name)
            for name in ("energy_weight", "mean_weight", "point_weight", "mmd_weight")
        }
        for name, weight in weights.items():
            _check(weight >= 0, f"{name} ({weight}) must not be negative")
        _check(any(weights.values()), f"one of {', '.join(weights)} must be above 0")
        _check_positive("objective.num_steps", self.num_steps)
        if self.time is TimeLaw.zero:
            _check(self.num_steps == 1, "objective.time=zero allows objective.num_steps=1 only")


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

    def __post_init__(self) -> None:
        for name in ("max_steps", "sets_per_batch", "log_every_steps"):
            _check_positive(f"trainer.{name}", getattr(self, name))
        if self.sets_per_micro_batch is not None:
            _check_positive("trainer.sets_per_micro_batch", self.sets_per_micro_batch)


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
            _check_positive("optimizer.lr", self.lr)
        _check_fraction("optimizer.final_lr_fraction", self.final_lr_fraction)
        _check_positive("optimizer.clip_norm", self.clip_norm)
        _check_fraction("optimizer.ema_decay", self.ema_decay)
        _check(len(self.betas) == 2, f"optimizer.betas ({self.betas}) must be two numbers")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the work; data parallel is what is left."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each set block; above 1, they share the cells of a set elsewhere."""
    distributed_optimizer: bool = False
    """Spread optimizer state over data-parallel ranks."""
    timeout_seconds: float = 1800.0
    """Of collectives."""

    def __post_init__(self) -> None:
        _check_positive("parallel.tensor_model_parallel_size", self.tensor_model_parallel_size)
        _check_positive("parallel.timeout_seconds", self.timeout_seconds)


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """When and on how much the held-out validation conditions are scored."""

    every_steps: int = 500
    max_sets_per_condition: int = 1

    def __post_init__(self) -> None:
        _check_positive("validation.every_steps", self.every_steps)
        _check_positive("validation.max_sets_per_condition", self.max_sets_per_condition)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_steps: int = 1000
    keep_last: int = 2
    resume: bool = True
    """Go on from the last checkpoint of a run of the same name and settings."""

    def __post_init__(self) -> None:
        _check_positive("checkpoint.every_steps", self.every_steps)
        _check_positive("checkpoint.keep_last", self.keep_last)


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
    min_cells: int = 8
    """Conditions with fewer observed cells are left out and listed."""

    def __post_init__(self) -> None:
        _check_positive("protocol.num_splits", self.num_splits)
        _check(
            self.max_control_cells >= 10,
            f"protocol.max_control_cells ({self.max_control_cells}) must be at least 10",
        )
        _check(self.min_cells >= 2, f"protocol.min_cells ({self.min_cells}) must be at least 2")


# --- roots --------------------------------------------------------------------------------------


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
    memory_bytes: int = 4 * 1024 * 1024 * 1024
    overwrite: bool = False
    verify: str | None = None
    """A store to check byte by byte, and stop."""
    seed: int = 0

    def __post_init__(self) -> None:
        _check_positive("minimum_cells", self.minimum_cells)
        _check_positive("shard_bytes", self.shard_bytes)
        _check_positive("memory_bytes", self.memory_bytes)


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
    """Store to predict the held-out conditions of, in place of ``input``."""
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
        _check(
            (self.input is None) != (self.store is None),
            "give either input (an h5ad) or store (a store, for the held-out part of a split)",
        )
        _check(self.part in ("val", "test"), f"part ({self.part!r}) must be val or test")
        _check_fraction("max_missing_genes", self.max_missing_genes)
        _check_positive("sets_per_batch", self.sets_per_batch)
        if self.cells_per_condition is not None:
            _check_positive("cells_per_condition", self.cells_per_condition)


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Settings of ``scale evaluate``."""

    name: str = MISSING
    run_dir: str = MISSING
    predicted: Any = MISSING
    """h5ad with predictions as PATH or METHOD=PATH, or a list of them."""
    observed: str = MISSING
    """h5ad with the observed cells and their controls, or a store."""
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
    protocol: ProtocolConfig = MISSING
    overwrite: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self.predicted = _as_list("predicted", self.predicted)
        _check(bool(self.predicted), "predicted is empty; give at least one h5ad")
        _check(self.part in ("val", "test"), f"part ({self.part!r}) must be val or test")


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
        _check_positive("steps", self.steps)
        _check_positive("finetune_steps", self.finetune_steps)


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
    """Directory of a store to describe."""
    run: str | None = None
    """Run directory to describe."""

    def __post_init__(self) -> None:
        _check_positive("num_genes", self.num_genes)


SCHEMAS: dict[str, type] = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "demo": DemoConfig,
    "info": InfoConfig,
}


# --- Hydra --------------------------------------------------------------------------------------


def config_dir() -> Path:
    """Return the folder of yaml files: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configs beside {package}; install the package again")


def register() -> None:
    """Make the root dataclasses known to Hydra as ``<task>_schema``."""
    store = ConfigStore.instance()
    for task, schema in SCHEMAS.items():
        store.store(name=f"{task}_schema", node=schema)


def to_dataclass(config: DictConfig) -> Any:
    """Return the checked root dataclass of a composed config; runs every ``__post_init__``.

    Raises
    ------
    ValueError
        If a setting is missing or has a wrong value.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        values = "values" if len(missing) > 1 else "value"
        raise ValueError(f"missing mandatory {values}: {', '.join(missing)}")
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(explain(error)) from error


def check(config: Any) -> Any:
    """Return a copy of a settings dataclass made in Python, with every check run."""
    return to_dataclass(OmegaConf.structured(config))


def to_yaml(config: Any) -> str:
    """Return a settings dataclass as yaml, as ``config.yaml`` of a run holds it."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def from_yaml(path: Path, schema: type) -> Any:
    """Read the ``config.yaml`` of a run back into its dataclass.

    Raises
    ------
    ValueError
        If the file holds a key that is no setting, or a wrong value.
    """
    loaded = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
    return OmegaConf.to_object(loaded)


def compose(task: str, overrides: Sequence[str] = (), *, run_dir: Path | str) -> Any:
    """Compose the settings of a task from Python, as the command line does.

    Parameters
    ----------
    task
        One of ``SCHEMAS``.
    overrides
        ``key=value`` or ``group=option``, as on the command line.
    run_dir
        The run's directory (the command line takes it from Hydra).

    Raises
    ------
    ValueError
        If a key is no setting, an option does not exist, or a value is missing or wrong.

    Examples
    --------
    >>> compose("pretrain", ["trainer.max_steps=5"], run_dir="runs/mine").trainer.max_steps
    5
    """
    register()
    given = [*overrides, f"run_dir={run_dir}", f"name={Path(run_dir).name}"]
    given = check_keys(SCHEMAS[task], given)
    # A task that composes others (the demo) runs inside a Hydra job already: step out and back.
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(config_dir()), version_base=None):
            config = hydra_compose(task, overrides=given)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer
    return to_dataclass(config)
