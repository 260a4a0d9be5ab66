r"""Distances between a predicted and an observed set of cells, one function each.

All have the signature ``(predicted_BSG, observed_BSG, predicted_mask_BS, observed_mask_BS) ->
loss_B`` and stand in ``LOSSES``. ``point`` expects the observed cells in the order of the predicted
ones. Estimates over pairs of cells are U-statistics: unbiased, hence they can be negative; never
clamp them or take their root.

Shapes: B = sets in the batch, S = cells per set (the two sets may differ), G = genes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SetLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

MMD_WIDTHS = (0.5, 1.0, 2.0, 4.0)
"""Kernel widths in units of the median squared distance between observed cells."""


def mean_loss(a_BSG: Tensor, y_BSG: Tensor, w_BS: Tensor, v_BS: Tensor) -> Tensor:
    r"""Return the squared distance of the mean cells per gene.

    .. math:: L_M = \| \mathrm{mean}_w A - \mathrm{mean}_v Y \|^2 / G
    """
    squared_BG = F.mse_loss(_mean(a_BSG, w_BS), _mean(y_BSG, v_BS), reduction="none")
    mean_B: Tensor = squared_BG.mean(-1)
    return mean_B


def point_loss(a_BSG: Tensor, y_BSG: Tensor, w_BS: Tensor, v_BS: Tensor) -> Tensor:
    r"""Return the mean squared difference of paired cells; alone it collapses the spread of cells.

    .. math:: L_P = \frac{1}{n G} \sum_i \| a_i - y_{\pi(i)} \|^2

    over the n cells that are real on both sides.
    """
    both_BS = w_BS & v_BS
    # the sum is divided, and not each of its terms in the backward pass of a mean
    squared_BS = F.mse_loss(a_BSG, y_BSG, reduction="none").sum(-1) / a_BSG.shape[-1]
    mean_B: Tensor = torch.where(both_BS, squared_BS, 0).sum(1) / both_BS.sum(1)
    return mean_B


def energy_loss(a_BSG: Tensor, y_BSG: Tensor, w_BS: Tensor, v_BS: Tensor) -> Tensor:
    r"""Return the energy distance over sqrt(G).

    .. math:: L_E = \left[ \frac{2}{nm} \sum_{ij} d(a_i, y_j)
        - \frac{1}{n(n-1)} \sum_{i \ne j} d(a_i, a_j)
        - \frac{1}{m(m-1)} \sum_{i \ne j} d(y_i, y_j) \right] / \sqrt{G}

    It needs no pairing and is strictly proper: least where the two laws are equal. The last term
    has no gradient.
    """
    squared, weight = _SquaredDistances.of(a_BSG, y_BSG, v_BS), _PairWeights.of(w_BS, v_BS, a_BSG)
    across_B = _mean_distance(squared.across_BSS, weight.across_BSS)
    predicted_B = _mean_distance(squared.predicted_BSS, weight.predicted_BSS)
    observed_B = _mean_distance(squared.observed_BSS, weight.observed_BSS)
    return (2 * across_B - predicted_B - observed_B) / math.sqrt(a_BSG.shape[-1])


def mmd_loss(a_BSG: Tensor, y_BSG: Tensor, w_BS: Tensor, v_BS: Tensor) -> Tensor:
    r"""Return the squared maximum mean discrepancy under a mean of Gaussian kernels.

    .. math:: L_K = \frac{1}{n(n-1)} \sum_{i \ne j} k(a_i, a_j)
        + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j) - \frac{2}{nm} \sum_{ij} k(a_i, y_j),
        \quad k = \mathrm{mean}_s \exp(-d^2 / (2 s M))

    with M the median squared distance between observed cells.
    """
    squared, weight = _SquaredDistances.of(a_BSG, y_BSG, v_BS), _PairWeights.of(w_BS, v_BS, a_BSG)
    between_BSS = squared.observed_BSS.masked_fill(weight.observed_BSS == 0, torch.nan)
    median_B11 = between_BSS.flatten(1).nanmedian(1).values.clamp(min=1e-12)[:, None, None]

    def mean_kernel(squared_BSS: Tensor, weight_BSS: Tensor) -> Tensor:
        scaled_BSS = squared_BSS / median_B11
        kernel_BSS = torch.stack([(-scaled_BSS / (2 * s)).exp() for s in MMD_WIDTHS]).mean(0)
        return (kernel_BSS * weight_BSS).sum((1, 2))

    return (
        mean_kernel(squared.predicted_BSS, weight.predicted_BSS)
        + mean_kernel(squared.observed_BSS, weight.observed_BSS)
        - 2 * mean_kernel(squared.across_BSS, weight.across_BSS)
    )


LOSSES: dict[str, SetLoss] = {
    "energy": energy_loss,
    "mean": mean_loss,
    "point": point_loss,
    "mmd": mmd_loss,
}


@dataclass(frozen=True, slots=True)
class _PairWeights:
    """Weights of a U-statistic: equal over pairs of real, different cells; their sum is 1."""

    across_BSS: Tensor
    predicted_BSS: Tensor
    observed_BSS: Tensor

    @classmethod
    def of(cls, w_BS: Tensor, v_BS: Tensor, like: Tensor) -> _PairWeights:
        w_BS, v_BS = w_BS.to(like.dtype), v_BS.to(like.dtype)
        n_B11, m_B11 = w_BS.sum(1)[:, None, None], v_BS.sum(1)[:, None, None]
        across_BSS = w_BS[:, :, None] * v_BS[:, None, :] / (n_B11 * m_B11)
        return cls(across_BSS, _different(w_BS, n_B11), _different(v_BS, m_B11))


def _different(w_BS: Tensor, n_B11: Tensor) -> Tensor:
    weight_BSS = w_BS[:, :, None] * w_BS[:, None, :] / (n_B11 * (n_B11 - 1))
    weight_BSS.diagonal(dim1=1, dim2=2).zero_()
    return weight_BSS


@dataclass(frozen=True, slots=True)
class _SquaredDistances:
    """Squared distances by products; those between observed cells have no gradient."""

    across_BSS: Tensor
    predicted_BSS: Tensor
    observed_BSS: Tensor

    @classmethod
    def of(cls, a_BSG: Tensor, y_BSG: Tensor, v_BS: Tensor) -> _SquaredDistances:
        # Centring at the observed mean costs little and divides the rounding error by three.
        center_B1G = _mean(y_BSG, v_BS)[:, None, :]
        with _full_precision():
            products = _Products.apply(a_BSG - center_B1G, y_BSG - center_B1G)  # type: ignore[no-untyped-call]
        aa_BSS, ay_BSS, yy_BSS = products
        norm_a_BS, norm_y_BS = _diagonal(aa_BSS), _diagonal(yy_BSS)
        return cls(
            _from_products(ay_BSS, norm_a_BS, norm_y_BS),
            _from_products(aa_BSS, norm_a_BS, norm_a_BS),
            _from_products(yy_BSS, norm_y_BS, norm_y_BS).detach(),
        )


class _Products(torch.autograd.Function):
    """Inner products within and between two sets, with one product per term of the gradient."""

    @staticmethod
    def forward(ctx: Any, a_BSG: Tensor, y_BSG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(a_BSG, y_BSG)
        return a_BSG @ a_BSG.mT, a_BSG @ y_BSG.mT, y_BSG @ y_BSG.mT

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        a_BSG, y_BSG = ctx.saved_tensors
        aa_BSS, ay_BSS, yy_BSS = gradients
        with _full_precision():
            to_a_BSG = torch.bmm(aa_BSS + aa_BSS.mT, a_BSG).baddbmm_(ay_BSS, y_BSG)
            to_y_BSG = None
            if ctx.needs_input_grad[1]:
                to_y_BSG = torch.bmm(yy_BSS + yy_BSS.mT, y_BSG).baddbmm_(ay_BSS.mT, a_BSG)
        return to_a_BSG, to_y_BSG


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep TF32 out: its error of a distance is 2e-2 in place of 2e-5."""
    matmul = torch.backends.cuda.matmul
    allowed, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = allowed


def _diagonal(product_BSS: Tensor) -> Tensor:
    return product_BSS.diagonal(dim1=1, dim2=2)


def _from_products(product_BSS: Tensor, norm_a_BS: Tensor, norm_b_BS: Tensor) -> Tensor:
    squared_BSS = norm_a_BS[:, :, None] + norm_b_BS[:, None, :] - 2 * product_BSS
    return squared_BSS.clamp(min=0)


def _mean_distance(squared_BSS: Tensor, weight_BSS: Tensor) -> Tensor:
    """Return the weighted mean of distances.

    A 1 takes the place of unweighted entries before the root: the root of a masked 0 has an
    infinite gradient, and zero times infinity is not a number.
    """
    safe_BSS = torch.where(weight_BSS == 0, 1.0, squared_BSS.clamp(min=1e-12))
    return (safe_BSS.sqrt() * weight_BSS).sum((1, 2))


def _mean(x_BSG: Tensor, w_BS: Tensor) -> Tensor:
    weight_BS = (w_BS / w_BS.sum(1, keepdim=True)).to(x_BSG.dtype)
    mean_B1G: Tensor = weight_BS[:, None, :] @ x_BSG
    return mean_B1G.squeeze(1)
