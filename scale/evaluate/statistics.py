"""The gene test, and what an average over independent units is worth.

The gene test is the two-sided Mann-Whitney U test of a condition's cells against control cells,
gene by gene, on the stored values. Only values that are not 0 are touched: those of the control and
of many conditions are sorted together, gene by gene, and counted in one pass; zeros are counted
from what is left. Sorting whole numbers that hold value and condition takes .28 CPU seconds for 50
conditions of 100 cells and 1,000 control cells (4.8 million values), bisection in compiled code
.37, and 60 MB and most of a second to load.

Shapes: P = conditions, S = sets of cells (the control, then the conditions), G = genes,
N = cells, M = stored values, R = runs of equal values of one set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.special import erfc, stdtrit

Floats = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Outcome = Literal["better", "worse", "open"]

SIGNIFICANT = 0.05
"""False discovery rate below which a gene counts as changed."""
MINIMUM_UNITS = 3
"""Units below which no interval is given."""
_VALUES_AT_ONCE = 1 << 22
"""Stored values of the conditions that are tested together: 70 MB with their copy by gene."""
_VALUES_PER_BLOCK = 1 << 16
"""Of the genes that are counted together: what fits into the cache of a core."""


@dataclass(frozen=True, slots=True)
class GeneTests:
    """Results of the gene test of P conditions: false discovery rates and log2 fold changes."""

    p_PG: Floats
    fdr_PG: Floats32
    lfc_PG: Floats32

    @property
    def significant_PG(self) -> npt.NDArray[np.bool_]:
        """Genes called changed."""
        return self.fdr_PG < np.float32(SIGNIFICANT)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over units with its confidence interval, or the reason why there is none."""

    mean: float
    low: float
    high: float
    num_units: int
    reason: str


@dataclass(frozen=True, slots=True)
class Signs:
    """How many units a gain is positive in, and what that count is worth by itself.

    Parameters
    ----------
    num_better, num_units
        Units with a positive gain, of those with any.
    p
        Two-sided sign test; gains of exactly 0 are left out.
    best_p
        The least p that so many units can give: 0.0625 with five.
    """

    num_better: int
    num_units: int
    p: float
    best_p: float


def column_sums(cells: sp.csr_matrix) -> Floats:
    """Return the sum of every gene in float64 (scipy's own sum of a float32 matrix is float32)."""
    return np.asarray(np.bincount(cells.indices, cells.data, cells.shape[1]), dtype=np.float64)


def column_means(cells: sp.csr_matrix) -> Floats:
    """Return the mean of every gene, summed in float64."""
    return column_sums(cells) / float(cells.shape[0])


def _groups(control: sp.csr_matrix, conditions: Sequence[sp.csr_matrix]) -> Iterator[slice]:
    """Cut conditions into groups that are tested together: the control is sorted in each."""
    limit = max(_VALUES_AT_ONCE, control.nnz)
    size_P = np.array([cells.nnz + cells.shape[1] for cells in conditions])
    group_P = (np.cumsum(size_P) - size_P) // limit
    start = np.flatnonzero(np.diff(group_P, prepend=-1))
    for first, last in pairwise([*start.tolist(), len(conditions)]):
        yield slice(first, last)


@dataclass(frozen=True, slots=True)
class _Counts:
    """What sorting the values of some genes tells, [genes, S] each; set 0 is the control.

    Parameters
    ----------
    stored_GS
        Values that are not 0.
    below_GS
        Sum over a set's values of the control's values below, and half of those equal.
    ties_GS
        Sum over values of what they add to the tie sum t^3 - t of the control's values.
    """

    stored_GS: Floats
    below_GS: Floats
    ties_GS: Floats


def _is_new(keys: Words, start_G1: Integers) -> npt.NDArray[np.bool_]:
    """Return whether a key is another than the one before it in its gene; one more for the end."""
    is_new = np.ones(keys.size + 1, dtype=bool)
    np.not_equal(keys[1:], keys[:-1], out=is_new[1:-1])
    is_new[start_G1] = True
    return is_new


def _count(data_M: Floats32, set_M: Words, start_G1: Integers, num: int) -> _Counts:
    """Count the values of some genes, which stand one gene after the other, among ``num`` sets."""
    # Positive floats are in the order of their bits: equal values come together, the control first.
    bits = np.uint64(num.bit_length())
    key_M = (data_M.view(np.uint32).astype(np.uint64) << bits) | set_M
    for first, last in pairwise(start_G1.tolist()):
        key_M[first:last].sort()
    start_R1 = np.flatnonzero(_is_new(key_M, start_G1))
    count_R = np.diff(start_R1)
    key_R = key_M[start_R1[:-1]]
    start_G1 = np.searchsorted(start_R1, start_G1)
    gene_R = np.repeat(np.arange(start_G1.size - 1), np.diff(start_G1))
    set_R = (key_R & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    is_control_R = set_R == 0
    # Counts of control values go on from gene to gene; those of the genes before are taken off.
    not_above_R = np.cumsum(count_R * is_control_R)
    before_R = np.concatenate([[0], not_above_R])[:-1]
    below_R = np.maximum.accumulate(before_R * _is_new(key_R >> bits, start_G1)[:-1])
    equal_R = np.where(is_control_R, 0, not_above_R - below_R)
    shape = (start_G1.size - 1, num)
    place_R = gene_R * num + set_R

    def total(weights: npt.NDArray[np.float64], place: Integers = place_R) -> Floats:
        sums = np.bincount(place, weights, shape[0] * shape[1])
        return np.asarray(sums, dtype=np.float64).reshape(shape)

    stored_GS = total(count_R)
    before_G1 = (np.cumsum(stored_GS[:, 0]) - stored_GS[:, 0])[:, None]
    below_GS = total(count_R * (below_R + 0.5 * equal_R)) - stored_GS * before_G1
    tied = np.flatnonzero((equal_R > 0) | (count_R > 1))
    k, m = count_R[tied].astype(np.float64), equal_R[tied].astype(np.float64)
    # (m + k)^3 - (m + k) - (m^3 - m): the m of the control are in its own sum
    return _Counts(stored_GS, below_GS, total(k * (3 * m * (m + k) + k * k - 1), place_R[tied]))


def _rank_sums(
    control: sp.csr_matrix, conditions: Sequence[sp.csr_matrix]
) -> tuple[Floats, Floats]:
    """Return U and the tie sum, [P, G] each, of conditions that are sorted together."""
    sets = [control, *conditions]
    num_S = np.array([cells.shape[0] for cells in sets], dtype=np.float64)
    columns = sp.vstack(sets, format="csr", dtype=np.float32).tocsc()
    columns.eliminate_zeros()
    set_N = np.repeat(np.arange(len(sets), dtype=np.uint64), num_S.astype(np.int64))
    num_genes = columns.shape[1]
    step = max(1, _VALUES_PER_BLOCK * num_genes // max(columns.nnz, 1))
    u_PG = np.empty((len(conditions), num_genes))
    ties_PG = np.empty((len(conditions), num_genes))
    for gene in range(0, num_genes, step):
        block = slice(gene, gene + step)
        start_G1 = columns.indptr[gene : gene + step + 1].astype(np.int64)
        part = slice(start_G1[0], start_G1[-1])
        set_M = set_N[columns.indices[part]]
        found = _count(columns.data[part], set_M, start_G1 - start_G1[0], len(sets))
        zeros_GS = num_S - found.stored_GS
        u_GS = found.below_GS + zeros_GS[:, :1] * (found.stored_GS + 0.5 * zeros_GS)
        all_zeros_GS = zeros_GS + zeros_GS[:, :1]
        ties_GS = found.ties_GS + found.ties_GS[:, :1] + all_zeros_GS**3 - all_zeros_GS
        u_PG[:, block], ties_PG[:, block] = u_GS[:, 1:].T, ties_GS[:, 1:].T
    return u_PG, ties_PG


def rank_sum(control: sp.csr_matrix, conditions: Sequence[sp.csr_matrix]) -> tuple[Floats, Floats]:
    r"""Return U (of a condition's cells) and the two-sided p-value of every gene, [P, G] each.

    .. math::
        U = \sum_i \#(c < x_i) + \#(c = x_i) / 2, \qquad
        z = (\max(U, n n_c - U) - n n_c / 2 - 1/2) / s, \qquad p = \min(1, 2 (1 - \Phi(z)))

    with s^2 = n n_c / 12 ((M + 1) - sum(t^3 - t) / (M (M - 1))), M = n + n_c; p = 1 where s = 0.

    Parameters
    ----------
    control
        Control cells, not negative.
    conditions
        Cells of each condition, not negative.
    """
    shape = (len(conditions), control.shape[1])
    u_PG, p_PG = np.empty(shape), np.empty(shape)
    n_c = control.shape[0]
    for part in _groups(control, conditions):
        u_PG[part], ties_PG = _rank_sums(control, conditions[part])
        n_P1 = np.array([[float(cells.shape[0])] for cells in conditions[part]])
        m_P1 = n_P1 + n_c
        variance_PG = n_P1 * n_c / 12.0 * ((m_P1 + 1) - ties_PG / (m_P1 * (m_P1 - 1.0)))
        sd_PG = np.sqrt(np.maximum(variance_PG, 0.0))
        upper_PG = np.maximum(u_PG[part], n_P1 * n_c - u_PG[part]) - n_P1 * n_c / 2.0 - 0.5
        # rounding leaves a hair of variance where every value is equal
        varies_PG = (ties_PG < m_P1**3 - m_P1) & (sd_PG > 0)
        z_PG = np.divide(upper_PG, sd_PG, out=np.zeros_like(sd_PG), where=varies_PG)
        p_PG[part] = np.where(varies_PG, np.minimum(1.0, erfc(z_PG / np.sqrt(2.0))), 1.0)
    return u_PG, p_PG


def benjamini_hochberg(p_G: Floats) -> Floats:
    """Return false discovery rates by the Benjamini-Hochberg step-up rule.

    Examples
    --------
    >>> benjamini_hochberg(np.array([0.01, 0.04, 0.03])).round(3).tolist()
    [0.03, 0.04, 0.04]
    """
    order = np.argsort(p_G, kind="stable")
    scaled = p_G[order] * (p_G.size / np.arange(1, p_G.size + 1))
    scaled = np.minimum.accumulate(scaled[::-1])[::-1]
    fdr_G = np.empty_like(scaled)
    fdr_G[order] = np.clip(scaled, 0.0, 1.0)
    return fdr_G


def log2_fold_change(mean_G: Floats, control_mean_G: Floats) -> Floats:
    """Return log2(expm1(mean) / expm1(control mean)): geometric means, no pseudocount.

    0 / 0 is 0, a zero on one side is plus or minus infinity.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        lfc_G = np.log2(np.expm1(mean_G) / np.expm1(control_mean_G))
    return np.where(np.isnan(lfc_G), 0.0, lfc_G)


def gene_tests(
    control: sp.csr_matrix, conditions: Sequence[sp.csr_matrix], mean_PG: Floats
) -> GeneTests:
    """Test every condition against the control cells, each with its own FDR over the genes.

    Parameters
    ----------
    control, conditions
        Cells, not negative.
    mean_PG
        Means of the cells of each condition.
    """
    _, p_PG = rank_sum(control, conditions)
    fdr_PG = np.empty(p_PG.shape, dtype=np.float32)
    lfc_PG = np.empty(p_PG.shape, dtype=np.float32)
    control_mean_G = column_means(control)
    for p, mean_G in enumerate(mean_PG):
        fdr_PG[p] = benjamini_hochberg(p_PG[p])
        lfc_PG[p] = log2_fold_change(mean_G, control_mean_G)
    return GeneTests(p_PG, fdr_PG, lfc_PG)


def t_interval(values: Floats, *, confidence: float = 0.95, units: str = "units") -> Interval:
    """Return the mean of unit means and its t-interval with (units - 1) degrees of freedom.

    Below three units there is no interval, and the reason says so. Resampling conditions would
    give one always, but in simulation it covers 28 % in place of 95 %: conditions of one cell line
    share what is particular to that line.

    Parameters
    ----------
    values
        One number per independent unit; NaN is left out.
    confidence
        Coverage.
    units
        What the units are called, for the reason.

    Examples
    --------
    >>> t_interval(np.array([1.0, 2.0]), units="cell lines").reason
    'fewer than 3 cell lines (2): no interval'
    """
    values = values[np.isfinite(values)]
    count = int(values.size)
    mean = float(values.mean()) if count else float("nan")
    if count < MINIMUM_UNITS:
        reason = f"fewer than {MINIMUM_UNITS} {units} ({count}): no interval"
        return Interval(mean, float("nan"), float("nan"), count, reason)
    half = float(stdtrit(count - 1, 0.5 + confidence / 2) * values.std(ddof=1) / count**0.5)
    return Interval(mean, mean - half, mean + half, count, "")


def outcome_of(low: float, high: float) -> Outcome:
    """Return what the interval of a gain allows to say: better or worse only if it leaves out 0."""
    if np.isfinite(low) and low > 0:
        return "better"
    if np.isfinite(high) and high < 0:
        return "worse"
    return "open"


def count_signs(gains: Floats) -> Signs:
    """Return in how many units a gain is positive, with the sign test.

    Examples
    --------
    >>> count_signs(np.array([0.1, 0.2, 0.1, 0.3, 0.2]))
    Signs(num_better=5, num_units=5, p=0.0625, best_p=0.0625)
    """
    gains = gains[np.isfinite(gains)]
    positive, not_zero = int((gains > 0).sum()), int((gains != 0).sum())
    fewer = min(positive, not_zero - positive)
    p = min(1.0, 2.0 * sum(comb(not_zero, i) for i in range(fewer + 1)) / 2**not_zero)
    return Signs(positive, int(gains.size), p, min(1.0, 2.0 * 0.5 ** int(gains.size)))
