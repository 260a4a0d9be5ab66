"""Scores of the validation conditions during training: streamed, no AnnData, no truth of the test.

Shapes: B = sets in the batch, S = cells per set, G = genes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scale.config import ObjectiveConfig, ValidationConfig
from scale.data.module import CellSetDataModule
from scale.model.losses import SetDistances, energy_loss
from scale.model.model import ScaleModel
from scale.types import Batch


class Validation:
    r"""Callable that scores a model on the ``val`` conditions of a split.

    ``val/energy_distance`` is the mean over the conditions of the energy distance of predicted and
    observed sets over :math:`\sqrt{G}`, as in the loss. ``val/pearson_delta`` is the mean over the
    conditions of the correlation of the predicted with the observed change of the mean cell. The
    two changes have disjoint control cells as reference: with a shared sample, changes of
    unrelated perturbations correlate.

    Memory does not grow with the split: conditions come in order, and only one is open.

    Parameters
    ----------
    data
        With a ``val`` part.
    config
        How much of each condition is scored.
    objective
        Steps of the sampler.
    sets_per_batch
        Sets per forward pass.
    """

    def __init__(
        self,
        data: CellSetDataModule,
        config: ValidationConfig,
        objective: ObjectiveConfig,
        *,
        sets_per_batch: int,
    ) -> None:
        self._data = data
        self._config = config
        self._num_steps = objective.num_steps
        self._sets_per_batch = sets_per_batch

    @torch.no_grad()
    def __call__(self, model: ScaleModel, step: int) -> dict[str, float]:
        """Return the scores; every rank computes them all."""
        was_training = model.training
        model.eval()
        energies: list[float] = []
        correlations: list[float] = []
        current: _Condition | None = None
        for batch in self._data.part_batches(
            "val",
            max_sets_per_condition=self._config.max_sets_per_condition,
            sets_per_batch=self._sets_per_batch,
        ):
            for number, told in self._score(model, batch):
                if current is None or current.number != number:
                    if current is not None:
                        energies.append(current.energy)
                        correlations.append(current.correlation)
                    current = _Condition(number)
                current.add(told)
        if current is not None:
            energies.append(current.energy)
            correlations.append(current.correlation)
        model.train(was_training)
        defined = [c for c in correlations if math.isfinite(c)]
        return {
            "val/energy_distance": sum(energies) / len(energies),
            "val/pearson_delta": sum(defined) / len(defined) if defined else math.nan,
        }

    def _score(self, model: ScaleModel, batch: Batch) -> list[tuple[int, _SetScore]]:
        """Return (condition, scores) of each set of a batch."""
        treated_BSG, mask_BS = batch.treated_BSG, batch.treated_mask_BS
        if treated_BSG is None or mask_BS is None:
            raise AssertionError("validation batches have treated cells")
        predicted_BSG = model.sample(batch, num_steps=self._num_steps).float()
        control_mask_BS = batch.control_mask_BS
        energy_B = energy_loss(
            SetDistances.between(predicted_BSG, treated_BSG, control_mask_BS, mask_BS)
        )
        sums: list[tuple[Tensor, Tensor]] = [
            ((cells * mask[:, :, None]).sum(1).double(), mask.sum(1).double())
            for cells, mask in (
                (predicted_BSG, control_mask_BS),
                (batch.control_BSG, control_mask_BS),
                (treated_BSG, mask_BS),
                (batch.summary_BUG, batch.summary_mask_BU),
            )
        ]
        return [
            (
                int(number),
                _SetScore(
                    float(energy_B[i]), [(total[i].cpu(), float(count[i])) for total, count in sums]
                ),
            )
            for i, number in enumerate(batch.condition_B.tolist())
        ]


@dataclass(frozen=True, slots=True)
class _SetScore:
    """Energy distance of a set; sum and number of its cells: predicted, control, treated, other."""

    energy: float
    sums: list[tuple[Tensor, float]]


@dataclass(slots=True)
class _Condition:
    """Sums over the sets of one condition."""

    number: int
    energies: list[float] = field(default_factory=list)
    sums: list[tuple[Tensor, float]] = field(default_factory=list)

    def add(self, told: _SetScore) -> None:
        self.energies.append(told.energy)
        if not self.sums:
            self.sums = list(told.sums)
            return
        self.sums = [
            (total + more, count + number)
            for (total, count), (more, number) in zip(self.sums, told.sums, strict=True)
        ]

    @property
    def energy(self) -> float:
        return sum(self.energies) / len(self.energies)

    @property
    def correlation(self) -> float:
        predicted, control, treated, other = (total / count for total, count in self.sums)
        pair: Any = torch.stack([predicted - control, treated - other])
        return float(torch.corrcoef(pair)[0, 1])
