r"""Predicted cells that could have been measured: whole counts.

A network gives every cell some small change of every gene. Measured cells are whole counts, most of
them 0, so that a test of genes would call all of these changes. A value v of a cell with library L
lies between the values of two neighbouring counts, and is moved to one of them:

.. math:: g_k = \log(1 + k T / L), \quad g_k \le v < g_{k+1}, \quad
    P(g_{k+1}) = \frac{v - g_k}{g_{k+1} - g_k}

This keeps the mean of a value, brings back its zeros and adds the spread of counting.

Shapes: B = sets in the batch, S = cells per set, G = genes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale.draws import mix64_tensor, uniform
from scale.model.decoders import to_counts
from scale.types import Batch, Vocabulary

DRAW_WHOLE = 32
"""Purposes of the model's draws are numbers from 11; this one chooses between two counts."""


def whole_counts(cells_BSG: Tensor, batch: Batch, vocabulary: Vocabulary, seed: int) -> Tensor:
    """Return cells whose values are those of whole counts, at the library of their control cells.

    A value that is still that of the control cell stays as it is: it was measured.

    Parameters
    ----------
    cells_BSG
        Predicted cells on the scale of the batch, not negative.
    batch
        The control cells that they started from.
    vocabulary
        Says how values follow from counts.
    seed
        Of the draws, which also depend on the number of the set and on the counts of the control
        cell, but not on its place: cells in another order are the same cells.
    """
    control_BSG = batch.control_BSG
    step_BS1 = (vocabulary.target_sum / batch.control_library_BS.clamp(min=1.0))[:, :, None]
    value_BSG = cells_BSG * vocabulary.value_scale
    below_BSG = torch.expm1(value_BSG).div_(step_BS1).floor_().mul_(step_BS1)
    gap_BSG = (step_BS1 / (1.0 + below_BSG)).log1p_()
    below_BSG.log1p_()
    count_BSG = to_counts(control_BSG, batch.control_library_BS, vocabulary)
    draw_BSG = _draw(count_BSG.to(torch.int64), batch.set_index_B, seed)
    is_up_BSG = draw_BSG * gap_BSG < value_BSG - below_BSG
    whole_BSG = below_BSG.addcmul_(gap_BSG, is_up_BSG.to(gap_BSG.dtype))
    whole_BSG = whole_BSG.div_(vocabulary.value_scale)
    return torch.where(cells_BSG == control_BSG, cells_BSG, whole_BSG)


def _draw(count_BSG: Tensor, index_B: Tensor, seed: int) -> Tensor:
    """Return a number in [0, 1) for every gene of every cell."""
    gene_G = mix64_tensor(torch.arange(count_BSG.shape[2], device=count_BSG.device))
    cell_BS = (count_BSG * (gene_G | 1)).sum(-1) ^ mix64_tensor(index_B)[:, None]
    return uniform(mix64_tensor(cell_BS)[:, :, None] ^ gene_G, seed, DRAW_WHOLE)
