"""A store as a source: genes cut again, stores joined, conditions regrouped; no cell is lost."""

import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
from cell_set_store import NUM_GENES, write_store
from prepared_store import cells_of, make, make_h5ad, settings

from scale.config import (
    ConditionBy,
    GeneChoice,
    GenesConfig,
    SourceFormat,
    compose,
)
from scale.data.ingest.from_store import StoreSource
from scale.data.ingest.prepare import prepare
from scale.data.store import CellSetStore
from scale.types import SourceError, StoreError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("from_store")
    make(folder / "a", SourceFormat.h5ad, make_h5ad(folder / "a.h5ad"))
    other = make_h5ad(folder / "b.h5ad", seed=1, drugs=("DMSO", "drugB", "drugC"))
    make(folder / "b", SourceFormat.h5ad, other)
    return folder


@pytest.mark.parametrize("condition_by", [ConditionBy.batch, ConditionBy.perturbation])
def test_every_cell_comes_back_also_regrouped(folder, tmp_path, condition_by):
    again = make(tmp_path / "again", SourceFormat.store, folder / "a", condition_by=condition_by)
    with CellSetStore.open(folder / "a") as store:
        assert cells_of(again) == cells_of(store)
        assert (again.control, again.labels) == (store.control, store.labels)
        assert again.genes.ensembl_ids == store.genes.ensembl_ids
        assert {p.doses for p in again.perturbations} == {(), (0.05,), (5.0,)}
    treated = again.conditions[~again.conditions["is_control"]]
    assert treated["batch"].isna().all() == (condition_by is ConditionBy.perturbation)
    # and once more, from a store whose cells carry the codes of their batches
    third = make(tmp_path / "third", SourceFormat.store, again.path, condition_by=ConditionBy.batch)
    assert cells_of(third) == cells_of(again)


def test_cut_to_some_genes_a_cell_keeps_its_total(folder, tmp_path):
    wanted = ["gene7", "gene3", "gene0"]
    (tmp_path / "genes.txt").write_text("\n".join(wanted))
    genes = GenesConfig(choice=GeneChoice.list, file=str(tmp_path / "genes.txt"))
    cut = make(tmp_path / "cut", SourceFormat.store, folder / "a", genes=genes)
    assert sorted(cut.genes.symbols) == sorted(wanted)
    with CellSetStore.open(folder / "a") as store:
        columns = [store.genes.symbols.index(name) for name in cut.genes.symbols]
        assert cells_of(cut) == cells_of(store, columns)


def test_stores_that_share_conditions_are_joined_cell_by_cell(folder, tmp_path):
    joined = make(tmp_path / "joined", SourceFormat.store, folder / "a", folder / "b")
    with CellSetStore.open(folder / "a") as a, CellSetStore.open(folder / "b") as b:
        assert cells_of(joined) == cells_of(a) + cells_of(b)


def test_cells_keep_the_names_they_had(folder, tmp_path):
    again = make(tmp_path / "again", SourceFormat.store, folder / "a")
    for path in (folder / "a", again.path):
        with StoreSource(path).open() as file:
            names = file.barcodes(0, file.num_cells).tolist()
            number_N = file.rows("X", 0, file.num_cells)[:, 0].toarray().ravel()
            assert names == [f"0-{number - 1}" for number in number_N.tolist()]
            assert file.barcodes(100, 103).tolist() == names[100:103]


def test_names_in_another_order_than_the_cells_are_refused(folder, tmp_path):
    path = shutil.copytree(folder / "a", tmp_path / "a")
    with StoreSource(path).open() as file:
        part = max((path / "cells").iterdir())
        pd.read_parquet(part).iloc[::-1].to_parquet(part, index=False)
        with pytest.raises(StoreError, match="does not list the cells in the order of the chunks"):
            file.barcodes(0, file.num_cells)


def test_a_source_can_be_sent_to_another_process(folder):
    with pickle.loads(pickle.dumps(StoreSource(folder / "a"))).open() as file:
        assert file.num_cells == 500


def test_a_store_without_names_calls_a_cell_by_its_place(tmp_path):
    with StoreSource(write_store(tmp_path / "store")).open() as file:
        assert file.barcodes(149, 152).tolist() == ["c0:149", "c1:0", "c1:1"]


def test_columns_are_those_of_the_source_and_of_the_store(tmp_path):
    path = write_store(tmp_path / "store")
    with CellSetStore.open(path) as store, StoreSource(path).open() as file:
        expected = store.to_anndata()
        assert file.num_cells == expected.n_obs
        assert (file.genes("X"), file.ensembl_ids("X")) == (list(expected.var_names), None)
        for name in file.columns:
            column = file.column(name, "setting")
            texts = [column.names[code] for code in column.codes_N.tolist()]
            assert texts == expected.obs[name].astype(str).tolist(), name
        np.testing.assert_array_equal(file.numbers("library", ""), expected.obs["library"])
        for start in range(0, file.num_cells, 333):
            stop = min(start + 333, file.num_cells)
            np.testing.assert_array_equal(
                file.rows("X", start, stop).toarray(), expected.X[start:stop].toarray()
            )
        assert file.matrix("X").shape == (expected.n_obs, NUM_GENES)
        assert file.matrix("X").num_stored == expected.X.nnz


def test_what_a_store_does_not_have_is_named(tmp_path):
    path = write_store(tmp_path / "store")
    with StoreSource(path).open() as file:
        with pytest.raises(SourceError, match=r"no column 'drugs'.*'drug'.*Set columns\.pert"):
            file.column("drugs", "columns.perturbation")
        with pytest.raises(SourceError, match="no matrix at 'raw/X'; a store has X alone"):
            file.rows("raw/X", 0, 5)
        with pytest.raises(SourceError, match="column 'drug' .*holds 'DMSO'; expected numbers"):
            file.numbers("drug", "columns.dose")
    with pytest.raises(StoreError, match="no store"), StoreSource(tmp_path / "none").open():
        pass


def test_the_command_takes_the_totals_of_the_store(folder, tmp_path):
    overrides = [
        "source=store",
        f"source.files={folder / 'a'}",
        f"store={tmp_path / 'again'}",
        "genes=all",
        "minimum_cells=1",
        "control=DMSO",
        *("columns.perturbation=drug", "columns.cell_type=line", "columns.batch=plate"),
        *("columns.dose=um", "columns.dose_unit=uM"),
    ]
    prepare(compose("prepare", overrides, run_dir=tmp_path / "run"))
    with CellSetStore.open(tmp_path / "again") as again, CellSetStore.open(folder / "a") as store:
        assert cells_of(again) == cells_of(store)


def test_totals_are_never_those_of_the_stored_genes_by_accident(folder, tmp_path):
    config = settings(tmp_path / "again", SourceFormat.store, [folder / "a"])
    config.columns.library = None
    with pytest.raises(SourceError, match=r"totals over all genes.*columns\.library=library"):
        prepare(config)
