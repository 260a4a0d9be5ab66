r"""An autoencoder of single cells, in whose latent space a path may lie.

.. math:: z = \frac{W \, \mathrm{SiLU}(E(x)) - \mu}{\sigma}, \quad
    \hat x = x_0 + V \, \mathrm{SiLU}(U z)

E is an encoder of the same form as that of a model in gene space; mu and sigma are mean and
standard deviation of W SiLU(E(x)) over some reference cells, which are kept with the weights. They
are a function of the weights alone: equal on all ranks, for every size of micro-batch, after a
restart, and for the moving average, whose latent cells a running mean would not fit. The decoder is
no SwiGLU, which without biases is even in small z: it learned late, or not at all.

It is trained with the model, by its own losses: the path and its targets are detached, since with
a gradient into them a constant encoder would be best.

Shapes: B = sets in the batch, S = cells per set (of this rank, where named own), U = cells of the
summary draw, G = genes, Z = numbers of a latent cell, N = reference cells.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scale.config import Decoder, ModelConfig, ObjectiveConfig, Precision
from scale.draws import normal
from scale.model.backend import reduce_from_tensor_model_parallel_region, tensor_parallel_size
from scale.model.decoders import draw_counts, log_likelihood, to_counts, to_values
from scale.model.encoder import at_least_float32, build_encoder
from scale.model.layers import act_on_own_cells, constant_start, gather_cells, own_cells
from scale.model.losses import SetDistances, mmd_loss
from scale.model.objective import Losses, weigh
from scale.types import Batch, Vocabulary

DRAW_NORMAL_CELLS = 19
"""Purposes of the model's draws are numbers from 11; this one is what latent cells should be."""

NUM_REFERENCE_CELLS = 256
"""A standard deviation over them is known to 4 %, which is the same 4 % for ever."""

# The optimizer moves a number by about its rate per step: in 500 steps of tiny, logarithms of
# dispersions that should rise to 1.4 came to .3, and predicted means were biased by it.
_DISPERSION_SPEED = 10.0
_SMALLEST_SHARE = 1e-6
_SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """A batch whose cells are latent, and what the autoencoder's losses need.

    Parameters
    ----------
    batch
        Latent cells in the place of the genes, whole sets, without gradient.
    control_BSZ, treated_BSZ
        This rank's latent cells, with gradient.
    """

    batch: Batch
    control_BSZ: Tensor
    treated_BSZ: Tensor


class CellDecoder(nn.Module):
    """Latent cells -> one number per gene; starts at zero."""

    def __init__(
        self, latent_size: int, hidden_size: int, num_genes: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(latent_size, hidden_size, bias=False, dtype=dtype)
        self.genes = nn.Linear(hidden_size, num_genes, dtype=dtype)
        for parameter in self.genes.parameters():
            nn.init.zeros_(constant_start(parameter))
        act_on_own_cells(self.parameters())

    def forward(self, latent_BSZ: Tensor) -> Tensor:
        """Return the numbers in the dtype of the weights."""
        out_BSG: Tensor = self.genes(F.silu(self.inner(latent_BSZ)))
        return out_BSG


class LatentSpace(nn.Module):
    """Genes -> latent cells and back.

    Parameters
    ----------
    config, objective
        Sizes, decoder and weights of the losses.
    vocabulary
        How values were made of counts.
    precision
        Of the maps; standardisation, likelihood and losses are float32.
    provider
        Of layers.
    recompute
        Compute gene blocks again for their gradients.
    """

    reference_NG: Tensor
    offset_G: Tensor

    def __init__(
        self,
        config: ModelConfig,
        objective: ObjectiveConfig,
        vocabulary: Vocabulary,
        precision: Precision,
        provider: Any,
        *,
        recompute: bool,
    ) -> None:
        super().__init__()
        assert objective.latent_size is not None, "checked with the settings"
        num_genes, dtype = len(vocabulary.genes), torch.float32
        if precision is Precision.bf16:
            dtype = torch.bfloat16
        self.objective = objective
        self.vocabulary = vocabulary
        # an autoencoder has nothing to learn but what cells look like
        self.encoder = build_encoder(
            config, num_genes, precision, provider, recompute=recompute, speed=1.0
        )
        self.narrow = nn.Linear(config.hidden_size, objective.latent_size, bias=False, dtype=dtype)
        self.decoder = CellDecoder(objective.latent_size, config.ffn_hidden_size, num_genes, dtype)
        act_on_own_cells(self.narrow.parameters())
        if objective.decoder is Decoder.negative_binomial:
            self.slow_dispersion_G = nn.Parameter(torch.zeros(num_genes))
            act_on_own_cells([self.slow_dispersion_G])
        self.register_buffer("reference_NG", torch.zeros(NUM_REFERENCE_CELLS, num_genes))
        self.register_buffer("offset_G", torch.zeros(num_genes))

    @property
    def log_dispersion_G(self) -> Tensor:
        """Logarithms of the dispersions of ``negative_binomial``."""
        return _DISPERSION_SPEED * self.slow_dispersion_G

    def set_reference(self, reference_NG: Tensor) -> None:
        """Keep training cells that set the scale of latent cells and where the decoder starts.

        A store of fewer cells than are kept has some of them several times.
        """
        row_N = torch.arange(NUM_REFERENCE_CELLS) % len(reference_NG)
        self.reference_NG.copy_(reference_NG[row_N])
        offset_G = self.reference_NG.mean(0)
        if self.objective.decoder is Decoder.negative_binomial:
            share_NG = torch.expm1(self.reference_NG * self.vocabulary.value_scale)
            offset_G = (share_NG.mean(0) / self.vocabulary.target_sum + _SMALLEST_SHARE).log()
        self.offset_G.copy_(offset_G)

    # --- genes -> latent cells --------------------------------------------------------------------

    def encode(self, batch: Batch) -> LatentBatch:
        """Return the latent cells of a batch for training.

        Raises
        ------
        ValueError
            If there are no reference cells.
        """
        assert batch.treated_BSG is not None, "training has treated cells"
        if not self.reference_NG.any():
            raise ValueError(
                "objective.space=latent takes the scale of latent cells from training cells; "
                "set_statistics first"
            )
        center_Z, deviation_Z = self._scale()
        control_BSZ = self._latent(own_cells(batch.control_BSG), center_Z, deviation_Z)
        treated_BSZ = self._latent(own_cells(batch.treated_BSG), center_Z, deviation_Z)
        with torch.no_grad():
            latent = replace(
                batch,
                control_BSG=gather_cells(control_BSZ.detach()),
                treated_BSG=gather_cells(treated_BSZ.detach()),
                summary_BUG=self._whole(batch.summary_BUG, center_Z, deviation_Z),
            )
        return LatentBatch(latent, control_BSZ, treated_BSZ)

    @torch.no_grad()
    def of_controls(self, batch: Batch) -> Batch:
        """Return a batch with latent controls, and without treated cells, for prediction."""
        center_Z, deviation_Z = self._scale()
        return replace(
            batch,
            control_BSG=self._whole(batch.control_BSG, center_Z, deviation_Z),
            summary_BUG=self._whole(batch.summary_BUG, center_Z, deviation_Z),
            treated_BSG=None,
            treated_mask_BS=None,
            treated_library_BS=None,
        )

    def _whole(self, x_BSG: Tensor, center_Z: Tensor, deviation_Z: Tensor) -> Tensor:
        return gather_cells(self._latent(own_cells(x_BSG), center_Z, deviation_Z))

    def _latent(self, x_BSG: Tensor, center_Z: Tensor, deviation_Z: Tensor) -> Tensor:
        return (self._narrowed(x_BSG) - center_Z) / deviation_Z

    def _narrowed(self, x_BSG: Tensor) -> Tensor:
        return at_least_float32(self.narrow(F.silu(self.encoder(x_BSG))))

    @torch.no_grad()
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the reference cells before standardisation."""
        narrowed_NZ = self._narrowed(self.reference_NG[None])[0]
        return narrowed_NZ.mean(0), narrowed_NZ.std(0).clamp(min=_SMALLEST_DEVIATION)

    # --- losses of the autoencoder ----------------------------------------------------------------

    def losses(self, latent: LatentBatch, batch: Batch, seed: int) -> Losses:
        """Return the weighted losses of the autoencoder; they are all that trains it."""
        losses = {"reconstruction": self._reconstruction(latent, batch)}
        if self.objective.alignment_weight != 0:
            losses["alignment"] = _alignment(latent, batch, seed)
        return weigh(self.objective, losses)

    def _reconstruction(self, latent: LatentBatch, batch: Batch) -> Tensor:
        """Return the mean loss of a gene of a cell, per set: all control and treated cells."""
        assert batch.treated_BSG is not None, "training has treated cells"
        assert batch.treated_mask_BS is not None, "training has treated cells"
        assert batch.treated_library_BS is not None, "training has treated cells"
        sum_B = self._sum_of_errors(
            latent.control_BSZ,
            batch.control_BSG,
            batch.control_library_BS,
            batch.control_mask_BS,
        ) + self._sum_of_errors(
            latent.treated_BSZ,
            batch.treated_BSG,
            batch.treated_library_BS,
            batch.treated_mask_BS,
        )
        if tensor_parallel_size() > 1:
            sum_B = reduce_from_tensor_model_parallel_region(sum_B)
        return sum_B / (batch.control_mask_BS.sum(1) + batch.treated_mask_BS.sum(1))

    def _sum_of_errors(
        self, latent_BSZ: Tensor, x_BSG: Tensor, library_BS: Tensor, mask_BS: Tensor
    ) -> Tensor:
        """Return the sum, over this rank's cells of each set, of the mean error of a gene."""
        x_BSG, library_BS, mask_BS = (own_cells(x) for x in (x_BSG, library_BS, mask_BS))
        decoded_BSG = self._decoded(latent_BSZ)
        if self.objective.decoder is Decoder.negative_binomial:
            count_BSG = to_counts(x_BSG, library_BS, self.vocabulary)
            log_mean_BSG = decoded_BSG + _log_library(library_BS)
            error_BSG = -log_likelihood(count_BSG, log_mean_BSG, self.log_dispersion_G)
        else:
            error_BSG = (decoded_BSG - x_BSG).square()
        return (error_BSG.mean(2) * mask_BS).sum(1)

    # --- latent cells -> genes --------------------------------------------------------------------

    def _decoded(self, latent_BSZ: Tensor) -> Tensor:
        """Return values, or logarithms of shares of the library."""
        change_BSG: Tensor = self.decoder(latent_BSZ.to(self.narrow.weight.dtype))
        return self.offset_G + change_BSG

    @torch.no_grad()
    def cells(self, end_BSZ: Tensor, latent: Batch, batch: Batch, seed: int) -> Tensor:
        """Return the cells at the end of a path, whole sets.

        Parameters
        ----------
        end_BSZ
            Predicted latent cells.
        latent, batch
            The control cells that they come from, in latent space and as they are.
        seed
            Of the draws of ``negative_binomial``, which gives each cell its control's library.
        """
        decoded_BSG = gather_cells(self._decoded(own_cells(end_BSZ)))
        match self.objective.decoder:
            case Decoder.negative_binomial:
                library_BS = batch.control_library_BS
                log_mean_BSG = decoded_BSG + _log_library(library_BS)
                count_BSG = draw_counts(
                    log_mean_BSG, self.log_dispersion_G, batch.set_index_B, seed
                )
                return to_values(count_BSG, library_BS, self.vocabulary)
            case Decoder.residual:
                before_BSG = gather_cells(self._decoded(own_cells(latent.control_BSG)))
                return F.relu(decoded_BSG - before_BSG + batch.control_BSG)
        return F.relu(decoded_BSG)


def _alignment(latent: LatentBatch, batch: Batch, seed: int) -> Tensor:
    """Return the kernel distance of a set's latent cells, of both kinds, from normal numbers."""
    assert batch.treated_mask_BS is not None, "training has treated cells"
    cells_BSZ = torch.cat([gather_cells(latent.control_BSZ), gather_cells(latent.treated_BSZ)], 1)
    mask_BS = torch.cat([batch.control_mask_BS, batch.treated_mask_BS], 1)
    normal_BSZ = normal(batch.set_index_B, seed, DRAW_NORMAL_CELLS, cells_BSZ.shape[1:])
    return mmd_loss(SetDistances.between(cells_BSZ, normal_BSZ.to(cells_BSZ), mask_BS, mask_BS))


def _log_library(library_BS: Tensor) -> Tensor:
    # rows of padding have none
    return library_BS.clamp(min=1.0).log()[:, :, None]
