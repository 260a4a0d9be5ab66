"""Baselines: what they know, what they must not know, and the law of the count shift."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.stats import norm
from scipy.stats import t as student_t
from small_screen import KEYS, draw, evaluate, hold_out, log_normalise, means, screen, to_anndata

from scale.evaluate.baselines import (
    BASELINES,
    DRAWN,
    ORACLE,
    Unavailable,
    baseline_cells,
    count_shift,
    mean_of,
)
from scale.evaluate.checks import Keys, read_table
from scale.evaluate.protocol import split_controls
from scale.evaluate.training import Change, InputControl, Training

HELD_OUT = [("L0", "d0"), ("L0", "d1"), ("L1", "d0"), ("L1", "d2")]


def table_of(adata, name="train"):
    keys = Keys(perturbation="drug", cell_type="line", unit=None, batch=None, control="DMSO")
    return read_table(adata, name, keys, None)


def training_of(adata):
    return Training(table_of(adata), "DMSO", {})


def predict(training, name, context, label):
    return BASELINES[name](training, context, label)


def test_baselines_read_nothing_of_a_scored_condition_but_its_size():
    adata = screen(1)
    train, observed = hold_out(adata, HELD_OUT)
    other = observed.copy()
    treated = np.flatnonzero(other.obs["drug"].to_numpy() != "DMSO")
    mixed = np.random.default_rng(0).permutation(treated)
    rows = np.arange(other.n_obs)
    rows[treated] = mixed
    other.X = observed.X[rows]
    other.layers["counts"] = np.where(
        np.isin(np.arange(other.n_obs), treated)[:, None], 7, observed.layers["counts"].toarray()
    )
    found = [evaluate({}, o, train, baselines=True) for o in (observed, other)]
    keys = [k for k in found[0].deltas if k[0] in BASELINES]
    assert len(keys) == len(BASELINES) * 2
    for key in keys:
        assert found[0].deltas[key].equals(found[1].deltas[key]), key
        assert found[0].fold_changes[key].equals(found[1].fold_changes[key]), key


def test_baselines_read_no_control_cell_of_the_reference_half():
    adata = split_controls(screen(2), perturbation_key="drug", cell_type_key="line", control="DMSO")
    train, observed = hold_out(adata, HELD_OUT)
    found = []
    for spoilt in (False, True):
        o, t = observed.copy(), train.copy()
        if spoilt:
            for cells, lines in ((o, ("L0", "L1")), (t, ("L0", "L1"))):
                rows = np.flatnonzero(
                    (cells.obs["control_fold"] == 1) & cells.obs["line"].isin(lines)
                )
                rows = rows[: len(rows) // 2]
                scale = np.ones(cells.n_obs)
                scale[rows] = 0.97
                cells.X = sp.csr_matrix(sp.diags(scale) @ cells.X, dtype=np.float32)
                scale[rows] = 3
                cells.layers["counts"] = sp.csr_matrix(sp.diags(scale) @ cells.layers["counts"])
        found.append(evaluate({}, o, t, baselines=True))
    for key in [k for k in found[0].deltas if k[0] != "observed"]:
        difference = found[0].deltas[key] - found[1].deltas[key]
        assert np.abs(difference.to_numpy()).max() == 0, key


def test_changes_are_those_of_the_training_cells():
    adata = screen(3, lines=2, drugs=3)
    training = training_of(adata)
    dense = adata.X.toarray().astype(np.float64)

    def mean(line, drug):
        rows = (adata.obs["line"] == line) & (adata.obs["drug"] == drug)
        return dense[rows.to_numpy()].mean(axis=0)

    delta = {(c, p): mean(c, p) - mean(c, "DMSO") for c in ("L0", "L1") for p in ("d0", "d1", "d2")}
    expected = np.mean([delta[("L0", p)] for p in ("d0", "d1", "d2")], axis=0)
    found = predict(training, "perturbation_mean", "L0", "d0").delta_G
    assert found == pytest.approx(expected, abs=1e-9)
    found = predict(training, "context_transfer", "L9", "d1").delta_G
    assert found == pytest.approx((delta[("L0", "d1")] + delta[("L1", "d1")]) / 2, abs=1e-9)


def additive_training(missing=(), combinations=()):
    """Training whose changes are exactly context + perturbation."""
    generator = np.random.default_rng(4)
    training = Training(None, "DMSO", {})
    context = {f"L{c}": generator.normal(size=7) for c in range(3)}
    perturbation = {f"d{p}": generator.normal(size=7) for p in range(5)}
    truth = {(c, p): context[c] + perturbation[p] for c in context for p in perturbation}
    for c in context:
        for name in combinations:
            truth[(c, name)] = sum(truth[(c, one)] for one in name.split("+"))
    training.changes = {
        k: Change(v, v) for k, v in truth.items() if k not in missing and "+" not in k[1]
    }
    return training, truth


def test_additive_is_exact_on_additive_changes():
    missing = [("L0", "d0"), ("L0", "d1"), ("L2", "d3")]
    training, truth = additive_training(missing)
    for key in missing:
        change = predict(training, "additive", *key)
        assert change.delta_G == pytest.approx(truth[key], abs=1e-12)
        assert change.log_fraction_G == pytest.approx(truth[key], abs=1e-12)


def test_additive_sums_singles_for_a_combination():
    training, truth = additive_training([("L0", "d0")], ["d0+d1", "d1+d2"])
    for key in (("L0", "d0+d1"), ("L1", "d1+d2")):
        found = predict(training, "additive", *key).delta_G
        assert found == pytest.approx(truth[key], abs=1e-12)
    with pytest.raises(Unavailable, match="not in training: d9"):
        predict(training, "additive", "L0", "d0+d9")


def test_additive_of_a_new_context_is_the_mean_over_contexts():
    training, truth = additive_training()
    found = predict(training, "additive", "L7", "d2").delta_G
    expected = np.mean([truth[(c, "d2")] for c in ("L0", "L1", "L2")], axis=0)
    assert found == pytest.approx(expected, abs=1e-12)


def test_perturbation_mean_falls_back_to_other_contexts():
    training, truth = additive_training()
    found = predict(training, "perturbation_mean", "L7", "d2").delta_G
    assert found == pytest.approx(np.mean(list(truth.values()), axis=0), abs=1e-12)


def test_linear_finds_a_linear_law_and_nearest_takes_the_closest_context():
    generator = np.random.default_rng(5)
    training = Training(None, "DMSO", {})
    shared = generator.normal(size=(30, 40)) @ np.diag(np.linspace(2, 0.1, 40))
    for p in range(30):
        for c, gain in (("L0", 1.0), ("L1", 0.5), ("L2", 1.0)):
            training.changes[(c, f"d{p}")] = Change(gain * shared[p], None)
    truth = training.changes.pop(("L0", "d3")).delta_G
    found = predict(training, "linear", "L0", "d3").delta_G
    assert np.corrcoef(found, truth)[0, 1] > 0.7
    training.control_mean_G = {
        "L0": np.arange(40.0),
        "L1": np.arange(40.0)[::-1],
        "L2": np.arange(40.0) ** 1.1,
    }
    found = predict(training, "nearest", "L0", "d3").delta_G
    assert found.tolist() == training.changes[("L2", "d3")].delta_G.tolist()


def test_drawn_baselines_are_training_cells_of_the_context():
    adata = screen(13, lines=2, drugs=4)
    train, _ = hold_out(adata, [("L0", "d0"), ("L1", "d0")])
    training, generator = training_of(train), np.random.default_rng(0)
    rows = {
        key: {tuple(row) for row in train.X[part].toarray()}
        for key, part in train.obs.groupby(["line", "drug"]).indices.items()
    }
    other = training.other_label("L0", "d0")
    assert other in ("d1", "d2", "d3")
    assert other == training_of(train).other_label("L0", "d0")
    pools = {"context_mean": set().union(*(rows["L0", f"d{p}"] for p in (1, 2, 3)))}
    pools["other_perturbation"] = rows["L0", other]
    dense = train.X.toarray().astype(np.float64)
    control_G = training.control_mean_G["L0"]
    for name, pool in pools.items():
        change = predict(training, name, "L0", "d0")
        cells = baseline_cells(name, training, ("L0", "d0"), change, None, 60, generator)
        assert cells.shape[0] == 60
        assert all(tuple(row) in pool for row in cells.toarray())
        chosen = np.array([tuple(row) in pool for row in train.X.toarray()])
        mean_G = dense[chosen].mean(axis=0)
        assert mean_of(change, control_G) == pytest.approx(mean_G, abs=1e-6)
    assert set(pools) == set(DRAWN)


def test_another_perturbation_is_never_the_same_and_not_always_one():
    training, _ = additive_training()
    found = {p: training.other_label("L0", f"d{p}") for p in range(5)}
    assert all(found[p] not in (None, f"d{p}") for p in range(5))
    assert len(set(found.values())) > 1
    training, _ = additive_training([(f"L{c}", f"d{p}") for c in range(3) for p in (0, 2, 3, 4)])
    with pytest.raises(Unavailable, match="no other training perturbation"):
        predict(training, "other_perturbation", "L0", "d1")
    with pytest.raises(Unavailable, match="no training perturbation in this context"):
        predict(training, "context_mean", "L9", "d1")


def test_the_oracle_is_the_observed_mean_against_the_input_control():
    train, observed = hold_out(screen(14), HELD_OUT)
    evaluation = evaluate({}, observed, train, baselines=True, ceiling=True)
    assert means(evaluation, "mse")[(ORACLE, "mean")] == 0.0
    assert means(evaluation, "residual_pearson")[(ORACLE, "mean")] == pytest.approx(1)
    assert 0.8 < means(evaluation, "pearson_delta")[(ORACLE, "mean")] < 1
    assert (ORACLE, "cells") not in means(evaluation, "mse")
    assert not (evaluation.aggregate["baseline"] == ORACLE).any()


def test_what_context_and_perturbation_explain_is_no_interaction():
    adata = screen(15, lines=4, drugs=8, cells=60, controls=160, own=0.6)
    number = adata.obs.groupby(["line", "drug"], observed=True).cumcount().to_numpy()
    repeat, rest = (adata[number % 2 == part].copy() for part in (0, 1))
    pairs = [(f"L{c}", f"d{p}") for c in range(2) for p in range(4)]
    train, observed = hold_out(rest, pairs)
    _, predicted = hold_out(repeat, pairs)
    evaluation = evaluate(predicted, observed, train, baselines=True)
    scores = means(evaluation, "residual_pearson_two_way")
    assert scores[("model", "cells")] > 0.4
    for method in ("perturbation_mean", "control_copy", "context_mean"):
        assert abs(scores[(method, "cells")]) < 0.15, method
    shared = means(evaluation, "shared_pearson")
    modulation = means(evaluation, "modulation_pearson")
    assert shared[("model", "cells")] > 0.7
    assert modulation[("model", "cells")] > 0.4
    assert shared[("context_transfer", "mean")] > 0.4
    assert modulation[("context_transfer", "mean")] < 0.3
    row = evaluation.aggregate.query("metric == 'shared_pearson' and method == 'model'").iloc[0]
    assert row["num_units"] == 1
    assert np.isnan(row["low"])


def no_effect(seed, *, lines=3, drugs=14, cells=20, controls=40, genes=50):
    generator = np.random.default_rng(seed)
    rate = np.exp(generator.normal(0, 1, genes))
    names = np.repeat([*(f"d{p}" for p in range(drugs)), "DMSO"], [cells] * drugs + [controls])
    labels = np.tile(names, lines)
    line = np.repeat([f"L{c}" for c in range(lines)], len(names))
    adata = to_anndata(draw(rate, len(labels), generator), line, labels)
    return split_controls(adata, perturbation_key="drug", cell_type_key="line", control="DMSO")


def test_without_effect_what_knows_nothing_has_no_skill():
    tables = []
    for seed in range(8):
        train, observed = hold_out(
            no_effect(seed), [(c, f"d{p}") for c in ("L0", "L1") for p in range(4)]
        )
        table = evaluate({}, observed, train, seed=seed, baselines=True).aggregate
        tables.append(table.set_index(["method", "form", "metric"])["mean"])
    found = pd.concat(tables, axis=1)
    three = student_t.ppf(norm.cdf(3), 7)  # what 3 standard errors are for 8 repeats: 4.5
    floor = 1 / 11  # of residual_pearson: noise of the mean of 10 training perturbations
    for metric, no_skill, above in (
        ("pearson_delta", 0.0, 0.0),
        ("residual_pearson", 0.0, floor),
        ("residual_pearson_two_way", 0.0, 0.0),
        ("shared_pearson", 0.0, 0.0),
        ("modulation_pearson", 0.0, 0.0),
        ("direction_at_100", 0.5, np.arcsin(floor) / np.pi),
        *((f"retrieval_{d}", 0.5, 0.0) for d in ("l1", "l2", "cosine", "transposed")),
    ):
        for method in ("control_copy", "other_perturbation", "perturbation_mean"):
            for form in ("cells", "mean"):
                values = found.loc[(method, form, metric)]
                error = three * values.std() / len(values) ** 0.5
                score = values.mean() - no_skill
                assert -error - 1e-12 <= score <= error + above + 1e-12, (metric, method, form)


@pytest.mark.parametrize("name", ["context_transfer", "additive", "linear", "nearest"])
def test_an_unseen_perturbation_has_a_reason(name):
    training, _ = additive_training()
    with pytest.raises(Unavailable, match="not in training"):
        predict(training, name, "L0", "new drug")


def test_count_shift_meets_the_wanted_mean_and_keeps_zeros_and_dispersion():
    generator = np.random.default_rng(6)
    genes = 60
    rate = np.exp(generator.normal(0, 1.0, genes))
    effect = generator.normal(0, 0.7, genes)
    control_counts = draw(rate, 4000, generator)
    truth = draw(rate * np.exp(effect), 4000, generator)
    control = InputControl(log_normalise(control_counts), sp.csr_matrix(control_counts))
    fraction = control.fraction_G
    wanted = truth.sum(axis=0) / truth.sum()
    change = Change(np.ones(genes), np.log(wanted / fraction))
    cells = count_shift(control, change, 4000, generator)
    found = cells.expm1().toarray() / 1e4
    error = found.std(axis=0) / np.sqrt(len(found))
    # normalising cell by cell moves a mean of ratios a little off the ratio of means
    assert (np.abs(found.mean(axis=0) - wanted) < 4 * error + 0.02 * wanted).all()
    expected = log_normalise(truth)
    zeros = [1 - c.getnnz(axis=0) / c.shape[0] for c in (cells, expected)]
    assert np.abs(zeros[0] - zeros[1]).mean() < 0.02
    spread = [c.toarray().std(axis=0) for c in (cells, expected)]
    # what is added is Poisson, so that a gene that rises much varies less than it would
    assert np.abs(spread[0] / spread[1] - 1).mean() < 0.2


def test_no_change_leaves_control_cells_as_they_are():
    adata = screen(7, lines=1, drugs=1)
    control = InputControl(adata.X, adata.layers["counts"])
    zero = np.zeros(adata.n_vars)
    cells = count_shift(control, Change(zero, zero), 30, np.random.default_rng(0))
    rows = {tuple(row) for row in adata.X.toarray()}
    assert all(tuple(row) in rows for row in cells.toarray())
    assert mean_of(Change(zero - 1, None), zero + 0.5).tolist() == [0.0] * adata.n_vars


def test_without_counts_only_means_and_copies_are_scored():
    train, observed = hold_out(screen(8), HELD_OUT)
    del train.layers["counts"], observed.layers["counts"]
    evaluation = evaluate({}, observed, train, baselines=True)
    found = means(evaluation, "mse")
    assert ("additive", "mean") in found
    assert ("additive", "cells") not in found
    assert ("control_copy", "cells") in found
    reasons = evaluation.scores.query("method == 'additive' and form == 'cells'")["reason"]
    assert reasons.str.contains("counts").all()
    assert len(reasons) == len(HELD_OUT)


def test_without_training_cells_only_the_control_copy_is_scored():
    _, observed = hold_out(screen(9), HELD_OUT)
    evaluation = evaluate({}, observed, baselines=True)
    assert set(evaluation.scores["method"]) == {"control_copy"}


def test_a_baseline_that_knows_the_effects_is_good():
    adata = screen(10, drugs=8, cells=60, controls=160)
    train, observed = hold_out(adata, [("L0", f"d{p}") for p in range(6)])
    evaluation = evaluate({}, observed, train, baselines=True)
    pearson = means(evaluation, "pearson_delta")
    assert pearson[("additive", "mean")] > 0.7
    assert pearson[("additive", "cells")] > 0.6
    assert pearson[("control_copy", "cells")] < 0.1
    residual = means(evaluation, "residual_pearson")
    assert residual[("additive", "cells")] > residual[("perturbation_mean", "cells")] + 0.3
    energy = means(evaluation, "energy_ratio")
    assert energy[("additive", "cells")] < 0.5
    # drawn with replacement from 80 input control cells, so a little further off than they are
    assert energy[("control_copy", "cells")] == pytest.approx(1.0, abs=0.25)


def test_combinations_are_scored_from_singles():
    adata = screen(11, lines=1, drugs=4, cells=80, controls=200, add=("d0+d1", "d2+d3"))
    train, observed = hold_out(adata, [("L0", "d0+d1"), ("L0", "d2+d3")])
    evaluation = evaluate({}, observed, train, baselines=True)
    assert means(evaluation, "pearson_delta")[("additive", "mean")] > 0.8
    missing = evaluation.scores.query("method == 'context_transfer'")["reason"]
    assert missing.str.contains("not in training").all()


def test_labels_in_training_may_be_categories():
    adata = screen(12, lines=2, drugs=2)
    adata.obs = adata.obs.astype("category")
    assert sorted(training_of(adata).changes) == [
        ("L0", "d0"),
        ("L0", "d1"),
        ("L1", "d0"),
        ("L1", "d1"),
    ]
    assert (
        KEYS["control"]
        not in training_of(
            to_anndata(adata.layers["counts"].toarray(), adata.obs["line"], adata.obs["drug"])
        ).of_label
    )
