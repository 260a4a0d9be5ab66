r"""From the output of a decoder to a cell, and the law of counts.

Counts k of a cell with library L have a negative binomial law with mean mu and dispersion theta:

.. math:: \log p(k) = \log \frac{\Gamma(k + \theta)}{\Gamma(\theta) \, k!}
    + \theta \log \frac{\theta}{\theta + \mu} + k \log \frac{\mu}{\theta + \mu}

Its variance is :math:`\mu + \mu^2 / \theta`. Values are log1p(k T / L) / scale, so that counts
follow from values and libraries.

Shapes: B = sets in the batch, S = cells per set, G = genes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale.draws import derive
from scale.types import Vocabulary

DRAW_COUNTS = 20
"""Purposes of the model's draws are numbers from 11; this one makes counts of rates."""

LARGEST_LOG_RATE = 15.0
"""Natural logarithm of the most counts of a gene in a cell: 3 million."""


def log_likelihood(count: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    """Return the log probability of counts under a negative binomial law."""
    dispersion = log_dispersion.exp()
    log_sum = torch.logaddexp(log_mean, log_dispersion)
    # log binomial coefficient; both gammas cancel where nothing was counted
    ways = torch.lgamma(count + dispersion) - torch.lgamma(dispersion) - torch.lgamma(count + 1)
    return ways + dispersion * (log_dispersion - log_sum) + count * (log_mean - log_sum)


def draw_counts(
    log_mean_BSG: Tensor, log_dispersion_G: Tensor, index_B: Tensor, seed: int
) -> Tensor:
    """Return counts drawn from negative binomial laws: Poisson with gamma rates.

    Each set has a generator of its own, keyed by (seed, number of the set), on the device of the
    rates: a set has the same counts in every batch, and other ones on another kind of device.
    """
    dispersion_G = log_dispersion_G.exp()
    mean_BSG = log_mean_BSG.clamp(max=LARGEST_LOG_RATE).exp()
    sets = []
    for mean_SG, index in zip(mean_BSG, index_B.tolist(), strict=True):
        generator = torch.Generator(mean_SG.device)
        generator.manual_seed(derive(seed, DRAW_COUNTS, index) >> 1)
        shape_SG = dispersion_G.expand_as(mean_SG).contiguous()
        gamma_SG = torch._standard_gamma(shape_SG, generator)
        sets.append(torch.poisson(gamma_SG * (mean_SG / dispersion_G), generator))
    return torch.stack(sets)


def to_counts(value_BSG: Tensor, library_BS: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the counts behind values."""
    share_BSG = torch.expm1(value_BSG * vocabulary.value_scale) / vocabulary.target_sum
    return (share_BSG * library_BS[:, :, None]).round_()


def to_values(count_BSG: Tensor, library_BS: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the values of counts, on the scale of a batch."""
    scale_BS1 = (vocabulary.target_sum / library_BS.clamp(min=1.0))[:, :, None]
    return torch.log1p(count_BSG * scale_BS1).div_(vocabulary.value_scale)
