"""``scale predict``: the held-out part of a store, a table of conditions, and what is refused."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scale.config import compose
from scale.data.store import CellSetStore
from scale.runtime import StopSignal
from scale.tasks import predict, pretrain

SPLIT = """[datasets]
toy = "."
[training]
toy = "train"
[fewshot."toy.K562"]
test = ["[('drugC', 0.5, 'uM')]", "[('drugB', 0.5, 'uM')]"]
"""
TEST_LABELS = {"[('drugC', 0.5, 'uM')]", "[('drugB', 0.5, 'uM')]"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, toy_store_path):
    folder = tmp_path_factory.mktemp("predict")
    (folder / "split.toml").write_text(SPLIT)
    settings = [
        f"data.store={toy_store_path}",
        f"data.split={folder / 'split.toml'}",
        "model.hidden_size=32",
        "model.num_layers=1",
        "model.num_heads=2",
        "model.ffn_hidden_size=64",
        "model.set_size=8",
        "model.num_summary_cells=4",
        "trainer.max_steps=2",
        "trainer.sets_per_batch=4",
        "validation.every_steps=100",
    ]
    assert pretrain.run(compose("pretrain", settings, run_dir=folder / "run"), StopSignal()) == 0
    return folder / "run"


def run_predict(folder, *settings) -> int:
    return predict.run(compose("predict", settings, run_dir=folder))


def test_held_out_conditions_of_a_store(run_dir, toy_store_path, tmp_path):
    # The split is not given: the run keeps its own copy.
    assert run_predict(tmp_path, f"checkpoint={run_dir}", f"store={toy_store_path}") == 0
    predicted = ad.read_h5ad(tmp_path / "predicted.h5ad")
    treated = predicted[~predicted.obs["is_control"].to_numpy(dtype=bool)]
    store = CellSetStore.open(toy_store_path)
    assert set(treated.obs["drug"]) == TEST_LABELS
    assert set(treated.obs["cell_line"]) == {"K562"}
    wanted = store.conditions[
        (store.conditions["cell_type"] == "K562")
        & np.array([store.labels[p] in TEST_LABELS for p in store.conditions["perturbation"]])
    ]
    assert len(treated) == wanted["num_cells"].sum()
    # Predictions start from one half of the controls; the other half is the reference.
    controls = store.to_anndata(
        [int(i) for i in store.conditions.index[store.conditions["is_control"]]]
    )
    folds = controls.obs.set_index("source_cell")["control_fold"]
    assert (folds.loc[treated.obs["source_cell"].to_numpy()] == 0).all()
    assert (tmp_path / "run.json").is_file()
    assert (tmp_path / "config.yaml").is_file()


def test_a_table_of_conditions_over_an_h5ad(run_dir, toy_anndata, tmp_path):
    toy_anndata.write_h5ad(tmp_path / "cells.h5ad")
    table = pd.DataFrame(
        {
            "cell_type": ["A549", "HepG2"],
            "perturbation": ["drugA", "drugB"],
            "dose": [0.7, 0.5],
            "num_cells": [11, 3],
        }
    )
    table.to_csv(tmp_path / "table.tsv", sep="\t", index=False)
    settings = (
        f"checkpoint={run_dir}",
        f"input={tmp_path / 'cells.h5ad'}",
        f"conditions={tmp_path / 'table.tsv'}",
        "include_control=false",
        "library_key=library",
    )
    assert run_predict(tmp_path / "out", *settings) == 0
    predicted = ad.read_h5ad(tmp_path / "out" / "predicted.h5ad")
    sizes = predicted.obs.groupby(["cell_line", "drug"], observed=True).size()
    assert sizes.to_dict() == {("A549", "drugA"): 11, ("HepG2", "drugB"): 3}
    assert np.isfinite(predicted.X.data).all()
    assert predicted.X.data.min() >= 0


def test_an_existing_prediction_is_not_overwritten(run_dir, toy_store_path, tmp_path):
    settings = (f"checkpoint={run_dir}", f"store={toy_store_path}")
    assert run_predict(tmp_path, *settings) == 0
    with pytest.raises(FileExistsError, match="overwrite=true"):
        run_predict(tmp_path, *settings)
    assert run_predict(tmp_path, *settings, "overwrite=true") == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["checkpoint=nowhere", "store={store}"], FileNotFoundError, "no run.* at nowhere"),
        (["checkpoint={run}", "store=nowhere"], ValueError, "nowhere is no store"),
        (["checkpoint={run}", "store={store}", "part=val"], ValueError, "no val conditions"),
        (["checkpoint={run}"], ValueError, "give either input .* or store"),
        (["checkpoint={run}", "input=nowhere.h5ad"], FileNotFoundError, "no file nowhere.h5ad"),
    ],
)
def test_what_is_missing_is_named(run_dir, toy_store_path, tmp_path, settings, error, message):
    given = [s.format(run=run_dir, store=toy_store_path) for s in settings]
    with pytest.raises(error, match=message):
        run_predict(tmp_path / "out", *given)
    assert not list(tmp_path.rglob("predicted.h5ad"))


def test_a_table_without_its_columns_is_refused(run_dir, toy_anndata, tmp_path):
    toy_anndata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "table.tsv").write_text("cell_type\tdrug\nA549\tdrugA\n")
    with pytest.raises(ValueError, match="lacks the columns perturbation; it has cell_type, drug"):
        run_predict(
            tmp_path / "out",
            f"checkpoint={run_dir}",
            f"input={tmp_path / 'cells.h5ad'}",
            f"conditions={tmp_path / 'table.tsv'}",
        )
