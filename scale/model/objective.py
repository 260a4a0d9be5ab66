"""The loss of a batch: the weighted sum of the losses of a set, and what sets must have for it.

Shapes: B = sets in the batch, S = cells per set, G = genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scale.config import ObjectiveConfig
from scale.model.losses import LOSSES, SetDistances
from scale.model.pairing import Pairs
from scale.types import Batch


@dataclass(frozen=True, slots=True)
class Losses:
    """Loss of a batch.

    Parameters
    ----------
    total
        Mean over the sets of the weighted sum of losses; has the gradient.
    parts
        Mean over the sets of each loss before its weight, without gradient.
    num_sets
        Sets in the batch, each with weight 1.
    """

    total: Tensor
    parts: dict[str, Tensor]
    num_sets: int


@dataclass(frozen=True, slots=True)
class Targets:
    """What predicted cells are compared with."""

    treated_BSG: Tensor
    mask_BS: Tensor
    pairs: Pairs
    """Which of the treated cells is the partner of which predicted one."""


def loss_names(objective: ObjectiveConfig) -> list[str]:
    """Return the names of the losses whose weight is not 0."""
    return [name for name in LOSSES if getattr(objective, f"{name}_weight") != 0]


def weighted_losses(
    objective: ObjectiveConfig, predicted_BSG: Tensor, mask_BS: Tensor, targets: Targets
) -> Losses:
    """Return the weighted sum over the losses of :func:`loss_names`."""
    sets = SetDistances.between(
        predicted_BSG, targets.treated_BSG, mask_BS, targets.mask_BS, targets.pairs
    )
    total = predicted_BSG.new_zeros(())
    parts = {}
    for name in loss_names(objective):
        mean = LOSSES[name](sets).mean()
        parts[name] = mean.detach()
        total = total + getattr(objective, f"{name}_weight") * mean
    return Losses(total, parts, len(mask_BS))


def check_masks(batch: Batch, treated_mask_BS: Tensor) -> bool:
    """Return whether all sets are full; a set of one cell has no distances within.

    One transfer from the device for all that the host has to know.
    """
    num_control_B, num_treated_B = batch.control_mask_BS.sum(1), treated_mask_BS.sum(1)
    smallest_control, smallest_treated = torch.stack(
        [num_control_B.min(), num_treated_B.min()]
    ).tolist()
    if min(smallest_control, smallest_treated) < 2:
        too_small_B = (num_control_B < 2) | (num_treated_B < 2)
        numbers = batch.condition_B[too_small_B].tolist()
        raise ValueError(
            f"sets of conditions {numbers[:5]} have fewer than 2 control or treated cells; raise "
            "data.minimum_control_cells, or minimum_cells when the store is prepared"
        )
    set_size = batch.control_mask_BS.shape[1]
    return bool(smallest_control == set_size and smallest_treated == set_size)
