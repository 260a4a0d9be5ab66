"""From h5ad to a store: nothing lost, nothing mixed up, the same store however it was made."""

import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scale.config import (
    ColumnsConfig,
    ConditionBy,
    CountsPolicy,
    GeneChoice,
    GenesConfig,
    PrepareConfig,
    SourceConfig,
    SourceFormat,
    compose,
)
from scale.data.genes import StreamingMoments
from scale.data.ingest.counts import recover_counts
from scale.data.ingest.h5ad import H5adSource
from scale.data.ingest.prepare import prepare
from scale.data.ingest.stages import Sizes
from scale.data.partial import PartialDirectory
from scale.data.store import CellSetStore
from scale.tasks import prepare as prepare_task
from scale.types import SourceError, StoreError

SHARED = Path(__file__).parents[3] / "shared" / "data"
LINES, PLATES, DRUGS = ("A549", "K562"), ("p1", "p2"), ("DMSO", "drugA", "drugB", "drugC")
NUM_GENES = 40


def make_adata(*, num_cells=700, seed=0):
    """Counts of two cell lines on two plates; every cell can be told from every other."""
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "drug": pd.Categorical(rng.choice(DRUGS, num_cells, p=[0.4, 0.25, 0.25, 0.1])),
            "line": pd.Categorical(rng.choice(LINES, num_cells)),
            "plate": pd.Categorical(rng.choice(PLATES, num_cells)),
            "qc": pd.Categorical(rng.choice(["full", "minimal"], num_cells, p=[0.9, 0.1])),
        },
        index=[f"cell{i}" for i in range(num_cells)],
    )
    counts = rng.poisson(rng.gamma(0.4, 2.0, NUM_GENES), (num_cells, NUM_GENES))
    counts[:, 0] = np.arange(num_cells) + 1
    counts[::50, 3] = 70_000
    var = pd.DataFrame(index=[f"gene{g}" for g in range(NUM_GENES)])
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def write(adata, path):
    adata.write_h5ad(path)
    return path


def settings(files, store, *, columns=None, genes=None, **changes):
    named = {"perturbation": "drug", "cell_type": "line", "batch": "plate", **(columns or {})}
    values = {
        "name": "test",
        "run_dir": str(Path(store).parent / "run"),
        "store": str(store),
        "source": SourceConfig(format=SourceFormat.h5ad, files=[str(f) for f in files]),
        "columns": ColumnsConfig(**named),
        "control": "DMSO",
        "genes": genes or GenesConfig(choice=GeneChoice.all),
        "minimum_cells": 1,
    }
    return PrepareConfig(**(values | changes))


def make_store(files, store, *, sizes=None, **changes):
    prepare(settings(files, store, **changes), sizes=sizes)
    return CellSetStore.open(store, verify="full")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(make_adata(), tmp_path_factory.mktemp("source") / "cells.h5ad")


@pytest.fixture(scope="module")
def fingerprint(source, tmp_path_factory):
    return make_store([source], tmp_path_factory.mktemp("reference") / "store").fingerprint


@pytest.fixture
def log(caplog):
    """The package's log, whether or not a task has cut it off from the root logger."""
    logger = logging.getLogger("scale")
    before = logger.level, logger.propagate
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.level, logger.propagate = before


@pytest.fixture
def _own_log():
    """Undo what a task does to the package's log: its console is closed with the test."""
    yield
    logger = logging.getLogger("scale")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def rows_by_condition(adata, names):
    """Condition -> sorted rows of counts."""
    counts = adata.X.toarray().astype(int)
    keys = adata.obs[list(names)].astype(str).agg("|".join, axis=1).to_numpy()
    return {key: sorted(map(tuple, counts[keys == key].tolist())) for key in np.unique(keys)}


# --- what goes in comes out ---------------------------------------------------------------------


@pytest.mark.parametrize("memory_bytes", [1 << 32, 200_000])
@pytest.mark.parametrize("condition_by", [ConditionBy.batch, ConditionBy.perturbation])
def test_every_cell_comes_back_in_its_condition(source, tmp_path, memory_bytes, condition_by):
    changes = {"memory_bytes": memory_bytes, "condition_by": condition_by}
    store = make_store([source], tmp_path / "store", **changes)
    adata, back = ad.read_h5ad(source), store.to_anndata()
    columns = ("drug", "line", "plate")
    assert rows_by_condition(back, columns) == rows_by_condition(adata, columns)
    assert list(back.var_names) == list(adata.var_names)
    np.testing.assert_array_equal(back.obs["library"], back.X.sum(axis=1).A1)
    treated = store.conditions[~store.conditions["is_control"]]
    assert treated["batch"].isna().all() == (condition_by is ConditionBy.perturbation)
    assert store.control == "DMSO"
    assert not list(tmp_path.glob("store.*"))


def test_the_order_within_a_condition_is_random_and_follows_the_seed(source, tmp_path):
    first = make_store([source], tmp_path / "a")
    second = make_store([source], tmp_path / "b", seed=1)
    assert first.fingerprint != second.fingerprint
    orders = []
    for store in (first, second):
        position = store.to_anndata().X[:, 0].toarray().ravel()
        condition = store.to_anndata().obs["condition"].to_numpy()
        orders.append(position)
        for number in np.unique(condition):
            own = position[condition == number]
            if len(own) > 60:
                # 5 standard deviations of a rank correlation of independent orders
                rank = np.corrcoef(np.arange(len(own)), np.argsort(np.argsort(own)))[0, 1]
                assert abs(rank) < 5 / np.sqrt(len(own) - 1)
    assert sorted(orders[0]) == sorted(orders[1])


# --- the same store however it was made ---------------------------------------------------------


@pytest.mark.parametrize("block_cells", [1, 17, 10_000])
def test_the_store_does_not_depend_on_block_size(source, tmp_path, fingerprint, block_cells):
    store = make_store([source], tmp_path / "store", sizes=Sizes(block_cells=block_cells))
    assert store.fingerprint == fingerprint


def test_the_store_does_not_depend_on_spilling(source, tmp_path, fingerprint):
    report = prepare(settings([source], tmp_path / "store", memory_bytes=100_000))
    assert report.spilled_bytes > 0
    assert CellSetStore.open(report.path).fingerprint == fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_files_are_one_source_in_the_order_of_their_names(source, tmp_path, fingerprint):
    adata = ad.read_h5ad(source)
    reversed_genes = adata[300:, ::-1].copy()
    files = [
        write(reversed_genes, tmp_path / "b.h5ad"),
        write(adata[:300].copy(), tmp_path / "a.h5ad"),
    ]
    assert make_store(files, tmp_path / "listed").fingerprint == fingerprint
    assert make_store([tmp_path / "*.h5ad"], tmp_path / "globbed").fingerprint == fingerprint
    twice = [*files, tmp_path / "?.h5ad"]
    assert make_store(twice, tmp_path / "twice").fingerprint == fingerprint


def _dense(adata):
    adata.X = adata.X.toarray()


def _csc(adata):
    adata.X = adata.X.tocsc()


def _csr_array(adata):
    adata.X = sp.csr_array(adata.X)


def _int64(adata):
    adata.X = adata.X.astype(np.int64)


def _unsorted_rows(adata):
    x = adata.X.copy()
    for start, stop in zip(x.indptr[:-1], x.indptr[1:], strict=True):
        x.indices[start:stop] = x.indices[start:stop][::-1].copy()
        x.data[start:stop] = x.data[start:stop][::-1].copy()
    adata.X = x


def _stored_zeros(adata):
    adata.X.data[:] = adata.X.data
    dense = adata.X.toarray()
    full = sp.csr_matrix(np.ones_like(dense))
    full.data = dense.ravel().copy()
    adata.X = full


def _layer(adata):
    adata.layers["counts"] = adata.X
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()) * 0.3)


def _raw(adata):
    adata.raw = adata.copy()
    adata.X = adata.X.toarray() - 1.0


def _log_normalised(adata, dtype=np.float32):
    total = adata.X.sum(axis=1).A1
    values = adata.X.astype(np.float64).multiply(1e4 / total[:, None]).tocsr()
    values.data = np.log1p(values.data)
    adata.X = values.astype(dtype)


def _log_normalised_float64(adata):
    _log_normalised(adata, np.float64)


def _strings(adata):
    for name in ("drug", "line", "plate"):
        adata.obs[name] = adata.obs[name].astype(str)


@pytest.mark.parametrize(
    "form",
    [
        *(_dense, _csc, _csr_array, _int64, _unsorted_rows, _stored_zeros, _layer, _raw),
        *(_log_normalised, _log_normalised_float64, _strings),
    ],
)
def test_the_store_does_not_depend_on_how_counts_are_kept(source, tmp_path, fingerprint, form):
    adata = ad.read_h5ad(source)
    form(adata)
    path = write(adata, tmp_path / "cells.h5ad")
    store = make_store([path], tmp_path / "store", sizes=Sizes(block_cells=100))
    assert store.fingerprint == fingerprint
    expected = "recovered" if "log" in form.__name__ else "read"
    assert store.manifest["counts"] == expected


def test_an_anndata_in_memory_is_read_as_its_file_is(source, tmp_path):
    adata = ad.read_h5ad(source)
    with H5adSource(source, memory_bytes=1 << 30).open() as file:
        on_disk = file.rows("X", 10, 20).toarray(), file.genes("X"), file.column("drug", "x")
    with H5adSource(adata, memory_bytes=1 << 30).open() as file:
        in_memory = file.rows("X", 10, 20).toarray(), file.genes("X"), file.column("drug", "x")
    np.testing.assert_array_equal(on_disk[0], in_memory[0])
    assert on_disk[1] == in_memory[1]
    np.testing.assert_array_equal(on_disk[2].codes_N, in_memory[2].codes_N)


# --- labels -------------------------------------------------------------------------------------


def test_drug_dose_lists_are_parsed_and_the_control_is_matched_exactly(tmp_path, log):
    adata = make_adata()
    spelled = {
        "DMSO": "[('DMSO', 0.0, 'uM')]",
        "drugA": "[('drugA', 0.50, 'uM')]",
        "drugB": "[('drugA ', 0.5, 'uM')]",
        "drugC": "[('Trametinib (DMSO solvate)', 5.0, 'uM')]",
    }
    adata.obs["drug"] = [spelled[name] for name in adata.obs["drug"]]
    store = make_store([write(adata, tmp_path / "cells.h5ad")], tmp_path / "store")
    labels = [p.label for p in store.perturbations]
    assert sorted(labels) == [
        "[('DMSO', 0.0, 'uM')]",
        "[('Trametinib (DMSO solvate)', 5.0, 'uM')]",
        "[('drugA', 0.5, 'uM')]",
    ]
    assert store.control == "[('DMSO', 0.0, 'uM')]"
    num_controls = store.conditions.loc[store.conditions["is_control"], "num_cells"].sum()
    assert num_controls == (adata.obs["drug"] == spelled["DMSO"]).sum()
    merged = [r for r in log.records if "more than one spelling" in r.getMessage()]
    assert len(merged) == 1
    assert "'drugA '" in merged[0].getMessage()
    assert "0.50" in merged[0].getMessage()
    assert store.to_anndata().obs["drug"].isin(list(spelled.values())).all()


def test_labels_that_differ_in_outer_blanks_are_merged_with_one_warning(tmp_path, log):
    adata = make_adata()
    adata.obs["drug"] = [f" {d}" if i % 2 else d for i, d in enumerate(adata.obs["drug"])]
    adata.obs["line"] = [f"{d} " if i % 3 else d for i, d in enumerate(adata.obs["line"])]
    store = make_store([write(adata, tmp_path / "cells.h5ad")], tmp_path / "store")
    assert sorted(p.label for p in store.perturbations) == sorted(DRUGS)
    assert set(store.labels) == set(DRUGS)
    assert set(store.conditions["cell_type"]) == set(LINES)
    assert sum("more than one spelling" in r.getMessage() for r in log.records) == 1


def test_doses_of_a_column_and_combinations(tmp_path):
    adata = make_adata()
    rng = np.random.default_rng(0)
    dose = rng.choice([0.5, 5.0], adata.n_obs)
    adata.obs["dose"] = np.where(adata.obs["drug"] == "DMSO", np.nan, dose)
    adata.obs["drug"] = adata.obs["drug"].astype(str).replace({"drugC": "drugB + drugA"})
    store = make_store(
        [write(adata, tmp_path / "cells.h5ad")],
        tmp_path / "store",
        columns={"dose": "dose", "dose_unit": "uM", "separator": "+"},
    )
    by_label = {p.label: label for p, label in zip(store.perturbations, store.labels, strict=True)}
    assert by_label["[('drugA', 0.5, 'uM'), ('drugB', 0.5, 'uM')]"] == "drugB + drugA"
    assert by_label["[('drugA', 5.0, 'uM')]"] == "drugA"
    assert by_label["DMSO"] == "DMSO"
    assert len(by_label) == 7
    back = store.to_anndata().obs
    assert back.loc[back["drug"] != "DMSO", "dose"].isin([0.5, 5.0]).all()


def test_a_control_that_holds_the_separator_is_one_name(tmp_path):
    adata = make_adata()
    adata.obs["drug"] = adata.obs["drug"].astype(str).replace({"DMSO": "non-targeting"})
    store = make_store(
        [write(adata, tmp_path / "cells.h5ad")],
        tmp_path / "store",
        columns={"separator": "-"},
        control="non-targeting ",
    )
    assert store.control == "non-targeting"
    assert store.conditions["is_control"].sum() == 4


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("int64", {"0", "1"}),
        ("float64", {"0", "1"}),
        ("bool", {"False", "True"}),
        ("Int64", {"0", "1"}),
        ("boolean", {"False", "True"}),
        ("string", {"0", "1"}),
    ],
)
def test_columns_of_every_kind_are_read_as_text(tmp_path, kind, names):
    adata = make_adata()
    codes = adata.obs["line"].cat.codes.astype("int64")
    adata.obs["line"] = codes.astype(str if kind == "string" else kind)
    store = make_store([write(adata, tmp_path / "cells.h5ad")], tmp_path / "store")
    assert set(store.conditions["cell_type"]) == names


def test_tables_of_older_and_newer_anndata_are_read(source, tmp_path, fingerprint):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(source.read_bytes())
    with h5py.File(path, "r+") as file:
        obs, var = file["obs"], file["var"]
        codes, categories = obs["drug/codes"][:], obs["drug/categories"][:]
        del obs["drug"]
        # anndata 0.7: codes in the column, categories beside the columns
        kept = obs.create_dataset("__categories/drug", data=categories)
        obs.create_dataset("drug", data=codes).attrs["categories"] = kept.ref
        names = var["_index"][:]
        del var["_index"]
        group = var.create_group("_index")  # anndata 0.12 may write names as nullable strings
        group.attrs.update({"encoding-type": "nullable-string-array", "encoding-version": "0.1.0"})
        for name, values in (("values", names), ("mask", np.zeros(len(names), dtype=bool))):
            group[name] = values
            kind = "string-array" if name == "values" else "array"
            group[name].attrs.update({"encoding-type": kind, "encoding-version": "0.2.0"})
    assert make_store([path], tmp_path / "store").fingerprint == fingerprint


def test_left_out_cells_may_lack_everything(tmp_path):
    adata = make_adata()
    is_out = adata.obs["qc"] == "minimal"
    adata.obs["total"] = np.where(is_out, np.nan, 1e5)
    adata.obs["dose"] = np.where(is_out, "unknown", "1.0")
    adata.obs["drug"] = adata.obs["drug"].astype(object).where(~is_out)
    adata.obs["line"] = adata.obs["line"].astype(str).where(~is_out, "")
    adata.obs.loc[adata.obs["drug"] == "DMSO", "dose"] = "nan"
    report = prepare(
        settings(
            [write(adata, tmp_path / "cells.h5ad")],
            tmp_path / "store",
            columns={"library": "total", "dose": "dose"},
            where={"qc": ["full"]},
        )
    )
    assert report.dropped == {"left out by where": is_out.sum()}


@pytest.mark.parametrize(("num_cells", "in_key"), [(1_000, False), (4_000, True)])
def test_batch_enters_the_condition_where_it_has_a_chunk_of_cells(
    source, tmp_path, num_cells, in_key
):
    adata = make_adata(num_cells=num_cells)  # 25 % of 1,000 on 4 (line, plate): 62 cells
    store = make_store([write(adata, tmp_path / "cells.h5ad")], tmp_path / "store")
    treated = store.conditions[~store.conditions["is_control"]]
    assert treated["batch"].notna().all() == in_key
    assert store.conditions.loc[store.conditions["is_control"], "batch"].notna().all()
    assert store.manifest["condition_by"] == ("batch" if in_key else "perturbation")


def test_where_and_minimum_cells_leave_out_and_count(source, tmp_path):
    adata = ad.read_h5ad(source)
    config = settings(
        [source],
        tmp_path / "store",
        where={"qc": ["full"]},
        minimum_cells=35,
        condition_by=ConditionBy.perturbation,
    )
    report = prepare(config)
    kept = adata.obs[adata.obs["qc"] == "full"]
    sizes = kept.groupby(["line", "drug"], observed=True).size()
    small = {k: n for k, n in sizes.items() if k[1] != "DMSO" and n < 35}
    assert report.dropped == {
        "left out by where": adata.n_obs - len(kept),
        "in conditions below minimum_cells": sum(small.values()),
    }
    assert report.dropped_conditions == {
        f"({line}, {drug})": n for (line, drug), n in small.items()
    }
    assert report.num_cells == len(kept) - sum(small.values())
    assert report.num_conditions == 6 - len(small)
    assert "below minimum_cells" in report.table()


# --- genes and library --------------------------------------------------------------------------


def test_chosen_genes_keep_the_library_of_all(source, tmp_path):
    genes = GenesConfig(choice=GeneChoice.hvg, num=10)
    store = make_store([source], tmp_path / "store", genes=genes)
    adata = ad.read_h5ad(source)
    moments = StreamingMoments(NUM_GENES)
    moments.update(adata.X.astype(np.uint32), adata.X.sum(axis=1).A1)
    chosen = adata.var_names[moments.highly_variable(10)]
    assert list(store.genes.symbols) == list(chosen)
    back = store.to_anndata()
    part = adata[:, chosen].copy()
    part.obs["library"] = adata.X.sum(axis=1).A1.astype(int)
    columns = ("drug", "line", "plate", "library")
    assert rows_by_condition(back, columns) == rows_by_condition(part, columns)
    table = pd.read_parquet(tmp_path / "store" / "genes.parquet")
    assert len(table) == NUM_GENES
    assert (table["column"] >= 0).sum() == 10


def test_a_gene_list_decides_the_order(source, tmp_path):
    panel = tmp_path / "panel.txt"
    panel.write_text("# panel\ngene7\n\ngene3 \ngene30\n")
    genes = GenesConfig(choice=GeneChoice.list, file=str(panel))
    store = make_store([source], tmp_path / "store", genes=genes)
    assert store.genes.symbols == ("gene7", "gene3", "gene30")
    adata = ad.read_h5ad(source)[:, ["gene7", "gene3", "gene30"]].copy()
    columns = ("drug", "line", "plate")
    assert rows_by_condition(store.to_anndata(), columns) == rows_by_condition(adata, columns)


def test_a_library_column_stands_for_genes_that_are_not_there(source, tmp_path):
    adata = ad.read_h5ad(source)
    adata.obs["total"] = adata.X.sum(axis=1).A1 + 1_000.0
    adata.obs.iloc[5, adata.obs.columns.get_loc("total")] = 0.0
    report = prepare(
        settings(
            [write(adata, tmp_path / "cells.h5ad")],
            tmp_path / "store",
            columns={"library": "total"},
        )
    )
    assert report.dropped == {"no counts": 1}
    back = CellSetStore.open(report.path).to_anndata()
    np.testing.assert_array_equal(back.obs["library"], back.X.sum(axis=1).A1 + 1_000)


def test_cells_without_counts_are_dropped_and_counted(source, tmp_path):
    adata = ad.read_h5ad(source)
    adata.X = adata.X.toarray()
    adata.X[[3, 8, 20]] = 0
    report = prepare(settings([write(adata, tmp_path / "c.h5ad")], tmp_path / "store"))
    assert report.dropped == {"no counts": 3}
    assert report.num_cells == adata.n_obs - 3


# --- counts from log1p values -------------------------------------------------------------------


@pytest.mark.parametrize("target_sum", [1e4, 4e3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_are_recovered_exactly(target_sum, dtype):
    counts = make_adata().X.astype(np.float64)
    total = counts.sum(axis=1).A1
    values = counts.multiply(target_sum / total[:, None]).tocsr()
    values.data = np.log1p(values.data)
    recovered = recover_counts(values.astype(dtype))
    assert recovered.is_exact_N.all()
    assert (recovered.counts != counts).nnz == 0


def test_a_common_factor_is_found_with_the_library():
    counts = sp.csr_matrix(np.array([[2, 4, 6], [1, 0, 2], [3, 3, 9], [0, 0, 0]], dtype=float))
    library = np.array([100.0, 50.0, 90.0, 0.0])
    values = counts.multiply(1e4 / np.maximum(library, 1)[:, None]).tocsr()
    values.data = np.log1p(values.data)
    alone = recover_counts(values)
    np.testing.assert_array_equal(alone.counts.toarray()[0], [1, 2, 3])
    recovered = recover_counts(values, library, 1e4)
    np.testing.assert_array_equal(recovered.counts.toarray(), counts.toarray())
    assert recovered.is_exact_N.all()
    assert not recover_counts(values, library * 1.3, 1e4).is_exact_N[:3].any()


@pytest.mark.parametrize("spoil", ["float16", "scaled"])
def test_values_without_whole_ratios_are_refused(source, tmp_path, spoil):
    adata = ad.read_h5ad(source)
    _log_normalised(adata)
    if spoil == "float16":
        adata.X.data = adata.X.data.astype(np.float16).astype(np.float32)
    else:
        adata.X.data *= 0.7
    path = write(adata, tmp_path / "cells.h5ad")
    message = r"X is not counts \(fractions in float32, maximum .*\) and counts could be recovered"
    with pytest.raises(SourceError, match=message):
        prepare(settings([path], tmp_path / "store"))


def test_recovery_can_be_forbidden(source, tmp_path):
    adata = ad.read_h5ad(source)
    _log_normalised(adata)
    path = write(adata, tmp_path / "cells.h5ad")
    config = settings([path], tmp_path / "store", counts_policy=CountsPolicy.require)
    with pytest.raises(SourceError, match="not counts .* counts_policy is require"):
        prepare(config)


def test_a_cut_log_normalised_matrix_is_pointed_out(source, tmp_path, log):
    adata = ad.read_h5ad(source)
    _log_normalised(adata)
    make_store([write(adata[:, 1:].copy(), tmp_path / "cells.h5ad")], tmp_path / "store")
    assert "it was cut to some genes; give columns.library" in log.text


# --- bad input ----------------------------------------------------------------------------------


def _obs(adata, name, values):
    adata.obs[name] = values


def _set(adata, row, gene, value):
    adata.X = adata.X.toarray()
    adata.X[row, gene] = value


BAD_CELLS = {
    "negative": (lambda a: _set(a, 3, 4, -2), {}, r"X, row 3, gene 'gene4' is -2: negative"),
    "nan": (lambda a: _set(a, 7, 4, np.nan), {}, r"X, row 7, gene 'gene4' is nan: not finite"),
    "inf": (lambda a: _set(a, 7, 4, np.inf), {}, r"row 7, gene 'gene4' is inf: not finite"),
    "fraction": (lambda a: _set(a, 7, 4, 0.5), {}, r"not counts \(fractions in float32"),
    "too large": (lambda a: _set(a, 7, 4, 2**25), {}, r"row 7, gene 'gene4' .* above 16,777,216"),
    "duplicate genes": (
        lambda a: setattr(a, "var_names", ["x", "x", *a.var_names[2:]]),
        {},
        r"cells.h5ad: 1 gene names occur more than once: x",
    ),
    "empty gene": (
        lambda a: setattr(a, "var_names", ["", *a.var_names[1:]]),
        {},
        r"cells.h5ad: 1 genes have no name, the first in column 0",
    ),
    "missing column": (
        lambda a: None,
        {"columns": {"perturbation": "drugs"}},
        r"no column 'drugs' in .obs .*did you mean 'drug'\?.* Set columns.perturbation",
    ),
    "unknown control": (
        lambda a: None,
        {"control": "dmso"},
        r"no control cells: 'drug' has no value 'dmso'; did you mean 'DMSO'\? it has DMSO, drug",
    ),
    "cell type without control": (
        lambda a: _obs(
            a,
            "drug",
            np.where((a.obs["drug"] == "DMSO") & (a.obs["line"] == "K562"), "drugA", a.obs["drug"]),
        ),
        {},
        r"no control cells in 1 cell types: K562",
    ),
    "missing value": (
        lambda a: _obs(a, "line", a.obs["line"].where(a.obs["line"] != "K562")),
        {},
        r"column 'line' \(columns.cell_type\) is missing \(NaN\) for \d+ of 700 cells",
    ),
    "empty label": (
        lambda a: _obs(a, "drug", a.obs["drug"].astype(str).replace({"drugC": " "})),
        {},
        r"column 'drug' holds an empty label",
    ),
    "unparsable list": (
        lambda a: _obs(a, "drug", a.obs["drug"].astype(str).replace("drugC", "[('x', 1]")),
        {},
        r"perturbation label \"\[\('x', 1\]\" cannot be read; expected a list of",
    ),
    "negative dose": (
        lambda a: _obs(a, "dose", -1.0),
        {"columns": {"dose": "dose"}},
        r"column 'dose' \(columns.dose\) holds -1 for 'D",
    ),
    "dose is text": (
        lambda a: _obs(a, "dose", "high"),
        {"columns": {"dose": "dose"}},
        r"column 'dose' \(columns.dose\) holds 'high'; expected numbers",
    ),
    "where without value": (
        lambda a: None,
        {"where": {"qc": ["ful"]}},
        r"where: column 'qc' has no value 'ful'; did you mean 'full'",
    ),
    "where without column": (lambda a: None, {"where": {"qcc": ["full"]}}, r"Set where"),
    "no such matrix": (
        lambda a: None,
        {"counts": "layers/umi"},
        r"no matrix at 'layers/umi'; it has X. Set counts",
    ),
    "library too small": (
        lambda a: _obs(a, "total", 5.0),
        {"columns": {"library": "total"}},
        r"columns.library is 5 in row 0, whose genes alone have [\d,]+ counts",
    ),
    "library missing": (
        lambda a: _obs(a, "total", np.nan),
        {"columns": {"library": "total"}},
        r"column 'total' \(columns.library\) is nan in row 0",
    ),
    "minimum too high": (
        lambda a: None,
        {"minimum_cells": 500},
        r"no treated condition has minimum_cells \(500\) cells; the largest of \d+ has \d+",
    ),
    "csc too large": (
        lambda a: setattr(a, "X", a.X.tocsc()),
        {"memory_bytes": 10_000},
        r"stored by columns \(CSC\) and needs [\d,]+ bytes .* above memory_bytes \(10,000\)",
    ),
    "text matrix": (
        lambda a: setattr(a, "X", a.X.astype(bool).toarray().astype("complex64")),
        {},
        r"values of type complex64",
    ),
}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_bad_cells_are_refused_and_nothing_is_written(tmp_path, name):
    spoil, changes, message = BAD_CELLS[name]
    adata = make_adata()
    spoil(adata)
    path = write(adata, tmp_path / "cells.h5ad")
    with pytest.raises(SourceError, match=message):
        prepare(settings([path], tmp_path / "store", **changes))
    assert [p.name for p in tmp_path.iterdir()] == ["cells.h5ad"]


def test_a_late_fraction_is_found_with_its_row(tmp_path):
    adata = make_adata(num_cells=12_000)
    adata.X.data[adata.X.indptr[11_990]] += 0.5  # beyond what is looked at first
    path = write(adata, tmp_path / "cells.h5ad")
    with pytest.raises(SourceError, match=r"row 11990, gene 'gene0' .* not a whole number"):
        prepare(settings([path], tmp_path / "store"))


def test_duplicate_entries_of_a_row(tmp_path):
    path = write(make_adata(), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indices"][1] = file["X/indices"][0]
    with pytest.raises(SourceError, match="row 0, gene 'gene0' stands twice in its row"):
        prepare(settings([path], tmp_path / "store"))


def test_indices_out_of_range(tmp_path):
    path = write(make_adata(), tmp_path / "cells.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indices"][1] = NUM_GENES
    with pytest.raises(SourceError, match="impossible indices .* expected columns 0 to 39"):
        prepare(settings([path], tmp_path / "store"))


def test_files_that_are_no_h5ad(tmp_path, source):
    content = source.read_bytes()
    (tmp_path / "cut.h5ad").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.h5ad").write_text("not HDF5")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["numbers"] = np.arange(3)
    for name in ("cut", "text"):
        with pytest.raises(SourceError, match=f"{name}.h5ad cannot be opened as HDF5"):
            prepare(settings([tmp_path / f"{name}.h5ad"], tmp_path / "store"))
    with pytest.raises(SourceError, match="is no h5ad: it has numbers; expected X, obs, var"):
        prepare(settings([tmp_path / "other.h5ad"], tmp_path / "store"))
    with pytest.raises(SourceError, match="no file matches '.*absent"):
        prepare(settings([tmp_path / "absent*.h5ad"], tmp_path / "store"))
    with pytest.raises(SourceError, match="source.files is empty"):
        prepare(settings([], tmp_path / "store"))


def test_a_damaged_chunk_names_the_rows(tmp_path):
    path = tmp_path / "cells.h5ad"
    make_adata().write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        place = file["X/data"].id.get_chunk_info(file["X/data"].id.get_num_chunks() - 1)
    with path.open("r+b") as handle:
        handle.seek(place.byte_offset)
        handle.write(b"\0" * place.size)
    with pytest.raises(SourceError, match=r"rows \d+ to \d+ of X cannot be read"):
        prepare(settings([path], tmp_path / "store"))


def test_a_file_without_cells(tmp_path):
    path = write(make_adata()[:0].copy(), tmp_path / "cells.h5ad")
    with pytest.raises(SourceError, match="has no cells"):
        prepare(settings([path], tmp_path / "store"))


def test_a_file_without_a_matrix(tmp_path):
    adata = make_adata()
    path = write(ad.AnnData(obs=adata.obs, var=adata.var), tmp_path / "cells.h5ad")
    with pytest.raises(SourceError, match="has neither layers/counts, raw/X nor X"):
        prepare(settings([path], tmp_path / "store"))


def test_files_with_other_genes_or_other_values(tmp_path, source):
    adata = ad.read_h5ad(source)
    other = write(adata[:, :-2].copy(), tmp_path / "d.h5ad")
    with pytest.raises(
        SourceError, match=r"other genes .* 38 against 40; 2 missing \(gene38, gene39\)"
    ):
        prepare(settings([source, other], tmp_path / "store"))
    _log_normalised(adata)
    other = write(adata, tmp_path / "e.h5ad")
    with pytest.raises(SourceError, match="holds log1p values, but that of .* holds counts"):
        prepare(settings([source, other], tmp_path / "store"))


def test_gene_lists_with_unknown_or_repeated_genes(tmp_path, source):
    panel = tmp_path / "panel.txt"
    genes = GenesConfig(choice=GeneChoice.list, file=str(panel))
    with pytest.raises(SourceError, match="panel.txt cannot be read"):
        prepare(settings([source], tmp_path / "store", genes=genes))
    panel.write_text("gene1\nTP53\nMYC\n")
    with pytest.raises(SourceError, match=r"2 of 3 genes are not in the source \(TP53, MYC\)"):
        prepare(settings([source], tmp_path / "store", genes=genes))
    panel.write_text("gene1\ngene1\n")
    with pytest.raises(SourceError, match="names a gene more than once"):
        prepare(settings([source], tmp_path / "store", genes=genes))


def test_a_store_that_exists_is_kept_unless_told(source, tmp_path, fingerprint):
    store = tmp_path / "store"
    make_store([source], store, seed=5)
    with pytest.raises(StoreError, match="store exists; give another store=, or overwrite=true"):
        prepare(settings([source], store))
    assert make_store([source], store, overwrite=True).fingerprint == fingerprint
    (tmp_path / "home").mkdir()
    with pytest.raises(StoreError, match="home is no store and is not overwritten"):
        prepare(settings([source], tmp_path / "home", overwrite=True))


def test_two_runs_cannot_write_one_store(source, tmp_path):
    claim = PartialDirectory(tmp_path / "store", overwrite=False, mark="")
    with pytest.raises(StoreError, match="another process is writing"):
        prepare(settings([source], tmp_path / "store"))
    claim.abort()
    make_store([source], tmp_path / "store")


def test_a_failing_overwrite_keeps_the_old_store(source, tmp_path, fingerprint):
    store = tmp_path / "store"
    make_store([source], store)
    with pytest.raises(SourceError, match="no control cells"):
        prepare(settings([source], store, overwrite=True, control="nothing"))
    assert CellSetStore.open(store, verify="full").fingerprint == fingerprint


def test_a_full_disk_leaves_no_store_and_the_same_command_goes_on(source, tmp_path, fingerprint):
    script = "import sys, test_prepare as t\nt.prepare(t.settings([sys.argv[1]], sys.argv[2]))\n"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384))

    done = subprocess.run(
        [sys.executable, "-c", script, source, tmp_path / "store"],
        preexec_fn=limit,
        env={
            **os.environ,
            "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}",
            "PYTHONDONTWRITEBYTECODE": "1",  # what Python keeps would be cut, too
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "OSError" in done.stderr
    assert "store.partial keeps what is done; the same command goes on" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["store.partial"]
    assert make_store([source], tmp_path / "store").fingerprint == fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# --- the task -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_own_log")
def test_the_task_writes_a_store_and_its_record(source, tmp_path, capsys, fingerprint):
    config = settings([source], tmp_path / "store")
    assert prepare_task.run(config) == 0
    assert "cells stored" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]
    assert record["exit_reason"] == "done"
    assert record["store_fingerprint"] == fingerprint
    assert (tmp_path / "run" / "config.yaml").exists()
    inputs = json.loads((tmp_path / "store" / "prepare.json").read_text())["provenance"]["inputs"]
    assert [i["name"] for i in inputs] == ["cells.h5ad"]


def test_the_task_checks_a_store(source, tmp_path, capsys):
    make_store([source], tmp_path / "store")
    config = compose("prepare", [f"verify={tmp_path / 'store'}"], run_dir=tmp_path / "run")
    assert prepare_task.run(config) == 0
    assert " bytes in " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    shard = next((tmp_path / "store" / "shards").glob("treated-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StoreError, match=shard.name):
        prepare_task.run(config)


def test_the_synthetic_source_needs_no_file(tmp_path):
    overrides = [f"store={tmp_path / 'toy'}", "source.num_cells=4000", "genes.num=200"]
    config = compose("prepare", overrides, run_dir=tmp_path / "run")
    report = prepare(config)
    assert report.num_cells == report.num_cells_in
    store = CellSetStore.open(report.path)
    assert store.num_genes == 200
    assert store.control == config.control


# --- real cells ---------------------------------------------------------------------------------


def test_real_counts_come_back(tmp_path):
    path = SHARED / "papalexi2021_thp1" / "papalexi2021_20729x299_counts.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    store = make_store(
        [path],
        tmp_path / "store",
        columns={"perturbation": "perturbation", "cell_type": "cell_line", "batch": "bio_rep"},
        control="non-targeting",
    )
    adata, back = ad.read_h5ad(path), store.to_anndata()
    columns = ("perturbation", "cell_line", "bio_rep")
    assert back.n_obs == adata.n_obs == 20_729
    assert rows_by_condition(back, columns) == rows_by_condition(adata, columns)


def test_real_log_values_give_the_reference_counts():
    folder = SHARED / "perturbench_devel"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    expected = ad.read_h5ad(folder / "devel_counts.h5ad")
    values = ad.read_h5ad(folder / "devel.h5ad").X.tocsr()
    recovered = recover_counts(values)
    assert recovered.is_exact_N.all()
    own, truth = recovered.counts.toarray(), expected.X.toarray()
    is_equal = (own == truth).all(axis=1)
    assert is_equal.sum() == 5_956
    for a, b in zip(own[~is_equal], truth[~is_equal], strict=True):
        factor = b.sum() / a.sum()
        np.testing.assert_array_equal(a * factor, b)  # the cell's counts share a factor
    library = expected.obs["size_factor_total"].to_numpy(dtype=float)
    with_library = recover_counts(values, library, 1e4)
    np.testing.assert_array_equal(with_library.counts.toarray(), truth)
