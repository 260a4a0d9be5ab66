"""The catalogue of metrics, and those of means, of ranks and of cell-eval's gene tables.

Every function takes P conditions at once and returns [P]; NaN means undefined. Who is to blame for
an undefined value and what it costs is the protocol's business. Names and definitions are those of
cell-eval 0.8.2 where it has the metric. Elsewhere stand the calibrated metrics of the gene test
(``significance``), those of whole distributions (``distances``) and those that need all contexts
(``across_contexts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from scale.evaluate.statistics import Floats, Floats32, GeneTests

Distance = Literal["l1", "l2", "cosine"]
Booleans = npt.NDArray[np.bool_]

CONSTANT = 1e-10
"""Spread (in log1p units) below which a vector is constant but for rounding."""
TOP_K = (10, 20, 50, 100, 200, 500)
_ONLY_HERE = (10, 20)
"""Lengths of gene lists that cell-eval does not score."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the catalogue.

    Parameters
    ----------
    name
        Column name, as cell-eval has it where it has the metric.
    group
        ``bulk``, ``residual``, ``contexts`` (over all contexts of the test set), ``retrieval``,
        ``genes`` (gene test), ``cells`` (distribution).
    better
        ``higher``, ``lower``, or ``none`` for a description.
    no_skill
        What an undefined value is worth in the strict profile if the prediction is at fault.
    full_depth
        How a half-depth ceiling is carried to full depth: ``spearman_brown``, ``half``,
        ``root_half``, ``same`` (unbiased as it is), or ``no`` (there is no correction).
    strict_only
        Not part of cell-eval.
    """

    name: str
    group: Literal["bulk", "residual", "contexts", "retrieval", "genes", "cells"]
    better: Literal["higher", "lower", "none"]
    no_skill: float
    full_depth: Literal["spearman_brown", "half", "root_half", "same", "no"] = "no"
    strict_only: bool = False


def _catalogue() -> dict[str, Metric]:
    nan = float("nan")
    rows = [
        Metric("pearson_delta", "bulk", "higher", 0.0, "spearman_brown"),
        Metric("mse", "bulk", "lower", nan, "half"),
        Metric("mae", "bulk", "lower", nan, "root_half"),
        Metric("mse_delta", "bulk", "lower", nan, "half"),
        Metric("mae_delta", "bulk", "lower", nan, "root_half"),
        Metric("r2_pseudobulk", "bulk", "higher", nan, "no", strict_only=True),
        Metric("mse_normalized", "bulk", "lower", nan, "same", strict_only=True),
        Metric("residual_pearson", "residual", "higher", 0.0, "spearman_brown", strict_only=True),
        Metric(
            "residual_pearson_two_way",
            "residual",
            "higher",
            0.0,
            "spearman_brown",
            strict_only=True,
        ),
        # Spearman-Brown reads .82 where a replicate of simulated data has .75: its genes are chosen
        # by the half that is scored against.
        Metric("direction_at_100", "residual", "higher", 0.5, strict_only=True),
        Metric("shared_pearson", "contexts", "higher", 0.0, "spearman_brown", strict_only=True),
        Metric("modulation_pearson", "contexts", "higher", 0.0, "spearman_brown", strict_only=True),
        *(
            Metric(f"discrimination_score_{d}", "retrieval", "higher", 0.5)
            for d in ("l1", "l2", "cosine")
        ),
        *(
            Metric(f"retrieval_{d}", "retrieval", "higher", 0.5, strict_only=True)
            for d in ("l1", "l2", "cosine", "transposed")
        ),
        *(
            Metric(f"{kind}_at_{k}", "genes", "higher", 0.0, strict_only=k in _ONLY_HERE)
            for kind in ("overlap", "precision")
            for k in ("N", *TOP_K)
        ),
        # Correlations over genes that the observed test calls have no correction either: at half
        # depth it calls larger changes. Spearman-Brown reads .91-.94 where a repeat has .87-.90.
        Metric("de_direction_match", "genes", "higher", 0.0),
        Metric("de_spearman_lfc_sig", "genes", "higher", 0.0),
        Metric("de_sig_genes_recall", "genes", "higher", 0.0),
        Metric("de_spearman_sig", "genes", "higher", 0.0),
        Metric("pr_auc", "genes", "higher", 0.0),
        Metric("roc_auc", "genes", "higher", 0.5),
        Metric("de_nsig_counts_real", "genes", "none", nan),
        Metric("de_nsig_counts_pred", "genes", "none", nan),
        Metric("sig_jaccard", "genes", "higher", 0.0, strict_only=True),
        Metric("sig_mcc", "genes", "higher", 0.0, strict_only=True),
        Metric("lfc_nmae", "genes", "lower", 1.0, strict_only=True),
        Metric("direction_yield", "genes", "higher", 0.0, strict_only=True),
        Metric("direction_reach", "genes", "higher", 0.0, strict_only=True),
        Metric("num_significant_ratio", "genes", "none", nan, strict_only=True),
        Metric("energy_distance", "cells", "lower", nan, "same", strict_only=True),
        Metric("energy_ratio", "cells", "lower", 1.0, "same", strict_only=True),
        Metric("mmd_ratio", "cells", "lower", 1.0, "same", strict_only=True),
        Metric("sliced_wasserstein", "cells", "lower", nan, "root_half", strict_only=True),
        Metric("variance_log_ratio", "cells", "none", nan, "same", strict_only=True),
        Metric("zero_fraction_error", "cells", "lower", nan, "no", strict_only=True),
    ]
    return {row.name: row for row in rows}


METRICS = _catalogue()
"""Every metric by name, in the order of the tables."""

PAPER_NAMES = {
    "PDCorr": "pearson_delta",
    "MSE": "mse",
    "MAE": "mae",
    "R2": "r2_pseudobulk",
    "PDS": "discrimination_score_l1",
    "PDS L1": "discrimination_score_l1",
    "PDS L2": "discrimination_score_l2",
    "PDS cosine": "discrimination_score_cosine",
    "DEOver": "overlap_at_N",
    "DES": "overlap_at_N",
    "DEPrec": "precision_at_N",
    "DirAgr": "de_direction_match",
    "LFCSpear": "de_spearman_lfc_sig",
    "ES": "de_spearman_sig",
    "AUPRC": "pr_auc",
    "AUROC": "roc_auc",
}
"""Names of papers (STATE, PerturbDiff, SCALE; PDS and DES of the Virtual Cell Challenge 2025)."""


# --- bulk ---------------------------------------------------------------------------------------


def pearson(x_PG: Floats, y_PG: Floats, *, constant: float = CONSTANT) -> Floats:
    """Return the Pearson correlation of matching rows; NaN where one spreads below ``constant``.

    Examples
    --------
    >>> pearson(np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 4.0, 6.0]])).round(6).tolist()
    [1.0]
    """
    x_PG = x_PG - x_PG.mean(axis=1, keepdims=True)
    y_PG = y_PG - y_PG.mean(axis=1, keepdims=True)
    defined_P = (np.ptp(x_PG, axis=1) > constant) & (np.ptp(y_PG, axis=1) > constant)
    norm_P = np.linalg.norm(x_PG, axis=1) * np.linalg.norm(y_PG, axis=1)
    r_P = np.full(len(x_PG), np.nan)
    np.divide(np.einsum("pg,pg->p", x_PG, y_PG), norm_P, out=r_P, where=defined_P)
    return np.asarray(np.clip(r_P, -1.0, 1.0))


def mean_squared_error(x_PG: Floats, y_PG: Floats) -> Floats:
    """Return the mean over genes of (x - y)^2."""
    return np.asarray(((x_PG - y_PG) ** 2).mean(axis=1))


def mean_absolute_error(x_PG: Floats, y_PG: Floats) -> Floats:
    """Return the mean over genes of abs(x - y)."""
    return np.asarray(np.abs(x_PG - y_PG).mean(axis=1))


def r2(predicted_PG: Floats, observed_PG: Floats) -> Floats:
    """Return 1 - (squared error) / (variance of the observed means over genes)."""
    total_P = ((observed_PG - observed_PG.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    error_P = ((predicted_PG - observed_PG) ** 2).sum(axis=1)
    r2_P = np.full(len(total_P), np.nan)
    np.divide(error_P, total_P, out=r2_P, where=total_P > 0)
    return 1.0 - r2_P


def residual(x_PG: Floats, basis_KG: Floats) -> Floats:
    """Return what an orthonormal basis of centred vectors leaves of each centred row."""
    x_PG = x_PG - x_PG.mean(axis=1, keepdims=True)
    return x_PG - (x_PG @ basis_KG.T) @ basis_KG


def direction_at(predicted_PG: Floats, observed_PG: Floats, k: int) -> Floats:
    """Return the share of equal signs among the ``k`` genes of largest observed magnitude."""
    top_Pk = np.argsort(-np.abs(observed_PG), axis=1, kind="stable")[:, :k]
    predicted_Pk = np.take_along_axis(predicted_PG, top_Pk, axis=1)
    observed_Pk = np.take_along_axis(observed_PG, top_Pk, axis=1)
    return np.asarray((np.sign(predicted_Pk) == np.sign(observed_Pk)).mean(axis=1))


# --- retrieval ----------------------------------------------------------------------------------


def distances(
    query_PG: Floats, target_QG: Floats, metric: Distance, skip_P: Sequence[int | None]
) -> Floats:
    """Return distances of every query to every target; ``skip_P``: a gene left out of a row.

    One routine serves all pairs: mixing two roundings would break ties that are none. The cosine
    distance to a zero vector is 1.
    """
    if all(gene is None for gene in skip_P):
        return _distances(query_PG, target_QG, metric)
    query_PG, target_QG = query_PG.copy(), target_QG.copy()
    rows = []
    for query_G, gene in zip(query_PG, skip_P, strict=True):
        left_out = [] if gene is None else [gene]
        kept_Q = target_QG[:, left_out]
        # a gene that is 0 everywhere adds nothing to any distance
        query_G[left_out] = target_QG[:, left_out] = 0.0
        rows.append(_distances(query_G[None], target_QG, metric)[0])
        target_QG[:, left_out] = kept_Q
    return np.stack(rows)


def _distances(query_PG: Floats, target_QG: Floats, metric: Distance) -> Floats:
    if metric == "cosine":
        norm_PQ = _norm(query_PG)[:, None] * _norm(target_QG)
        return np.asarray(1.0 - query_PG @ target_QG.T / np.where(norm_PQ > 0, norm_PQ, 1.0))
    return np.asarray(cdist(query_PG, target_QG, "cityblock" if metric == "l1" else "euclidean"))


def _norm(x_PG: Floats) -> Floats:
    return np.asarray(np.sqrt(np.einsum("pg,pg->p", x_PG, x_PG)))


def discrimination_score(distance_PP: Floats) -> Floats:
    """Return 1 - rank / N, rank = 0-based place of the own perturbation, ties by position."""
    own_P1 = np.diag(distance_PP)[:, None]
    before_PP = np.tri(len(distance_PP), k=-1, dtype=bool)
    rank_P = (distance_PP < own_P1).sum(axis=1) + ((distance_PP == own_P1) & before_PP).sum(axis=1)
    return np.asarray(1.0 - rank_P / len(distance_PP))


def retrieval(distance_PP: Floats) -> Floats:
    """Return 1 - k / (N - 1), k = others closer + half of those at equal distance; .5 by chance."""
    count = len(distance_PP)
    if count < 2:
        return np.full(count, np.nan)
    own_P1 = np.diag(distance_PP)[:, None]
    closer_P = (distance_PP < own_P1).sum(axis=1)
    ties_P = (distance_PP == own_P1).sum(axis=1) - 1
    return np.asarray(1.0 - (closer_P + 0.5 * ties_P) / (count - 1))


# --- the gene test ------------------------------------------------------------------------------


def _top(lfc_G: Floats32, significant_G: Booleans) -> npt.NDArray[np.int64]:
    """Significant genes by falling magnitude of the fold change, ties in gene order.

    cell-eval leaves ties to an unstable sort, so that its order among more than about 20 genes of
    equal (as a rule infinite) fold change is arbitrary.
    """
    genes = np.flatnonzero(significant_G)
    return genes[np.argsort(-np.abs(lfc_G[genes]), kind="stable")]


def overlaps(predicted: GeneTests, observed: GeneTests) -> dict[str, Floats]:
    """Return ``overlap_at_*`` and ``precision_at_*``.

    With S the observed and T the predicted significant genes, both by falling abs(fold change):
    overlap takes the first k = min(K, size of S) of both lists and divides by k; precision does
    so with k = min(K, size of T). k = 0 gives 0, and so does a file without any significant gene.
    """
    observed_PG, predicted_PG = observed.significant_PG, predicted.significant_PG
    count = len(observed_PG)
    names = [f"{kind}_at_{k}" for kind in ("overlap", "precision") for k in ("N", *TOP_K)]
    found = {name: np.zeros(count) for name in names}
    if not observed_PG.any() or not predicted_PG.any():
        return found
    for p in range(count):
        first = _top(observed.lfc_PG[p], observed_PG[p])
        second = _top(predicted.lfc_PG[p], predicted_PG[p])
        place_G = np.full(observed_PG.shape[1], observed_PG.shape[1])
        place_G[second] = np.arange(second.size)
        # from which length on a gene is in both lists
        both = np.maximum(np.arange(first.size), place_G[first])
        for kind, limit in (("overlap", first.size), ("precision", second.size)):
            for k in (None, *TOP_K):
                size = limit if k is None else min(k, limit)
                if size:
                    found[f"{kind}_at_{k or 'N'}"][p] = np.count_nonzero(both < size) / size
    return found


def direction_match(predicted: GeneTests, observed: GeneTests) -> Floats:
    """Return the share of observed significant genes whose fold changes have equal signs."""
    chosen_PG = observed.significant_PG
    equal_PG = np.sign(predicted.lfc_PG) == np.sign(observed.lfc_PG)
    return _share((equal_PG & chosen_PG).sum(axis=1), chosen_PG.sum(axis=1))


def recall(predicted: GeneTests, observed: GeneTests) -> Floats:
    """Return the share of observed significant genes that the prediction finds."""
    both_PG = observed.significant_PG & predicted.significant_PG
    return _share(both_PG.sum(axis=1), observed.significant_PG.sum(axis=1))


def _share(part: npt.ArrayLike, whole: npt.ArrayLike) -> Floats:
    part_P, whole_P = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    share_P = np.full(whole_P.shape, np.nan)
    np.divide(part_P, whole_P, out=share_P, where=whole_P > 0)
    return share_P


def _spearman(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> float:
    if x.size < 2:
        return float("nan")
    return float(pearson(_ranks(x)[None], _ranks(y)[None])[0])


def _ranks(values: npt.NDArray[Any]) -> Floats:
    """Return the rank of each value; equal ones share their mean rank."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - 0.5 * (count - 1))[place])


def spearman_fold_change(predicted: GeneTests, observed: GeneTests) -> Floats:
    """Return the Spearman correlation of fold changes over observed significant genes."""
    values = [
        _spearman(observed.lfc_PG[p, chosen_G], predicted.lfc_PG[p, chosen_G])
        for p, chosen_G in enumerate(observed.significant_PG)
    ]
    return np.asarray(values, dtype=np.float64)


def spearman_significant(predicted: GeneTests, observed: GeneTests) -> float:
    """Return one number: Spearman over conditions of the numbers of significant genes.

    Only conditions with an observed significant gene count; 1 if there is none, NaN if constant.
    """
    observed_P = observed.significant_PG.sum(axis=1)
    chosen_P = observed_P > 0
    if not chosen_P.any():
        return 1.0
    return _spearman(observed_P[chosen_P], predicted.significant_PG.sum(axis=1)[chosen_P])


def ranking_areas(predicted: GeneTests, observed: GeneTests) -> dict[str, Floats]:
    """Return ``pr_auc`` (average precision) and ``roc_auc`` of the predicted FDR as a classifier.

    Label: observed FDR < .05; score: -log10 of the predicted FDR, not below 1e-10.
    """
    clipped_PG = np.clip(predicted.fdr_PG, np.float32(1e-10), np.float32(1.0))
    score_PG = -np.log10(clipped_PG)
    found = {name: np.full(len(score_PG), np.nan) for name in ("pr_auc", "roc_auc")}
    for p, label_G in enumerate(observed.significant_PG):
        positives = int(label_G.sum())
        if not 0 < positives < label_G.size:
            continue
        order = np.argsort(-score_PG[p], kind="stable")
        score_G, hit_G = score_PG[p][order], np.cumsum(label_G[order])
        last = np.append(np.flatnonzero(np.diff(score_G)), score_G.size - 1)
        hits, called = hit_G[last].astype(np.float64), last + 1.0
        found["pr_auc"][p] = float(np.sum(np.diff(hits, prepend=0.0) * hits / called)) / positives
        false = np.concatenate([[0.0], called - hits]) / (label_G.size - positives)
        true = np.concatenate([[0.0], hits]) / positives
        found["roc_auc"][p] = float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))
    return found
