"""Stores: what goes in comes out, damage is named, a failed writer leaves nothing."""

import gc
import json
import os
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scale.config import Codec
from scale.data.buffers import BufferPool
from scale.data.compact import decode
from scale.data.genes import GeneVocabulary
from scale.data.store import CellSetStore, control_fold
from scale.data.store_files import MANIFEST, seal
from scale.data.store_writer import StoreWriter
from scale.types import Component, Condition, Perturbation, SourceError, StoreError

GENES = GeneVocabulary(tuple(f"g{i}" for i in range(9)), tuple(f"ENSG{i}" for i in range(9)))
COLUMNS = {"perturbation": "guide", "cell_type": "line", "batch": "plate"}
CONTROL = Condition("A549", Perturbation.parse("NT"), "p1", is_control=True)
TREATED = Condition("A549", Perturbation.parse("KLF1"), "p1")


def counts_of(seed, num_cells, num_genes=9):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (num_cells, num_genes))
    counts[:, -1] += 1
    return sp.csr_matrix(counts)


def library_of(counts):
    return np.asarray(counts.sum(1)).ravel() + 3


def open_writer(path, **changes):
    settings = {
        "genes": GENES,
        "columns": COLUMNS,
        "control": "NT",
        "codec": Codec.zstd,
        "shard_bytes": 1 << 20,
        "provenance": {},
    }
    return StoreWriter(path, **(settings | changes))


def write_store(path, conditions=((CONTROL, 70), (TREATED, 130)), **changes):
    with open_writer(path, **changes) as writer:
        for condition, num_cells in conditions:
            label = condition.perturbation.label
            counts = counts_of(len(label) + num_cells, num_cells)
            writer.add(condition, label, counts, library_of(counts))
    return CellSetStore.open(path)


# --- in == out ----------------------------------------------------------------------------------


def test_every_cell_comes_back_where_it_was_put(toy_store_path, toy_conditions):
    store = CellSetStore.open(toy_store_path, verify="full")
    assert store.num_genes == 60
    assert len(store.conditions) == 24
    assert store.conditions["num_cells"].min() < 32
    for condition, (what, label, counts, library) in enumerate(toy_conditions):
        assert store.condition(condition) == what
        row = store.conditions.loc[condition]
        assert store.labels[row["perturbation"]] == label
        assert row["num_cells"] == counts.shape[0]
        cells = store.read(condition)
        matrix = sp.csr_matrix((cells.counts_M, cells.indices_M, cells.indptr_P), counts.shape)
        assert (matrix != counts).nnz == 0
        assert (cells.library_N == library).all()
        rows = np.random.default_rng(condition).permutation(counts.shape[0])[:21]
        taken = store.read(condition, rows)
        assert (taken.library_N == library[rows]).all()
        assert (taken.counts_M == cells.take(rows).counts_M).all()
    with pytest.raises(IndexError, match="of a condition of"):
        store.read(0, np.array([10_000]))


def test_anndata_holds_all_cells_under_the_names_of_the_source(
    toy_store_path, toy_anndata, toy_conditions
):
    expected = sp.vstack([counts for _, _, counts, _ in toy_conditions])
    assert toy_anndata.X.dtype == np.float32
    assert (expected != toy_anndata.X).nnz == 0
    obs = toy_anndata.obs
    assert obs["drug"].tolist() == [x for _, x, c, _ in toy_conditions for _ in range(c.shape[0])]
    assert set(obs["plate"]) == {"plate1", "plate2"}
    assert set(obs["cell_line"]) == {"A549", "HepG2", "K562"}
    assert (obs["is_control"] == (obs["drug"] == "DMSO")).all()
    assert ((obs["control_fold"] == -1) == ~obs["is_control"]).all()
    assert (obs["source_cell"] == obs.index).all()
    assert obs.index.is_unique
    first = obs[obs["condition"] == 5]
    assert first["source_cell"].tolist() == [f"c5:{i}" for i in range(len(first))]
    assert (obs["library"].to_numpy() >= expected.sum(1).A1).all()
    few = CellSetStore.open(toy_store_path).to_anndata([5, 0], max_cells=25)
    assert few.obs["condition"].tolist() == [5] * 25 + [0] * 25
    assert (few.X != toy_anndata[few.obs_names].X).nnz == 0
    assert (few.obs["control_fold"] == obs.loc[few.obs_names, "control_fold"]).all()
    assert CellSetStore.open(toy_store_path).to_anndata([]).shape == (0, 60)


def test_anndata_can_be_written(toy_anndata, tmp_path):
    toy_anndata.write_h5ad(tmp_path / "cells.h5ad")
    assert (ad.read_h5ad(tmp_path / "cells.h5ad").X != toy_anndata.X).nnz == 0


def test_values_are_those_of_scanpy_on_all_genes_before_the_cut(tmp_path):
    sc = pytest.importorskip("scanpy")
    counts = counts_of(0, 150, num_genes=40)
    adata = ad.AnnData(counts.astype(np.float64))
    sc.pp.normalize_total(adata, target_sum=1e4)
    sc.pp.log1p(adata)
    kept = np.sort(np.random.default_rng(0).permutation(40)[:9])
    with open_writer(tmp_path / "store") as writer:
        writer.add(TREATED, "KLF1", counts[:, kept], np.asarray(counts.sum(1)).ravel())
    store = CellSetStore.open(tmp_path / "store")
    chunk_N, row_N = store.locate(0, np.arange(150))
    compact = store.find_cells(chunk_N, row_N, BufferPool()).copy(np.arange(150))
    values = decode(compact, num_rows=150, num_genes=9, target_sum=1e4).numpy()
    np.testing.assert_allclose(values, adata.X[:, kept].toarray(), atol=1e-6)


def test_single_control_cells_are_read_in_place(toy_store_path):
    store = CellSetStore.open(toy_store_path)
    controls = store.conditions.index[store.conditions["is_control"]]
    rng = np.random.default_rng(0)
    condition_N = rng.choice(controls, 100)
    row_N = rng.integers(0, store.conditions.loc[condition_N, "num_cells"].to_numpy())
    places = [store.locate(c, np.array([r])) for c, r in zip(condition_N, row_N, strict=True)]
    chunk_N, inner_N = (np.concatenate(p) for p in zip(*places, strict=True))
    slot_N = rng.permutation(100)
    compact = store.find_cells(chunk_N, inner_N, BufferPool()).copy(slot_N)
    values = decode(compact, num_rows=100, num_genes=60, target_sum=1e4)
    for condition, row, slot in zip(condition_N, row_N, slot_N, strict=True):
        cells = store.read(int(condition), np.array([row]))
        expected = np.zeros(60)
        expected[cells.indices_M] = np.log1p(cells.counts_M * 1e4 / cells.library_N[0])
        np.testing.assert_allclose(values[slot].numpy(), expected, atol=1e-6)


def test_doses_combinations_and_batches_of_single_cells(tmp_path):
    combination = Perturbation((Component("B", 2.0, "uM"), Component("A", 0.5, "uM")))
    columns = {"perturbation": "condition", "cell_type": "line", "batch": "gem", "dose": "dose"}
    codes = np.array([1, -1, 0, 1])
    counts = counts_of(0, 4)
    with open_writer(tmp_path / "store", columns=columns, batches=["x", "y"]) as writer:
        control = Condition("A549", Perturbation.parse("NT"), "y", is_control=True)
        writer.add(control, "NT", counts, library_of(counts))
        treated = Condition("A549", combination)
        writer.add(treated, "A;B", counts, library_of(counts), batch_codes=codes)
    store = CellSetStore.open(tmp_path / "store")
    assert store.condition(1) == treated
    assert store.perturbations[1].components[0] == Component("A", 0.5, "uM")
    assert store.read(1).batch_code_N.tolist() == [1, 65_535, 0, 1]
    adata = store.to_anndata()
    # the source's own column "condition" is kept
    assert adata.obs["condition"].tolist() == ["NT"] * 4 + ["A;B"] * 4
    assert adata.obs["gem"].astype(object).fillna("none").tolist() == [
        *["y"] * 4,
        *["y", "none", "x", "y"],
    ]
    np.testing.assert_array_equal(adata.obs["dose"], [np.nan] * 4 + [0.5] * 4)
    assert adata.var["ensembl_id"].tolist() == list(GENES.ensembl_ids)


def test_threads_read_what_one_thread_reads(toy_store_path):
    expected = CellSetStore.open(toy_store_path)
    shared = CellSetStore.open(toy_store_path)
    chunks = list(range(len(shared.chunks))) * 5
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda chunk: shared.read_chunk(chunk).to_csr(), chunks))
    for chunk, cells in zip(chunks, found, strict=True):
        assert (cells.counts_M == expected.read_chunk(chunk).to_csr().counts_M).all()


def test_metadata_of_single_cells_is_kept_apart(toy_store_path, toy_conditions):
    table = pd.concat(map(pd.read_parquet, sorted((toy_store_path / "cells").iterdir())))
    store = CellSetStore.open(toy_store_path)
    condition = store.chunks["condition"][table["chunk"]]
    row = (table["chunk"] - store.conditions["first_chunk"].to_numpy()[condition]) * 64
    row += table["row"]
    labels = [label for _, label, _, _ in toy_conditions]
    expected = [f"{labels[c]}-{r}" for c, r in zip(condition, row, strict=True)]
    assert table["barcode"].tolist() == expected


def test_genes_of_the_source_are_all_in_the_table(tmp_path):
    names = [f"g{i}" for i in range(9)] + ["other"]
    table = pd.DataFrame({"symbol": names, "column": [*range(9), -1], "mean": np.arange(10.0)})
    write_store(tmp_path / "store", genes=GeneVocabulary(GENES.symbols), gene_table=table)
    written = pd.read_parquet(tmp_path / "store" / "genes.parquet")
    assert written["symbol"].tolist() == names
    assert written["mean"].tolist() == list(range(10))
    assert CellSetStore.open(tmp_path / "store").genes == GeneVocabulary(GENES.symbols)


# --- order, shards, fingerprint -----------------------------------------------------------------


def test_treated_shards_hold_one_cell_type_and_the_index_is_the_truth(tmp_path):
    conditions = [
        (Condition(line, Perturbation.parse(name), None, name == "NT"), 70)
        for line in ("A549", "K562")
        for name in ("NT", "KLF1", "CEBPE")
    ]
    store = write_store(tmp_path / "store", conditions, shard_bytes=1500)
    names = [f["path"] for f in store.manifest["files"] if f["path"].startswith("shards/")]
    assert len(names) > 4
    lines = store.conditions["cell_type"].to_numpy()[store.chunks["condition"]]
    is_control = store.conditions["is_control"].to_numpy()[store.chunks["condition"]]
    for number, name in enumerate(names):
        inside = store.chunks["shard"] == number
        assert inside.any()
        assert (is_control[inside] == name.startswith("shards/control-")).all()
        assert is_control[inside].all() or len(set(lines[inside])) == 1
        assert (tmp_path / "store" / name).read_bytes()[:8] == b"SCLS\x01\x00\x00\x00"
    assert (store.chunks["offset"] % 8 == 0).all()
    assert store.chunks.dtype.itemsize == 32
    assert store.chunks["num_cells"].tolist() == [64, 6] * 6
    assert isinstance(store.chunks, np.memmap)


def test_fingerprint_is_of_the_content(tmp_path):
    one = write_store(tmp_path / "one")
    same = write_store(tmp_path / "two", [(TREATED, 130), (CONTROL, 70)], shard_bytes=1000)
    other = write_store(tmp_path / "three", [(TREATED, 130), (CONTROL, 71)])
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
    library = {"over": "all", "num_genes": 20}
    assert write_store(tmp_path / "four", library=library).fingerprint != one.fingerprint


def test_same_cells_give_the_same_files(tmp_path):
    for name in ("one", "two"):
        write_store(tmp_path / name)
    assert (tmp_path / "one" / MANIFEST).read_bytes() == (tmp_path / "two" / MANIFEST).read_bytes()


def test_control_folds_are_halves_and_depend_on_the_name_only():
    fold = control_fold(CONTROL, 101)
    assert fold.dtype == np.int8
    assert np.bincount(fold).tolist() == [51, 50]
    np.testing.assert_array_equal(fold, control_fold(CONTROL, 101))
    other = Condition("A549", CONTROL.perturbation, "p2", is_control=True)
    assert (fold != control_fold(other, 101)).any()
    # golden: a fold is written into predictions, so it must never change
    assert control_fold(CONTROL, 12).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    agreement = np.mean(control_fold(CONTROL, 20_000) == control_fold(other, 20_000))
    assert abs(agreement - 0.5) < 0.015  # four standard deviations


# --- damage -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "store"
    counts = counts_of(0, 5)
    with open_writer(path) as writer:
        for condition in (CONTROL, TREATED):
            cells = pd.DataFrame({"barcode": list("abcde")})
            writer.add(condition, "x", counts, library_of(counts), cells=cells)
    return path


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)


def test_a_flipped_byte_in_a_shard_is_noticed_when_it_is_read(small_store, tmp_path):
    for name, condition in (("control", 0), ("treated", 1)):
        copy = shutil.copytree(small_store, tmp_path / name)
        shard = copy / "shards" / f"{name}-00000.scl"
        flip(shard, 60)
        store = CellSetStore.open(copy)
        label = store.perturbations[condition].label
        message = rf"{shard.name}: chunk {condition} of condition {condition} \(A549, {label}, p1\)"
        for _ in range(2):
            with pytest.raises(StoreError, match=message):
                store.read(condition)
        with pytest.raises(StoreError, match=shard.name):
            store.verify()
        store.read(1 - condition)
        if condition == 0:
            with pytest.raises(StoreError, match=message):
                store.find_cells(np.array([0]), np.array([1]), BufferPool())


def test_a_shard_that_shrinks_after_opening_is_noticed(small_store, tmp_path):
    copy = shutil.copytree(small_store, tmp_path / "store")
    store = CellSetStore.open(copy)
    shard = copy / "shards" / "treated-00000.scl"
    os.truncate(shard, 40)
    with pytest.raises(StoreError, match=r"crc32 [0-9a-f]{8} of 24 bytes, expected"):
        store.read(1)


def test_what_is_no_store_or_a_newer_one(small_store, tmp_path):
    with pytest.raises(StoreError, match=r"nothing is no store: it has no manifest.json$"):
        CellSetStore.open(tmp_path / "nothing")
    (tmp_path / "nothing.partial").mkdir()
    with pytest.raises(StoreError, match="nothing.partial is unfinished, run prepare again"):
        CellSetStore.open(tmp_path / "nothing")
    copy = shutil.copytree(small_store, tmp_path / "store")
    manifest = json.loads((copy / MANIFEST).read_text())
    changed = {**manifest, "schema_version": 2, "created_by": "scale 9.0"}
    (copy / MANIFEST).write_bytes(seal(changed))
    with pytest.raises(StoreError, match=r"version 2, made by scale 9.0; .* update the package"):
        CellSetStore.open(copy)
    (copy / MANIFEST).write_bytes(seal({**manifest, "kind": 1}))
    with pytest.raises(StoreError, match="is of kind 1"):
        CellSetStore.open(copy)
    (copy / MANIFEST).write_bytes(seal({**manifest, "later": "unknown keys are ignored"}))
    CellSetStore.open(copy)


def open_files(folder):
    found = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    for link in list(Path("/proc/self/fd").iterdir()):
        with suppress(FileNotFoundError):  # other threads close files of their own
            found.append(str(link.readlink()))
    return sorted(name for name in found if name.startswith(str(folder)))


def test_reading_leaves_no_file_open(toy_store_path, tmp_path):
    copy = shutil.copytree(toy_store_path, tmp_path / "toy")
    with CellSetStore.open(copy) as store:
        store.read(0)
        store.read(store.conditions.index[-1])
        assert any("shards" in name for name in open_files(copy))
    assert not any("shards" in name for name in open_files(copy))
    del store  # the index is mapped as long as there is a store
    CellSetStore.open(copy).read(1)  # closed when it is collected
    gc.collect()
    assert not open_files(copy)


# --- writing ------------------------------------------------------------------------------------


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_error_leaves_nothing(tmp_path):
    def stop_on_the_way():
        with open_writer(tmp_path / "store") as writer:
            writer.add(TREATED, "KLF1", counts_of(0, 5), np.full(5, 50))
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        stop_on_the_way()
    assert files_in(tmp_path) == []
    writer = open_writer(tmp_path / "store")
    bad = counts_of(0, 5).astype(float) * 0.5
    with pytest.raises(SourceError, match=r"condition \(A549, KLF1, p1\), cell 0: a count that is"):
        writer.add(TREATED, "KLF1", bad, np.full(5, 50))
    assert files_in(tmp_path) == []
    with pytest.raises(StoreError, match="is closed"):
        writer.add(TREATED, "KLF1", counts_of(0, 5), np.full(5, 50))
    with pytest.raises(SourceError, match="no condition was added"):
        open_writer(tmp_path / "store").close()
    assert files_in(tmp_path) == []


def test_a_condition_is_added_once_and_fits_the_genes(tmp_path):
    counts = counts_of(0, 5)
    cases = [
        (lambda w: w.add(TREATED, "KLF1", counts, np.full(5, 50)), "was added before"),
        (lambda w: w.add(CONTROL, "NT", counts_of(0, 5, 10), np.full(5, 50)), "more columns than"),
        (lambda w: w.add(CONTROL, "NT", counts, np.full(4, 50)), "4 libraries for 5 cells"),
        (
            lambda w: w.add(CONTROL, "NT", counts, np.full(5, 50), batch_codes=np.arange(5)),
            "batch codes need their names",
        ),
        (
            lambda w: w.add(CONTROL, "NT", counts, np.full(5, 50), cells=pd.DataFrame({"a": [1]})),
            "1 rows about 5 cells",
        ),
    ]
    for action, message in cases:
        writer = open_writer(tmp_path / "store")
        writer.add(TREATED, "KLF1", counts, np.full(5, 50))
        with pytest.raises(SourceError, match=message):
            action(writer)
        assert files_in(tmp_path) == []
    with pytest.raises(SourceError, match="columns.batch is 'library'"):
        open_writer(tmp_path / "store", columns={**COLUMNS, "batch": "library"})
    assert files_in(tmp_path) == []


def test_an_existing_store_is_replaced_only_by_a_complete_one(tmp_path):
    path = tmp_path / "store"
    first = write_store(path).fingerprint
    with pytest.raises(StoreError, match="store exists; choose another name, or set overwrite"):
        open_writer(path)
    writer = open_writer(path, overwrite=True)
    writer.add(TREATED, "KLF1", counts_of(0, 5), np.full(5, 50))
    assert CellSetStore.open(path, verify="full").fingerprint == first
    writer.abort()
    assert CellSetStore.open(path, verify="full").fingerprint == first
    second = write_store(path, [(CONTROL, 40)], overwrite=True).fingerprint
    assert second != first
    assert files_in(tmp_path) == ["store"]


def test_what_is_no_store_is_never_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"has no manifest.json, so it is not overwritten"):
        open_writer(tmp_path / "thesis", overwrite=True)
    assert files_in(tmp_path / "thesis") == ["chapter.tex"]


def test_two_writers_of_one_name_and_what_a_killed_one_leaves(tmp_path):
    writer = open_writer(tmp_path / "store")
    with pytest.raises(StoreError, match="another process is writing .*store.partial"):
        open_writer(tmp_path / "store")
    writer.abort()
    left = tmp_path / "store.partial" / "shards"
    left.mkdir(parents=True)
    (left / "treated-00000.scl").write_bytes(b"half a chunk")
    write_store(tmp_path / "store")
    assert files_in(tmp_path) == ["store"]
    # killed between its last two renames: the old store is back when the next writer starts
    (tmp_path / "store").rename(tmp_path / "store.replaced")
    with pytest.raises(StoreError, match="exists"):
        open_writer(tmp_path / "store")
    assert files_in(tmp_path) == ["store"]


@contextmanager
def largest_file(num_bytes):
    """Make writing beyond a size fail, as on a full disk (Python ignores the signal of it)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [10, 3000])
def test_a_full_disk_leaves_nothing(tmp_path, limit):
    # 10 bytes: no shard can be written; 3000: all shards, but not the tables
    with largest_file(limit), pytest.raises(OSError, match="File too large"):
        write_store(tmp_path / "store")
    assert files_in(tmp_path) == []
