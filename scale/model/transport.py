"""What ``objective`` asks for, around a network that gives a change: pairs, path, losses, sampler.

It has no weights and knows no ranks: the formulas stand in ``flow``, ``pairing`` and ``losses``,
and are put together here.

Shapes: B = sets in the batch, S = cells per set, G = genes (or the numbers of a latent cell, on the
path), P = principal components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scale.config import Head, ObjectiveConfig, Prediction, Prior, Space, TimeLaw
from scale.model.flow import (
    PathPoint,
    bound,
    draw_start,
    draw_time,
    endpoint,
    integrate,
    point_on_path,
)
from scale.model.objective import Losses, Targets, velocity_losses, weighted_losses
from scale.model.pairing import Pairs, pair
from scale.types import Batch


@dataclass(frozen=True, slots=True)
class Path:
    """Where the paths of the sets of a batch start, and the point at their times."""

    start_BSG: Tensor
    point: PathPoint


@dataclass(frozen=True, slots=True)
class Transport:
    """The way from control to treated cells.

    Parameters
    ----------
    objective
        Space, prior, prediction, head, pairing, law of time and weights.
    seed
        Of all draws of the training path.
    """

    objective: ObjectiveConfig
    seed: int

    @property
    def is_velocity(self) -> bool:
        """Whether the network gives the rate of change along the path."""
        return self.objective.prediction is Prediction.velocity

    def pairs(self, batch: Batch, basis_GP: Tensor, *, moves: bool, is_scored: bool) -> Pairs:
        """Pair the cells of a batch in gene space: of the sets where anything depends on it.

        Parameters
        ----------
        batch
            With treated cells.
        basis_GP
            Principal components in which cells are compared.
        moves, is_scored
            Whether this pipeline stage has the point on the path, and the losses.
        """
        assert batch.treated_BSG is not None, "pairs are made in training"
        assert batch.treated_mask_BS is not None, "pairs are made in training"
        masks = batch.control_mask_BS, batch.treated_mask_BS
        if is_scored and self.objective.point_weight != 0:
            needed_B = torch.ones_like(batch.is_control_B)
        elif moves:
            needed_B = draw_time(self.objective, batch.set_index_B, self.seed) > 0
        else:
            needed_B = torch.zeros_like(batch.is_control_B)
        cells = batch.control_BSG, batch.treated_BSG
        return pair(self.objective.pairing, *cells, *masks, basis_GP, needed_B)

    def path(self, sets: Batch, pairs: Pairs) -> Path:
        """Return the paths of a batch with treated cells: a function of the numbers of its sets."""
        assert sets.treated_BSG is not None, "a path has an end"
        start_BSG = draw_start(self.objective, sets.control_BSG, sets.set_index_B, self.seed)
        point = point_on_path(
            start_BSG,
            sets.control_mask_BS,
            pairs.partners(sets.treated_BSG),
            pairs,
            draw_time(self.objective, sets.set_index_B, self.seed),
        )
        return Path(start_BSG, self._beside(point, sets))

    def losses(
        self,
        change_BSG: Tensor,
        sets: Batch,
        path: Path | None,
        mask_BS: Tensor,
        pairs: Pairs,
        mean_G: Tensor,
    ) -> Losses:
        """Return the losses of what the network gave, whose real cells ``mask_BS`` marks.

        Raises
        ------
        ValueError
            If the direct head has no mean cell to start from.
        """
        is_direct = self.objective.head is Head.direct and self.objective.space is Space.gene
        if is_direct and not mean_G.any():
            raise ValueError(
                "objective.head=direct starts from the mean cell; set_statistics first"
            )
        assert sets.treated_BSG is not None, "losses are of training"
        assert sets.treated_mask_BS is not None, "losses are of training"
        targets = Targets(sets.treated_BSG, sets.treated_mask_BS, pairs)
        point = None if path is None else path.point
        end_BSG = endpoint(self.objective, change_BSG, sets.control_BSG, mean_G, point)
        predicted_BSG = bound(self.objective.space, end_BSG)
        if not self.is_velocity:
            return weighted_losses(self.objective, predicted_BSG, mask_BS, targets)
        assert path is not None, "a velocity leads from somewhere"
        return velocity_losses(
            self.objective, change_BSG, path.start_BSG, predicted_BSG, mask_BS, targets
        )

    def end(
        self,
        change_at: Callable[[PathPoint], Tensor],
        sets: Batch,
        mean_G: Tensor,
        *,
        num_steps: int,
        seed: int,
    ) -> Tensor:
        """Return where the paths of a batch end, by the sampler.

        Parameters
        ----------
        change_at
            What the network gives at a point.
        sets
            Control cells, and the numbers of the sets, which key the noise of a path that starts
            at noise.
        mean_G
            Where the direct head starts.
        num_steps
            Steps of the sampler.
        seed
            Of the noise.

        Raises
        ------
        ValueError
            If the network never saw the times of so many steps.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps ({num_steps}) must be at least 1")
        if num_steps > 1 and self.objective.time is TimeLaw.zero:
            raise ValueError(
                f"the model was trained with objective.time=zero; num_steps ({num_steps}) must be 1"
            )

        def endpoint_at(z_BSG: Tensor, time: float) -> Tensor:
            time_B = torch.full((len(z_BSG),), time, device=z_BSG.device)
            point = self._beside(PathPoint(z_BSG, sets.control_mask_BS, time_B), sets)
            change_BSG = change_at(point)
            end_BSG = endpoint(self.objective, change_BSG, sets.control_BSG, mean_G, point)
            # what a velocity implies halfway is no prediction, and the path may pass there
            return end_BSG if self.is_velocity else bound(self.objective.space, end_BSG)

        start_BSG = draw_start(self.objective, sets.control_BSG, sets.set_index_B, seed)
        return bound(self.objective.space, integrate(endpoint_at, start_BSG, num_steps))

    def _beside(self, point: PathPoint, sets: Batch) -> PathPoint:
        if self.objective.prior is Prior.control:
            return point
        return replace(point, beside_BSG=sets.control_BSG)
