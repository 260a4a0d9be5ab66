r"""Distances between a predicted and an observed set of cells, one function each.

All of them are functions of the squared distances between cells (:class:`SetDistances`), which are
computed once for a batch: each has the signature ``(distances) -> loss_B`` and stands in
``LOSSES``. Estimates over pairs of cells are U-statistics: unbiased, hence they can be negative;
never clamp them or take their root.

Shapes: B = sets in the batch, S = predicted cells per set, T = observed cells per set, G = genes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale.model.pairing import Pairs

MMD_WIDTHS = (0.5, 1.0, 2.0, 4.0)
"""Kernel widths in units of the median squared distance between observed cells."""


@dataclass(frozen=True, slots=True)
class SetDistances:
    """Squared distances between and within two sets of cells, and which cells are real.

    Parameters
    ----------
    across_BST
        From each predicted to each observed cell.
    predicted_BSS
        Between predicted cells.
    observed_BTT
        Between observed cells; has no gradient.
    mask_BS, observed_mask_BT
        True for real cells.
    num_genes
        G, by whose root or number a loss is divided.
    pairs
        The observed partner of each predicted cell, for the point loss.
    """

    across_BST: Tensor
    predicted_BSS: Tensor
    observed_BTT: Tensor
    mask_BS: Tensor
    observed_mask_BT: Tensor
    num_genes: int
    pairs: Pairs | None = None

    @classmethod
    def between(
        cls,
        predicted_BSG: Tensor,
        observed_BTG: Tensor,
        mask_BS: Tensor,
        observed_mask_BT: Tensor,
        pairs: Pairs | None = None,
    ) -> SetDistances:
        """Compute the distances; the gradient flows to the predicted cells alone."""
        tables: tuple[Tensor, Tensor, Tensor] = _SquaredDistances.apply(  # type: ignore[no-untyped-call]
            predicted_BSG, observed_BTG, observed_mask_BT
        )
        across_BST, predicted_BSS, observed_BTT = tables
        num_genes = predicted_BSG.shape[-1]
        return cls(
            across_BST, predicted_BSS, observed_BTT, mask_BS, observed_mask_BT, num_genes, pairs
        )


SetLoss = Callable[[SetDistances], Tensor]


def mean_loss(sets: SetDistances) -> Tensor:
    r"""Return the squared distance of the mean cells per gene.

    .. math:: L_M = \| \mathrm{mean}_w A - \mathrm{mean}_v Y \|^2 / G
        = \left[ \mathrm{mean}_{ij} d^2(a_i, y_j) - \tfrac{1}{2} \mathrm{mean}_{ij} d^2(a_i, a_j)
        - \tfrac{1}{2} \mathrm{mean}_{ij} d^2(y_i, y_j) \right] / G
    """
    w_BS, v_BT = (
        _shares(sets.mask_BS, sets.across_BST),
        _shares(sets.observed_mask_BT, sets.across_BST),
    )
    across_B = _bilinear(w_BS, sets.across_BST, v_BT)
    predicted_B = _bilinear(w_BS, sets.predicted_BSS, w_BS)
    observed_B = _bilinear(v_BT, sets.observed_BTT, v_BT)
    return (across_B - 0.5 * (predicted_B + observed_B)) / sets.num_genes


def point_loss(sets: SetDistances) -> Tensor:
    r"""Return the mean squared difference of paired cells; alone it collapses the spread of cells.

    .. math:: L_P = \frac{1}{n G} \sum_i \| a_i - y_{\pi(i)} \|^2

    over the n predicted cells that are real and have a partner.
    """
    if sets.pairs is None:
        raise ValueError("the point loss needs to know which observed cell is whose partner")
    real_BS = sets.mask_BS & sets.pairs.has_partner_BS
    squared_BS = sets.across_BST.gather(2, sets.pairs.partner_BS[:, :, None]).squeeze(2)
    sum_B = torch.where(real_BS, squared_BS, 0).sum(1)
    return sum_B / (real_BS.sum(1) * sets.num_genes)


def energy_loss(sets: SetDistances) -> Tensor:
    r"""Return the energy distance over sqrt(G).

    .. math:: L_E = \left[ \frac{2}{nm} \sum_{ij} d(a_i, y_j)
        - \frac{1}{n(n-1)} \sum_{i \ne j} d(a_i, a_j)
        - \frac{1}{m(m-1)} \sum_{i \ne j} d(y_i, y_j) \right] / \sqrt{G}

    It needs no pairing and is strictly proper: least where the two laws are equal. The last term
    has no gradient.
    """
    weight = _PairWeights.of(sets)
    across_B = _mean_distance(sets.across_BST, weight.across_BST)
    predicted_B = _mean_distance(sets.predicted_BSS, weight.predicted_BSS)
    observed_B = _mean_distance(sets.observed_BTT, weight.observed_BTT)
    return (2 * across_B - predicted_B - observed_B) / math.sqrt(sets.num_genes)


def mmd_loss(sets: SetDistances) -> Tensor:
    r"""Return the squared maximum mean discrepancy under a mean of Gaussian kernels.

    .. math:: L_K = \frac{1}{n(n-1)} \sum_{i \ne j} k(a_i, a_j)
        + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j) - \frac{2}{nm} \sum_{ij} k(a_i, y_j),
        \quad k = \mathrm{mean}_s \exp(-d^2 / (2 s M))

    with M the median squared distance between observed cells.
    """
    weight = _PairWeights.of(sets)
    between_BTT = sets.observed_BTT.masked_fill(weight.observed_BTT == 0, torch.nan)
    median_B11 = between_BTT.flatten(1).nanmedian(1).values.clamp(min=1e-12)[:, None, None]

    def mean_kernel(squared: Tensor, weights: Tensor) -> Tensor:
        scaled = squared / median_B11
        kernel = torch.stack([(-scaled / (2 * s)).exp() for s in MMD_WIDTHS]).mean(0)
        return (kernel * weights).sum((1, 2))

    return (
        mean_kernel(sets.predicted_BSS, weight.predicted_BSS)
        + mean_kernel(sets.observed_BTT, weight.observed_BTT)
        - 2 * mean_kernel(sets.across_BST, weight.across_BST)
    )


LOSSES: dict[str, SetLoss] = {
    "energy": energy_loss,
    "mean": mean_loss,
    "point": point_loss,
    "mmd": mmd_loss,
}


class _SquaredDistances(torch.autograd.Function):
    r"""Squared distances by products, and their gradient by products.

    Of the losses, only the products touch the genes: what is elementwise happens on tables of cells
    by cells. With g the gradients of the two tables and h = g + g' of the one within,

    .. math:: da_i = 2 \sum_j g_{ij} (a_i - y_j) + 2 \sum_j h_{ij} (a_i - a_j)

    which is a table of cells by cells times the cells, for either set.
    """

    @staticmethod
    def forward(
        ctx: Any, predicted_BSG: Tensor, observed_BTG: Tensor, observed_mask_BT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Centring at the observed mean costs little and divides the rounding error by three.
        share_BT = _shares(observed_mask_BT, observed_BTG)
        center_B1G = share_BT[:, None, :] @ observed_BTG
        a_BSG, y_BTG = predicted_BSG - center_B1G, observed_BTG - center_B1G
        with _full_precision():
            ay_BST, aa_BSS, yy_BTT = a_BSG @ y_BTG.mT, a_BSG @ a_BSG.mT, y_BTG @ y_BTG.mT
        norm_a_BS, norm_y_BT = _diagonal(aa_BSS), _diagonal(yy_BTT)
        squared = (
            _from_products(ay_BST, norm_a_BS, norm_y_BT),
            _from_products(aa_BSS, norm_a_BS, norm_a_BS),
            _from_products(yy_BTT, norm_y_BT, norm_y_BT),
        )
        ctx.save_for_backward(a_BSG, y_BTG)
        ctx.mark_non_differentiable(squared[2])
        return squared

    @staticmethod
    def backward(
        ctx: Any, across_BST: Tensor, within_BSS: Tensor, _observed: Tensor
    ) -> tuple[Tensor, None, None]:
        a_BSG, y_BTG = ctx.saved_tensors
        to_y_BST, to_a_BSS = across_BST * -2, (within_BSS + within_BSS.mT).mul_(-2)
        _diagonal(to_a_BSS).sub_(to_a_BSS.sum(2) + to_y_BST.sum(2))
        with _full_precision():
            return (to_a_BSS @ a_BSG).baddbmm_(to_y_BST, y_BTG), None, None


@dataclass(frozen=True, slots=True)
class _PairWeights:
    """Weights of a U-statistic: equal over pairs of real, different cells; their sum is 1."""

    across_BST: Tensor
    predicted_BSS: Tensor
    observed_BTT: Tensor

    @classmethod
    def of(cls, sets: SetDistances) -> _PairWeights:
        dtype = sets.across_BST.dtype
        w_BS, v_BT = sets.mask_BS.to(dtype), sets.observed_mask_BT.to(dtype)
        n_B11, m_B11 = w_BS.sum(1)[:, None, None], v_BT.sum(1)[:, None, None]
        across_BST = w_BS[:, :, None] * v_BT[:, None, :] / (n_B11 * m_B11)
        return cls(across_BST, _different(w_BS, n_B11), _different(v_BT, m_B11))


def _different(w_BS: Tensor, n_B11: Tensor) -> Tensor:
    weight_BSS = w_BS[:, :, None] * w_BS[:, None, :] / (n_B11 * (n_B11 - 1))
    weight_BSS.diagonal(dim1=1, dim2=2).zero_()
    return weight_BSS


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep TF32 out: its error of a distance is 2e-2 in place of 2e-5."""
    matmul = torch.backends.cuda.matmul
    allowed, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = allowed


def _diagonal(table_BSN: Tensor) -> Tensor:
    return table_BSN.diagonal(dim1=1, dim2=2)


def _from_products(product: Tensor, norm_a: Tensor, norm_b: Tensor) -> Tensor:
    return torch.sub(norm_a[:, :, None] + norm_b[:, None, :], product, alpha=2).clamp_(min=0)


def _mean_distance(squared: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of distances.

    A 1 takes the place of unweighted entries before the root: the root of a masked 0 has an
    infinite gradient, and zero times infinity is not a number.
    """
    safe = torch.where(weights == 0, 1.0, squared.clamp(min=1e-12))
    return (safe.sqrt() * weights).sum((1, 2))


def _shares(mask_BS: Tensor, like: Tensor) -> Tensor:
    """Return equal weights of the real cells of a set, of sum 1."""
    return (mask_BS / mask_BS.sum(1, keepdim=True)).to(like.dtype)


def _bilinear(w_BS: Tensor, table_BST: Tensor, v_BT: Tensor) -> Tensor:
    sum_B11: Tensor = w_BS[:, None, :] @ table_BST @ v_BT[:, :, None]
    return sum_B11[:, 0, 0]
