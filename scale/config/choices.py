"""Settings with a fixed list of values."""

from enum import Enum


class SourceFormat(Enum):
    """What ``prepare`` reads."""

    synthetic = "synthetic"
    h5ad = "h5ad"
    tahoe_parquet = "tahoe_parquet"
    scdl = "scdl"
    store = "store"


class GeneChoice(Enum):
    """Which genes a store keeps."""

    hvg = "hvg"
    all = "all"
    list = "list"


class GeneFlavor(Enum):
    """By which rule genes count as highly variable; both are scanpy's."""

    seurat = "seurat"
    cell_ranger = "cell_ranger"


class KeepCells(Enum):
    """What is kept of single cells beside their counts."""

    barcode = "barcode"
    none = "none"


class Restart(Enum):
    """What to do with the rest of a ``prepare`` that was stopped."""

    resume = "resume"
    discard = "discard"


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
    paper_pooled = "paper_pooled"


class ControlSplit(Enum):
    """Whether predicted and observed changes share control cells."""

    disjoint = "disjoint"
    shared = "shared"


class Missing(Enum):
    """What to do with conditions that only one of two files has."""

    error = "error"
    drop = "drop"


class Space(Enum):
    """Where the path from control to treated cells lies."""

    gene = "gene"
    latent = "latent"


class Prior(Enum):
    """Where the path starts."""

    control = "control"
    gaussian = "gaussian"


class Prediction(Enum):
    """What the network gives at a point on the path."""

    endpoint = "endpoint"
    velocity = "velocity"


class Decoder(Enum):
    """How a latent endpoint becomes a cell."""

    negative_binomial = "negative_binomial"
    residual = "residual"
    mean = "mean"


class Fusion(Enum):
    """How the facts of a condition become one vector."""

    seed_attention = "seed_attention"
    sum = "sum"
