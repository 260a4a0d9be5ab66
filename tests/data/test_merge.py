"""Merging: the cells of all parts, unchanged, and a refusal of what would not be one store."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from prepared_store import cells_of, make, make_h5ad
from store_parts import Part, coded, write

from scale.config import DataConfig, SourceFormat
from scale.data.merge import merge_stores
from scale.data.module import CellSetDataModule
from scale.data.store import CellSetStore
from scale.data.store_rows import StoreRows
from scale.types import StoreError

PARTS = (Part("A549", seed=1), Part("K562", ("crizotinib", "bortezomib"), ("p2", "p3"), seed=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    for name, part in zip("ab", PARTS, strict=True):
        write(folder / name, [part])
    write(folder / "joint", list(PARTS))
    merge_stores([folder / "a", folder / "b"], folder / "merged")
    return folder


def content(store):
    """Condition -> cells in order: counts, library, batch and name of each."""
    rows, found = StoreRows(store), {}
    for number in store.conditions.index:
        first, size = int(rows._start_P[number]), int(store.conditions.at[number, "num_cells"])
        cells, code_N = rows.read(first, first + size)
        matrix = sp.csr_matrix((cells.counts_M, cells.indices_M, cells.indptr_P), (size, 300))
        names = rows.barcodes(first, first + size).tolist()
        batches = rows.cells.batch_names(code_N).tolist()
        found[store.condition(number)] = (
            matrix.toarray().tolist(),
            cells.library_N.tolist(),
            batches,
            names,
        )
    return found


def test_a_merged_store_is_the_store_of_all_conditions(folder):
    with (
        CellSetStore.open(folder / "merged", verify="full") as merged,
        CellSetStore.open(folder / "joint") as joint,
    ):
        assert merged.fingerprint == joint.fingerprint
        assert content(merged) == content(joint)
        assert merged.batches == joint.batches == ("p1", "p2", "p3")
        assert merged.columns == joint.columns
        assert merged.control == joint.control
        assert merged.manifest["library"] == joint.manifest["library"]
        pd.testing.assert_frame_equal(merged.conditions, joint.conditions)
        assert merged.labels == joint.labels
        for chunk in range(len(merged.chunks)):
            merged.read_chunk(chunk)


def test_stores_prepared_apart_hold_the_cells_of_one_prepared_at_once(tmp_path):
    source = make_h5ad(tmp_path / "cells.h5ad")
    joint = make(tmp_path / "joint", SourceFormat.h5ad, source)
    lines = ("A549", "K562")
    for line in lines:
        make(tmp_path / line, SourceFormat.h5ad, source, where={"line": [line]})
    merge_stores([tmp_path / line for line in lines], tmp_path / "merged")
    with CellSetStore.open(tmp_path / "merged", verify="full") as merged:
        assert cells_of(merged) == cells_of(joint)
        rows = StoreRows(merged)
        names = rows.barcodes(0, rows.num_cells)
        assert sorted(names) == sorted(f"0-{i}" for i in range(500))
        counts = merged.to_anndata().X[:, 0].toarray().ravel()  # a cell's number in the source + 1
        assert names.tolist() == [f"0-{int(count) - 1}" for count in counts]


def test_shards_keep_their_bytes_and_their_blocks_on_the_disk(folder):
    sources = [p for name in "ab" for p in sorted((folder / name / "shards").iterdir())]
    merged = sorted((folder / "merged" / "shards").iterdir())
    assert sorted(p.read_bytes() for p in merged) == sorted(p.read_bytes() for p in sources)
    assert {p.stat().st_ino for p in merged} == {p.stat().st_ino for p in sources}
    for name, part in zip("ab", PARTS, strict=True):
        with CellSetStore.open(folder / name, verify="full") as store:
            assert {c.cell_type for c in content(store)} == {part.cell_type}


def test_where_files_cannot_be_linked_they_are_copied(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merge_stores([folder / "a", folder / "b"], tmp_path / "copied")
    with (
        CellSetStore.open(tmp_path / "copied", verify="full") as copied,
        CellSetStore.open(folder / "merged") as linked,
    ):
        assert copied.fingerprint == linked.fingerprint
    assert all(p.stat().st_nlink == 1 for p in (tmp_path / "copied" / "shards").iterdir())


def test_the_manifest_says_what_was_joined(folder, tmp_path):
    write(tmp_path / "c", [Part("HepG2", seed=3)])
    merge_stores([folder / "merged", tmp_path / "c"], tmp_path / "again")
    with (
        CellSetStore.open(folder / "merged") as merged,
        CellSetStore.open(tmp_path / "again", verify="full") as again,
    ):
        assert (merged.manifest["generation"], again.manifest["generation"]) == (2, 3)
        record = json.loads((again.path / "prepare.json").read_text())["provenance"]["merged"]
        assert [part["fingerprint"] for part in record] == [
            merged.fingerprint,
            CellSetStore.open(tmp_path / "c").fingerprint,
        ]
        inner = record[0]["prepared"]["provenance"]["merged"]
        assert [part["prepared"]["provenance"] for part in inner] == [
            {"from": ["A549"]},
            {"from": ["K562"]},
        ]


def test_a_merged_store_trains(folder):
    config = DataConfig(store=str(folder / "merged"), minimum_control_cells=2)
    module = CellSetDataModule(config, set_size=32, num_summary_cells=8, seed=0)
    try:
        seen = set()
        num_sets = module.train_plan.num_sets_per_epoch
        for number in range(num_sets):
            batch = module.train_reader.batch(np.array([number]))
            assert bool(torch.isfinite(batch.treated_BSG).all())
            seen.add(int(batch.condition_B[0]))
        treated = module.store.conditions.index[~module.store.conditions["is_control"]]
        assert seen == set(treated)
    finally:
        module.close()


# --- codes of batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_codes_keep_their_meaning_where_one_table_begins_the_other(tmp_path, swapped):
    parts = [coded("A549", ("g1", "g2"), 4), coded("K562", ("g1", "g2", "g7"), 5)]
    parts = parts[::-1] if swapped else parts
    paths = [write(tmp_path / part.cell_type, [part]) for part in parts]
    merge_stores(paths, tmp_path / "merged")
    write(tmp_path / "joint", parts, batches=("g1", "g2", "g7"))
    with (
        CellSetStore.open(tmp_path / "merged", verify="full") as merged,
        CellSetStore.open(tmp_path / "joint") as joint,
    ):
        assert merged.fingerprint == joint.fingerprint
        assert content(merged) == content(joint)


def test_codes_that_mean_other_batches_are_refused(tmp_path):
    parts = [coded("A549", ("g1", "g2"), 4), coded("K562", ("g0", "g2"), 5)]
    paths = [write(tmp_path / part.cell_type, [part]) for part in parts]
    advice = f"source=store source.files=[{paths[0]},{paths[1]}]"
    with pytest.raises(StoreError, match=f"numbers the batches.*{re.escape(advice)}"):
        merge_stores(paths, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"genes": ("other", *Part("A").genes[1:])},
            r"differ in genes: 300 and 300, 299 in common",
        ),
        ({"library": {"over": "all", "num_genes": 500}}, r"library: .*400.* and .*500"),
        ({"control": "vehicle"}, r"control: 'DMSO' and 'vehicle'"),
        ({"columns": {"perturbation": "drug", "cell_type": "cell"}}, r"columns: .*'line'.*'cell'"),
        ({"condition_by": "perturbation"}, r"condition_by: 'batch' and 'perturbation'"),
    ],
)
def test_a_difference_is_named(folder, tmp_path, change, message):
    other = write(tmp_path / "other", [replace(PARTS[1], **change)])
    with pytest.raises(StoreError, match=f"{message}.*source=store source.files"):
        merge_stores([folder / "a", other], tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


def test_all_differences_are_named_at_once(folder, tmp_path):
    other = write(tmp_path / "other", [replace(PARTS[1], control="vehicle", library={"over": "x"})])
    with pytest.raises(StoreError, match="library.*control"):
        merge_stores([folder / "a", other], tmp_path / "merged")


def test_a_condition_in_two_stores_is_refused_with_the_way_to_do_it(folder, tmp_path):
    other = write(tmp_path / "other", [replace(PARTS[0], drugs=("dasatinib",), batches=("p1",))])
    expected = r"1 conditions are in more than one store: \(A549, DMSO, p1\)\..*" + re.escape(
        f"source=store source.files=[{folder / 'a'},{other}]"
    )
    with pytest.raises(StoreError, match=expected):
        merge_stores([folder / "a", other], tmp_path / "merged")


def test_one_store_is_no_merge_and_an_existing_one_is_not_touched(folder, tmp_path):
    with pytest.raises(StoreError, match="two stores or more"):
        merge_stores([folder / "a"], tmp_path / "merged")
    before = (folder / "joint" / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match="exists"):
        merge_stores([folder / "a", folder / "b"], folder / "joint")
    assert (folder / "joint" / "manifest.json").read_bytes() == before


def test_names_of_cells_are_left_out_where_a_store_has_none(folder, tmp_path, caplog):
    other = write(tmp_path / "other", [Part("HepG2", names_cells=False, seed=6)])
    with caplog.at_level("WARNING", logger="scale.data.merge"):
        merge_stores([folder / "a", other], tmp_path / "merged")
    assert not (tmp_path / "merged" / "cells").exists()
    assert "names of cells are left out" in caplog.text
