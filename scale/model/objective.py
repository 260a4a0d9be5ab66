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

    def __add__(self, other: Losses) -> Losses:
        """Return both together, of the same sets."""
        return Losses(self.total + other.total, self.parts | other.parts, self.num_sets)


@dataclass(frozen=True, slots=True)
class Targets:
    """What predicted cells are compared with."""

    treated_BSG: Tensor
    mask_BS: Tensor
    pairs: Pairs
    """Which of the treated cells is the partner of which predicted one."""


AUTOENCODER_LOSSES = ("reconstruction", "alignment")


def loss_names(objective: ObjectiveConfig) -> list[str]:
    """Return the names of the losses whose weight is not 0."""
    names = (*LOSSES, *AUTOENCODER_LOSSES)
    return [name for name in names if getattr(objective, f"{name}_weight") != 0]


def weigh(objective: ObjectiveConfig, losses: dict[str, Tensor]) -> Losses:
    """Return the weighted sum of losses by name, each one number per set."""
    total = next(iter(losses.values())).new_zeros(())
    parts = {}
    for name, loss_B in losses.items():
        mean = loss_B.mean()
        parts[name] = mean.detach()
        total = total + getattr(objective, f"{name}_weight") * mean
    return Losses(total, parts, len(loss_B))


def weighted_losses(
    objective: ObjectiveConfig, predicted_BSG: Tensor, mask_BS: Tensor, targets: Targets
) -> Losses:
    """Return the weighted sum over the losses of a set."""
    sets = SetDistances.between(
        predicted_BSG, targets.treated_BSG, mask_BS, targets.mask_BS, targets.pairs
    )
    names = [name for name in loss_names(objective) if name in LOSSES]
    return weigh(objective, {name: LOSSES[name](sets) for name in names})


def velocity_losses(
    objective: ObjectiveConfig,
    velocity_BSG: Tensor,
    start_BSG: Tensor,
    predicted_BSG: Tensor,
    mask_BS: Tensor,
    targets: Targets,
) -> Losses:
    r"""Return the weighted sum with the point loss on the velocity, others on the endpoint.

    .. math:: L_P = \frac{1}{n G} \sum_i \| v_i - (z_{1, \pi(i)} - z_{0, i}) \|^2
    """
    sets = SetDistances.between(
        predicted_BSG, targets.treated_BSG, mask_BS, targets.mask_BS, targets.pairs
    )
    losses = {}
    for name in loss_names(objective):
        if name == "point":
            change_BSG = targets.pairs.partners(targets.treated_BSG) - start_BSG
            real_BS = mask_BS & targets.pairs.has_partner_BS
            squared_BS = (velocity_BSG - change_BSG).square().mean(-1)
            losses[name] = torch.where(real_BS, squared_BS, 0).sum(1) / real_BS.sum(1)
        elif name in LOSSES:
            losses[name] = LOSSES[name](sets)
    return weigh(objective, losses)


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
