"""Laws of the protocol: no skill scores as none, a repeat as a repeat, collapse is seen."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from small_screen import KEYS, draw, evaluate, hold_out, log_normalise, means, screen, to_anndata

from scale.evaluate.aggregate import aggregate, full_depth
from scale.evaluate.baselines import BASELINES, ORACLE
from scale.evaluate.metrics import METRICS
from scale.evaluate.protocol import split_controls
from scale.evaluate.scaled import add_scaled

SCORE_COLUMNS = [
    "method",
    "form",
    "context",
    "unit",
    "perturbation",
    "metric",
    "value",
    "reason",
    "num_cells_predicted",
    "num_cells_observed",
    "num_controls",
    "num_significant_observed",
]


def all_pairs(lines, drugs):
    return [(f"L{c}", f"d{p}") for c in range(lines) for p in range(drugs)]


def split_in_two(adata):
    """Two repeats of one experiment: every other cell of each condition."""
    number = adata.obs.groupby(["line", "drug"], observed=True).cumcount().to_numpy()
    return [adata[number % 2 == part].copy() for part in (0, 1)]


@pytest.fixture(scope="module")
def whole():
    """An evaluation of a repeated experiment, with everything."""
    adata = screen(30, lines=4, drugs=8, cells=80, controls=160, own=0.3)
    model, rest = split_in_two(adata)
    pairs = [(f"L{c}", f"d{p}") for c in range(3) for p in range(6)]
    train, observed = hold_out(rest, pairs)
    _, predicted = hold_out(model, pairs)
    return evaluate(predicted, observed, train, baselines=True, ceiling=True)


# --- shapes and names ---------------------------------------------------------------------------


def test_the_tables_have_the_promised_columns(whole):
    assert list(whole.scores.columns) == SCORE_COLUMNS
    methods = {"model", "replicate", *BASELINES}
    assert set(whole.scores["method"]) == methods | {ORACLE}
    assert set(whole.scores["metric"]) == set(METRICS)
    cells = whole.scores.query("form == 'cells' and method == 'model'")
    assert len(cells) == 18 * len(METRICS)
    promised = {"mean", "mean_over_conditions", "low", "high", "num_units", "num_conditions"}
    assert promised | {"num_undefined", "better"} <= set(whole.aggregate.columns)
    assert not whole.aggregate.duplicated(["method", "form", "metric"]).any()
    genes = [f"g{i}" for i in range(80)]
    for table in (whole.deltas, whole.fold_changes):
        assert {m for m, _ in table} == methods - {"replicate"} | {"observed"}
        frame = table[("observed", "L1")]
        assert list(frame.columns) == genes
        assert list(frame.index) == [f"d{p}" for p in range(6)]
        assert (frame.dtypes == np.float32).all()
    assert set(whole.collapse) == methods - {"replicate"}


def test_the_sample_of_cells_is_small_and_labelled(whole):
    assert whole.cells.n_obs <= 1500
    assert set(whole.cells.obs["role"]) == {"control", "observed", "predicted"}
    assert set(whole.cells.obs["context"]) == {"L0", "L1", "L2"}
    assert (whole.cells.obs.query("role == 'predicted'")["method"] == "model").all()
    assert list(whole.cells.obs.columns) == ["role", "method", "context", "perturbation"]


def test_mean_forms_have_no_gene_test(whole):
    groups = {METRICS[m].group for m in whole.scores.query("form == 'mean'")["metric"]}
    assert groups == {"bulk", "residual", "contexts", "retrieval"}


# --- what the numbers say -----------------------------------------------------------------------


def test_a_repeated_experiment_is_recognised(whole):
    assert means(whole, "pearson_delta")[("model", "cells")] > 0.6
    assert means(whole, "retrieval_l2")[("model", "cells")] == 1.0
    assert abs(means(whole, "energy_ratio")[("model", "cells")]) < 0.1
    assert abs(means(whole, "mse_normalized")[("model", "cells")]) < 0.1
    assert whole.collapse["model"]["verdict"] == "no collapse"
    assert whole.collapse["model"]["spread_ratio"] == pytest.approx(1, abs=0.15)
    assert whole.collapse["control_copy"]["verdict"] == "CONTROL COPY"
    assert whole.collapse["perturbation_mean"]["verdict"] == "COLLAPSED ACROSS PERTURBATIONS"


def test_the_ceiling_at_full_depth_is_what_a_repeat_scores(whole):
    table = whole.aggregate.query("method == 'replicate'").set_index("metric")
    for metric, tolerance in (("pearson_delta", 0.06), ("shared_pearson", 0.06)):
        repeat = means(whole, metric)[("model", "cells")]
        assert table["mean"][metric] < repeat
        assert table["mean_full_depth"][metric] == pytest.approx(repeat, abs=tolerance)
    for metric in ("mse", "mae"):
        repeat = means(whole, metric)[("model", "cells")]
        assert table["mean_full_depth"][metric] == pytest.approx(repeat, rel=0.12)
    assert np.isnan(table["mean_full_depth"]["overlap_at_N"])
    assert abs(table["mean"]["energy_distance"]) < 0.1


def test_the_scaled_score_is_zero_for_the_best_baseline_and_one_for_a_repeat(whole):
    table = whole.aggregate[whole.aggregate["metric"] == "pearson_delta"]
    best = table[table["method"].isin(BASELINES)].sort_values("mean").iloc[-1]
    assert best["scaled"] == pytest.approx(0, abs=1e-12)
    assert best["baseline_mean"] == pytest.approx(best["mean"])
    model = table[table["method"] == "model"].iloc[0]
    assert model["scaled"] == pytest.approx(1, abs=0.4)
    retrieval = whole.aggregate.query("metric == 'retrieval_l2' and method == 'model'").iloc[0]
    assert retrieval["scaled_reason"].startswith("no headroom")
    assert np.isnan(retrieval["scaled"])


def test_intervals_are_over_units(whole):
    row = whole.aggregate.query("metric == 'mse' and method == 'model'").iloc[0]
    scores = whole.scores.query("metric == 'mse' and method == 'model'")
    units = scores.groupby("unit")["value"].mean()
    assert row["num_units"] == 3
    assert row["mean"] == pytest.approx(units.mean())
    half = 4.302653 * units.std() / np.sqrt(3)
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=1e-6)


# --- no skill -----------------------------------------------------------------------------------


def no_effect(seed, *, drugs=30, cells=40, controls=80):
    """Observed cells without any effect, halves of the controls, and what else is drawn."""
    generator = np.random.default_rng(seed)
    rate = np.exp(generator.normal(0, 1, 100))
    sizes = [cells] * drugs + [controls]
    labels = np.repeat([*(f"d{p}" for p in range(drugs)), "DMSO"], sizes)
    lines = np.full(len(labels), "L0")
    observed = to_anndata(draw(rate, len(labels), generator), lines, labels)
    return observed, to_anndata(draw(rate, len(labels), generator), lines, labels), generator


def test_without_effect_disjoint_controls_give_no_skill():
    observed, independent, generator = no_effect(40)
    train = independent.copy()
    names = train.obs["drug"].to_numpy(str)
    train.obs["drug"] = np.where(names == "DMSO", names, "t" + names.astype(object))
    observed = split_controls(
        observed, perturbation_key="drug", cell_type_key="line", control="DMSO"
    )
    inputs = np.flatnonzero(observed.obs["control_fold"] == 0)
    copy = observed.copy()
    is_treated = (observed.obs["drug"] != "DMSO").to_numpy()
    rows = np.where(is_treated, generator.choice(inputs, observed.n_obs), np.arange(observed.n_obs))
    copy.X = observed.X[rows]
    evaluation = evaluate({"copied": copy}, observed, train, baselines=True)
    for method in ("copied", "control_copy", "perturbation_mean"):
        for metric, no_skill in (("pearson_delta", 0.0), ("retrieval_l2", 0.5)):
            values = evaluation.scores.query(
                f"method == '{method}' and metric == '{metric}' and form == 'cells'"
            )["value"]
            error = values.std() / np.sqrt(len(values))
            # the conditions share the control mean, so that a few errors are no skill
            assert abs(values.mean() - no_skill) < 4 * error, (method, metric)


def test_shared_controls_have_the_floor_of_the_formula():
    found, expected = [], []
    for seed in range(6):
        observed, independent, _ = no_effect(50 + seed)
        controls = (observed.obs["drug"] == "DMSO").to_numpy()
        predicted = independent.copy()
        predicted.X = sp.csr_matrix(
            sp.diags(controls.astype(np.float32)) @ observed.X
            + sp.diags((~controls).astype(np.float32)) @ independent.X
        )
        evaluation = evaluate(predicted, observed, profile="cell_eval")
        found.append(means(evaluation, "pearson_delta")[("model", "cells")])
        expected.append(evaluation.meta["control_floor"]["L0"])
    assert expected[0] == pytest.approx((1 / 80) / (1 / 80 + 1 / 40))
    assert np.mean(found) == pytest.approx(expected[0], abs=0.06)


# --- undefined values ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def constant():
    """Predictions that are the control cells themselves, cell by cell."""
    adata = screen(31, lines=1, drugs=5, cells=40, controls=80)
    adata = split_controls(adata, perturbation_key="drug", cell_type_key="line", control="DMSO")
    inputs = np.flatnonzero(adata.obs["control_fold"] == 0)
    predicted = adata.copy()
    rows = np.arange(adata.n_obs)
    for drug in [f"d{p}" for p in range(5)]:
        rows[np.flatnonzero(adata.obs["drug"] == drug)] = inputs
    predicted.X = adata.X[rows]
    return predicted, adata


def test_a_prediction_without_change_earns_no_skill(constant):
    evaluation = evaluate(*constant)
    for metric, no_skill in (
        ("pearson_delta", 0.0),
        ("retrieval_l1", 0.5),
        ("discrimination_score_l2", 0.5),
        ("overlap_at_N", 0.0),
        ("precision_at_N", 0.0),
        ("roc_auc", 0.5),
        ("lfc_nmae", 1.0),
    ):
        assert means(evaluation, metric)[("model", "cells")] == pytest.approx(no_skill, abs=0.02)
    row = evaluation.aggregate.query("metric == 'pearson_delta'").iloc[0]
    assert row["num_undefined_predicted"] == 5
    assert row["num_undefined_observed"] == 0
    assert evaluation.collapse["model"]["verdict"] == "CONTROL COPY"


def test_what_the_data_cannot_carry_is_left_out_for_all():
    adata = screen(32, lines=1, drugs=4, cells=40, controls=80, strength=0.0)
    train, observed = hold_out(adata, all_pairs(1, 3))
    evaluation = evaluate(observed, observed, train, baselines=True, ceiling=True)
    rows = evaluation.scores.query("metric == 'overlap_at_N'")
    drawn = {"control_copy", "perturbation_mean", "context_mean", "other_perturbation"}
    assert set(rows["method"]) == {"model", "replicate"} | drawn
    assert rows["value"].isna().all()
    assert (rows["reason"] == "data: fewer than 10 significant genes").all()
    for metric in ("energy_ratio", "mse_normalized"):  # no denominator above its noise
        assert evaluation.scores.query(f"metric == '{metric}'")["value"].isna().all()
    counted = evaluation.aggregate.query("metric == 'overlap_at_N' and method == 'model'").iloc[0]
    assert counted["num_undefined_observed"] == 3
    assert counted["num_conditions"] == 0


def test_one_perturbation_has_no_retrieval():
    adata = screen(33, lines=1, drugs=1, cells=40, controls=80)
    evaluation = evaluate(adata, adata)
    rows = evaluation.scores.query("metric == 'retrieval_l2' or metric.str.startswith('discr')")
    assert rows["value"].isna().all()
    assert set(rows["reason"]) == {"data: one perturbation in the context"}
    kept = evaluate(adata, adata, profile="cell_eval")
    assert means(kept, "discrimination_score_l1")[("model", "cells")] == 1.0


def test_residuals_need_training_cells():
    adata = screen(34, lines=1, drugs=2)
    reasons = evaluate(adata, adata).scores.query("metric == 'residual_pearson'")["reason"]
    assert reasons.str.contains("no training cells").all()


# --- collapse -----------------------------------------------------------------------------------


def cells_of(observed, factory):
    """A prediction whose treated cells of a drug are ``factory(drug number)`` counts."""
    predicted = observed.copy()
    values = predicted.X.toarray()
    drugs = observed.obs["drug"].to_numpy(str)
    for p in range(8):
        rows = np.flatnonzero(drugs == f"d{p}")
        values[rows] = log_normalise(factory(p, len(rows))).toarray()
    predicted.X = sp.csr_matrix(values)
    return predicted


def test_collapse_is_told_from_skill():
    generator = np.random.default_rng(35)
    rate = np.exp(generator.normal(0, 1, 80))
    effect = generator.normal(0, 0.8, (8, 80)) * (generator.random((8, 80)) < 0.4)
    common = effect.mean(axis=0)

    def observe(p, size):
        return draw(rate * np.exp(effect[p]), size, generator)

    blocks = [observe(p, 60) for p in range(8)] + [draw(rate, 200, generator)]
    labels = np.repeat([*(f"d{p}" for p in range(8)), "DMSO"], [60] * 8 + [200])
    observed = to_anndata(np.vstack(blocks), np.full(len(labels), "L0"), labels)
    predictions = {
        "repeat": cells_of(observed, observe),
        "one response": cells_of(
            observed, lambda _, n: draw(rate * np.exp(3 * common), n, generator)
        ),
        "half": cells_of(observed, lambda p, n: draw(rate * np.exp(0.5 * effect[p]), n, generator)),
        "same cell": cells_of(
            observed, lambda p, n: np.tile(1e3 * rate * np.exp(effect[p]), (n, 1)) + 1
        ),
    }
    wide = predictions["repeat"].copy()
    dense = wide.X.toarray()
    for drug in sorted(set(labels)):
        rows = labels == drug
        dense[rows] += 1.2 * (drug != "DMSO") * (dense[rows] - dense[rows].mean(axis=0))
    wide.X = sp.csr_matrix(np.clip(dense, 0, 12))
    predictions["wide"] = wide
    found = {m: facts["verdict"] for m, facts in evaluate(predictions, observed).collapse.items()}
    assert found["repeat"] == "no collapse"
    assert found["one response"] == "COLLAPSED ACROSS PERTURBATIONS"
    assert found["half"] == "SHRUNK"
    assert "COLLAPSED WITHIN SETS" in found["same cell"]
    assert "OVER-DISPERSED" in found["wide"]


# --- what must not matter -----------------------------------------------------------------------


def test_the_order_of_cells_does_not_matter_where_halves_are_given():
    adata = split_controls(
        screen(36, lines=2, drugs=3),
        perturbation_key="drug",
        cell_type_key="line",
        control="DMSO",
    )
    order = np.random.default_rng(0).permutation(adata.n_obs)
    first, second = evaluate(adata, adata), evaluate(adata[order].copy(), adata[order].copy())
    pd.testing.assert_frame_equal(first.scores, second.scores, rtol=1e-9, atol=1e-9)


def test_the_same_seed_gives_the_same_bytes():
    adata = screen(37, lines=2, drugs=4)
    train, observed = hold_out(adata, [("L0", "d0"), ("L0", "d1")])
    settings = {"baselines": True, "ceiling": True}
    first = evaluate(observed, observed, train, **settings)
    again = evaluate(observed, observed, train, **settings)
    other = evaluate(observed, observed, train, seed=1, **settings)
    pd.testing.assert_frame_equal(first.scores, again.scores, check_exact=True)
    assert not first.scores["value"].equals(other.scores["value"])


def test_other_predictions_do_not_change_a_score():
    adata = screen(38, lines=1, drugs=3)
    half, _ = split_in_two(adata)
    alone = evaluate({"a": adata}, adata).scores
    both = evaluate({"b": half, "a": adata}, adata).scores
    both = both[both["method"] == "a"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, both, check_exact=True)


def test_residuals_do_not_see_the_control():
    adata = split_controls(
        screen(39, lines=2, drugs=5), perturbation_key="drug", cell_type_key="line", control="DMSO"
    )
    pairs = [("L0", "d0"), ("L0", "d1"), ("L0", "d2")]
    train, observed = hold_out(adata, pairs)
    _, predicted = hold_out(screen(39, lines=2, drugs=5, own=0.3), pairs)
    moved = observed.copy()
    moved.obs["control_fold"] = np.where(
        moved.obs["control_fold"] >= 0, 1 - moved.obs["control_fold"], -1
    )
    for metric in ("residual_pearson", "pearson_delta"):
        values = [
            evaluate(predicted, o, train).scores.query(f"metric == '{metric}'")["value"].to_numpy()
            for o in (observed, moved)
        ]
        same = np.abs(values[0] - values[1]).max() < 1e-9
        assert same == (metric == "residual_pearson")


# --- folds, units, aggregation ------------------------------------------------------------------


def test_split_controls_halves_every_context_and_batch():
    adata = screen(41, lines=2, drugs=1, controls=41)
    adata.obs["plate"] = np.where(np.arange(adata.n_obs) % 3 == 0, "p1", "p2")
    keys = {k: KEYS[k] for k in ("perturbation_key", "cell_type_key", "control")}
    split = split_controls(adata, batch_key="plate", **keys)
    assert "control_fold" not in adata.obs
    folds = split.obs[split.obs["drug"] == "DMSO"].groupby(["line", "plate"])["control_fold"]
    for _, values in folds:
        counts = values.value_counts()
        assert set(counts.index) == {0, 1}
        assert abs(counts[0] - counts[1]) <= 1
    assert (split.obs.query("drug != 'DMSO'")["control_fold"] == -1).all()
    again = split_controls(adata, batch_key="plate", **keys)
    assert split.obs["control_fold"].equals(again.obs["control_fold"])
    other = split_controls(adata, batch_key="plate", seed=1, **keys)
    assert not split.obs["control_fold"].equals(other.obs["control_fold"])


def test_another_unit_makes_contexts_of_cell_type_and_unit():
    adata = screen(42, lines=2, drugs=2, controls=120)
    number = adata.obs.groupby(["line", "drug"]).cumcount().to_numpy()
    adata.obs["donor"] = np.array(["A", "B"])[number % 2]
    evaluation = evaluate(adata, adata, unit_key="donor")
    assert set(evaluation.scores["context"]) == {"L0 / A", "L0 / B", "L1 / A", "L1 / B"}
    assert set(evaluation.scores.query("metric == 'mse'")["unit"]) == {"A", "B"}
    assert (evaluation.aggregate["num_units"] <= 2).all()
    assert evaluation.aggregate["low"].isna().all()


def on_plates(adata, *, effect, seed=5):
    """Drugs in turn on two plates, controls on both; the second changes a third of the genes."""
    drug = adata.obs["drug"].to_numpy(str)
    number = np.array([int(d[1:]) if d != "DMSO" else i for i, d in enumerate(drug)])
    is_second = number % 2 == 1
    generator = np.random.default_rng(seed)
    share_G = np.where(generator.random(adata.n_vars) < 1 / 3, effect, 1.0)
    counts = adata.layers["counts"].toarray().astype(np.int64)
    counts[is_second] = generator.binomial(counts[is_second], share_G)
    plates = to_anndata(counts, adata.obs["line"].to_numpy(str), drug)
    plates.obs["plate"] = np.where(is_second, "second", "first")
    return plates


def test_the_effect_of_a_plate_is_none_of_a_drug_on_it():
    adata = on_plates(screen(7, lines=1, drugs=4, cells=80, controls=240, strength=0), effect=0.4)
    tested = adata[adata.obs["drug"].isin(["DMSO", "d1", "d3"])].copy()

    def num_genes(**keys):
        scores = evaluate(tested, tested, control_split="shared", **keys).scores
        return scores[scores["metric"] == "mse"]["num_significant_observed"].tolist()

    assert min(num_genes()) > 15  # a third of 80 genes, by the plate alone
    assert max(num_genes(batch_key="plate")) <= 1


def test_a_batch_makes_contexts_of_cell_type_and_batch_in_one_unit():
    adata = on_plates(screen(8, lines=2, drugs=4, controls=160), effect=0.6)
    predicted = screen(9, lines=2, drugs=4, controls=160)
    predicted.obs["plate"] = on_plates(predicted, effect=1.0).obs["plate"].to_numpy()
    found = evaluate(predicted, adata, control_split="shared", batch_key="plate")
    assert set(found.scores.query("metric == 'mse'")["unit"]) == {"L0", "L1"}
    assert found.meta["control_rule"].endswith("each condition against those of its own plate")
    for table in (adata, predicted):  # the same contexts, by hand
        table.obs["line"] = table.obs["line"].astype(str) + " / " + table.obs["plate"]
    by_hand = evaluate(predicted, adata, control_split="shared")
    keys = ["method", "form", "context", "perturbation", "metric", "value"]
    within = [t.scores[t.scores["context"].str.contains("/")][keys] for t in (found, by_hand)]
    assert len(within[0]) > 100
    pd.testing.assert_frame_equal(*(t.sort_values(keys[:5], ignore_index=True) for t in within))


def score_rows(method, form, values):
    """A score table of one metric: (unit, context) -> values of its conditions."""
    rows = [
        {
            "method": method,
            "form": form,
            "metric": "mse",
            "unit": u,
            "context": c,
            "value": v,
            "reason": "" if np.isfinite(v) else "data: none",
        }
        for (u, c), conditions in values.items()
        for v in conditions
    ]
    return pd.DataFrame(rows)


def test_aggregation_goes_by_condition_context_unit():
    table = score_rows(
        "m",
        "cells",
        {("u", "a"): [1.0, 3.0, np.nan], ("u", "b"): [6.0], ("v", "c"): [10.0], ("w", "d"): [1.0]},
    )
    row = aggregate(table).iloc[0]
    assert row["mean"] == pytest.approx((4.0 + 10.0 + 1.0) / 3)
    assert row["mean_over_conditions"] == pytest.approx(21.0 / 5)
    assert (row["num_units"], row["num_conditions"], row["num_undefined"]) == (3, 5, 1)
    assert row["low"] < row["mean"] < row["high"]


def test_full_depth_corrections():
    assert full_depth("pearson_delta", 0.5) == pytest.approx(2 / 3)
    assert np.isnan(full_depth("pearson_delta", -0.1))  # r <= 0 has no ceiling
    assert full_depth("mse", 0.2) == pytest.approx(0.1)
    assert full_depth("mae", 0.2) == pytest.approx(0.2 / np.sqrt(2))
    assert full_depth("energy_distance", 0.2) == pytest.approx(0.2)
    assert np.isnan(full_depth("overlap_at_N", 0.5))


def test_scaled_scores_by_hand():
    context = {("u", "a"): 4.0, ("v", "b"): 6.0}
    table = pd.concat(
        [
            score_rows("model", "cells", {k: [v / 2] for k, v in context.items()}),
            score_rows("additive", "mean", {k: [v] for k, v in context.items()}),
            score_rows("additive", "cells", {k: [v + 1] for k, v in context.items()}),
            score_rows("replicate", "cells", {k: [v / 2] for k, v in context.items()}),
        ]
    )
    splits = pd.DataFrame(
        {
            "split": [0, 1, 0, 1],
            "unit": ["u", "u", "v", "v"],
            "context": ["a", "a", "b", "b"],
            "metric": "mse",
            "value": [1.9, 2.1, 2.9, 3.1],
        }
    )
    found = add_scaled(aggregate(table), table, splits, ["additive"]).set_index(["method", "form"])
    # the replicate's error halves at full depth: b = v, r = v / 4, u = v / 2
    assert found.loc[("model", "cells"), "scaled"] == pytest.approx((0.5 - 1) / (0.25 - 1))
    assert found.loc[("additive", "mean"), "scaled"] == pytest.approx(0)
    assert found.loc[("model", "cells"), "baseline_form"] == "mean"
    assert found.loc[("model", "cells"), "ceiling_sd"] == pytest.approx(0.2 / np.sqrt(2))
    assert found.loc[("model", "cells"), "ceiling_full_depth_sd"] == pytest.approx(0.1 / np.sqrt(2))
    half = table[(table["method"] != "model") | (table["unit"] == "u")]
    few = add_scaled(aggregate(half), half, splits, ["additive"]).set_index(["method", "form"])
    assert few.loc[("model", "cells"), "scaled_reason"] == "covers 1 of 2 conditions"
    splits["value"] = [-2.0, 6.0, -1.0, 7.0]
    found = add_scaled(aggregate(table), table, splits, ["additive"])
    assert found["scaled"].isna().all()
    assert found["scaled_reason"].str.startswith("no headroom").all()
