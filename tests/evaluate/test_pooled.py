"""The two flaws of common protocols, reproduced: pooled contexts, shared control cells.

Both give skill to predictions that know nothing of any perturbation.
"""

import numpy as np
import pandas as pd
import pytest
from small_screen import KEYS, draw, evaluate, hold_out, means, screen, to_anndata

from scale.evaluate.pooled import POOLED

LINES, DRUGS, GENES = 5, 12, 200


@pytest.fixture(scope="module")
def composition():
    """Observed cells whose contexts have other shares than the controls, and control copies.

    Every drug has an effect, which the prediction knows nothing of: it is control cells, as many of
    each line as were observed.
    """
    generator = np.random.default_rng(70)
    base = np.exp(generator.normal(0, 1, GENES) + generator.normal(0, 1, (LINES, GENES)))
    effect = generator.normal(0, 0.3, (DRUGS, GENES)) * (generator.random((DRUGS, GENES)) < 0.3)
    observed, copied, lines, drugs = [], [], [], []
    for c in range(LINES):
        controls = draw(base[c], 240 if c < 2 else 80, generator)
        for p in range(DRUGS):
            size = 12 if c < 2 else 36
            observed.append(draw(base[c] * np.exp(effect[p]), size, generator))
            copied.append(controls[generator.integers(0, len(controls), size)])
            lines += [f"L{c}"] * size
            drugs += [f"d{p}"] * size
        observed.append(controls)
        copied.append(controls)
        lines += [f"L{c}"] * len(controls)
        drugs += ["DMSO"] * len(controls)
    return [to_anndata(np.vstack(counts), lines, drugs) for counts in (copied, observed)]


@pytest.fixture(scope="module")
def both(composition):
    return evaluate(*composition, profile="paper_pooled")


def test_copies_of_controls_score_high_pooled_and_nothing_per_context(both):
    assert means(both.pooled, "pearson_delta")[("model", "cells")] > 0.8
    assert abs(means(both, "pearson_delta")[("model", "cells")]) < 0.05


def test_the_copy_of_the_controls_stands_beside_every_row(both):
    for table, columns, value in (
        (both.pooled.scores, ["perturbation", "metric"], "value"),
        (both.pooled.aggregate, ["metric"], "mean"),
    ):
        copies = table.query("method == 'control_copy' and form == 'cells'").set_index(columns)
        model = table.query("method == 'model'").set_index(columns)
        assert len(model)
        pd.testing.assert_series_equal(
            model["control_copy"], copies.loc[model.index, value], check_names=False
        )
    copied = means(both.pooled, "pearson_delta")
    # without any model the same is scored: that is what the column is for
    assert copied[("control_copy", "cells")] == pytest.approx(copied[("model", "cells")], abs=0.02)


def test_pooled_tables_say_so(both):
    pooled = both.pooled
    assert set(pooled.scores["context"]) == set(pooled.scores["unit"]) == {POOLED}
    assert {context for _, context in pooled.deltas} == {POOLED}
    assert set(pooled.cells.obs["context"]) == {POOLED}
    assert pooled.meta["contexts"] == POOLED
    assert pooled.meta["warnings"][0].startswith("Pooled over contexts: ")
    assert pooled.aggregate["low"].isna().all()
    assert "residual_pearson" not in set(pooled.scores["metric"])
    assert pooled.pooled is None
    assert both.meta["contexts"] == "each alone"
    assert set(both.scores["context"]) == {f"L{c}" for c in range(LINES)}


def test_beside_the_pooled_result_stands_that_of_each_context(both, composition):
    alone = evaluate(*composition, profile="cell_eval")
    pd.testing.assert_frame_equal(both.scores, alone.scores, check_exact=True)
    assert alone.pooled is None


def test_the_pooled_result_is_that_of_one_context(both, composition):
    """Reference: contexts are made one before the evaluation."""
    one = [adata.copy() for adata in composition]
    for adata in one:
        adata.obs["line"] = POOLED
    expected = evaluate(*one, profile="cell_eval").scores
    found = both.pooled.scores.query("method == 'model'")
    keys = ["perturbation", "metric"]
    merged = found.merge(expected, on=keys, suffixes=("", "_one"))
    assert len(merged) == len(found) > 100
    # energy distances are in another space: that of the contexts' controls in another order
    close = merged[~merged["metric"].str.contains("energy|mmd|wasserstein")]
    np.testing.assert_allclose(close["value"], close["value_one"], rtol=1e-6, atol=1e-9)


def test_pooled_baselines_are_those_of_each_context_together():
    adata = screen(71, lines=3, drugs=5, cells=30, controls=60, strength=1.5)
    pairs = [("L0", "d0"), ("L0", "d1"), ("L1", "d0"), ("L1", "d1")]
    train, observed = hold_out(adata, pairs)
    settings = {"baselines": True, "profile": "paper_pooled"}
    evaluation = evaluate(observed, observed, train, **settings)
    pooled = evaluation.pooled
    for method in ("control_copy", "context_transfer", "additive"):
        for label in ("d0", "d1"):
            parts = [evaluation.deltas[(method, c)].loc[label] for c in ("L0", "L1")]
            # both contexts have equal shares of every pool, so that changes average
            expected = (parts[0] + parts[1]) / 2
            found = pooled.deltas[(method, POOLED)].loc[label]
            np.testing.assert_allclose(found, expected, atol=1e-5)


# --- shared control cells -----------------------------------------------------------------------


def test_shared_controls_give_skill_to_cells_without_effect():
    """Without any effect, cells drawn afresh score the floor of the formula, or 0 with halves."""
    shared, halves, floor = [], [], []
    for seed in range(6):
        generator = np.random.default_rng(80 + seed)
        rate = np.exp(generator.normal(0, 1, 100))
        labels = np.repeat([*(f"d{p}" for p in range(20)), "DMSO"], [40] * 20 + [80])
        lines = np.full(len(labels), "L0")
        observed, fresh = (
            to_anndata(draw(rate, len(labels), generator), lines, labels) for _ in range(2)
        )
        evaluation = evaluate(fresh, observed, control_split="shared")
        shared.append(means(evaluation, "pearson_delta")[("model", "cells")])
        floor.append(evaluation.meta["control_floor"]["L0"])
        assert any(f"pearson_delta of L0 {floor[-1]:.2f}" in w for w in evaluation.meta["warnings"])
        evaluation = evaluate(fresh, observed)
        halves.append(means(evaluation, "pearson_delta")[("model", "cells")])
        assert evaluation.meta["control_floor"] == {"L0": 0.0}
    assert floor == pytest.approx([(1 / 80) / (1 / 80 + 1 / 40)] * 6)
    assert np.mean(shared) == pytest.approx(floor[0], abs=0.06)
    # the control means of two halves have nothing in common, those of 40 cells much noise
    assert abs(np.mean(halves)) < 0.15


def test_the_floor_counts_the_predicted_cells():
    adata = screen(72, lines=1, drugs=2, cells=40, controls=80)
    number = adata.obs.groupby(["line", "drug"], observed=True).cumcount().to_numpy()
    predicted = adata[(number < 20) | (adata.obs["drug"] == "DMSO").to_numpy()].copy()
    floor = evaluate(predicted, adata, control_split="shared").meta["control_floor"]["L0"]
    assert floor == pytest.approx((1 / 80) / np.sqrt((1 / 80 + 1 / 40) * (1 / 80 + 1 / 20)))


def test_where_predictions_started_must_be_known():
    from scale.config import ProtocolConfig
    from scale.evaluate.protocol import run_protocol

    adata = screen(73, lines=1, drugs=2)
    settings = ProtocolConfig(baselines=False, ceiling=False)
    with pytest.raises(
        ValueError, match=r"model: no column source_cell, and .* protocol.control_split=shared"
    ):
        run_protocol({"model": adata}, adata, protocol=settings, **KEYS)
