"""Prediction: an untrained model is the identity, and every way in gives the same cells."""

import dataclasses

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from scale.config import Backend, ModelConfig, ObjectiveConfig, ParallelConfig
from scale.model.model import ScaleModel
from scale.predict.predictor import Predictor
from scale.predict.query import QueryKeys, Request
from scale.runtime import World
from scale.train.parallel import start, stop
from scale.types import Perturbation, Vocabulary

GENES = tuple(f"G{i}" for i in range(30))
VOCABULARY = Vocabulary(
    genes=GENES,
    components=("<unknown>", "DMSO", "Erdafitinib", "Imatinib"),
    cell_types=("A", "B"),
    batches=("p1", "p2"),
    perturbations=("Erdafitinib", "Imatinib"),
    control="DMSO",
    perturbation_key="drug",
    cell_type_key="line",
    batch_key="plate",
    dose_key=None,
    separator="+",
    target_sum=1e4,
    value_scale=1.0,
)
SIZES = ModelConfig(
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    ffn_hidden_size=64,
    set_size=8,
    num_summary_cells=8,
    lr=1e-3,
    backend=Backend.local,
)


@pytest.fixture(scope="module")
def predictor():
    torch.set_num_threads(1)
    start(ParallelConfig(), World(0, 1, 0), seed=0, device=torch.device("cpu"))
    model = ScaleModel(SIZES, ObjectiveConfig(), VOCABULARY, seed=0)
    yield Predictor(model, VOCABULARY, source_sha256="0" * 64)
    stop()


@pytest.fixture
def cells() -> AnnData:
    generator = np.random.default_rng(0)
    counts = generator.poisson(3.0, size=(120, len(GENES))).astype(np.float32)
    obs = pd.DataFrame(
        {
            "drug": (["DMSO"] * 40 + ["Erdafitinib"] * 20) * 2,
            "line": ["A"] * 60 + ["B"] * 60,
            "plate": (["p1"] * 20 + ["p2"] * 40) * 2,
        },
        index=[f"cell{i}" for i in range(120)],
    )
    return AnnData(X=sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(GENES)))


def log1p_normalised(adata: AnnData) -> np.ndarray:
    counts = np.asarray(adata.X.todense() if sp.issparse(adata.X) else adata.X, dtype=np.float64)
    return np.log1p(counts * 1e4 / counts.sum(axis=1, keepdims=True))


def test_untrained_model_returns_the_control_cells_it_started_from(predictor, cells):
    predicted = predictor.predict(cells, perturbation="Imatinib")
    treated = predicted[~predicted.obs["is_control"].to_numpy()]
    assert len(treated) == 80  # as many as controls: 40 in each of two cell types
    assert set(treated.obs["drug"]) == {"Imatinib"}
    source = cells[treated.obs["source_cell"].to_numpy()]
    assert (source.obs["drug"] == "DMSO").all()
    assert (source.obs["line"].to_numpy() == treated.obs["line"].to_numpy()).all()
    np.testing.assert_allclose(treated.X.toarray(), log1p_normalised(source), atol=1e-5)


def test_controls_are_appended_unchanged(predictor, cells):
    predicted = predictor.predict(cells, perturbation="Imatinib")
    controls = predicted[predicted.obs["is_control"].to_numpy()]
    assert set(controls.obs["drug"]) == {"DMSO"}
    expected = log1p_normalised(cells[controls.obs["source_cell"].to_numpy()])
    np.testing.assert_allclose(controls.X.toarray(), expected, atol=1e-5)
    without = predictor.predict(cells, perturbation="Imatinib", include_control=False)
    assert not without.obs["is_control"].any()


def test_as_many_cells_as_observed_and_none_twice_while_the_pool_lasts(predictor, cells):
    predicted = predictor.predict(cells, include_control=False)
    sizes = predicted.obs.groupby(["line", "drug"], observed=True).size()
    assert sizes.loc["A", "Erdafitinib"] == 20
    assert sizes.loc["A", "Imatinib"] == 40
    for _, group in predicted.obs.groupby(["line", "drug"], observed=True):
        assert group["source_cell"].is_unique


def test_input_is_not_touched_and_seeds_decide(predictor, cells):
    before = cells.copy()
    first = predictor.predict(cells, perturbation="Imatinib", seed=1)
    again = predictor.predict(cells, perturbation="Imatinib", seed=1)
    other = predictor.predict(cells, perturbation="Imatinib", seed=2)
    assert (first.X != again.X).nnz == 0
    assert list(first.obs["source_cell"]) != list(other.obs["source_cell"])
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert (cells.X != before.X).nnz == 0
    assert not cells.uns


def test_a_condition_does_not_depend_on_its_neighbours(predictor, cells):
    alone = predictor.predict(cells, perturbation="Imatinib", include_control=False)
    both = predictor.predict(cells, include_control=False)
    both = both[(both.obs["drug"] == "Imatinib").to_numpy()]
    assert list(both.obs["source_cell"]) == list(alone.obs["source_cell"])
    assert (both.X != alone.X).nnz == 0


@pytest.mark.parametrize(
    "form", ["csc", "dense", "float64", "reordered", "extra", "backed", "log1p"]
)
def test_every_form_of_the_same_cells_gives_the_same_prediction(predictor, cells, form, tmp_path):
    expected = predictor.predict(cells, perturbation="Imatinib")
    other = cells.copy()
    if form == "csc":
        other.X = sp.csc_matrix(other.X)
    elif form == "dense":
        other.X = other.X.toarray()
    elif form == "float64":
        other.X = other.X.astype(np.float64)
    elif form == "reordered":
        other = other[:, list(GENES[::-1])].copy()
    elif form == "extra":
        extra = AnnData(np.zeros((120, 2), dtype=np.float32), obs=other.obs)
        extra.var_names = ["X1", "X2"]
        other = ad.concat([extra, other], axis=1, merge="first")
    elif form == "log1p":
        other.X = sp.csr_matrix(log1p_normalised(other).astype(np.float32))
    if form == "backed":
        other.write_h5ad(tmp_path / "cells.h5ad")
        other = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    predicted = predictor.predict(other, perturbation="Imatinib")
    assert list(predicted.obs["source_cell"]) == list(expected.obs["source_cell"])
    np.testing.assert_allclose(predicted.X.toarray(), expected.X.toarray(), atol=1e-4)
    if form == "backed":
        other.file.close()


def test_file_holds_what_predict_returns(predictor, cells, tmp_path):
    expected = predictor.predict(cells)
    number = predictor.write(tmp_path / "out.h5ad", cells, keys=QueryKeys())
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    assert number == written.n_obs == expected.n_obs
    assert (written.X != expected.X).nnz == 0
    pd.testing.assert_frame_equal(written.obs, expected.obs)
    assert list(written.var_names) == list(GENES)
    assert written.uns["scale"]["weights_sha256"] == "0" * 64


def test_failed_write_leaves_nothing(predictor, cells, tmp_path):
    request = Request("C", None, Perturbation.parse("Imatinib"), "Imatinib", 5)
    with pytest.raises(ValueError, match="cell type 'C' has 0 control cells.*A, B"):
        predictor.write(tmp_path / "out.h5ad", cells, keys=QueryKeys(), requests=[request])
    assert not list(tmp_path.iterdir())


def test_only_fold_zero_starts_when_controls_are_split(predictor, cells):
    cells.obs["control_fold"] = np.where(cells.obs["drug"] == "DMSO", np.arange(120) % 2, -1)
    predicted = predictor.predict(cells, perturbation="Imatinib", include_control=False)
    folds = cells.obs.loc[predicted.obs["source_cell"], "control_fold"]
    assert (folds == 0).all()


def test_pool_smaller_than_a_set_is_divided_between_set_and_summary(predictor, cells):
    few = cells[[0, 1, 2, 3, 4]].copy()
    predicted = predictor.predict(few, perturbation="Imatinib", cells_per_condition=11)
    treated = predicted[~predicted.obs["is_control"].to_numpy()]
    assert len(treated) == 11
    expected = log1p_normalised(few[treated.obs["source_cell"].to_numpy()])
    np.testing.assert_allclose(treated.X.toarray(), expected, atol=1e-5)


def test_controls_alone_are_enough(predictor, cells):
    controls = cells[(cells.obs["drug"] == "DMSO").to_numpy()].copy()
    del controls.obs["drug"], controls.obs["line"], controls.obs["plate"]
    predicted = predictor.predict(controls, perturbation="Imatinib", cell_type="new line")
    assert set(predicted.obs["line"]) == {"new line"}
    assert predicted.n_obs == 160


def test_combination_and_seen_mark(predictor, cells):
    predicted = predictor.predict(
        cells, perturbation=["Imatinib", "Imatinib+Erdafitinib"], include_control=False
    )
    seen = predicted.obs.groupby("drug", observed=True)["seen_in_training"].all()
    assert seen["Imatinib"]
    assert not seen["Imatinib+Erdafitinib"]


def test_total_counts_column_for_a_cut_matrix(predictor, cells):
    cells.obs["total"] = np.asarray(cells.X.sum(axis=1)).ravel() * 2
    plain = predictor.predict(cells, perturbation="Imatinib")
    halved = predictor.predict(cells, perturbation="Imatinib", library_key="total")
    np.testing.assert_allclose(
        np.expm1(halved.X.toarray()) * 2, np.expm1(plain.X.toarray()), rtol=1e-3, atol=1e-3
    )


def drop_genes(adata):
    return adata[:, list(GENES[:20])].copy()


def spoil(value):
    def change(adata):
        adata.X[0, 0] = value
        return adata

    return change


def other_scale(adata):
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray() * 0.37))
    return adata


def rename_genes(adata):
    adata.var_names = ["G0", "G0", *GENES[2:]]
    return adata


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"perturbation": "Imatinb"}, "did you mean 'Imatinib'"),
        (None, {"perturbation_key": "drg"}, "no column 'drg' in .obs; did you mean 'drug'"),
        (None, {"cell_type_key": "celltype"}, "no column 'celltype'.*Set cell_type_key"),
        (None, {"control": "dmso"}, "no control cells.*did you mean 'DMSO'"),
        (None, {"library_key": "n"}, "no column 'n' with total counts"),
        (drop_genes, {}, r"10 of 30 model genes are missing.*first: G20.*max_missing_genes"),
        (spoil(-1.0), {}, "negative, NaN or infinite"),
        (spoil(float("nan")), {}, "negative, NaN or infinite"),
        (other_scale, {}, r"neither counts nor log1p of counts per 10,000"),
        (rename_genes, {}, "G0"),
    ],
)
def test_bad_input_is_named(predictor, cells, change, arguments, message):
    adata = cells if change is None else change(cells)
    with pytest.raises(ValueError, match=message):
        predictor.predict(adata, **arguments)


def test_missing_genes_within_the_limit_are_reported_and_zero(predictor, cells, caplog):
    with caplog.at_level("WARNING", logger="scale"):
        predicted = predictor.predict(cells[:, list(GENES[:28])].copy(), perturbation="Imatinib")
    assert predicted.uns["scale"]["missing_genes"] == ["G28", "G29"]
    assert predicted.X[:, 28:].nnz == 0
    assert "2 of 30 model genes are missing" in caplog.text


def test_guidance_one_and_more_steps_keep_the_identity(predictor, cells):
    plain = predictor.predict(cells, perturbation="Imatinib")
    for options in ({"guidance": 2.0}, {"num_steps": 4}):
        other = predictor.predict(cells, perturbation="Imatinib", **options)
        np.testing.assert_allclose(other.X.toarray(), plain.X.toarray(), atol=1e-5)


def test_doses_stand_in_a_column_of_their_own(predictor, cells):
    vocabulary = dataclasses.replace(
        VOCABULARY, dose_key="dose", perturbations=("[('Imatinib', 0.5, 'uM')]",)
    )
    dosed = Predictor(predictor.model, vocabulary, source_sha256="0" * 64)
    predicted = dosed.predict(cells)
    treated = predicted.obs[~predicted.obs["is_control"]]
    assert set(treated["drug"]) == {"Imatinib"}
    assert set(treated["dose"]) == {0.5}
    assert treated["seen_in_training"].all()
    assert predicted.obs.loc[predicted.obs["is_control"], "dose"].isna().all()
    other = dosed.predict(cells, perturbation="Imatinib", dose=5.0, include_control=False)
    assert not other.obs["seen_in_training"].any()
    assert set(other.obs["dose"]) == {5.0}
