"""SCDL archives: read as they are laid out, refused where damaged, written so that all returns."""

import pickle
import shutil
import struct
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from cell_set_store import write_store
from prepared_store import cells_of, make, make_h5ad

from scale.config import ColumnsConfig, GeneChoice, GenesConfig, SourceFormat
from scale.data.export import export_store
from scale.data.ingest.scdl import ScdlSource
from scale.data.scdl_writer import ScdlWriter
from scale.data.store import CellSetStore
from scale.types import SourceError

TYPES = ("uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
"""Types of the format by their number, from 1 on."""


class Bomb:
    """What unpickling would set off."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def write_archive(path, blocks, *, types=("float32", "uint64", "uint32"), with_header=True):
    """Write blocks of (counts, obs, var) by hand, after the published layout."""
    matrix = sp.vstack([sp.csr_matrix(counts) for counts, _, _ in blocks], format="csr")
    path.mkdir()
    parts = (("DATA", matrix.data), ("ROWPTR", matrix.indptr), ("COLPTR", matrix.indices))
    files = ("data.npy", "row_ptr.npy", "col_ptr.npy")
    header = b"SCDL" + bytes([0, 1, 0, 1]) + struct.pack(">II", 1, 3)
    for (name, values), file, kind in zip(parts, files, types, strict=True):
        values.astype(kind).tofile(path / file)
        header += struct.pack(">I", len(name)) + name.encode()
        header += struct.pack(">QIB", len(values), TYPES.index(kind) + 1, 0)
    if with_header:
        (path / "header.sch").write_bytes(header + struct.pack(">I", 0))
    (path / "metadata.json").write_text('{"num_rows": 3}')  # stale, as after a flatten
    ends = np.cumsum([sp.csr_matrix(counts).shape[0] for counts, _, _ in blocks])
    for axis, place in (("obs_features", 1), ("var_features", 2)):
        (path / axis).mkdir()
        for i, block in enumerate(blocks):
            block[place].to_parquet(path / axis / f"dataframe_{i}.parquet", index=False)
        np.save(path / axis / "cumulative_sum_index.npy", np.array([-1, *ends]))
        np.save(path / axis / "version.npy", np.array("0.1.3"))
        with (path / axis / "labels.npy").open("wb") as handle:
            bomb = np.array([Bomb(path / "exploded")], object)
            np.lib.format.write_array_header_1_0(
                handle, {"descr": "|O", "fortran_order": False, "shape": (1,)}
            )
            pickle.dump(bomb, handle)
    return path


def make_block(seed, *, num_cells=90, genes=None):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.5, (num_cells, 20))
    counts[5] = 0
    counts[:, 0] = rng.integers(1, 200, num_cells)
    obs = pd.DataFrame(
        {
            "drug": rng.choice(["DMSO", "a", "b"], num_cells, p=[0.4, 0.3, 0.3]),
            "line": "A549",
            "plate": rng.integers(1, 3, num_cells),
            "um": rng.choice([0.5, 5.0], num_cells),
            "total": counts.sum(axis=1),
            "barcode": [f"{seed}-{i}" for i in range(num_cells)],
        }
    )
    var = pd.DataFrame({"symbol": genes or [f"gene{i}" for i in range(20)]})
    return counts, obs, var


@pytest.fixture
def archive(tmp_path):
    return write_archive(tmp_path / "cells.scdl", [make_block(0), make_block(1)])


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "types",
    [
        ("uint8", "uint16", "uint8"),
        ("uint16", "uint64", "uint32"),
        ("uint64", "uint32", "uint64"),
        ("float16", "uint64", "uint16"),
        ("float64", "uint64", "uint32"),
    ],
)
def test_every_type_of_the_header_is_read(tmp_path, types):
    counts, obs, var = make_block(0)
    path = write_archive(tmp_path / "cells.scdl", [(counts, obs, var)], types=types)
    with ScdlSource(path).open() as file:
        assert file.matrix("X").dtype == types[0]
        assert (file.num_cells, file.matrix("X").num_stored) == (90, int((counts > 0).sum()))
        np.testing.assert_array_equal(file.rows("X", 0, 90).toarray(), counts)
        np.testing.assert_array_equal(file.rows("X", 4, 7).toarray(), counts[4:7])


def test_an_archive_without_a_header_has_the_types_of_old(tmp_path):
    counts, obs, var = make_block(0)
    path = write_archive(tmp_path / "cells.scdl", [(counts, obs, var)], with_header=False)
    with ScdlSource(path).open() as file:
        np.testing.assert_array_equal(file.rows("X", 0, 90).toarray(), counts)


def test_blocks_with_genes_in_another_order_are_aligned(tmp_path):
    order = np.random.default_rng(3).permutation(20)
    first, (counts, obs, _) = make_block(0), make_block(1)
    var = pd.DataFrame({"symbol": [f"gene{i}" for i in order]})
    path = write_archive(tmp_path / "cells.scdl", [first, (counts[:, order], obs, var)])
    with ScdlSource(path).open() as file:
        expected = np.concatenate([first[0], counts])
        for start, stop in ((0, 180), (80, 100), (89, 90), (90, 91), (100, 180)):
            np.testing.assert_array_equal(
                file.rows("X", start, stop).toarray(), expected[start:stop]
            )


def test_columns_are_texts_and_numbers_over_all_blocks(archive):
    obs = pd.concat([make_block(0)[1], make_block(1)[1]])
    with ScdlSource(archive).open() as file:
        for name in ("drug", "plate", "line"):
            column = file.column(name, "setting")
            assert len(set(column.names)) == len(column.names)
            texts = [column.names[code] for code in column.codes_N]
            assert texts == obs[name].astype(str).tolist()
        np.testing.assert_array_equal(file.numbers("um", "setting"), obs["um"])
        assert file.barcodes(88, 92).tolist() == ["0-88", "0-89", "1-0", "1-1"]


def test_missing_values_are_missing(tmp_path):
    counts, obs, var = make_block(0)
    obs.loc[[3, 8], "drug"] = None
    obs.loc[[4], "um"] = np.nan
    path = write_archive(tmp_path / "cells.scdl", [(counts, obs, var)])
    with ScdlSource(path).open() as file:
        missing = np.flatnonzero(file.column("drug", "setting").codes_N < 0)
        assert missing.tolist() == [3, 8]
        assert np.flatnonzero(np.isnan(file.numbers("um", "setting"))).tolist() == [4]


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (["ensembl_id", "feature_name", "rank"], "feature_name"),
        (["var_feature_id"], "var_feature_id"),
        (["rank", "gene_id"], "gene_id"),
        (["whatever"], "whatever"),
    ],
)
def test_the_name_of_a_gene_is_found_by_rule(tmp_path, columns, chosen):
    counts, obs, _ = make_block(0)
    var = pd.DataFrame({c: [f"ENSG-{c}-{i}" for i in range(20)] for c in columns})
    with ScdlSource(write_archive(tmp_path / "a.scdl", [(counts, obs, var)])).open() as file:
        assert file.genes("X") == [f"ENSG-{chosen}-{i}" for i in range(20)]
        ids = [c for c in columns if c in ("ensembl_id", "gene_id")]
        expected = [f"ENSG-{ids[0]}-{i}" for i in range(20)] if ids else None
        assert file.ensembl_ids("X") == expected


def test_a_source_can_be_sent_to_another_process(archive):
    with pickle.loads(pickle.dumps(ScdlSource(archive))).open() as file:
        assert file.num_cells == 180


def test_a_pickle_in_an_archive_is_never_opened(archive):
    with pytest.raises(ValueError, match="pickle"):
        np.load(archive / "obs_features" / "labels.npy", allow_pickle=False)
    with ScdlSource(archive).open() as file:
        file.rows("X", 0, file.num_cells)
        file.column("drug", "setting")
        file.barcodes(0, 5)
    assert not (archive / "exploded").exists()
    np.load(archive / "obs_features" / "labels.npy", allow_pickle=True)
    assert (archive / "exploded").exists()


# --- damage -------------------------------------------------------------------------------------


def read_all(path):
    with ScdlSource(path).open() as file:
        file.genes("X")
        file.rows("X", 0, file.num_cells)
        for name in file.columns:
            file.column(name, "setting")


def rewrite(name, dtype, change):
    def damage(path):
        values = np.fromfile(path / name, dtype)
        change(values).astype(dtype).tofile(path / name)

    return damage


def swap_rows(pointer):
    pointer[[30, 31]] = pointer[[31, 30]]
    return pointer


def put(position, value):
    def change(values):
        values[position] = value
        return values

    return change


def cut(name, size):
    def damage(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:size])

    return damage


def replace(name, table):
    return lambda path: table.to_parquet(path / name, index=False)


DAMAGE = {
    "no matrix": (
        lambda p: (p / "col_ptr.npy").unlink(),
        r"no SCDL archive: it has no col_ptr\.npy",
    ),
    "rows descend": (rewrite("row_ptr.npy", "uint64", swap_rows), r"row_ptr\.npy does not ascend"),
    "row beyond": (rewrite("row_ptr.npy", "uint64", put(50, 1 << 63)), r"row_ptr\.npy does not"),
    "first row": (rewrite("row_ptr.npy", "uint64", put(0, 1)), r"row_ptr\.npy goes from 1 to"),
    "last row": (rewrite("row_ptr.npy", "uint64", put(-1, 7)), r"row_ptr\.npy goes from 0 to 7,"),
    "gene beyond": (
        rewrite("col_ptr.npy", "uint32", put(9, 20)),
        r"col_ptr\.npy goes from 0 to 20",
    ),
    "gene far beyond": (rewrite("col_ptr.npy", "uint32", put(9, 2**32 - 1)), r"col_ptr\.npy goes"),
    "data cut": (cut("data.npy", -8), r"there are \d+ values in data\.npy"),
    "data cut oddly": (cut("data.npy", -3), r"data\.npy has \d+ bytes, no multiple of the 4"),
    "no rows": (cut("row_ptr.npy", 8), r"row_ptr\.npy holds no row"),
    "header": (rewrite("header.sch", "uint8", put(0, 0)), r"header\.sch starts with"),
    "later schema": (rewrite("header.sch", "uint8", put(4, 1)), r"header\.sch starts with"),
    "order of bytes": (rewrite("header.sch", "uint8", put(7, 0)), r"header\.sch starts with"),
    "type of DATA": (rewrite("header.sch", "uint8", put(35, 9)), r"'DATA' has type 9"),
    "name of DATA": (rewrite("header.sch", "uint8", put(20, 80)), r"header\.sch is damaged"),
    "no genes": (lambda p: shutil.rmtree(p / "var_features"), "no tables in var_features"),
    "parquet": (
        cut("obs_features/dataframe_1.parquet", 90),
        r"dataframe_1\.parquet cannot be read",
    ),
    "genes' parquet": (cut("var_features/dataframe_0.parquet", 90), r"dataframe_0\.parquet cannot"),
    "index": (cut("obs_features/cumulative_sum_index.npy", 9), r"cumulative_sum_index\.npy cannot"),
    "index is a pickle": (
        lambda p: shutil.copy(
            p / "obs_features/labels.npy", p / "obs_features/cumulative_sum_index.npy"
        ),
        r"cumulative_sum_index\.npy cannot be read",
    ),
    "index of others": (
        lambda p: np.save(p / "obs_features/cumulative_sum_index.npy", [-1, 90, 170]),
        r"holds \[-1, 90, 170\]; expected 3 ascending numbers up to 180",
    ),
    "index descends": (
        lambda p: np.save(p / "var_features/cumulative_sum_index.npy", [-1, 190, 180]),
        r"holds \[-1, 190, 180\]",
    ),
    "old table": (
        replace("obs_features/dataframe_1.parquet", make_block(1)[1][:80]),
        r"dataframe_1\.parquet has 80 rows, .*cumulative_sum_index\.npy says 90",
    ),
    "other genes": (
        replace("var_features/dataframe_1.parquet", pd.DataFrame({"symbol": list("abc")})),
        r"dataframe_1\.parquet has other genes than .*dataframe_0\.parquet: 3 against 20, 0 in com",
    ),
    "unnamed genes": (
        replace("var_features/dataframe_0.parquet", pd.DataFrame({"mean": [1.0], "rank": [1]})),
        r"dataframe_0\.parquet has the columns mean, rank; expected the names of the genes in one",
    ),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_damage_and_nonsense_name_the_file(archive, case):
    damage, message = DAMAGE[case]
    read_all(archive)
    damage(archive)
    with pytest.raises(SourceError, match=message):
        read_all(archive)


def test_a_header_that_is_cut_anywhere_is_refused(archive):
    whole = (archive / "header.sch").read_bytes()
    for size in range(len(whole) - 4):  # the last 4 bytes count tables, which are not read
        (archive / "header.sch").write_bytes(whole[:size])
        with pytest.raises(SourceError, match=r"header\.sch is damaged"):
            read_all(archive)


def test_a_missing_column_is_named(archive):
    with ScdlSource(archive).open() as file:
        with pytest.raises(SourceError, match=r"no column 'drag'.*'drug'.*Set columns\.pert"):
            file.column("drag", "columns.perturbation")
        with pytest.raises(SourceError, match="no matrix at 'layers/counts'"):
            file.matrix("layers/counts")


# --- to a store and back ------------------------------------------------------------------------


def test_the_same_cells_as_h5ad_and_as_an_archive_give_the_same_store(tmp_path):
    adata = ad.read_h5ad(make_h5ad(tmp_path / "cells.h5ad"))
    var = adata.var.assign(symbol=adata.var_names)
    write_archive(tmp_path / "cells.scdl", [(adata.X, adata.obs, var)])
    h5ad = make(tmp_path / "a", SourceFormat.h5ad, tmp_path / "cells.h5ad")
    archive = make(
        tmp_path / "b",
        SourceFormat.scdl,
        tmp_path / "cells.scdl",
    )
    assert archive.fingerprint == h5ad.fingerprint


def test_from_a_store_to_an_archive_and_back_no_cell_changes(tmp_path):
    columns = ColumnsConfig(
        perturbation="drug",
        cell_type="cell_line",
        batch="plate",
        library="library",
        separator="+",
    )
    with CellSetStore.open(write_store(tmp_path / "store")) as store:
        export_store(store, tmp_path / "cells.scdl")
        back = make(tmp_path / "back", SourceFormat.scdl, tmp_path / "cells.scdl", columns=columns)
        assert cells_of(back) == cells_of(store)
        assert back.control == store.control
        assert set(back.labels) == set(store.labels)


def test_highly_variable_genes_of_an_archive_are_those_of_the_h5ad(tmp_path):
    adata = ad.read_h5ad(make_h5ad(tmp_path / "cells.h5ad"))
    write_archive(
        tmp_path / "cells.scdl",
        [
            (adata.X[:200], adata.obs[:200], adata.var.assign(symbol=adata.var_names)),
            (adata.X[200:], adata.obs[200:], adata.var.assign(symbol=adata.var_names, extra=1)),
        ],
    )
    genes = GenesConfig(choice=GeneChoice.hvg, num=10)
    h5ad = make(tmp_path / "a", SourceFormat.h5ad, tmp_path / "cells.h5ad", genes=genes)
    archive = make(tmp_path / "b", SourceFormat.scdl, tmp_path / "cells.scdl", genes=genes)
    assert archive.genes.symbols == h5ad.genes.symbols
    assert archive.fingerprint == h5ad.fingerprint


# --- writing ------------------------------------------------------------------------------------


def write_rows(path, counts, blocks):
    counts = sp.csr_matrix(counts)
    var = pd.DataFrame({"symbol": [f"g{i}" for i in range(counts.shape[1])]})
    with ScdlWriter(
        path, var=var, num_rows=counts.shape[0], num_values=counts.nnz, label="label"
    ) as writer:
        for start, stop in blocks:
            part = counts[start:stop]
            obs = pd.DataFrame({"row": np.arange(start, stop)})
            writer.add(part.indptr.astype(np.int64), part.indices, part.data, obs)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [(255, "uint8"), (256, "uint16"), (65_535, "uint16"), (65_536, "uint32"), (1 << 24, "uint32")],
)
@pytest.mark.parametrize("at", [0, 57])
def test_counts_have_the_narrowest_type_wherever_the_largest_is(tmp_path, largest, expected, at):
    counts = np.random.default_rng(0).poisson(0.4, (60, 300)).astype(np.uint32)
    counts[20:30] = 0
    counts[at, 299] = largest
    write_rows(tmp_path / "a.scdl", counts, [(0, 25), (25, 26), (26, 60)])
    with ScdlSource(tmp_path / "a.scdl").open() as file:
        assert file.matrix("X").dtype == expected
        np.testing.assert_array_equal(file.rows("X", 0, 60).toarray(), counts)
        assert file.numbers("row", "setting").tolist() == list(range(60))
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "a.scdl").glob("*.npy")}
    num_values = int((counts > 0).sum())
    assert sizes["col_ptr.npy"] == 2 * num_values  # 300 genes
    assert sizes["row_ptr.npy"] == 2 * 61
    assert sizes["data.npy"] == np.dtype(expected).itemsize * num_values


def test_an_archive_that_is_not_complete_does_not_appear(tmp_path):
    counts = np.ones((10, 4), np.uint32)
    with pytest.raises(ValueError, match="5 rows were added, 10 announced"):
        write_rows(tmp_path / "a.scdl", counts, [(0, 5)])
    assert list(tmp_path.iterdir()) == []
