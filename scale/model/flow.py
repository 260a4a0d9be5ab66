"""The path from control to treated cells, the law of its time, the endpoint, and the sampler.

Shapes: B = sets in the batch, S = cells per set, G = genes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scale.config import Head, ObjectiveConfig, TimeLaw
from scale.model.pairing import Pairs
from scale.runtime import uniform

DRAW_TIME = 11
"""Purposes of the model's draws are numbers from 11; this one is the time of a set."""
CHOOSE_ZERO_TIME = 12


def draw_time(objective: ObjectiveConfig, index_B: Tensor, seed: int) -> Tensor:
    """Return one path time per set: a pure function of the number of the set.

    Given a point at t > 0 and the controls, the target follows without the perturbation; so half
    of the sets stand at 0, which is also the only time that a one-step sampler uses.
    """
    if objective.time is TimeLaw.zero:
        return torch.zeros(len(index_B), device=index_B.device)
    time_B = uniform(index_B, seed, DRAW_TIME)
    if objective.time is TimeLaw.mix:
        at_zero_B = uniform(index_B, seed, CHOOSE_ZERO_TIME) < objective.zero_time_fraction
        time_B = time_B.masked_fill(at_zero_B, 0.0)
    return time_B


def interpolate(z0_BSG: Tensor, z1_BSG: Tensor, t_B: Tensor) -> Tensor:
    """Return the point at time ``t`` on the straight path from control to perturbed cells.

    .. math:: Z_t = (1 - t) Z_0 + t Z_1          (SCALE, arXiv 2603.17380); t in [0, 1], one per set
    """
    t_B11 = t_B.to(z0_BSG.dtype)[:, None, None]
    return torch.lerp(z0_BSG, z1_BSG, t_B11)


@dataclass(frozen=True, slots=True)
class PathPoint:
    """Where the sets of a batch stand, and which cells stand there."""

    z_BSG: Tensor
    mask_BS: Tensor
    time_B: Tensor


def point_on_path(
    control_BSG: Tensor, control_mask_BS: Tensor, partner_BSG: Tensor, pairs: Pairs, time_B: Tensor
) -> PathPoint:
    """Return all control cells of sets at t = 0, and the paired ones of the others."""
    on_path_B1 = (time_B > 0)[:, None]
    mask_BS = torch.where(on_path_B1, pairs.has_partner_BS, control_mask_BS)
    return PathPoint(interpolate(control_BSG, partner_BSG, time_B), mask_BS, time_B)


def endpoint(head: Head, change_BSG: Tensor, control_BSG: Tensor, mean_G: Tensor) -> Tensor:
    """Return the endpoint of the path: never negative.

    ``residual`` starts from the control cells, outside the network, whatever the path time;
    ``direct`` from the mean training cell, without which a network that starts at zero would have
    no gradient.
    """
    start = control_BSG if head is Head.residual else mean_G.to(change_BSG.dtype)
    return F.relu(start + change_BSG)


def integrate(
    endpoint_at: Callable[[Tensor, float], Tensor], z0_BSG: Tensor, num_steps: int
) -> Tensor:
    r"""Return the end of the path in ``num_steps`` equal steps.

    .. math:: z \leftarrow z + \frac{h(z, t) - z}{(1 - t) K}, \quad t = k / K

    The last step lands on the endpoint itself, and nothing is divided by zero.

    Parameters
    ----------
    endpoint_at
        The map h from a point and its time to the endpoint.
    z0_BSG
        Control cells.
    num_steps
        Steps, K.
    """
    z_BSG = z0_BSG
    for k in range(num_steps - 1):
        time = k / num_steps
        z_BSG = torch.lerp(z_BSG, endpoint_at(z_BSG, time), 1.0 / ((1.0 - time) * num_steps))
    return endpoint_at(z_BSG, (num_steps - 1) / num_steps)


def guide(with_condition: Tensor, without_condition: Tensor, guidance: float) -> Tensor:
    r"""Return the change that exaggerates what sets a perturbation apart from the mean response.

    .. math:: \Delta_w = \Delta_0 + w (\Delta_p - \Delta_0)
    """
    return torch.lerp(without_condition, with_condition, guidance)
