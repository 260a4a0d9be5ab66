r"""Perturbation, dose, cell type, batch, population and time -> the condition of a set.

.. math::
    a_j = \mathrm{table}[j] + F(v_j), \quad
    e_j = a_j (1 + A \delta_j) + C \delta_j, \quad
    u = \mathrm{Attention}(\mathrm{seed}, [e_1 \dots e_J, e_c, e_b, m]), \quad
    \mathrm{mod} = W \, \mathrm{SiLU}(u + \sum_j e_j + \mathrm{TimeMLP}(t))

with v_j the features of a component, where it has any, and delta_j its encoded log10 dose. A, C and
W start at zero. What was never trained on is row 0 of the table, the unknown, and its features. A
combination is a sum over its components, so their order cannot matter. ``model.fusion=sum`` puts
the sum of the tokens in place of :math:`u + \sum_j e_j`. Everything here is float32 and the same on
all ranks that share the cells of a set.

Shapes: B = sets in the batch, J = components of a perturbation, K = condition tokens, H = heads,
D = width, C = components that a vocabulary knows, V = numbers of a feature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale.config import Fusion, ModelConfig
from scale.draws import uniform
from scale.model.layers import NUM_MODULATIONS, constant_start, embedding_start
from scale.types import ABSENT, UNKNOWN_COMPONENT, Batch, Vocabulary

HIDE_PERTURBATION = 13
"""Purposes of the model's draws are numbers from 11; this one hides the perturbation."""
HIDE_CELL_TYPE = 15
HIDE_BATCH = 16
HIDE_NAME = 17
HIDE_FEATURE = 18

SILU_GAIN = 0.6
"""Root mean square of SiLU for standard normal numbers."""
FEATURE_DROPOUT = 0.6
"""Share of a feature's numbers that are hidden in training.

A fingerprint tells every drug of the training apart, and a map that has seen few drugs learns them
by heart instead of what they share. Measured on 8 held-out drugs of a simulated screen with 32 in
training, 500 steps of tiny: residual correlation .28 without, .33 at .3, .34 at .6.
"""
NUM_DOSE_FREQUENCIES = 16
NUM_TIME_FREQUENCIES = 128


@dataclass(frozen=True, slots=True)
class ConditionIds:
    """What is known of each set: rows of the tables, and doses.

    Parameters
    ----------
    component_BJ
        Rows of the component table, ``ABSENT`` where there is none. Rows behind its end are
        components that are known by their features alone.
    dose_BJ
        In the unit of the training data, NaN where there is none.
    cell_type_B, batch_B
        Rows of their tables; 0 is the unknown.
    hidden_BJ
        Components that are taken as unknown if they have features; None = none of them.
    kept_BJV
        Numbers of a feature that are seen; None = all of them.
    """

    component_BJ: Tensor
    dose_BJ: Tensor
    cell_type_B: Tensor
    batch_B: Tensor
    hidden_BJ: Tensor | None = None
    kept_BJV: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> ConditionIds:
        """Read the ids of a batch; the vocabulary counts from 0, the tables from 1."""
        return cls(batch.component_BJ, batch.dose_BJ, batch.cell_type_B + 1, batch.batch_B + 1)

    def without_perturbation(self, hidden_B: Tensor | None = None) -> ConditionIds:
        """Return the ids with the null perturbation in the sets marked, by default in all."""
        null_BJ = torch.full_like(self.component_BJ, ABSENT)
        null_BJ[:, 0] = UNKNOWN_COMPONENT
        no_dose_BJ = torch.full_like(self.dose_BJ, math.nan)
        if hidden_B is None:
            return replace(self, component_BJ=null_BJ, dose_BJ=no_dose_BJ)
        return replace(
            self,
            component_BJ=torch.where(hidden_B[:, None], null_BJ, self.component_BJ),
            dose_BJ=torch.where(hidden_B[:, None], no_dose_BJ, self.dose_BJ),
        )

    def dropped(
        self, config: ModelConfig, index_B: Tensor, seed: int, *, num_features: int
    ) -> ConditionIds:
        """Return the ids with some hidden, as drawn for these numbers of sets.

        The null rows learn the mean response of a context, and to do without its name; the map of
        features learns to do without the name of a perturbation, and without some of its numbers.
        """
        ids = self
        if num_features:
            components = range(self.component_BJ.shape[1])
            draw_BJ = torch.stack([uniform(index_B, seed, HIDE_NAME, j) for j in components], 1)
            number_V = torch.arange(num_features, device=index_B.device)
            index_BV = index_B[:, None] * num_features + number_V
            draw_BJV = torch.stack(
                [uniform(index_BV, seed, HIDE_FEATURE, j) for j in components], 1
            )
            ids = replace(
                ids,
                hidden_BJ=draw_BJ < config.identity_dropout,
                kept_BJV=draw_BJV >= FEATURE_DROPOUT,
            )
        if config.condition_dropout > 0:
            hidden_B = uniform(index_B, seed, HIDE_PERTURBATION) < config.condition_dropout
            ids = ids.without_perturbation(hidden_B)
        if config.cell_type_dropout > 0:
            hidden_B = uniform(index_B, seed, HIDE_CELL_TYPE) < config.cell_type_dropout
            ids = replace(ids, cell_type_B=ids.cell_type_B.masked_fill(hidden_B, 0))
        if config.batch_dropout > 0:
            hidden_B = uniform(index_B, seed, HIDE_BATCH) < config.batch_dropout
            ids = replace(ids, batch_B=ids.batch_B.masked_fill(hidden_B, 0))
        return ids


@dataclass(frozen=True, slots=True)
class Perturbed:
    """Vectors of a perturbation: one per component, and their sum over the components present."""

    component_BJD: Tensor
    present_BJ: Tensor
    sum_BD: Tensor


class FeatureMap(nn.Module):
    """Features of a component -> its vector; exactly 0 for a component without."""

    feature_CV: Tensor

    def __init__(self, num_components: int, num_features: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(num_features, width)
        self.outer = nn.Linear(width, width)
        # Its output starts as large as a row of the table: at the size of an ordinary map it would
        # be a thirtieth of that, and features be learned too late.
        for linear, gain in ((self.inner, 1.0), (self.outer, SILU_GAIN)):
            weight, _bias = linear.parameters()
            embedding_start(weight, 1 / (gain * math.sqrt(linear.in_features)))
        # Kept with the weights, so that a model needs no other file for the names it knows.
        self.register_buffer("feature_CV", torch.zeros(num_components, num_features))

    def forward(self, component_BJ: Tensor, kept_BJV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return vectors [B, J, D], and which components have features [B, J]."""
        feature_BJV = F.embedding(component_BJ, self.feature_CV)
        is_known_BJ = feature_BJV.any(-1)
        if kept_BJV is not None:
            feature_BJV = feature_BJV * kept_BJV / (1 - FEATURE_DROPOUT)
        mapped_BJD = self.outer(F.silu(self.inner(feature_BJV)))
        return mapped_BJD * is_known_BJ[..., None], is_known_BJ


class ConditionEncoder(nn.Module):
    """Tables and small maps that turn the facts of a set into the modulation of its layers."""

    dose_frequency_F: Tensor
    time_frequency_F: Tensor

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_heads
        self.fusion = config.fusion
        self.component_table = _table(len(vocabulary.components), width)
        self.cell_type_table = _table(len(vocabulary.cell_types) + 1, width)
        self.batch_table = _table(len(vocabulary.batches) + 1, width)
        self.dose = nn.Sequential(
            nn.Linear(2 * NUM_DOSE_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.dose_scale = nn.Linear(width, width, bias=False)
        self.dose_shift = nn.Linear(width, width, bias=False)
        self.time = nn.Sequential(
            nn.Linear(2 * NUM_TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.features = None
        if vocabulary.num_features:
            num_components = len(vocabulary.components) + len(vocabulary.described)
            self.features = FeatureMap(num_components, vocabulary.num_features, width)
        if self.fusion is Fusion.seed_attention:
            self.seed_1D = embedding_start(nn.Parameter(torch.zeros(1, width)), 1.0)
            self.query = nn.Linear(width, width, bias=False)
            self.key = nn.Linear(width, width, bias=False)
            self.value = nn.Linear(width, width, bias=False)
            self.out = nn.Linear(width, width, bias=False)
        self.modulation = nn.Linear(width, NUM_MODULATIONS * width)
        for module in (self.dose_scale, self.dose_shift, self.modulation):
            for parameter in module.parameters():
                nn.init.zeros_(constant_start(parameter))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
        # log10 of a dose: waves from 16 decades, longer than any screen, to half a decade.
        waves_F = torch.logspace(math.log10(16.0), math.log10(0.5), NUM_DOSE_FREQUENCIES)
        self.register_buffer("dose_frequency_F", 2 * math.pi / waves_F, persistent=False)
        exponent_F = torch.arange(NUM_TIME_FREQUENCIES) / NUM_TIME_FREQUENCIES
        self.register_buffer("time_frequency_F", 1e4**-exponent_F, persistent=False)

    def set_features(self, feature_CV: Tensor) -> None:
        """Keep the features of all components, zeros where there are none; saved with the weights.

        More components than there were are names that were learned of after training.
        """
        assert self.features is not None, "a vocabulary without features"
        held_CV = self.features.feature_CV
        self.features.feature_CV = feature_CV.to(held_CV)

    def perturbed(self, ids: ConditionIds) -> Perturbed:
        """Return the vectors of each set's perturbation."""
        present_BJ = ids.component_BJ != ABSENT
        row_BJD = self._component_vectors(ids)
        has_dose_BJ = torch.isfinite(ids.dose_BJ) & (ids.dose_BJ > 0)
        # A real number stands in where there is no dose: NaN would reach the gradient.
        log_dose_BJ = torch.where(has_dose_BJ, ids.dose_BJ, 1.0).log10().to(row_BJD.dtype)
        dose_BJD = self.dose(_waves(log_dose_BJ, self.dose_frequency_F))
        dosed_BJD = torch.addcmul(
            row_BJD + self.dose_shift(dose_BJD), row_BJD, self.dose_scale(dose_BJD)
        )
        component_BJD = torch.where(has_dose_BJ[..., None], dosed_BJD, row_BJD)
        component_BJD = component_BJD * present_BJ[..., None]
        return Perturbed(component_BJD, present_BJ, component_BJD.sum(1))

    def _component_vectors(self, ids: ConditionIds) -> Tensor:
        """Return the vector of each component without its dose."""
        component_BJ = ids.component_BJ.clamp(min=0)
        if self.features is None:
            return F.embedding(component_BJ, self.component_table)
        mapped_BJD, is_known_BJ = self.features(component_BJ, ids.kept_BJV)
        is_unknown_BJ = component_BJ >= len(self.component_table)
        if ids.hidden_BJ is not None:
            is_unknown_BJ = is_unknown_BJ | (ids.hidden_BJ & is_known_BJ)
        row_BJ = component_BJ.masked_fill(is_unknown_BJ, UNKNOWN_COMPONENT)
        vector_BJD: Tensor = F.embedding(row_BJ, self.component_table) + mapped_BJD
        return vector_BJD

    def forward(
        self, ids: ConditionIds, perturbed: Perturbed, summary_BD: Tensor, time_B: Tensor
    ) -> Tensor:
        """Return the modulation [B, 6, D] of a set's layers."""
        cell_type_BD = F.embedding(ids.cell_type_B, self.cell_type_table)
        batch_BD = F.embedding(ids.batch_B, self.batch_table)
        facts_B3D = torch.stack([cell_type_BD, batch_BD, summary_BD.to(cell_type_BD.dtype)], 1)
        token_BKD = torch.cat([perturbed.component_BJD, facts_B3D], 1)
        present_BK = F.pad(perturbed.present_BJ, (0, 3), value=True)
        time_B256 = _waves(1000.0 * time_B.to(token_BKD.dtype), self.time_frequency_F)
        if self.fusion is Fusion.sum:  # absent components are zeros
            condition_BD = token_BKD.sum(1)
        else:
            condition_BD = self._attend(token_BKD, present_BK) + perturbed.sum_BD
        condition_BD = condition_BD + self.time(time_B256)
        rows_B6D: Tensor = self.modulation(F.silu(condition_BD))
        return rows_B6D.view(len(rows_B6D), NUM_MODULATIONS, -1)

    def _attend(self, token_BKD: Tensor, present_BK: Tensor) -> Tensor:
        """Return what the learned seed reads from the tokens that are present."""

        def heads(x_BKD: Tensor) -> Tensor:
            return x_BKD.view(*x_BKD.shape[:2], self.num_heads, -1).transpose(1, 2)

        read_BHKE = F.scaled_dot_product_attention(
            heads(self.query(self.seed_1D)[None]).expand(len(token_BKD), -1, -1, -1),
            heads(self.key(token_BKD)),
            heads(self.value(token_BKD)),
            attn_mask=present_BK[:, None, None, :],
        )
        read_BD: Tensor = self.out(read_BHKE.flatten(1))
        return read_BD


def _table(rows: int, width: int) -> nn.Parameter:
    return embedding_start(nn.Parameter(torch.zeros(rows, width)), 1.0)


def _waves(x: Tensor, frequency_F: Tensor) -> Tensor:
    """Return sines and cosines of ``x`` at each frequency, in the last dimension."""
    angle = x[..., None] * frequency_F
    return torch.cat([angle.sin(), angle.cos()], -1)
