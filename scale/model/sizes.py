"""Parameters and arithmetic of a model in closed form; tests hold them against the modules.

Letters as in the formulas of a transformer: d = width, f = SwiGLU width, s = cells per set; inside
a cell e = width of a token, t = patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scale.config import ModelConfig
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
    condition = rows * d + time + dose + d + 4 * d * d + 6 * d * d + 6 * d
    return encoder + summary + blocks + condition + readout


def forward_flops_per_cell(config: ModelConfig, num_genes: int) -> float:
    """Return the floating point operations of one forward pass per treated cell.

    The summary draw of U cells is shared by the S cells of a set; the condition, one vector per
    set, is left out.
    """
    d, f, layers, s = config.hidden_size, config.ffn_hidden_size, config.num_layers, config.set_size
    if config.gene_layers:
        g = _GeneBlocks.of(config, num_genes)
        e, t = g.width, g.num_patches
        inner = t * config.gene_layers * (4 * e * e + 3 * e * g.ffn)
        encoder = 2 * (t * config.gene_patch_size * e + inner + 2 * t * e * g.num_seeds + d * d)
        encoder += 4 * t * t * e * config.gene_layers
        readout = 2 * d * f + f * num_genes
    else:
        encoder = 2 * num_genes * d
        readout = d * num_genes
    share = config.num_summary_cells / s
    blocks = 2 * layers * (4 * d * d + 3 * d * f) + 4 * layers * s * d
    # phi has two maps; the second works on the mean of a set.
    return encoder * (1 + share) + 2 * d * d * share + blocks + 2 * readout
