"""Figures of what a prediction needs beside the right mean: counts, variance, zeros, ranks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from scale.evaluate.aggregate import full_depth
from scale.evaluate.pictures.subject import Picture, Subject, picture_of
from scale.evaluate.verdict import label_of
from scale.plot.bars import CEILING, number
from scale.plot.canvas import method_name, new_figure
from scale.plot.conditions import against_effect, counts, distances, genes, ranks

Floats = npt.NDArray[np.float64]

_FEWEST_CELLS = 20


def draw_calibration(subject: Subject) -> list[Picture]:
    """Significant genes per condition; variance and share of zeros per gene."""
    observed = subject.values("de_nsig_counts_real", subject.model)
    best = subject.best_baseline("overlap_at_N")
    predicted = {
        m: values
        for m in [*([best] if best else []), *subject.shown]
        if not (values := subject.values("de_nsig_counts_pred", m)).empty
    }
    moments = _gene_moments(subject)
    has_counts = bool(predicted) and not observed.empty
    num_panels = int(has_counts) + 2 * int(moments is not None)
    if not num_panels:
        return []
    figure = new_figure(3.73 * max(2, num_panels), 4.5)
    axes = list(figure.subplots(1, max(2, num_panels), squeeze=False)[0])
    for ax in axes[num_panels:]:
        ax.remove()
    told, captions = [], []
    if has_counts:
        counts(observed, predicted, colours=subject.colours, ax=axes.pop(0))
        captions.append(
            "Significant genes (false discovery rate below 5 %) per condition: above the dashed "
            "line a method calls too many."
        )
        told += [
            f"{method_name(m)} calls {number(float(v.sum()))} significant genes where "
            f"{number(float(observed.sum()))} are observed"
            for m, v in predicted.items()
        ]
    if moments is not None:
        variance, zeros = moments
        for numbers, label, by_ratio in (
            (variance, "variance of a gene", True),
            (zeros, "share of zeros of a gene", False),
        ):
            rest = {m: v for m, v in numbers.items() if m != "observed"}
            genes(
                numbers["observed"],
                rest,
                colours=subject.colours,
                label=label,
                by_ratio=by_ratio,
                ax=axes.pop(0),
            )
        captions.append(
            "Variance and share of zeros: one point per gene, over the sampled cells less the "
            "mean of their context (variance) or as they are (zeros)."
        )
        told.append("variance and share of zeros per gene, predicted against observed")
    title = "Calibration: significant genes, variance, zeros"
    return [picture_of("calibration", title, " ".join(captions), "; ".join(told) + ".", figure)]


def _gene_moments(subject: Subject) -> tuple[dict[str, Floats], dict[str, Floats]] | None:
    """Variance within contexts and share of zeros of each gene in the sampled cells."""
    cells = subject.evaluation.cells
    if cells is None:
        return None
    role, method = (cells.obs[name].astype(str).to_numpy() for name in ("role", "method"))
    groups = {"observed": role == "observed"}
    groups |= {m: (role == "predicted") & (method == m) for m in subject.shown}
    groups = {m: mask for m, mask in groups.items() if int(mask.sum()) >= _FEWEST_CELLS}
    if "observed" not in groups or len(groups) < 2:
        return None
    values = cells.X.toarray() if hasattr(cells.X, "toarray") else np.asarray(cells.X)
    context = cells.obs["context"].astype(str).to_numpy()
    variance, zeros = {}, {}
    for name, mask in groups.items():
        own = values[mask].astype(np.float64)
        zeros[name] = (own == 0).mean(axis=0)
        where = context[mask]
        for one in set(where):
            own[where == one] -= own[where == one].mean(axis=0)
        variance[name] = (own**2).sum(axis=0) / max(1, len(own) - len(set(where)))
    return variance, zeros


def draw_effect_sizes(subject: Subject) -> list[Picture]:
    """Correlations against the size of the observed change."""
    size = effect_sizes(subject)
    metrics = [
        m
        for m in ("pearson_delta", "residual_pearson")
        if not subject.values(m, subject.model).empty
    ]
    if size.empty or not metrics:
        return []
    figure = new_figure(5.6 * max(2, len(metrics)), 3.9)
    axes = figure.subplots(1, max(2, len(metrics)), squeeze=False)[0]
    for ax in axes[len(metrics) :]:
        ax.remove()
    for ax, metric in zip(axes, metrics, strict=False):
        replicate = subject.values(metric, CEILING)
        against_effect(
            size,
            subject.rivals(metric),
            colours=subject.colours,
            label=subject.words(metric),
            limit=None if replicate.empty else noise_free(metric, replicate),
            ax=ax,
        )
    return [
        picture_of(
            "effect-size",
            "Scores against the size of the effect",
            "One point per condition; weak responses are hard for everyone, the replicate "
            "included. The size has the sampling noise taken out where there is a replicate. "
            "Dashed: √r of the replicate at full depth, about what the true mean would score.",
            "Scatter of "
            + " and ".join(label_of(m).lower() for m in metrics)
            + " per condition against the size of the observed change, for "
            + ", ".join(map(method_name, subject.rivals(metrics[0])))
            + ".",
            figure,
        )
    ]


def noise_free(metric: str, replicate: pd.Series) -> pd.Series:
    """Return sqrt(r), r = the replicate's correlation at full depth; 0 where it is not above 0."""
    full = replicate.map(lambda r: full_depth(metric, float(r)))
    root: pd.Series = full.fillna(0.0).clip(lower=0.0) ** 0.5
    return root


def effect_sizes(subject: Subject) -> pd.Series:
    """Return the norm of the observed change by condition, noise taken out where it is known.

    Two halves of the cells differ by four times the noise of the mean of all cells, so that
    G mse_delta / 4 of the replicate is taken off the squared norm.
    """
    sizes: dict[tuple[str, str], float] = {}
    num_genes = 0
    for (method, context), table in subject.evaluation.deltas.items():
        if method != "observed":
            continue
        num_genes = table.shape[1]
        squares = (table.to_numpy(np.float64) ** 2).sum(axis=1)
        sizes |= {(context, str(p)): float(v) for p, v in zip(table.index, squares, strict=True)}
    squared = pd.Series(sizes, dtype=np.float64)
    noise = subject.values("mse_delta", CEILING) * num_genes / 4.0
    if not noise.empty:
        squared = squared - noise.reindex(squared.index).fillna(0.0)
    size: pd.Series = squared.clip(lower=0.0) ** 0.5
    return size


def draw_ranks(subject: Subject) -> list[Picture]:
    """Retrieval ranks beside chance, and energy distances beside the control copy's."""
    metric = "retrieval_l2"
    found = {m: v.to_numpy() for m, v in subject.rivals(metric, ceiling=False).items()}
    control = subject.values("energy_distance", "control_copy")
    energy = subject.rivals("energy_distance")
    energy.pop("control_copy", None)
    panels = [bool(found), bool(energy) and not control.empty]
    if not any(panels):
        return []
    figure = new_figure(11.2, 3.9)
    axes = list(figure.subplots(1, 2, squeeze=False)[0])
    for ax in axes[sum(panels) :]:
        ax.remove()
    captions, told = [], []
    if panels[0]:
        ranks(found, colours=subject.colours, ax=axes.pop(0))
        captions.append(
            "Retrieval: among the observed changes of all perturbations of the context, how many "
            "are farther from the prediction than the right one; at 1 the right one is the nearest."
        )
        told += [
            f"{method_name(m)} finds the right perturbation at once in {np.mean(v == 1):.0%} "
            "of the conditions"
            for m, v in found.items()
        ]
    if panels[1]:
        distances(control, energy, colours=subject.colours, ax=axes.pop(0))
        captions.append(
            "Energy distance to the observed cells: below the dashed line a method is closer to "
            "them than the control cells are."
        )
        told.append("energy distance per condition against that of the control copy")
    title = "Is it the right perturbation, and are they the right cells?"
    return [picture_of("ranks", title, " ".join(captions), "; ".join(told) + ".", figure)]
