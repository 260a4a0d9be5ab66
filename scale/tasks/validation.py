"""Scores of the validation conditions during training: streamed, no AnnData, no truth of the test.

Shapes: B = sets in the batch, S = cells per set, G = genes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scale.config import ObjectiveConfig, ValidationConfig
from scale.data.module import CellSetDataModule
from scale.model.losses import SetDistances, energy_loss
from scale.model.model import ScaleModel
from scale.train.parallel import gather_over_sets
from scale.types import Batch


class Validation:
    r"""Callable that scores a model on the ``val`` conditions of a split.

    ``val/energy_distance`` is the mean over the conditions of the energy distance of predicted and
    observed sets over :math:`\sqrt{G}`, as in the loss. ``val/pearson_delta`` is the mean over the
    conditions of the correlation of the predicted with the observed change of the mean cell. The
    two changes have disjoint control cells as reference: with a shared sample, changes of
    unrelated perturbations correlate.

    Data parallel ranks share out the sets. Memory does not grow with the split: conditions come in
    order, and only those at the ends of a share, which other ranks may have a part of, stay open.

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
        """Return the scores, on every rank."""
        was_training = model.training
        model.eval()
        share = _Share()
        for batch in self._data.part_batches(
            "val",
            max_sets_per_condition=self._config.max_sets_per_condition,
            sets_per_batch=self._sets_per_batch,
        ):
            for number, told in self._score(model, batch):
                share.add(number, told)
        model.train(was_training)
        energies, correlations = zip(*join(gather_over_sets(share)), strict=True)
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

    def add(self, energies: list[float], sums: list[tuple[Tensor, float]]) -> None:
        self.energies = [*self.energies, *energies]
        if not self.sums:
            self.sums = list(sums)
            return
        self.sums = [
            (total + more, count + number)
            for (total, count), (more, number) in zip(self.sums, sums, strict=True)
        ]

    @property
    def scores(self) -> tuple[float, float]:
        """Energy distance, and correlation of the changes."""
        predicted, control, treated, other = (total / count for total, count in self.sums)
        pair: Any = torch.stack([predicted - control, treated - other])
        correlation = float(torch.corrcoef(pair)[0, 1])
        return sum(self.energies) / len(self.energies), correlation


@dataclass(slots=True)
class _Share:
    """Conditions of a rank in order: those at the ends open, scores of the ones between."""

    first: _Condition | None = None
    between: list[tuple[float, float]] = field(default_factory=list)
    last: _Condition | None = None

    def add(self, number: int, told: _SetScore) -> None:
        """Take the next set, of condition ``number``."""
        current = self.last or self.first
        if current is None:
            current = self.first = _Condition(number)
        elif current.number != number:
            if self.last is not None:
                self.between.append(self.last.scores)
            current = self.last = _Condition(number)
        current.add([told.energy], told.sums)


def join(shares: Sequence[_Share]) -> list[tuple[float, float]]:
    """Return the scores of all conditions; what ranks have of the same one is taken together."""
    found: list[tuple[float, float]] = []
    current: _Condition | None = None
    for share in shares:
        if share.first is None:
            continue
        if current is not None and current.number == share.first.number:
            current.add(share.first.energies, share.first.sums)
        else:
            if current is not None:
                found.append(current.scores)
            current = share.first
        if share.last is not None:
            found += [current.scores, *share.between]
            current = share.last
    if current is not None:
        found.append(current.scores)
    return found
