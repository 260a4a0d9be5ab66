"""Parameters and arithmetic of a model in closed form; tests hold them against the modules.

Letters as in the formulas of a transformer: d = width, f = SwiGLU width, s = cells per set; inside
a cell e = width of a token, t = patches; z = numbers of a latent cell. Without an objective, sizes
are those of the default one: a path in gene space from control cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scale.config import Decoder, Fusion, ModelConfig, ObjectiveConfig, Prior, Space
from scale.model.condition import NUM_DOSE_FREQUENCIES, NUM_TIME_FREQUENCIES
from scale.model.encoder import gene_ffn_size
from scale.types import Vocabulary


@dataclass(frozen=True, slots=True)
class _GeneBlocks:
    """Sizes of the encoder inside a cell."""

    num_patches: int
    width: int
    ffn: int
    num_seeds: int

    @classmethod
    def of(cls, config: ModelConfig, num_genes: int) -> _GeneBlocks:
        width = config.gene_hidden_size
        return cls(
            math.ceil(num_genes / config.gene_patch_size),
            width,
            gene_ffn_size(width),
            config.hidden_size // width,
        )


def count_parameters(
    config: ModelConfig, vocabulary: Vocabulary, objective: ObjectiveConfig | None = None
) -> int:
    """Return the number of trained parameters over all ranks."""
    d, f, layers = config.hidden_size, config.ffn_hidden_size, config.num_layers
    genes = len(vocabulary.genes)
    encoder, inputs, autoencoder = _encoder_parameters(config, genes), genes, 0
    if objective is not None and objective.space is Space.latent:
        inputs = objective.latent_size or 0
        autoencoder = encoder + d * inputs + inputs * f + f * genes + genes
        autoencoder += genes if objective.decoder is Decoder.negative_binomial else 0
        encoder = inputs * d + d
    if objective is not None and objective.prior is Prior.gaussian:
        encoder *= 2
    readout = _readout_weights(config, inputs) + inputs
    summary = 3 * (d * d + d)
    attending = 0
    if config.cell_attention:
        attending = 4 * d * d + d + (2 * (d // config.num_heads) if config.qk_norm else 0)
    blocks = layers * (attending + 3 * d * f + 7 * d) + d
    rows = len(vocabulary.components) + len(vocabulary.cell_types) + len(vocabulary.batches) + 2
    time = 2 * NUM_TIME_FREQUENCIES * d + d + d * d + d
    dose = 2 * NUM_DOSE_FREQUENCIES * d + d + d * d + d + 2 * d * d
    attention = d + 4 * d * d if config.fusion is Fusion.seed_attention else 0
    features = (vocabulary.num_features + d + 2) * d if vocabulary.num_features else 0
    condition = rows * d + time + dose + features + attention + 6 * d * d + 6 * d
    return encoder + summary + blocks + condition + readout + autoencoder


def _encoder_parameters(config: ModelConfig, num_genes: int) -> int:
    """Return the parameters of an encoder of single cells."""
    d = config.hidden_size
    if not config.gene_layers:
        return num_genes * d + d
    g = _GeneBlocks.of(config, num_genes)
    e = g.width
    patches = (g.num_patches * config.gene_patch_size + g.num_patches) * e
    layers = config.gene_layers * (4 * e * e + 3 * e * g.ffn + 2 * e) + e
    return patches + layers + g.num_seeds * e + d * d


def _readout_weights(config: ModelConfig, num_outputs: int) -> int:
    """Return the weights of the matrices of the readout."""
    d, f = config.hidden_size, config.ffn_hidden_size
    return 2 * d * f + f * num_outputs if config.gene_layers else d * num_outputs


def forward_flops_per_cell(
    config: ModelConfig, num_genes: int, objective: ObjectiveConfig | None = None
) -> float:
    """Return the floating point operations of one forward pass per treated cell.

    The summary draw of U cells is shared by the S cells of a set; the condition, one vector per
    set, is left out, and so are the reference cells of a latent space. The autoencoder works on
    control and treated cells.
    """
    d, f = config.hidden_size, config.ffn_hidden_size
    share = config.num_summary_cells / config.set_size
    encoder, inputs, autoencoder = _encoder_flops(config, num_genes), num_genes, 0.0
    if objective is not None and objective.space is Space.latent:
        inputs = objective.latent_size or 0
        encode = encoder + 2 * d * inputs
        autoencoder = encode * (2 + share) + 2 * 2 * (inputs * f + f * num_genes)
        encoder = 2 * inputs * d
    # phi has two maps; the second works on the mean of a set.
    summary = (encoder + 2 * d * d) * share
    num_encoded = 2 if objective is not None and objective.prior is Prior.gaussian else 1
    readout = 2 * _readout_weights(config, inputs)
    layers = config.num_layers * _layer_flops(config)
    return num_encoded * encoder + summary + layers + readout + autoencoder


def _encoder_flops(config: ModelConfig, num_genes: int) -> float:
    """Return the operations of encoding a cell."""
    d = config.hidden_size
    if not config.gene_layers:
        return 2 * num_genes * d
    g = _GeneBlocks.of(config, num_genes)
    e, t = g.width, g.num_patches
    inner = t * config.gene_layers * (4 * e * e + 3 * e * g.ffn)
    linear = 2 * (t * config.gene_patch_size * e + inner + 2 * t * e * g.num_seeds + d * d)
    return linear + 4 * t * t * e * config.gene_layers


def _layer_flops(config: ModelConfig) -> float:
    """Return the operations of a set block per cell."""
    d = config.hidden_size
    attention = 2 * 4 * d * d + 4 * config.set_size * d if config.cell_attention else 0
    return attention + 2 * 3 * d * config.ffn_hidden_size


def first_stage_layers(config: ModelConfig, num_genes: int, num_stages: int) -> int:
    r"""Return the set blocks of the first pipeline stage, which has the encoder beside them.

    .. math:: n_1 = \frac{L + c}{P} - c

    gives all stages the same work, c being the encoder's in set blocks. The nearest number is
    taken of which each stage has at least one layer and the later ones have equally many.
    """
    if num_stages == 1:
        return config.num_layers
    share = 1 + config.num_summary_cells / config.set_size
    c = _encoder_flops(config, num_genes) * share / _layer_flops(config)
    ideal = (config.num_layers + c) / num_stages - c
    later = num_stages - 1
    possible = [config.num_layers - later * n for n in range(1, config.num_layers)]
    # Of two that are equally near, the encoder's stage takes the smaller.
    return min((n for n in possible if n > 0), key=lambda n: (abs(n - ideal), n))


def check_shares(
    config: ModelConfig, *, world_size: int, tensor_size: int, num_stages: int
) -> None:
    """Refuse sizes of the model that the ranks cannot share.

    Raises
    ------
    ValueError
        Naming the settings, their values, and values that would do.
    """
    shared = ("num_heads", "ffn_hidden_size", "set_size", "num_summary_cells")
    for name in shared:
        if getattr(config, name) % tensor_size:
            fitting = [
                n
                for n in range(1, world_size + 1)
                if world_size % n == 0 and not any(getattr(config, other) % n for other in shared)
            ]
            raise ValueError(
                f"parallel.tensor_model_parallel_size ({tensor_size}) must divide model.{name} "
                f"({getattr(config, name)}); use {one_of(fitting)}"
            )
    if num_stages > config.num_layers:
        fitting = [n for n in range(1, config.num_layers + 1) if world_size % n == 0]
        raise ValueError(
            f"parallel.pipeline_model_parallel_size ({num_stages}) must be at most "
            f"model.num_layers ({config.num_layers}): each stage has a layer; use {one_of(fitting)}"
        )
    if num_stages > 1 and config.set_size > config.hidden_size:
        raise ValueError(
            f"parallel.pipeline_model_parallel_size ({num_stages}) needs model.set_size "
            f"({config.set_size}) to be at most model.hidden_size ({config.hidden_size}): the mask "
            "of a set travels between stages in one row; use 1, or smaller sets"
        )


def check_space(objective: ObjectiveConfig, *, num_stages: int) -> None:
    """Refuse a latent space that pipeline stages would have to share.

    Raises
    ------
    ValueError
        Naming both settings.
    """
    if objective.space is Space.latent and num_stages > 1:
        raise ValueError(
            f"parallel.pipeline_model_parallel_size ({num_stages}) must be 1 with "
            "objective.space=latent: the last stage would need the autoencoder of the first; "
            "tensor and data parallel ranks can share it"
        )


def one_of(values: list[int]) -> str:
    """Return the values in words, as ``1, 2 or 4``."""
    head = [str(v) for v in values[:-1]]
    return f"{', '.join(head)} or {values[-1]}" if head else str(values[-1])
