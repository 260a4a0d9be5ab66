"""Laws of the figures: they draw what they are given, touch nothing global, and never overlap."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from example_evaluation import MODEL_QUALITY, example_evaluation
from matplotlib.backends.backend_agg import FigureCanvasAgg

import scale.plot
from scale.plot.bars import CEILING, better_forms, number, score_panels, strip
from scale.plot.canvas import Figure, method_colours, new_figure, png, spread_evenly
from scale.plot.cells import pearson, pretty
from scale.plot.curves import read_metrics, training_panels
from scale.plot.heat import heat
from scale.plot.plane import principal_components, response_directions, response_map


@pytest.fixture(scope="module")
def evaluation():
    return example_evaluation(num_contexts=3, num_perturbations=6, num_genes=60)


@pytest.fixture(scope="module")
def change():
    generator = np.random.default_rng(0)
    genes = [f"GENE{g}" for g in range(200)]
    observed = pd.Series(generator.normal(size=200), index=genes)
    return observed, 0.5 * observed + generator.normal(0, 0.1, size=200)


def texts_of(ax):
    return [text.get_text() for text in ax.texts]


def boxes_overlap(figure, texts):
    """Return pairs of texts whose boxes on the canvas meet."""
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(t, t.get_window_extent(renderer)) for t in texts if t.get_text() and t.get_visible()]
    return [
        (a.get_text(), b.get_text())
        for i, (a, box_a) in enumerate(boxes)
        for b, box_b in boxes[i + 1 :]
        if box_a.shrunk(0.96, 0.9).overlaps(box_b.shrunk(0.96, 0.9))
    ]


def test_delta_says_pearson_and_keeps_genes_by_name(change):
    observed, predicted = change
    ax = scale.plot.delta(predicted.sample(frac=1, random_state=0), observed)
    expected = np.corrcoef(observed, predicted)[0, 1]
    assert f"r = {expected:.2f}" in texts_of(ax)[0]
    assert len(ax.collections[0].get_offsets()) == 200


def test_delta_counts_what_is_not_finite(change):
    observed, predicted = change[0].copy(), change[1]
    observed.iloc[:3] = np.inf
    ax = scale.plot.delta(predicted, observed)
    assert "3 genes not finite" in texts_of(ax)[0]


def test_delta_of_many_genes_is_binned():
    values = pd.Series(np.random.default_rng(0).normal(size=6000), index=map(str, range(6000)))
    binned = scale.plot.delta(values, values).collections[0]
    assert binned.get_array().sum() == 6000


def test_pearson_is_numpy_and_undefined_for_a_constant(change):
    observed, predicted = (series.to_numpy() for series in change)
    assert pearson(observed, predicted) == pytest.approx(np.corrcoef(observed, predicted)[0, 1])
    assert np.isnan(pearson(np.ones(5), np.arange(5.0)))


def test_effect_ranks_genes_by_the_first_entry(change):
    observed, predicted = change
    ax = scale.plot.effect({"observed": observed, "model": predicted}, num_genes=10)
    drawn = {label.get_text() for label in ax.get_yticklabels()}
    assert drawn == set(observed.abs().nlargest(10).index)


def test_mean_delta_is_the_difference_of_means():
    values = np.array([[0.0, 1.0], [2.0, 3.0], [5.0, 5.0]])
    adata = AnnData(
        values,
        obs=pd.DataFrame({"drug": ["DMSO", "DMSO", "A"]}, index=list("xyz")),
        var=pd.DataFrame(index=["G1", "G2"]),
    )
    found = scale.plot.mean_delta(adata, "A", perturbation_key="drug", control="DMSO")
    assert found.to_dict() == {"G1": 4.0, "G2": 3.0}
    with pytest.raises(ValueError, match="no cells of 'B' in 'drug'; it has A, DMSO"):
        scale.plot.mean_delta(adata, "B", perturbation_key="drug", control="DMSO")


def test_scores_draw_the_better_form_and_the_ceiling_last(evaluation):
    worse = evaluation.aggregate.assign(form="mean", mean=evaluation.aggregate["mean"] - 1)
    both = pd.concat([evaluation.aggregate, worse])
    ax = scale.plot.scores(both, "pearson_delta")
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names[0] == "replicate"
    assert names[-1] == "model"
    widths = [bar.get_width() for bar in ax.patches]
    expected = better_forms(evaluation.aggregate, "pearson_delta")["mean"]
    assert sorted(widths) == pytest.approx(sorted(expected))


def test_better_form_of_an_error_is_the_smaller():
    rows = [("a", "cells", 2.0), ("a", "mean", 1.0), ("b", "cells", 3.0)]
    table = pd.DataFrame(rows, columns=["method", "form", "mean"])
    best = better_forms(table.assign(metric="mse", better="lower"), "mse")
    assert best["mean"].to_dict() == {"a": 1.0, "b": 3.0}


def test_scores_of_an_unknown_metric_name_the_known(evaluation):
    with pytest.raises(ValueError, match="no values of 'r2'; the table has .*mse"):
        scale.plot.scores(evaluation.aggregate, "r2")


def test_distribution_writes_the_share_of_zeros():
    values = {"control": np.array([0.0, 0.0, 1.0, 2.0]), "observed": np.array([0.0, 1.0])}
    assert texts_of(scale.plot.distribution(values, "A")) == ["50% zero", "50% zero"]
    adata = AnnData(np.ones((2, 1)), var=pd.DataFrame(index=["A"]))
    assert texts_of(scale.plot.distribution({"control": adata}, "A")) == ["0% zero"]
    with pytest.raises(ValueError, match="no gene 'B'"):
        scale.plot.distribution({"control": adata}, "B")


def test_training_reads_a_run_and_says_what_is_missing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.0, "val/loss": 1.5}\n'
    )
    ax = scale.plot.training(tmp_path)
    assert len(ax.lines) == 2
    assert list(read_metrics(tmp_path)["step"]) == [1, 2]
    with pytest.raises(ValueError, match="no nothing in the metrics; it has step, train/loss"):
        scale.plot.training(tmp_path, keys=["nothing"])
    with pytest.raises(ValueError, match=r"no metrics\.jsonl at .*absent"):
        scale.plot.training(tmp_path / "absent")


def test_training_panels_leave_out_what_was_not_logged():
    table = pd.DataFrame({"step": [1, 2], "train/loss": [2.0, 1.0], "train/lr": [0.1, 0.1]})
    assert len(training_panels(table).axes) == 1
    assert training_panels(pd.DataFrame({"step": [1]})) is None


def test_principal_components_are_those_of_the_covariance():
    values = np.random.default_rng(0).normal(size=(40, 6)) * np.arange(1, 7)
    coordinates, shares = principal_components(values)
    eigenvalues = np.linalg.eigvalsh(np.cov(values.T))[::-1]
    assert coordinates.var(axis=0, ddof=1) == pytest.approx(eigenvalues[:2])
    assert shares == pytest.approx(eigenvalues[:2] / eigenvalues.sum())


def test_the_largest_response_is_the_first_direction():
    generator = np.random.default_rng(0)
    direction = np.zeros(20)
    direction[3] = 1.0
    change = np.outer(generator.normal(0, 5, size=30), direction)
    change += generator.normal(0, 0.1, size=change.shape)
    basis, shares = response_directions(change)
    assert basis[0] @ direction == pytest.approx(1.0, abs=1e-3)
    assert shares[0] > 0.95
    ax = response_map(change @ basis.T, change @ basis.T, colour="k", names=("a", "b"))
    assert [len(c.get_offsets()) for c in ax.collections] == [30, 30]


def test_embedding_shows_each_role_once(evaluation):
    ax = scale.plot.embedding(evaluation.cells, method="model", context="LINE-A")
    assert [len(c.get_offsets()) for c in ax.collections] == [60, 40, 40]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "control",
        "observed",
        "predicted",
    ]


def test_functions_draw_into_given_axes(evaluation, change):
    figure = new_figure(4, 4)
    ax = figure.subplots()
    assert scale.plot.delta(change[1], change[0], ax=ax) is ax
    assert scale.plot.scores(evaluation.aggregate, "mse", ax=ax) is ax
    assert scale.plot.embedding(evaluation.cells, ax=ax) is ax


def test_heat_writes_every_number():
    figure = new_figure(4, 3)
    table = pd.DataFrame([[0.1, np.nan], [0.4, 0.9]], index=["A", "B"], columns=["x", "y"])
    ax = heat(table, label="r", title="t", figure=figure, ax=figure.subplots())
    assert texts_of(ax) == ["0.10", "–", "0.40", "0.90"]


def test_no_texts_overlap_in_the_score_panels(evaluation):
    metrics = ["residual_pearson", "retrieval_l2", "energy_ratio", "mse"]
    colours = method_colours(["model"], list(MODEL_QUALITY)[1:-1])
    colours[CEILING] = colours.pop(CEILING)
    figure = score_panels(
        evaluation.aggregate, metrics, labels={}, colours=colours, columns=len(metrics)
    )
    for ax in figure.axes:
        assert boxes_overlap(figure, ax.texts) == []
        assert boxes_overlap(figure, ax.get_xticklabels()) == []
    titles = [text for ax in figure.axes for text in (ax.title, ax._left_title)]
    assert boxes_overlap(figure, titles) == []


def test_strip_draws_every_condition(evaluation):
    methods = dict.fromkeys(MODEL_QUALITY, "cells")
    ax = strip(evaluation.scores, "mse", methods, colours={}, label="mse")
    assert sum(len(c.get_offsets()) for c in ax.collections) == 18 * len(methods)


def test_summary_figure_holds_bars_cells_and_a_condition(evaluation):
    observed = evaluation.deltas["observed", "LINE-A"].loc["drug-00"]
    figure = scale.plot.summary(
        evaluation.aggregate,
        evaluation.cells,
        evaluation.deltas["model", "LINE-A"].loc["drug-00"],
        observed,
        method="model",
        metrics=["pearson_delta", "overlap_at_N"],
        colours=method_colours(["model"], list(MODEL_QUALITY)[1:-1]),
        context="LINE-A",
    )
    assert len([ax for part in figure.subfigs for ax in part.axes]) == 4
    assert png(figure)[:8] == b"\x89PNG\r\n\x1a\n"


def test_equal_figures_are_equal_bytes(change):
    first, second = (png(scale.plot.delta(change[1], change[0]).figure) for _ in range(2))
    assert first == second


def test_pyplot_and_the_backend_are_left_alone():
    code = (
        "import sys, matplotlib\n"
        # reading rcParams["backend"] would choose one
        "rc = matplotlib.rcParams\n"
        "settings = lambda: [rc[k] for k in rc if k != 'backend']\n"
        "before = settings()\n"
        "import pandas as pd, scale.plot\n"
        "from scale.plot.canvas import png\n"
        "s = pd.Series([0., 1., -1.], index=list('ABC'))\n"
        "png(scale.plot.delta(s, s).figure)\n"
        "assert settings() == before\n"
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_known_methods_have_one_colour_and_all_differ():
    baselines = ["control_copy", "perturbation_mean", "context_transfer", "additive", "mine"]
    colours = method_colours(["model", "other"], baselines)
    assert len(set(colours.values())) == len(colours)
    assert colours["additive"] == method_colours(["x"], ["additive"])["additive"]


def test_labels_read_as_one_says_them():
    assert pretty("[('A', 0.5, 'uM'), ('B', 5.0, 'uM')]") == "A 0.5 uM + B 5 uM"
    assert pretty("KLF1+CEBPE") == "KLF1+CEBPE"
    assert pretty("[(broken") == "[(broken"


def test_numbers_are_short():
    assert [number(v) for v in (0.0, 1.23456, 12.345, -0.5)] == ["0.000", "1.235", "12.3", "-0.500"]


def test_offsets_stay_inside_and_apart():
    offsets = spread_evenly(50, 0.3)
    assert np.abs(offsets).max() < 0.3
    assert np.diff(np.sort(offsets)).min() > 0.002


def test_figures_are_plain_objects(change):
    assert isinstance(scale.plot.delta(change[1], change[0]).figure, Figure)
