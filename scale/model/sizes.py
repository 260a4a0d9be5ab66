"""Parameters and arithmetic of a model in closed form; tests hold them against the modules.

Letters as in the formulas of a transformer: d = width, f = SwiGLU width, s = cells per set; inside
a cell e = width of a token, t = patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scale.config import Fusion, ModelConfig
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


def count_parameters(config: ModelConfig, vocabulary: Vocabulary) -> int:
    """Return the number of trained parameters over all ranks."""
    d, f, layers = config.hidden_size, config.ffn_hidden_size, config.num_layers
    genes = len(vocabulary.genes)
    if config.gene_layers:
        g = _GeneBlocks.of(config, genes)
        e = g.width
        encoder = (g.num_patches * config.gene_patch_size + g.num_patches) * e
        encoder += config.gene_layers * (4 * e * e + 3 * e * g.ffn + 2 * e) + e
        encoder += g.num_seeds * e + d * d
        readout = 2 * d * f + f * genes + genes
    else:
        encoder = genes * d + d
        readout = d * genes + genes
    summary = 3 * (d * d + d)
    qk_norm = 2 * (d // config.num_heads) if config.qk_norm else 0
    blocks = layers * (4 * d * d + 3 * d * f + 8 * d + qk_norm) + d
    rows = len(vocabulary.components) + len(vocabulary.cell_types) + len(vocabulary.batches) + 2
    time = 2 * NUM_TIME_FREQUENCIES * d + d + d * d + d
    dose = 2 * NUM_DOSE_FREQUENCIES * d + d + d * d + d + 2 * d * d
    attention = d + 4 * d * d if config.fusion is Fusion.seed_attention else 0
    features = (vocabulary.num_features + d + 2) * d if vocabulary.num_features else 0
    condition = rows * d + time + dose + features + attention + 6 * d * d + 6 * d
    return encoder + summary + blocks + condition + readout


def forward_flops_per_cell(config: ModelConfig, num_genes: int) -> float:
    """Return the floating point operations of one forward pass per treated cell.

    The summary draw of U cells is shared by the S cells of a set; the condition, one vector per
    set, is left out.
    """
    d, f = config.hidden_size, config.ffn_hidden_size
    readout = 2 * d * f + f * num_genes if config.gene_layers else d * num_genes
    share = config.num_summary_cells / config.set_size
    encoder = _encoder_flops(config, num_genes)
    # phi has two maps; the second works on the mean of a set.
    summary = (encoder + 2 * d * d) * share
    return encoder + summary + config.num_layers * _layer_flops(config) + 2 * readout


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
    return 2 * (4 * d * d + 3 * d * config.ffn_hidden_size) + 4 * config.set_size * d


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


def one_of(values: list[int]) -> str:
    """Return the values in words, as ``1, 2 or 4``."""
    head = [str(v) for v in values[:-1]]
    return f"{', '.join(head)} or {values[-1]}" if head else str(values[-1])
