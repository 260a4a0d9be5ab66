"""Scores of one method in one context: two sides in, one number per metric and condition out.

Here the definitions of ``metrics`` meet the rules for undefined values: in the ``cell_eval``
profile they stay undefined; in the ``strict`` profile a condition whose data cannot carry a
metric is left out for all methods alike, and a prediction that makes a metric undefined gets what
knowing nothing is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from scale.evaluate import metrics, significance
from scale.evaluate.distances import energy_distance, sliced_wasserstein, squared_mmd
from scale.evaluate.metrics import METRICS
from scale.evaluate.sides import Cells, Side
from scale.evaluate.statistics import Floats

_EXPRESSED = 0.05
"""Mean log1p value above which a gene's variance is compared."""

DATA = "data"
PREDICTION = "prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What all methods of a context share.

    Parameters
    ----------
    labels
        Perturbations, sorted.
    target_gene_P
        Number of the gene that is called like the perturbation, or None.
    strict
        Profile.
    num_significant_P
        Observed significant genes at full depth.
    min_significant
        Those that a condition needs for the metrics of genes (strict).
    reference_mean_G
        Mean over the context's training perturbations of their mean expression; None where the
        context has none.
    reference_delta_G
        Mean change over the other contexts' training perturbations, in its place; None without
        training cells.
    effects_P
        Orthonormal bases of what training knows of each condition without its interaction, [K, G];
        None where it knows nothing of the perturbation.
    control_energy_P, control_mmd_P
        Distances of input control cells to the observed cells.
    energy_noise, mmd_noise
        Standard deviations of these where there is no effect.
    spread
        Squared distance of two observed cells, the scale of the kernels of ``control_mmd_P``.
    direction_KD
        Directions of the sliced distance.
    """

    labels: tuple[str, ...]
    target_gene_P: tuple[int | None, ...]
    strict: bool
    num_significant_P: npt.NDArray[np.int64]
    min_significant: int
    reference_mean_G: Floats | None
    reference_delta_G: Floats | None
    effects_P: tuple[Floats | None, ...]
    control_energy_P: Floats
    energy_noise: float
    control_mmd_P: Floats
    mmd_noise: float
    spread: float
    direction_KD: Floats

    def take(self, places: Sequence[int]) -> Facts:
        """Return the facts of some of the conditions."""
        return replace(
            self,
            labels=tuple(self.labels[p] for p in places),
            target_gene_P=tuple(self.target_gene_P[p] for p in places),
            num_significant_P=self.num_significant_P[places],
            effects_P=tuple(self.effects_P[p] for p in places),
            control_energy_P=self.control_energy_P[places],
            control_mmd_P=self.control_mmd_P[places],
        )


@dataclass(slots=True)
class Scores:
    """Values by metric, [P] each, with the reason where a value is or was undefined."""

    values: dict[str, Floats] = field(default_factory=dict)
    reasons: dict[str, npt.NDArray[np.object_]] = field(default_factory=dict)

    def add(self, name: str, values: Floats, reason: str | npt.NDArray[np.object_] = "") -> None:
        """Store the values of a metric; ``reason``, one or [P], applies where undefined."""
        self.values[name] = np.asarray(values, dtype=np.float64)
        self.reasons[name] = np.where(np.isnan(self.values[name]), reason, "").astype(object)


def score(predicted: Side, observed: Side, facts: Facts) -> Scores:
    """Return every metric that the sides allow.

    Parameters
    ----------
    predicted
        Of cells or of means; means get bulk, residual and retrieval metrics only.
    observed
        Of cells.
    facts
        What all methods of the context share.
    """
    scores = Scores()
    _bulk(scores, predicted, observed)
    _residual(scores, predicted, observed, facts)
    _two_way(scores, predicted, observed, facts)
    _retrieval(scores, predicted, observed, facts)
    if predicted.cells is not None and observed.cells is not None:
        _genes(scores, predicted.cells, observed.cells)
        _significance(scores, predicted.cells, observed.cells, facts)
        _distances(scores, predicted.cells, observed.cells, facts)
        _dispersion(scores, predicted, observed, predicted.cells, observed.cells)
    if facts.strict:
        _apply_strict_rules(scores, facts)
    return scores


def _bulk(scores: Scores, predicted: Side, observed: Side) -> None:
    constant = f"{PREDICTION}: the change is constant over genes"
    scores.add("pearson_delta", metrics.pearson(predicted.delta_PG, observed.delta_PG), constant)
    for name, x_PG, y_PG in (
        ("", predicted.mean_PG, observed.mean_PG),
        ("_delta", predicted.delta_PG, observed.delta_PG),
    ):
        scores.add(f"mse{name}", metrics.mean_squared_error(x_PG, y_PG))
        scores.add(f"mae{name}", metrics.mean_absolute_error(x_PG, y_PG))
    scores.add("r2_pseudobulk", metrics.r2(predicted.mean_PG, observed.mean_PG), DATA)
    scores.add("mse_normalized", _mse_normalized(predicted, observed), f"{DATA}: no effect")


def _mse_normalized(predicted: Side, observed: Side) -> Floats:
    """Ratio of sums over conditions: squared error over squared effect, noise taken out of both.

    N = mean_g (b^ - b)^2 - v - min(v^, v), D = mean_g (b - c)^2 - v - v_c, v = mean_g s^2 / n;
    the credit for the prediction's own noise is capped by the observed noise.
    """
    assert observed.cells is not None
    noise_P = observed.cells.variance_PG.mean(axis=1) / observed.num_P
    own_P = np.zeros_like(noise_P)
    if predicted.cells is not None:
        own_P = predicted.cells.variance_PG.mean(axis=1) / predicted.num_P
    error_P = metrics.mean_squared_error(predicted.mean_PG, observed.mean_PG)
    effect_P = metrics.mean_squared_error(observed.mean_PG, observed.control.mean_G[None])
    control_G = observed.control.variance_G / observed.control.num_cells
    numerator = float((error_P - noise_P - np.minimum(own_P, noise_P)).sum())
    denominator = float((effect_P - noise_P - control_G.mean()).sum())
    # sd of a sum of squares of G independent normals of these variances, over conditions
    total_PG = observed.cells.variance_PG / observed.num_P[:, None] + control_G
    sd = float(np.sqrt(2.0 * (total_PG**2).sum())) / total_PG.shape[1]
    return _ratio(numerator, denominator, len(error_P), sd)


def _ratio(numerator: float, denominator: float, count: int, noise: float = 0.0) -> Floats:
    """One number of the context, repeated; NaN if the denominator is not 3 sd above its noise."""
    defined = denominator > 3.0 * noise
    return np.full(count, numerator / denominator if defined else np.nan)


def _residual(scores: Scores, predicted: Side, observed: Side, facts: Facts) -> None:
    """Metrics of what is left of a change when the mean response is taken off.

    The mean response of the context's training perturbations is subtracted as mean expression,
    m - c on each side with that side's own c: the control, and with it its noise, cancels. The
    noise of m itself is on both sides: with P training perturbations, a control copy without any
    effect has up to 1 / (P + 1), measured .19 for P = 4; a replicate as ``pearson_delta`` or less.
    """
    if facts.reference_mean_G is not None:
        predicted_PG = predicted.mean_PG - facts.reference_mean_G
        observed_PG = observed.mean_PG - facts.reference_mean_G
    elif facts.reference_delta_G is not None:
        predicted_PG = predicted.delta_PG - facts.reference_delta_G
        observed_PG = observed.delta_PG - facts.reference_delta_G
    else:
        missing = np.full(len(facts.labels), np.nan)
        for name in ("residual_pearson", "direction_at_100"):
            scores.add(name, missing, f"{DATA}: no training cells to take a mean response from")
        return
    constant = f"{PREDICTION}: the change is the mean response"
    scores.add("residual_pearson", metrics.pearson(predicted_PG, observed_PG), constant)
    signs_P = metrics.direction_at(predicted_PG, observed_PG, 100)
    signs_P[np.abs(predicted_PG).max(axis=1) < metrics.CONSTANT] = np.nan
    scores.add("direction_at_100", signs_P, constant)


def _two_way(scores: Scores, predicted: Side, observed: Side, facts: Facts) -> None:
    """Correlation of what neither the context nor the perturbation explains: their interaction.

    What the mean changes of the context, of the perturbation and of both together explain, each
    from training cells only, is taken off by least squares. Subtracting their sum would leave the
    noise of the training cells on both sides, which reads as skill. Control copy 0, replicate as
    large as the interaction is; Spearman-Brown. Our reading of the residual correlation of SCALE
    (arXiv 2603.17380), of which no formula was published.
    """
    values_P = np.full(len(facts.labels), np.nan)
    reasons_P = np.full(len(facts.labels), f"{DATA}: perturbation not in training", dtype=object)
    delta_2PG = np.stack([predicted.delta_PG, observed.delta_PG])
    for p, basis_KG in enumerate(facts.effects_P):
        if basis_KG is not None:
            left_2G = metrics.residual(delta_2PG[:, p], basis_KG)
            values_P[p] = metrics.pearson(left_2G[:1], left_2G[1:])[0]
            reasons_P[p] = f"{PREDICTION}: no more than context and perturbation"
    scores.add("residual_pearson_two_way", values_P, reasons_P)


def _retrieval(scores: Scores, predicted: Side, observed: Side, facts: Facts) -> None:
    single = f"{DATA}: one perturbation in the context"
    zero_P = np.ptp(predicted.delta_PG, axis=1) < metrics.CONSTANT
    for metric in ("l1", "l2", "cosine"):
        distance_PP = metrics.distances(
            predicted.delta_PG, observed.delta_PG, metric, facts.target_gene_P
        )
        scores.add(f"discrimination_score_{metric}", metrics.discrimination_score(distance_PP))
        scores.add(f"retrieval_{metric}", metrics.retrieval(distance_PP), single)
    distance_PP = metrics.distances(
        observed.delta_PG, predicted.delta_PG, "l2", facts.target_gene_P
    )
    scores.add("retrieval_transposed", metrics.retrieval(distance_PP), single)
    if facts.strict and len(facts.labels) > 1:
        for name in [n for n in scores.values if METRICS[n].group == "retrieval"]:
            scores.values[name][zero_P] = np.nan
            scores.reasons[name][zero_P] = f"{PREDICTION}: no change at all"


def _genes(scores: Scores, predicted: Cells, observed: Cells) -> None:
    ours, truth = predicted.tests, observed.tests
    count = len(truth.fdr_PG)
    none = f"{DATA}: no significant gene"
    for name, values in metrics.overlaps(ours, truth).items():
        scores.add(name, values)
    scores.add("de_direction_match", metrics.direction_match(ours, truth), none)
    constant = f"{PREDICTION}: fold changes are constant"
    scores.add("de_spearman_lfc_sig", metrics.spearman_fold_change(ours, truth), constant)
    scores.add("de_sig_genes_recall", metrics.recall(ours, truth), none)
    constant = f"{PREDICTION}: numbers of significant genes are constant"
    correlation = metrics.spearman_significant(ours, truth)
    scores.add("de_spearman_sig", np.full(count, correlation), constant)
    for name, values in metrics.ranking_areas(ours, truth).items():
        scores.add(name, values, f"{DATA}: no gene or every gene is significant")
    observed_P = truth.significant_PG.sum(axis=1).astype(np.float64)
    predicted_P = ours.significant_PG.sum(axis=1).astype(np.float64)
    scores.add("de_nsig_counts_real", observed_P)
    scores.add("de_nsig_counts_pred", predicted_P)
    ratio_P = _ratio(float(predicted_P.sum()), float(observed_P.sum()), count)
    scores.add("num_significant_ratio", ratio_P, none)


def _significance(scores: Scores, predicted: Cells, observed: Cells, facts: Facts) -> None:
    ours, truth, target_P = predicted.tests, observed.tests, facts.target_gene_P
    none = f"{DATA}: no significant gene"
    scores.add("sig_jaccard", significance.jaccard(ours, truth, target_P))
    found_P, genes = truth.significant_PG.sum(axis=1), truth.significant_PG.shape[1]
    fault_P = np.where(
        (found_P == 0) | (found_P == genes), none, f"{PREDICTION}: calls no gene, or every gene"
    )
    scores.add("sig_mcc", significance.matthews(ours, truth), fault_P.astype(object))
    minimum = max(1, facts.min_significant) if facts.strict else 1
    error_P = significance.fold_change_nmae(ours, truth, target_P, minimum=minimum)
    scores.add("lfc_nmae", error_P, f"{DATA}: too few significant genes of finite change")
    scores.add("direction_yield", significance.direction_yield(ours, truth, target_P), none)
    scores.add("direction_reach", significance.direction_reach(ours, truth, target_P), none)


def _distances(scores: Scores, predicted: Cells, observed: Cells, facts: Facts) -> None:
    """Distances of sets of cells: alone, and as a share of the control's over the context."""
    sides = list(zip(predicted.points, observed.points, strict=True))
    within = zip(predicted.within_P, observed.within_P, strict=True)
    energy_P = np.array(
        [energy_distance(x, y, *own) for (x, y), own in zip(sides, within, strict=True)]
    )
    few = f"{PREDICTION}: fewer than 2 cells"
    scores.add("energy_distance", energy_P, few)
    sliced_P = [sliced_wasserstein(x, y, facts.direction_KD) for x, y in sides]
    scores.add("sliced_wasserstein", np.array(sliced_P))
    mmd_P = np.array([squared_mmd(x, y, facts.spread) for x, y in sides])
    for name, ours_P, control_P, noise in (
        ("energy_ratio", energy_P, facts.control_energy_P, facts.energy_noise),
        ("mmd_ratio", mmd_P, facts.control_mmd_P, facts.mmd_noise),
    ):
        noise *= len(ours_P) ** 0.5
        effect = float(control_P.sum())
        reason = few if effect > 3.0 * noise else f"{DATA}: no effect in this context"
        scores.add(name, _ratio(float(ours_P.sum()), effect, len(ours_P), noise), reason)


def _dispersion(scores: Scores, predicted: Side, observed: Side, ours: Cells, truth: Cells) -> None:
    chosen_PG = (predicted.mean_PG > _EXPRESSED) & (observed.mean_PG > _EXPRESSED)
    chosen_PG &= (truth.variance_PG > 0) & (ours.variance_PG > 0)
    log_ratio_PG = np.full(chosen_PG.shape, np.nan)
    np.divide(ours.variance_PG, truth.variance_PG, out=log_ratio_PG, where=chosen_PG)
    np.log(log_ratio_PG, out=log_ratio_PG, where=chosen_PG)
    medians = [
        np.median(row[keep]) if keep.any() else np.nan
        for row, keep in zip(log_ratio_PG, chosen_PG, strict=True)
    ]
    scores.add("variance_log_ratio", np.array(medians), f"{PREDICTION}: no gene varies")
    zeros_P = np.abs(ours.zeros_PG - truth.zeros_PG).mean(axis=1)
    scores.add("zero_fraction_error", zeros_P)


_KEPT_WITHOUT_GENES = (
    "de_nsig_counts_real",
    "de_nsig_counts_pred",
    "de_spearman_sig",
    "num_significant_ratio",
)


def _apply_strict_rules(scores: Scores, facts: Facts) -> None:
    """Leave out what the data cannot carry; fill what the prediction made undefined."""
    weak_P = facts.num_significant_P < facts.min_significant
    for name, values in scores.values.items():
        row, reasons = METRICS[name], scores.reasons[name]
        if row.group == "genes" and name not in _KEPT_WITHOUT_GENES:
            values[weak_P] = np.nan
            reasons[weak_P] = f"{DATA}: fewer than {facts.min_significant} significant genes"
        if row.group == "retrieval" and len(facts.labels) < 2:
            values[:] = np.nan
            reasons[:] = f"{DATA}: one perturbation in the context"
        fault_P = np.isnan(values) & np.array([str(r).startswith(PREDICTION) for r in reasons])
        values[fault_P] = row.no_skill


def gene_numbers(labels: Sequence[str], genes: Sequence[str]) -> tuple[int | None, ...]:
    """Return the number of the gene that each perturbation is called like, or None."""
    place = {gene: g for g, gene in enumerate(genes)}
    return tuple(place.get(label) for label in labels)
