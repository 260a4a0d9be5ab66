"""What bad input is told: found, expected, what to do."""

import logging

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from small_screen import KEYS, evaluate, halved, hold_out, screen

from scale.config import ProtocolConfig
from scale.evaluate.protocol import run_protocol

PAIRS = [("L0", "d0"), ("L0", "d1"), ("L1", "d0")]


@pytest.fixture(scope="module")
def cells():
    adata = screen(20, lines=2, drugs=3, cells=20, controls=40, genes=30)
    train, observed = hold_out(adata, PAIRS)
    predicted = observed.copy()
    del predicted.layers["counts"]
    return train, observed, predicted


@pytest.fixture
def pair(cells):
    return cells[1].copy(), cells[2].copy()


def treated(adata):
    return (adata.obs["drug"] != "DMSO").to_numpy()


def with_values(adata, values):
    return ad.AnnData(X=values, obs=adata.obs.copy(), var=adata.var.copy())


def test_other_gene_order_is_aligned_by_name(pair, caplog):
    observed, predicted = pair
    with caplog.at_level(logging.INFO, logger="scale"):
        shuffled = evaluate(predicted[:, ::-1].copy(), observed)
    assert "aligned by name" in caplog.text
    expected = evaluate(predicted, observed)
    pd.testing.assert_frame_equal(shuffled.scores, expected.scores)


def test_other_genes_are_named(pair):
    observed, predicted = pair
    predicted.var_names = [*predicted.var_names[:-1], "G29x"]
    with pytest.raises(
        ValueError, match=r"model: genes differ .* 1 missing \(g29\), 1 more \(G29x"
    ):
        evaluate(predicted, observed)


def test_duplicate_genes_are_named(pair):
    observed, predicted = pair
    predicted.var_names = [*predicted.var_names[:-1], "g0"]
    with pytest.raises(ValueError, match=r"model: gene names are not unique \(as g0\)"):
        evaluate(predicted, observed)


def test_missing_and_extra_conditions_are_named(pair):
    observed, predicted = pair
    fewer = predicted[(predicted.obs["drug"] != "d1").to_numpy()].copy()
    with pytest.raises(ValueError, match=r"1 only in observed \(d1 in L0\); predict every"):
        evaluate(fewer, observed)
    predicted.obs["drug"] = predicted.obs["drug"].astype(str).replace("d1", "d9")
    with pytest.raises(ValueError, match=r"1 only in observed .* 1 only in model \(d9 in L0\)"):
        evaluate(predicted, observed)


def test_absent_control_label_gets_the_nearest(pair):
    observed, predicted = pair
    observed.obs["drug"] = observed.obs["drug"].astype(str).replace("DMSO", "DMSO_TF")
    observed.obs["drug"] = observed.obs["drug"].replace("d0", "DMSOx")
    with pytest.raises(
        ValueError, match=r"observed: no control cells, no label is 'DMSO'; did you"
    ):
        evaluate(predicted, observed)


def test_a_label_that_contains_the_control_is_no_control(pair):
    observed, predicted = pair
    for adata in pair:
        names = adata.obs["drug"].astype(str).replace("d0", "Trametinib (DMSO solvate)")
        adata.obs["drug"] = " " + names + "  "
    evaluation = evaluate(predicted, observed)
    assert "Trametinib (DMSO solvate)" in set(evaluation.scores["perturbation"])


def test_contexts_without_enough_controls_are_named(pair):
    observed, predicted = pair
    rows = treated(observed) | (observed.obs["line"] == "L0").to_numpy()
    with pytest.raises(ValueError, match=r"observed: contexts with fewer than 10 .* L1 \(0\)"):
        evaluate(predicted, observed[rows].copy())


def test_cell_eval_needs_controls_in_the_prediction(pair):
    observed, predicted = pair
    with pytest.raises(ValueError, match="model: no control cells"):
        evaluate(predicted[treated(predicted)].copy(), observed, profile="cell_eval")


def test_strict_needs_none_there(pair):
    observed, predicted = pair
    assert len(evaluate(predicted[treated(predicted)].copy(), observed).scores)


def test_an_absent_column_gets_the_nearest(pair):
    observed, predicted = pair
    predicted.obs = predicted.obs.rename(columns={"line": "lines"})
    with pytest.raises(ValueError, match=r"model: no column 'line' .* did you mean 'lines'\?"):
        evaluate(predicted, observed)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_placed(pair, bad):
    observed, predicted = pair
    values = predicted.X.toarray()
    values[3, 7] = bad
    with pytest.raises(ValueError, match=r"model: cell '.*', gene 'g7' is (nan|inf)"):
        evaluate(with_values(predicted, values), observed)


def test_negative_values_are_an_error_however_small(pair):
    observed, predicted = pair
    values = predicted.X.toarray()
    values[0, 0] = -1e-4
    with pytest.raises(ValueError, match=r"negative, down to -0.0001; expected .* clip the output"):
        evaluate(with_values(predicted, values), observed)


def test_counts_are_an_error(pair):
    observed, predicted = pair
    with pytest.raises(ValueError, match=r"model: X holds integers up to \d+, so counts"):
        evaluate(with_values(predicted, observed.layers["counts"]), observed)


def test_values_that_are_no_logs_are_an_error(pair):
    observed, predicted = pair
    with pytest.raises(ValueError, match=r"model: X reaches \d+\.\d, so it is not log1p"):
        evaluate(with_values(predicted, predicted.X.expm1()), observed)


def test_no_cells_are_an_error(pair):
    observed, predicted = pair
    with pytest.raises(ValueError, match="observed: holds no cells"):
        evaluate(predicted, observed[:0].copy())


def test_zeros_only_are_an_error(pair):
    observed, predicted = pair
    empty = sp.csr_matrix(predicted.shape, dtype=np.float32)
    with pytest.raises(ValueError, match="model: all values are 0"):
        evaluate(with_values(predicted, empty), observed)


@pytest.mark.parametrize("scale", [0.1, 1.05])
def test_another_target_sum_or_scale_is_an_error(pair, scale):
    observed, predicted = pair
    predicted.X = sp.csr_matrix(predicted.X * np.float32(scale))
    with pytest.raises(ValueError, match=r"control cells add up to \d+ counts .* one target sum"):
        evaluate(predicted, observed)


def test_another_target_sum_is_seen_without_controls_too(pair):
    observed, predicted = pair
    predicted = predicted[treated(predicted)].copy()
    predicted.X = sp.csr_matrix((predicted.X.expm1() * 0.1).log1p())
    with pytest.raises(ValueError, match=r"model: the treated cells add up to"):
        evaluate(predicted, observed)


def test_every_matrix_type_gives_the_same_scores(pair):
    observed, predicted = pair
    expected = evaluate(predicted, observed).scores
    for values in (
        sp.csr_array(predicted.X),
        sp.csc_matrix(predicted.X),
        predicted.X.toarray(),
        predicted.X.astype(np.float64),
    ):
        pd.testing.assert_frame_equal(
            evaluate(with_values(predicted, values), observed).scores, expected
        )


def test_float16_is_warned(pair):
    observed, predicted = pair
    values = predicted.X.toarray().astype(np.float16)
    evaluation = evaluate(with_values(predicted, values), observed)
    assert any("model: X is float16, which holds 3" in w for w in evaluation.meta["warnings"])


def written(adata, path, matrix):
    """Write an AnnData whose X and counts are of a type."""
    made = adata.copy()
    made.X = matrix(made.X)
    for name in list(made.layers):
        made.layers[name] = matrix(made.layers[name])
    made.write_h5ad(path)
    return path


@pytest.mark.parametrize("matrix", [sp.csr_matrix, sp.csc_matrix, lambda x: x.toarray()])
def test_files_give_the_bytes_of_cells_in_memory(cells, tmp_path, matrix):
    train, observed, predicted = cells
    observed = halved(observed)
    settings = {"baselines": True, "ceiling": True}
    expected = evaluate(predicted, observed, train, **settings)
    names = ("p", "o", "t")
    paths = [
        written(adata, tmp_path / f"{name}.h5ad", matrix)
        for name, adata in zip(names, (predicted, observed, train), strict=True)
    ]
    found = run_protocol(
        {"model": paths[0]},
        str(paths[1]),
        train=paths[2],
        protocol=ProtocolConfig(min_cells=8),
        **KEYS,
    )
    backed = [ad.read_h5ad(path, backed="r") for path in paths]
    try:
        again = run_protocol(
            {"model": backed[0]},
            backed[1],
            train=backed[2],
            protocol=ProtocolConfig(min_cells=8),
            **KEYS,
        )
    finally:
        for adata in backed:
            adata.file.close()
    for other in (found, again):
        pd.testing.assert_frame_equal(other.scores, expected.scores, check_exact=True)
        for key in ("observed_sha256", "predicted_sha256", "train_sha256"):
            assert other.meta[key] == expected.meta[key]


def test_a_path_that_is_no_anndata_is_an_error(pair, tmp_path):
    observed, predicted = pair
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.h5ad"):
        evaluate(tmp_path / "nowhere.h5ad", observed)
    with h5py.File(tmp_path / "empty.h5ad", "w"):
        pass
    with pytest.raises(ValueError, match=r"empty.h5ad holds nothing; expected an h5ad with X, obs"):
        evaluate(tmp_path / "empty.h5ad", observed)


def test_unequal_cell_numbers_are_warned_and_refused_beyond_twice(pair):
    observed, predicted = pair
    rows = np.flatnonzero(treated(predicted))
    some = np.concatenate([np.flatnonzero(~treated(predicted)), rows[::3]])
    fewer = predicted[np.sort(np.concatenate([some, rows[1::3]]))].copy()
    evaluation = evaluate(fewer, observed)
    assert any("predicted / observed cells" in text for text in evaluation.meta["warnings"])
    with pytest.raises(
        ValueError, match=r"model: predicted / observed cells .* as many as observed"
    ):
        evaluate(predicted[np.sort(some)].copy(), observed)
    evaluate(predicted[np.sort(some)].copy(), observed, profile="cell_eval")


def test_small_conditions_are_left_out_and_listed(pair):
    observed, predicted = pair
    names = observed.obs["drug"].to_numpy(str).copy()
    small = np.flatnonzero((names == "d1") & (observed.obs["line"] == "L0").to_numpy())[5:]
    keep = np.setdiff1d(np.arange(observed.n_obs), small)
    evaluation = evaluate(predicted, observed[keep].copy(), min_cells=10)
    assert evaluation.excluded.to_dict("records") == [
        {"context": "L0", "perturbation": "d1", "reason": "5 observed cells; 10 are needed"}
    ]
    assert "d1" not in set(evaluation.scores["perturbation"])
    with pytest.raises(ValueError, match=r"no condition has 50 observed cells .* largest has 20"):
        evaluate(predicted, observed, min_cells=50)


def test_training_cells_of_a_scored_condition_are_a_leak(cells):
    train, observed, predicted = cells
    leaking = ad.concat([train, observed[(observed.obs["drug"] == "d1").to_numpy()]])
    with pytest.raises(ValueError, match=r"train holds cells of 1 scored conditions \(d1 in L0\)"):
        evaluate(predicted, observed, leaking)


def test_predictions_from_reference_controls_are_refused(pair):
    observed, predicted = pair
    is_control = ~treated(observed)
    observed.obs["control_fold"] = np.where(is_control, np.arange(observed.n_obs) % 2, -1)
    reference = observed.obs_names[is_control & (observed.obs["control_fold"] == 1).to_numpy()]
    inputs = observed.obs_names[is_control & (observed.obs["control_fold"] == 0).to_numpy()]
    predicted.obs["source_cell"] = inputs[0]
    evaluate(predicted, observed)
    predicted.obs.loc[predicted.obs_names[treated(predicted)][:3], "source_cell"] = reference[0]
    with pytest.raises(ValueError, match=r"model: 3 cells were made from control cells of fold 1"):
        evaluate(predicted, observed)


def test_a_fold_column_must_cover_every_control(pair):
    observed, predicted = pair
    observed.obs["control_fold"] = -1
    with pytest.raises(ValueError, match=r'control_fold"\] must be 0 \(input\) or 1'):
        evaluate(predicted, observed)
    observed.obs["control_fold"] = 0
    with pytest.raises(ValueError, match="0 reference control cells; each half needs"):
        evaluate(predicted, observed)


def test_source_cells_that_are_not_observed_are_warned(pair):
    observed, predicted = pair
    predicted.obs["source_cell"] = "elsewhere"
    evaluation = evaluate(predicted, observed)
    assert any("no source_cell is a control cell of obs" in w for w in evaluation.meta["warnings"])


# --- what a setting lets pass -------------------------------------------------------------------


def test_conditions_of_one_input_are_left_out_and_listed_if_asked(pair):
    observed, predicted = pair
    in_one = (predicted.obs["drug"] == "d1").to_numpy()
    other = predicted.copy()
    names = other.obs["drug"].astype(str)
    other.obs["drug"] = names.where((other.obs["line"] != "L1") | (names != "d0"), "d9")
    methods = {"few": predicted[~in_one].copy(), "other": other}
    evaluation = evaluate(methods, observed, missing="drop")
    assert set(evaluation.excluded.itertuples(index=False, name=None)) == {
        ("L0", "d1", "not predicted by few"),
        ("L1", "d0", "not predicted by other"),
        ("L1", "d9", "predicted by other, not observed"),
    }
    scored = evaluation.scores.query("metric == 'mse'")
    assert set(zip(scored["context"], scored["perturbation"], strict=True)) == {("L0", "d0")}
    assert any("3 conditions stand in one input only" in w for w in evaluation.meta["warnings"])
    rows = ~treated(observed) | (observed.obs["line"] == "L0").to_numpy()
    rows &= (observed.obs["drug"] != "d1").to_numpy()
    alone = evaluate(methods["few"][rows[~in_one]].copy(), observed[rows].copy())
    for metric in ("mse", "mae"):
        found = evaluation.scores.query(f"method == 'few' and metric == '{metric}'")["value"]
        assert found.tolist() == alone.scores.query(f"metric == '{metric}'")["value"].tolist()
    nothing = predicted.copy()
    nothing.obs["drug"] = names.where(names == "DMSO", "x" + names)
    with pytest.raises(ValueError, match=r"no condition stands in every input \(6 in some\)"):
        evaluate(nothing, observed, missing="drop")


def test_counts_are_normalised_if_asked(cells):
    train, observed, predicted = (adata.copy() for adata in cells)
    counts = observed.layers["counts"]
    expected = evaluate(observed, observed, train, baselines=True).scores
    as_counts = [with_values(observed, counts), with_values(observed, counts)]
    trained = with_values(train, train.layers["counts"])
    settings = {"baselines": True, "normalize": 1e4}
    evaluation = evaluate(*as_counts, trained, **settings)
    assert evaluation.meta["normalize"] == 1e4
    pd.testing.assert_frame_equal(evaluation.scores, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"model: X holds fractions up to .* takes counts"):
        evaluate(predicted, as_counts[1], **settings)


def test_cells_are_matched_if_asked(pair):
    observed, predicted = pair
    rows = np.flatnonzero(treated(predicted))
    fewer = predicted[np.sort(np.r_[np.flatnonzero(~treated(predicted)), rows[::3]])].copy()
    evaluation = evaluate(fewer, observed, match_cells=True, min_cells=2)
    numbers = evaluation.scores.query("metric == 'mse'")
    sizes = fewer.obs[treated(fewer)].groupby(["line", "drug"], observed=True).size()
    assert numbers["num_cells_observed"].tolist() == sizes.tolist()
    assert numbers["num_cells_predicted"].tolist() == sizes.tolist()
    again = evaluate(fewer, observed, match_cells=True, min_cells=2)
    pd.testing.assert_frame_equal(evaluation.scores, again.scores, check_exact=True)
    more = evaluate(observed, fewer, match_cells=True, min_cells=2)
    drawn = more.scores.query("metric == 'mse' and form == 'cells'")
    assert drawn["num_cells_predicted"].tolist() == sizes.tolist()


def test_means_are_those_of_all_cells_where_some_are_drawn(pair):
    observed, predicted = pair
    rows = np.flatnonzero(treated(predicted))
    kept = np.r_[np.flatnonzero(~treated(predicted)), rows[::3]]
    fewer = observed[np.sort(kept)].copy()
    found = evaluate(predicted, fewer, match_cells=True, min_cells=2)
    means = found.scores.query("form == 'mean'").set_index(["metric", "context", "perturbation"])
    assert set(found.scores["form"]) == {"cells", "mean"}

    def mean(adata, line, drug):
        chosen = (adata.obs["line"] == line) & (adata.obs["drug"] == drug)
        return np.asarray(adata[chosen.to_numpy()].X.mean(axis=0)).ravel()

    for line, drug in PAIRS:
        error = np.mean((mean(predicted, line, drug) - mean(fewer, line, drug)) ** 2)
        assert means.loc[("mse", line, drug), "value"] == pytest.approx(error, rel=1e-6)
    assert "energy_distance" not in means.index.get_level_values("metric")
    assert set(evaluate(predicted, observed).scores["form"]) == {"cells"}  # as many: one form


# --- what is said beside the numbers ------------------------------------------------------------


def test_other_controls_in_the_prediction_are_counted(pair):
    observed, predicted = pair
    same = evaluate(predicted, observed, profile="cell_eval")
    assert not any("predicted controls" in w for w in same.meta["warnings"])
    values = predicted.X.toarray()
    spoilt = np.flatnonzero(~treated(predicted))[:7]
    values[spoilt] = values[spoilt][:, ::-1]
    changed = with_values(predicted, values)
    evaluation = evaluate(changed, observed, profile="cell_eval")
    total = int((~treated(observed)).sum())
    assert any(
        f"model: predicted controls differ from the observed ones: 7 of {total} cells" in w
        for w in evaluation.meta["warnings"]
    )
    strict = [evaluate(cells, observed).scores for cells in (predicted, changed)]
    pd.testing.assert_frame_equal(*strict, check_exact=True)


def test_identical_cells_of_a_set_are_said(pair):
    observed, predicted = pair
    values = predicted.X.toarray()
    rows = np.flatnonzero((predicted.obs["drug"] == "d1").to_numpy())
    values[rows] = values[rows].mean(axis=0)
    evaluation = evaluate(with_values(predicted, values), observed)
    assert any(
        "model: within-set collapse: all predicted cells are the same in 1 of 3" in w
        for w in evaluation.meta["warnings"]
    )


def test_totals_of_treated_cells_that_differ_are_said(pair):
    observed, predicted = pair
    predicted = predicted[treated(predicted)].copy()
    predicted.X = sp.csr_matrix((predicted.X.expm1() * 0.7).log1p())
    evaluation = evaluate(predicted, observed)
    assert any("may have been normalised to another" in w for w in evaluation.meta["warnings"])


def test_training_cells_may_have_more_genes(cells):
    train, observed, predicted = cells
    some = observed.var_names[::2]
    cut = [adata[:, some].copy() for adata in (predicted, observed)]
    settings = {"baselines": True}
    expected = evaluate(*cut, train[:, some].copy(), **settings)
    more = evaluate(*cut, train, **settings)
    pd.testing.assert_frame_equal(more.scores, expected.scores, check_exact=True)


def test_values_are_read_for_scored_conditions_only(cells, tmp_path):
    """Law: what is not scored is not read; a value that is no number there harms nobody."""
    _, observed, predicted = cells
    observed = halved(observed)
    expected = evaluate(predicted, observed, missing="drop").scores
    extra = observed[(observed.obs["drug"] == "d1").to_numpy()].copy()
    extra.obs["drug"] = "unpredicted"
    extra.obs_names = "x" + extra.obs_names
    extra.X = extra.X * np.float32(np.nan)
    more = ad.concat([extra, observed], merge="same")
    more.write_h5ad(tmp_path / "o.h5ad")
    found = evaluate(predicted, tmp_path / "o.h5ad", missing="drop").scores
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_names_of_baselines_are_taken(pair):
    observed, predicted = pair
    with pytest.raises(ValueError, match="may not be called additive"):
        evaluate({"additive": predicted}, observed)


def test_inputs_are_left_as_they_are(cells):
    train, observed, predicted = (adata.copy() for adata in cells)
    evaluate(predicted, observed, train, baselines=True, ceiling=True)
    for adata, before in zip((train, observed, predicted), cells, strict=True):
        assert (adata.X != before.X).nnz == 0
        pd.testing.assert_frame_equal(adata.obs, before.obs)
        assert list(adata.layers) == list(before.layers)
