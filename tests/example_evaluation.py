"""A generated evaluation: numbers in the shape that the protocol returns, with known winners."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
from anndata import AnnData

MODEL_QUALITY = {
    "model": 0.75,
    "control_copy": 0.0,
    "perturbation_mean": 0.35,
    "context_transfer": 0.55,
    "additive": 0.6,
    "replicate": 0.9,
}
"""Share of the observed change that a method predicts; the replicate is the ceiling."""
NO_MODELS = set(MODEL_QUALITY) - {"model"}
THREE = {"model_v2": 0.75, "state <beta>": 0.5, "flat_model": 0.1}
"""Three models, told apart by their names as their owners write them."""
HIGHER = ("residual_pearson", "retrieval_l2", "overlap_at_N", "pearson_delta", "precision_at_N")
LOWER = ("energy_ratio", "mse")
COUNTS = ("de_nsig_counts_real", "de_nsig_counts_pred")


def example_evaluation(
    *, num_contexts=5, num_perturbations=12, num_genes=240, quality=MODEL_QUALITY, seed=0
):
    """Return scores, changes and cells of ``num_contexts`` cell lines."""
    generator = np.random.default_rng(seed)
    genes = [f"GENE{g:04d}" for g in range(num_genes)]
    contexts = [f"LINE-{chr(65 + i)}" for i in range(num_contexts)]
    perturbations = [f"drug-{i:02d}" for i in range(num_perturbations)]
    rows, deltas, folds = [], {}, {}
    for context in contexts:
        strength = generator.lognormal(-1.0, 0.6, size=(num_perturbations, 1))
        sparse = generator.random((num_perturbations, num_genes)) < 0.3
        change = strength * sparse * generator.normal(size=(num_perturbations, num_genes))
        tables = {"observed": change + generator.normal(0, 0.02, change.shape)}
        for method, share in quality.items():
            noise = generator.normal(0, 0.15 * (1 - share) + 0.02, change.shape)
            tables[method] = share * change + noise * np.abs(change).mean()
        for method, table in tables.items():
            frame = pd.DataFrame(table.astype(np.float32), index=perturbations, columns=genes)
            deltas[method, context] = frame
            folds[method, context] = frame * np.float32(1.44)
        folds["observed", context].iloc[0, 0] = np.inf
        rows += _rows(context, perturbations, quality, tables["observed"], generator)
    scores = pd.DataFrame(rows)
    return SimpleNamespace(
        scores=scores,
        aggregate=_aggregate(scores),
        deltas=deltas,
        fold_changes=folds,
        cells=_cells(contexts, genes, [m for m in quality if m not in NO_MODELS], generator),
        excluded=pd.DataFrame(
            {
                "context": contexts[:1],
                "perturbation": ["drug-99 <b>&"],
                "reason": ["5 observed cells, fewer than min_cells (30)"],
            }
        ),
        collapse={
            "model": {
                "spread_ratio": 0.71,
                "within_variance_ratio": 0.93,
                "verdict": "no collapse",
            }
        },
        meta={"profile": "strict", "seed": seed, "num_genes": num_genes},
        pooled=None,
        gene_tables={},
    )


@cache
def three_models():
    """Return a report of three models, two of which have collapsed, and its page; drawn once."""
    from scale.evaluate.report import Report

    quality = THREE | {name: share for name, share in MODEL_QUALITY.items() if name != "model"}
    made = example_evaluation(
        quality=quality, num_contexts=3, num_perturbations=12, num_genes=60, seed=1
    )
    made.collapse = {
        "model_v2": {"spread_ratio": 0.71, "verdict": "no collapse"},
        "state <beta>": {"spread_ratio": 0.31, "verdict": "SHRUNK"},
        "flat_model": {"spread_ratio": 0.01, "verdict": "COLLAPSED ACROSS PERTURBATIONS"},
    }
    report = Report(made)
    return report, report.html()


def _rows(context, perturbations, quality, observed, generator):
    size = np.linalg.norm(observed, axis=1)
    hardness = size / (size + size.mean())
    significant = np.round(60 * hardness).astype(int)
    rows = []
    for method, share in quality.items():
        for place, perturbation in enumerate(perturbations):
            base = {
                "method": method,
                "form": "cells",
                "context": context,
                "unit": context,
                "perturbation": perturbation,
                "reason": "",
                "num_cells_predicted": 60,
                "num_cells_observed": 60,
                "num_controls": 240,
                "num_significant_observed": int(significant[place]),
            }
            good = share * hardness[place] + generator.normal(0, 0.04)
            values = dict.fromkeys(HIGHER, good)
            values["retrieval_l2"] = min(1.0, 0.5 + 0.5 * max(0.0, good))
            values.update(dict.fromkeys(LOWER, 1.0 - good))
            values["de_nsig_counts_real"] = float(significant[place])
            values["de_nsig_counts_pred"] = float(round(significant[place] * share))
            rows += [{**base, "metric": name, "value": value} for name, value in values.items()]
    return rows


def _aggregate(scores):
    rows = []
    for (method, form, metric), table in scores.groupby(["method", "form", "metric"], sort=False):
        means = table.groupby("unit")["value"].mean()
        half = 2.776 * means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 2 else np.nan
        rows.append(
            {
                "method": method,
                "form": form,
                "metric": metric,
                "mean": means.mean(),
                "mean_over_conditions": table["value"].mean(),
                "low": means.mean() - half,
                "high": means.mean() + half,
                "num_units": len(means),
                "num_conditions": len(table),
                "num_undefined": 0,
                "better": "none" if metric in COUNTS else "lower" if metric in LOWER else "higher",
            }
        )
    return pd.DataFrame(rows)


def _cells(contexts, genes, models, generator):
    blocks, tables = [], []
    for place, context in enumerate(contexts):
        centre = generator.gamma(1.0, 0.7, size=len(genes))
        roles = [("control", "", 0.0), ("observed", "", 1.0)]
        for role, method, shift in [*roles, *(("predicted", m, 0.8) for m in models)]:
            count = 60 if role == "control" else 40
            mean = centre * np.exp(shift * 0.4 * np.sin(np.arange(len(genes)) + place))
            blocks.append(np.log1p(generator.poisson(mean * 2, size=(count, len(genes)))))
            tables.append(
                pd.DataFrame(
                    {
                        "role": role,
                        "method": method,
                        "context": context,
                        "perturbation": "control" if role == "control" else "drug-00",
                    },
                    index=range(count),
                )
            )
    obs = pd.concat(tables, ignore_index=True)
    obs.index = obs.index.astype(str)
    return AnnData(np.vstack(blocks).astype(np.float32), obs=obs, var=pd.DataFrame(index=genes))
