"""Exports hold what ``to_anndata`` returns, whole or not at all; one task does one thing."""

import logging
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from cell_set_store import write_store
from store_parts import Part, coded, write

from scale.config import compose
from scale.data import store_rows
from scale.data.export import export_store
from scale.data.ingest.scdl import ScdlSource
from scale.data.store import CellSetStore
from scale.tasks import prepare as prepare_task
from scale.types import StoreError

STORES = {
    "batch in the condition": lambda path: write_store(path),
    "batch by cell": lambda path: write(path, [coded("A549", ("g1", "g2", "g3"), 4)]),
    "no batch": lambda path: write(
        path,
        [
            Part(
                "A549",
                batches=(None,),
                columns={"perturbation": "condition", "cell_type": "line", "dose": "dose"},
                names_cells=False,
            )
        ],
    ),
}


@pytest.fixture(params=list(STORES))
def store(request, tmp_path):
    with CellSetStore.open(STORES[request.param](tmp_path / "store")) as store:
        yield store


@pytest.fixture
def _small_blocks(monkeypatch):
    """Make every export consist of many blocks."""
    monkeypatch.setattr(store_rows, "_MOST_CELLS", 37)


@pytest.fixture
def _own_log():
    """Undo what a task does to the package's log: its console is closed with the test."""
    yield
    logger = logging.getLogger("scale")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


@pytest.mark.usefixtures("_small_blocks")
def test_an_h5ad_is_what_to_anndata_returns(store, tmp_path):
    assert export_store(store, tmp_path / "new" / "cells.h5ad") == store.manifest["num_cells"]
    store.to_anndata().write_h5ad(tmp_path / "expected.h5ad")
    expected = ad.read_h5ad(tmp_path / "expected.h5ad")
    found = ad.read_h5ad(tmp_path / "new" / "cells.h5ad")
    if (store.path / "cells").exists():
        names = found.obs.pop("barcode")
        assert names.is_unique
        assert names.iloc[0].startswith("A549-0-")
    pd.testing.assert_frame_equal(found.obs, expected.obs)
    pd.testing.assert_frame_equal(found.var, expected.var)
    assert (found.X.dtype, found.X.format) == (expected.X.dtype, "csr")
    for part in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(found.X, part), getattr(expected.X, part))
    backed = ad.read_h5ad(tmp_path / "new" / "cells.h5ad", backed="r")
    np.testing.assert_array_equal(backed.X[30:80].toarray(), expected.X[30:80].toarray())
    backed.file.close()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["cells.h5ad"]


@pytest.mark.usefixtures("_small_blocks")
def test_an_archive_is_what_to_anndata_returns(store, tmp_path):
    export_store(store, tmp_path / "cells.scdl")
    expected = store.to_anndata()
    with ScdlSource(tmp_path / "cells.scdl").open() as file:
        assert file.genes("X") == list(expected.var_names)
        found = file.rows("X", 0, file.num_cells)
        np.testing.assert_array_equal(found.toarray(), expected.X.toarray())
        assert set(file.columns) - {"barcode"} == set(expected.obs)
        for name in expected.obs:
            column, values = file.column(name, ""), expected.obs[name]
            texts = [column.names[code] if code >= 0 else None for code in column.codes_N]
            assert texts == [None if pd.isna(v) else str(v).removesuffix(".0") for v in values], (
                name
            )
    assert {p.name for p in tmp_path.iterdir()} == {"store", "cells.scdl"}


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.scdl"])
def test_what_exists_is_replaced_only_on_request(tmp_path, name):
    target = tmp_path / name
    with CellSetStore.open(write_store(tmp_path / "store")) as store:
        export_store(store, target)
        before = ad.read_h5ad(target) if target.is_file() else None
        with pytest.raises(StoreError, match=f"{name} exists.*overwrite=true"):
            export_store(store, target)
        export_store(store, target, overwrite=True)
        if before is not None:
            assert (ad.read_h5ad(target).X != before.X).nnz == 0


def test_a_folder_that_is_no_archive_is_never_replaced(tmp_path):
    (tmp_path / "home.scdl").mkdir()
    (tmp_path / "home.scdl" / "letter").write_text("dear")
    with (
        CellSetStore.open(write_store(tmp_path / "store")) as store,
        pytest.raises(StoreError, match=r"has no header\.sch, so it is not overwritten"),
    ):
        export_store(store, tmp_path / "home.scdl", overwrite=True)
    assert (tmp_path / "home.scdl" / "letter").exists()


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.scdl"])
def test_an_error_on_the_way_leaves_nothing(tmp_path, name):
    shard = max((write_store(tmp_path / "store") / "shards").glob("treated-*"))
    content = bytearray(shard.read_bytes())
    content[-40] ^= 1
    shard.write_bytes(content)
    with CellSetStore.open(tmp_path / "store") as store, pytest.raises(StoreError, match="damaged"):
        export_store(store, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_store_at_an_address_is_exported_as_far_as_it_is_fetched(tmp_path):
    pytest.importorskip("fsspec")
    local = write_store(tmp_path / "store")
    with CellSetStore.open(f"file://{local}", cache_dir=tmp_path / "cache") as store:
        export_store(store, tmp_path / "cells.h5ad")
        assert (ad.read_h5ad(tmp_path / "cells.h5ad").X != store.to_anndata().X).nnz == 0
    named = write(tmp_path / "named", [Part("A549")])
    with (
        CellSetStore.open(f"file://{named}", cache_dir=tmp_path / "cache") as store,
        pytest.raises(StoreError, match=r"names of cells are not on this machine; copy the whole"),
    ):
        export_store(store, tmp_path / "named.h5ad")


def test_the_ending_says_the_format(tmp_path):
    with (
        CellSetStore.open(write_store(tmp_path / "store")) as store,
        pytest.raises(StoreError, match=r"cells\.loom: the name must end in \.h5ad or \.scdl"),
    ):
        export_store(store, tmp_path / "cells.loom")


# --- the task -----------------------------------------------------------------------------------


def run(tmp_path, *overrides):
    return prepare_task.run(compose("prepare", list(overrides), run_dir=tmp_path / "run"))


@pytest.mark.usefixtures("_own_log")
def test_the_task_exports_merges_and_checks_without_a_source(tmp_path, capsys):
    store = write_store(tmp_path / "store")
    for name in ("cells.h5ad", "cells.scdl"):
        assert run(tmp_path, f"store={store}", f"export={tmp_path / name}") == 0
        assert f"{name}: 2,077 cells, 300 genes of {store}\n" in capsys.readouterr().out
    parts = [write(tmp_path / name, [Part(name, seed=i)]) for i, name in enumerate(("A", "B"))]
    assert run(tmp_path, f"merge=[{parts[0]},{parts[1]}]", f"store={tmp_path / 'both'}") == 0
    assert "cells in 12 conditions of 2 stores\n" in capsys.readouterr().out
    assert run(tmp_path, f"verify={tmp_path / 'both'}") == 0
    assert "chunks are whole\n" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    shutil.rmtree(parts[0])  # a merged store stands alone
    assert run(tmp_path, f"verify={tmp_path / 'both'}") == 0


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (("verify=a", "export=b.h5ad"), "verify and export"),
        (("export=b.h5ad", "merge=[a,b]"), "export and merge"),
        (("verify=a", "export=b.h5ad", "merge=[a,b]"), "verify and export and merge"),
    ],
)
def test_the_task_does_one_thing_at_a_time(tmp_path, overrides, names):
    with pytest.raises(ValueError, match=f"^{names} are given; do one of them at a time$"):
        run(tmp_path, *overrides)
