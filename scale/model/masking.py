"""Genes that are hidden from the network in training, so that it learns genes from genes.

A hidden gene is hidden in all cells that the network is shown of a set: in the point on the path,
since otherwise its neighbours in the set would tell its mean, and in the summary's controls, which
would tell it as well. The start of the residual head and the target keep their values, so the
change of a hidden gene has to follow from the other genes and the condition.

Shapes: B = sets in the batch, G = genes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from scale.draws import uniform
from scale.model.flow import PathPoint
from scale.types import Batch

HIDE_GENE = 31
"""Purposes of the model's draws are numbers from 11; this one hides a gene of a set."""


def draw_visible(index_B: Tensor, num_genes: int, fraction: float, seed: int) -> Tensor:
    """Return which genes of each set the network sees [B, G]: a function of the set's number."""
    gene_G = torch.arange(num_genes, device=index_B.device)
    return uniform(index_B[:, None] * num_genes + gene_G, seed, HIDE_GENE) >= fraction


def hide_genes(
    point: PathPoint, batch: Batch, fraction: float, seed: int
) -> tuple[PathPoint, Batch]:
    """Return what the network is shown of a point on the path and of the summary's controls."""
    visible_BG = draw_visible(batch.set_index_B, point.z_BSG.shape[2], fraction, seed)
    shown_B1G = visible_BG[:, None, :]
    beside_BSG = None if point.beside_BSG is None else point.beside_BSG * shown_B1G
    return (
        replace(point, z_BSG=point.z_BSG * shown_B1G, beside_BSG=beside_BSG),
        replace(batch, summary_BUG=batch.summary_BUG * shown_B1G),
    )
