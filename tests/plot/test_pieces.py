"""Laws of figures in pieces: side by side they are the figure, and no name covers another."""

from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from scale.plot.canvas import column_edges, dot, figure_key, new_figure, png, png_pieces
from scale.plot.comparison import collapse_plane, gains, overlap_curves, scaled
from scale.plot.conditions import distances, genes, ranks, running_median
from scale.plot.heat import heat


def pixels(data):
    return imread(BytesIO(data))[:, :, :3]


def overlaps(ax):
    """Pairs of names in the axes whose boxes meet."""
    ax.figure.draw_without_rendering()
    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in ax.texts if t.get_text()]
    return [
        (a, b)
        for i, (a, box) in enumerate(boxes)
        for b, other in boxes[i + 1 :]
        if box.shrunk(0.95, 0.85).overlaps(other.shrunk(0.95, 0.85))
    ]


def six_panels():
    figure = new_figure(9.0, 3.0)
    axes = figure.subplots(2, 3)
    for ax in axes.flat:
        ax.plot([0, 1], [0, 1])
        ax.set_ylabel("value")
    return figure


@pytest.fixture
def figure():
    return six_panels()


def test_columns_are_told_apart_and_rows_are_not(figure):
    figure.draw_without_rendering()
    edges = column_edges(figure)
    assert len(edges) == 4
    assert edges[0] == 0
    assert edges[-1] == 9.0
    assert np.diff(edges) == pytest.approx(3.0, abs=0.6)


def test_a_colour_bar_stays_with_its_panel():
    figure = new_figure(8.0, 3.0)
    for ax in figure.subplots(1, 2):
        table = pd.DataFrame(np.eye(3), columns=list("abc"))
        heat(table, label="score", title="t", figure=figure, ax=ax)
    figure.draw_without_rendering()
    assert len(column_edges(figure)) == 3


def test_pieces_side_by_side_are_the_figure(figure):
    whole = pixels(png(figure))
    pieces = png_pieces(figure)
    assert sum(width for _, width in pieces) == pytest.approx(9.0)
    joined = np.concatenate([pixels(data) for data, _ in pieces], axis=1)
    assert joined.shape == pytest.approx(whole.shape, abs=len(pieces))
    width = min(joined.shape[1], whole.shape[1])
    assert np.abs(joined[:, :width] - whole[:, :width]).mean() < 0.01


def test_the_legend_is_a_piece_of_its_own(figure):
    alone = [pixels(data) for data, _ in png_pieces(figure)]
    figure_key(figure, [dot("#0072b2", "mine")])
    *panels, legend = (pixels(data) for data, _ in png_pieces(figure))
    assert len(panels) == len(alone)
    blue = np.array([0, 0x72, 0xB2]) / 255
    is_blue = [bool((np.abs(p - blue).max(axis=2) < 0.1).any()) for p in (*panels, legend)]
    assert is_blue == [False] * 3 + [True]
    assert legend.shape[0] < 0.3 * panels[0].shape[0]


def test_equal_figures_give_equal_bytes(figure):
    assert png_pieces(figure) == png_pieces(six_panels())


def test_a_single_dot_keeps_its_colour():
    figure = new_figure(5.0, 4.0)
    ax = figure.subplots()
    generator = np.random.default_rng(0)
    ax.hexbin(*generator.normal(size=(2, 5000)), gridsize=40, cmap="viridis")
    ax.scatter([0], [0], s=60, color="#0072b2")
    seen = pixels(png_pieces(figure)[0][0]).reshape(-1, 3)
    assert np.abs(seen - np.array([0, 0x72, 0xB2]) / 255).max(axis=1).min() < 0.03


def test_names_of_lines_do_not_cover_each_other():
    curves = {f"method {i}": pd.Series([0.1, 0.5 + 0.001 * i], index=[10, 100]) for i in range(5)}
    ax = overlap_curves(curves, colours={}, label="share")
    assert len(ax.texts) == 5
    assert overlaps(ax) == []


def test_names_in_the_plane_do_not_cover_each_other():
    points = {f"method {i}": (1.0 + 0.01 * i, 0.02 * (i % 2)) for i in range(6)}
    ax = collapse_plane(points, colours={})
    names = [t.get_text() for t in ax.texts]
    assert set(points) <= set(names)
    assert not [pair for pair in overlaps(ax) if set(pair) <= set(points)]


def test_scaled_scores_name_both_ends():
    table = pd.DataFrame(
        {"label": ["a", "a"], "method": ["x", "y"], "value": [0.4, -0.3], "low": np.nan}
    ).assign(high=np.nan)
    ax = scaled(table, colours={})
    assert {"best baseline", "repeated experiment", "0.400", "-0.300"} <= {
        t.get_text() for t in ax.texts
    }


def test_gains_put_every_unit_in_a_row_and_the_mean_below():
    by_unit = {"x": pd.Series({"A": 0.1, "B": 0.2}), "y": pd.Series({"B": -0.1})}
    nan = float("nan")
    ax = gains(by_unit, {"x": (0.15, nan, nan), "y": (-0.1, nan, nan)}, colours={})
    labels = dict(zip((t.get_text() for t in ax.get_yticklabels()), ax.get_yticks(), strict=True))
    assert labels["A"] == 1
    assert labels["B"] == 0
    assert labels["y"] < labels["x"] < 0
    low, high = ax.get_xlim()
    assert low < -0.1
    assert high > 0.2


def test_ranks_add_up_to_all_conditions():
    values = {"x": np.array([1.0, 0.95, 0.5, 0.0]), "y": np.array([1.0])}
    bars = ranks(values, colours={}).patches
    assert sum(b.get_height() for b in bars) == pytest.approx(2.0)


def test_distances_below_zero_stand_on_the_edge():
    control = pd.Series({"a": 1.0, "b": 2.0})
    ax = distances(control, {"x": pd.Series({"a": -0.1, "b": 0.5})}, colours={})
    inside = ax.collections[0].get_offsets()[:, 1]
    assert inside.min() > 0
    assert inside.min() >= ax.get_ylim()[0]
    assert "1 of 2" not in ax.get_legend().get_texts()[0].get_text()
    assert "2 of 2 below" in ax.get_legend().get_texts()[0].get_text()


def test_genes_tell_the_median_ratio_of_what_has_one():
    observed = np.array([0.0, 1.0, 2.0, 4.0])
    ax = genes(observed, {"x": 2 * observed}, colours={}, label="variance", by_ratio=True)
    assert len(ax.collections[0].get_offsets()) == 3
    assert "2.000 ×" in ax.get_legend().get_texts()[0].get_text()


def test_running_median_of_a_constant_is_the_constant():
    size = pd.Series(np.arange(20.0))
    x, y = running_median(size, pd.Series(np.full(20, 0.7)))
    assert (np.diff(x) > 0).all()
    assert (y == 0.7).all()
    assert running_median(size[:4], size[:4]) is None
