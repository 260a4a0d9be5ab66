"""A small screen with known effects, for the tests of the evaluation."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scale.config import ControlSplit, Missing, Profile, ProtocolConfig
from scale.evaluate.protocol import run_protocol, split_controls

KEYS = {"perturbation_key": "drug", "cell_type_key": "line", "control": "DMSO"}
TARGET_SUM = 1e4


def log_normalise(counts):
    counts = sp.csr_matrix(counts, dtype=np.float64)
    total = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    return sp.csr_matrix((sp.diags(TARGET_SUM / total) @ counts).log1p(), dtype=np.float32)


def to_anndata(counts, lines, drugs):
    obs = pd.DataFrame(
        {"line": lines, "drug": drugs}, index=[f"cell{i}" for i in range(len(lines))]
    )
    var = pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])])
    adata = ad.AnnData(X=log_normalise(counts), obs=obs, var=var)
    adata.layers["counts"] = sp.csr_matrix(counts, dtype=np.float32)
    return adata


def draw(rate, size, generator):
    """Negative binomial counts of ``size`` cells, 5 counts per gene on average."""
    fraction = rate / rate.sum()
    library = np.exp(generator.normal(np.log(5.0 * rate.size), 0.25, (size, 1)))
    return generator.poisson(generator.gamma(4.0, library * fraction / 4.0))


def screen(
    seed=0, *, lines=3, drugs=6, cells=40, controls=80, genes=80, strength=1.0, own=0.0, add=()
):
    """Cells of every (line, drug) and of the control DMSO of every line.

    Effects are those of the drug (``strength``) plus some of the (line, drug) (``own``); ``add``
    lists combinations as ``"d0+d1"``, whose log effects are the sums.
    """
    generator = np.random.default_rng(seed)
    base = np.exp(generator.normal(0, 1.0, (lines, genes)) * 0.5 + generator.normal(0, 1.0, genes))
    effect = strength * generator.normal(0, 0.8, (drugs, genes))
    effect = effect * (generator.random((drugs, genes)) < 0.3)
    special = own * generator.normal(0, 0.8, (lines, drugs, genes))
    counts, line_of, drug_of = [], [], []
    for c in range(lines):
        total = effect + special[c]
        parts = {f"d{p}": total[p] for p in range(drugs)}
        parts |= {name: sum(parts[one] for one in name.split("+")) for name in add}
        for drug, log_fold in parts.items():
            counts.append(draw(base[c] * np.exp(log_fold), cells, generator))
            line_of += [f"L{c}"] * cells
            drug_of += [drug] * cells
        counts.append(draw(base[c], controls, generator))
        line_of += [f"L{c}"] * controls
        drug_of += ["DMSO"] * controls
    order = generator.permutation(len(line_of))
    return to_anndata(np.vstack(counts)[order], np.array(line_of)[order], np.array(drug_of)[order])


def hold_out(adata, pairs):
    """(training cells with all controls, observed cells of ``pairs`` with their controls)."""
    line, drug = adata.obs["line"].to_numpy(str), adata.obs["drug"].to_numpy(str)
    held = np.array([pair in set(pairs) for pair in zip(line, drug, strict=True)])
    controls = (drug == "DMSO") & np.isin(line, [c for c, _ in pairs])
    return adata[~held].copy(), adata[held | controls].copy()


def halved(observed, seed=0, batch_key=None):
    """The same cells with halves of the control cells, where they have none and are in memory."""
    if not isinstance(observed, ad.AnnData) or "control_fold" in observed.obs:
        return observed
    return split_controls(observed, **KEYS, batch_key=batch_key, seed=seed)


def evaluate(predicted, observed, train=None, *, seed=0, unit_key=None, batch_key=None, **protocol):
    if not isinstance(predicted, dict):
        predicted = {"model": predicted}
    protocol = {"baselines": False, "ceiling": False, "min_cells": 8} | protocol
    protocol["profile"] = Profile[protocol.get("profile", "strict")]
    for key, kind in (("control_split", ControlSplit), ("missing", Missing)):
        if key in protocol:
            protocol[key] = kind[protocol[key]]
    settings = ProtocolConfig(**protocol)
    if settings.profile is Profile.strict and settings.control_split is ControlSplit.disjoint:
        observed = halved(observed, seed, batch_key)
    columns = KEYS | {"unit_key": unit_key, "batch_key": batch_key}
    return run_protocol(predicted, observed, train=train, protocol=settings, seed=seed, **columns)


def means(evaluation, metric):
    """(method, form) -> mean."""
    rows = evaluation.aggregate[evaluation.aggregate["metric"] == metric]
    return {(r.method, r.form): r.mean for r in rows.itertuples()}
