"""Agreement on which genes change and in which direction, calibrated against knowing nothing.

Apart from the other metrics of the gene test because these follow one source, the evaluation of the
Virtual Cell Challenge 2026 (cell-eval2 0.20), on our gene test. S is the set of observed, T that of
predicted significant genes; the gene that a perturbation is called like is left out of both, since
that a silenced gene falls is no prediction. Every function takes P conditions and returns [P].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from scale.evaluate.statistics import Floats, Floats32, GeneTests

Booleans = npt.NDArray[np.bool_]
Targets = Sequence[int | None]

PURITY = 0.9
"""Share of equal signs down to which ``direction_reach`` goes."""


def _without_target(chosen_PG: Booleans, target_P: Targets | None) -> Booleans:
    """Return the sets without the gene of each perturbation."""
    if target_P is None or all(gene is None for gene in target_P):
        return chosen_PG
    chosen_PG = chosen_PG.copy()
    for p, gene in enumerate(target_P):
        if gene is not None:
            chosen_PG[p, gene] = False
    return chosen_PG


def _has_direction(lfc_PG: Floats32) -> Booleans:
    """Fold changes with a sign: infinite ones have one, 0 and undefined ones have none."""
    return np.asarray(~np.isnan(lfc_PG) & (lfc_PG != 0))


def _equal_directions(predicted: GeneTests, observed: GeneTests) -> Booleans:
    """Genes for which both sides have a direction, and the same one."""
    both_PG = _has_direction(predicted.lfc_PG) & _has_direction(observed.lfc_PG)
    return np.asarray(both_PG & (np.sign(predicted.lfc_PG) == np.sign(observed.lfc_PG)))


def jaccard(predicted: GeneTests, observed: GeneTests, target_P: Targets | None = None) -> Floats:
    """Return intersection over union of S and T; 1 if both are empty. Higher is better.

    A control copy calls nothing: 0. A replicate, on simulated data of 100 cells a condition: .57.
    Source: ``de_sig_jaccard`` of cell-eval2.
    """
    first_PG = _without_target(observed.significant_PG, target_P)
    second_PG = _without_target(predicted.significant_PG, target_P)
    both_P = (first_PG & second_PG).sum(axis=1)
    either_P = (first_PG | second_PG).sum(axis=1)
    return np.where(either_P == 0, 1.0, both_P / np.maximum(either_P, 1))


def matthews(predicted: GeneTests, observed: GeneTests) -> Floats:
    r"""Return the Matthews correlation of S and T over all G genes. Higher is better.

    .. math:: (|S \cap T| G - |S| |T|) / \sqrt{|S| |T| (G - |S|) (G - |T|)}

    0 is what guessing earns, whatever the number of guesses; NaN where S or T is empty or holds
    every gene. A control copy, which calls nothing, is undefined and worth 0; a replicate has .72
    on simulated data of 100 cells a condition. Source: ``de_sig_agreement`` of cell-eval2, which
    keeps the perturbed gene and gives -1 where this is undefined.
    """
    first_PG, second_PG = observed.significant_PG, predicted.significant_PG
    genes = first_PG.shape[1]
    first_P = first_PG.sum(axis=1).astype(np.float64)
    second_P = second_PG.sum(axis=1).astype(np.float64)
    both_P = (first_PG & second_PG).sum(axis=1)
    scale_P = np.sqrt(first_P * second_P * (genes - first_P) * (genes - second_P))
    found_P = np.full(len(first_P), np.nan)
    np.divide(both_P * genes - first_P * second_P, scale_P, out=found_P, where=scale_P > 0)
    return found_P


def fold_change_nmae(
    predicted: GeneTests,
    observed: GeneTests,
    target_P: Targets | None = None,
    *,
    minimum: int = 1,
) -> Floats:
    """Return sum of abs(L^ - L) over sum of abs(L), over the genes of S of finite L.

    Lower is better: 1 is what predicting no change earns, and about what a control copy has; a
    replicate has .26 on simulated data of 100 cells a condition. A predicted fold change that is
    not finite reads as 0. NaN with fewer than ``minimum`` genes. Source: ``de_lfc_nmae`` of
    cell-eval2, whose minimum is 10.
    """
    chosen_PG = observed.significant_PG & np.isfinite(observed.lfc_PG)
    chosen_PG = _without_target(chosen_PG, target_P)
    observed_PG = np.where(chosen_PG, observed.lfc_PG, 0.0).astype(np.float64)
    predicted_PG = np.where(np.isfinite(predicted.lfc_PG), predicted.lfc_PG, 0.0)
    error_PG = np.where(chosen_PG, np.abs(predicted_PG - observed_PG), 0.0)
    total_P = np.abs(observed_PG).sum(axis=1)
    found_P = np.full(len(total_P), np.nan)
    enough_P = (total_P > 0) & (chosen_PG.sum(axis=1) >= minimum)
    np.divide(error_PG.sum(axis=1), total_P, out=found_P, where=enough_P)
    return found_P


def direction_yield(
    predicted: GeneTests, observed: GeneTests, target_P: Targets | None = None
) -> Floats:
    """Return k / max(size of T', size of S), k = genes of T' whose signs agree. Higher is better.

    T' are the called genes of which the observed fold change has a sign, significant or not: calls
    in the right direction per call and per gene to find, whichever are more. A call without a sign
    is a miss. A control copy calls nothing: 0; a replicate has .89 on simulated data of 100 cells a
    condition. NaN if S and T' are empty. Source: ``de_direction_fidelity_yield_raw`` of cell-eval2.
    """
    called_PG = predicted.significant_PG & _has_direction(observed.lfc_PG)
    called_PG = _without_target(called_PG, target_P)
    wanted_P = _without_target(observed.significant_PG, target_P).sum(axis=1)
    whole_P = np.maximum(called_PG.sum(axis=1), wanted_P).astype(np.float64)
    hits_P = (called_PG & _equal_directions(predicted, observed)).sum(axis=1)
    found_P = np.full(len(whole_P), np.nan)
    np.divide(hits_P, whole_P, out=found_P, where=whole_P > 0)
    return found_P


def direction_reach(
    predicted: GeneTests, observed: GeneTests, target_P: Targets | None = None
) -> Floats:
    """Return how deep the prediction's own order of S stays right, as a share of S.

    The genes of S are ordered by the prediction: called ones first, then by false discovery rate,
    p-value, magnitude of the fold change, gene. The depth is that of the longest prefix of which
    at least 90 % of the signs agree; genes whose observed fold change has no sign are passed over,
    a prediction without a sign is a miss. Higher is better. A control copy has what coin flips at
    the top earn, about 1 / size of S (.01); a replicate 1.00 on simulated data of 100 cells a
    condition. NaN if S is empty. Source: ``de_direction_reach`` of cell-eval2, universe
    ``adjudicated``, not corrected; it orders equal genes by name.
    """
    chosen_PG = _without_target(observed.significant_PG, target_P)
    judged_PG = chosen_PG & _has_direction(observed.lfc_PG)
    equal_PG = _equal_directions(predicted, observed)
    found_P = np.full(len(chosen_PG), np.nan)
    for p, size in enumerate(chosen_PG.sum(axis=1)):
        if not size:
            continue
        genes = np.flatnonzero(judged_PG[p])
        magnitude = np.nan_to_num(np.abs(predicted.lfc_PG[p, genes]), nan=-1.0, posinf=np.inf)
        keys = (-magnitude, predicted.p_PG[p, genes], predicted.fdr_PG[p, genes])
        order = np.lexsort((*keys, ~predicted.significant_PG[p, genes]))
        depth = np.arange(1, genes.size + 1)
        pure = np.flatnonzero(np.cumsum(equal_PG[p, genes[order]]) / depth >= PURITY)
        found_P[p] = (pure[-1] + 1) / size if pure.size else 0.0
    return found_P
