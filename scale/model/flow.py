"""The path to treated cells, where it starts, the law of its time, the endpoint, and the sampler.

Shapes: B = sets in the batch, S = cells per set, G = genes, or the numbers of a latent cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scale.config import Head, ObjectiveConfig, Prediction, Prior, Space, TimeLaw
from scale.draws import normal, uniform
from scale.model.pairing import Pairs

DRAW_TIME = 11
"""Purposes of the model's draws are numbers from 11; this one is the time of a set."""
CHOOSE_ZERO_TIME = 12
DRAW_START = 28


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


def draw_start(
    objective: ObjectiveConfig, control_BSG: Tensor, index_B: Tensor, seed: int
) -> Tensor:
    """Return where the paths start: at the control cells, or at noise of deviation 1.

    The noise of a cell is a function of the number of its set and its place in it.
    """
    if objective.prior is Prior.control:
        return control_BSG
    return normal(index_B, seed, DRAW_START, control_BSG.shape[1:]).to(control_BSG.dtype)


def interpolate(z0_BSG: Tensor, z1_BSG: Tensor, t_B: Tensor) -> Tensor:
    """Return the point at time ``t`` on the straight path from control to perturbed cells.

    .. math:: Z_t = (1 - t) Z_0 + t Z_1          (SCALE, arXiv 2603.17380); t in [0, 1], one per set
    """
    t_B11 = t_B.to(z0_BSG.dtype)[:, None, None]
    return torch.lerp(z0_BSG, z1_BSG, t_B11)


@dataclass(frozen=True, slots=True)
class PathPoint:
    """Where the sets of a batch stand, and which cells stand there.

    Parameters
    ----------
    z_BSG, mask_BS, time_B
        The cells at the time of their set.
    beside_BSG
        The control cells, on a path from noise, whose points do not tell them; else None.
    """

    z_BSG: Tensor
    mask_BS: Tensor
    time_B: Tensor
    beside_BSG: Tensor | None = None

    def of_sets(self, sets: slice) -> PathPoint:
        """Return the point of some of the sets."""
        beside_BSG = None if self.beside_BSG is None else self.beside_BSG[sets]
        return PathPoint(self.z_BSG[sets], self.mask_BS[sets], self.time_B[sets], beside_BSG)


def point_on_path(
    start_BSG: Tensor, control_mask_BS: Tensor, partner_BSG: Tensor, pairs: Pairs, time_B: Tensor
) -> PathPoint:
    """Return all control cells of sets at t = 0, and the paired ones of the others."""
    on_path_B1 = (time_B > 0)[:, None]
    mask_BS = torch.where(on_path_B1, pairs.has_partner_BS, control_mask_BS)
    return PathPoint(interpolate(start_BSG, partner_BSG, time_B), mask_BS, time_B)


def endpoint(
    objective: ObjectiveConfig,
    change_BSG: Tensor,
    control_BSG: Tensor,
    mean_G: Tensor,
    point: PathPoint | None,
) -> Tensor:
    r"""Return the endpoint of the path that the network's output stands for, before :func:`bound`.

    ``residual`` starts from the control cells, outside the network, whatever the path time and
    wherever the path starts; ``direct`` from the mean training cell, without which a network that
    starts at zero would have no gradient. A velocity v leads from the point itself:

    .. math:: \hat Z_1 = Z_t + (1 - t) v
    """
    if objective.prediction is Prediction.velocity:
        assert point is not None, "a velocity leads from somewhere"
        left_B11 = (1 - point.time_B).to(change_BSG.dtype)[:, None, None]
        return torch.addcmul(point.z_BSG, left_B11, change_BSG)
    if objective.head is Head.residual:
        return control_BSG + change_BSG
    return mean_G.to(change_BSG.dtype) + change_BSG


def bound(space: Space, z_BSG: Tensor) -> Tensor:
    """Return cells that can be: expression is never negative."""
    return F.relu(z_BSG) if space is Space.gene else z_BSG


def integrate(
    endpoint_at: Callable[[Tensor, float], Tensor], z0_BSG: Tensor, num_steps: int
) -> Tensor:
    r"""Return the end of the path in ``num_steps`` equal steps.

    .. math:: z \leftarrow z + \frac{h(z, t) - z}{(1 - t) K}, \quad t = k / K

    The last step lands on the endpoint itself, and nothing is divided by zero. With
    :math:`h = z + (1 - t) v` these are Euler's steps of :math:`dz/dt = v`.

    Parameters
    ----------
    endpoint_at
        The map h from a point and its time to the endpoint.
    z0_BSG
        Where the path starts.
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
