"""BioNeMo's own code reads our archives and walks over our sets, and we read its archives.

bionemo-core and bionemo-scdl are put on the path of processes of their own, by
scripts/bionemo_environment; this process never imports them.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from cell_set_store import write_store

from scale.config import DataConfig
from scale.data.dataset import CellSetDataset
from scale.data.export import export_store
from scale.data.ingest.scdl import ScdlSource
from scale.data.module import CellSetDataModule
from scale.data.store import CellSetStore
from scale.types import SourceError

ROOT = Path(__file__).resolve().parents[2]


def make_h5ad(path, seed, *, genes, largest, more_columns):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (150, len(genes)))
    counts[0, 0] = largest
    obs = pd.DataFrame(
        {
            "drug": pd.Categorical(rng.choice(["DMSO", "a", "b"], 150)),
            "line": rng.choice(["A549", "K562"], 150),
            "dose": rng.choice([0.05, 5.0, np.nan], 150),
            "passage": rng.integers(1, 4, 150),
        }
    )
    if more_columns:
        obs["only_here"] = "x"
    var = pd.DataFrame({"gene_name": genes, "rank": np.arange(len(genes)) + seed})
    obs.index = [f"cell{i}" for i in range(150)]
    var.index = [f"ENSG{i}" for i in range(len(genes))]
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)
    adata.write_h5ad(path)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Return a folder in which bionemo was at work: on a store, its export, and two h5ad files."""
    folder = tmp_path_factory.mktemp("bionemo")
    script = ROOT / "scripts" / "bionemo_environment"
    made = subprocess.run(
        [str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if made.returncode != 0:
        last = (made.stderr.strip() or "no message").splitlines()[-1]
        pytest.skip(f"no environment with bionemo-core and bionemo-scdl: {last}")
    with CellSetStore.open(write_store(folder / "store")) as store:
        export_store(store, folder / "store.scdl")
    genes = [f"gene{i}" for i in range(30)]
    make_h5ad(folder / "0.h5ad", 0, genes=genes, largest=200, more_columns=False)
    make_h5ad(folder / "1.h5ad", 1, genes=genes[::-1], largest=60_000, more_columns=True)
    runner = Path(__file__).parent / "run_bionemo.py"
    done = subprocess.run(
        [sys.executable, str(runner), made.stdout.strip(), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "BIONEMO_CACHE_DIR": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


# --- our archives -------------------------------------------------------------------------------


def test_bionemo_scdl_reads_an_export_row_by_row(work):
    with CellSetStore.open(work / "store") as store:
        expected = store.to_anndata()
    found = np.load(work / "read.npz")
    assert found["shape"].tolist() == [expected.n_obs, expected.n_vars]
    assert found["size"].tolist() == np.diff(expected.X.indptr).tolist()
    np.testing.assert_array_equal(found["values"], expected.X.data)
    np.testing.assert_array_equal(found["columns"], expected.X.indices)
    obs = pd.read_parquet(work / "read.obs.parquet")
    assert list(obs.columns) == list(expected.obs.columns)
    for name in obs.columns:
        assert obs[name].tolist() == expected.obs[name].tolist(), name
    var = pd.read_parquet(work / "read.var.parquet")
    assert var["symbol"].tolist() == list(expected.var_names)


# --- its archives -------------------------------------------------------------------------------


PARTS = {"single0": [0], "single1": [1], "joined": [0, 1], "twice": [1, 1], "flattened": [0, 1]}
"""Which files each archive is made of."""


@pytest.mark.parametrize("name", list(PARTS))
def test_an_archive_of_bionemo_scdl_is_read_as_the_files_it_was_made_of(work, name):
    chosen = [ad.read_h5ad(work / f"{i}.h5ad") for i in PARTS[name]]
    genes = list(chosen[0].var["gene_name"])
    counts = np.concatenate(
        [f.X.toarray()[:, [list(f.var["gene_name"]).index(g) for g in genes]] for f in chosen]
    )
    obs = pd.concat([f.obs for f in chosen])
    if name == "flattened":  # what it calls its parts is a pickle, which nobody opens here
        with pytest.raises(ValueError, match="pickle"):
            np.load(work / "flattened.scdl" / "obs_features" / "labels.npy", allow_pickle=False)
    with ScdlSource(work / f"{name}.scdl").open() as file:
        assert file.num_cells == len(obs)
        assert file.genes("X") == genes
        found = [file.rows("X", i, min(i + 70, len(obs))) for i in range(0, len(obs), 70)]
        np.testing.assert_array_equal(np.concatenate([f.toarray() for f in found]), counts)
        for column in ("drug", "line"):
            texts = file.column(column, "setting")
            assert [texts.names[c] for c in texts.codes_N] == obs[column].tolist()
        np.testing.assert_array_equal(file.numbers("dose", "setting"), obs["dose"])
        assert set(file.column("passage", "setting").names) <= {"1", "2", "3"}
        assert file.barcodes(148, 150).tolist() == [f"{name}.scdl:148", f"{name}.scdl:149"]
        if set(PARTS[name]) == {0, 1}:
            assert "only_here" not in file.columns
            with pytest.raises(SourceError, match=r"missing in 1 of the 2.*dataframe_0\.parquet"):
                file.column("only_here", "columns.batch")
        else:
            assert ("only_here" in file.columns) == (1 in PARTS[name])


# --- epochs -------------------------------------------------------------------------------------


@dataclass
class EpochIndex:
    epoch: int
    idx: int


def test_the_sets_of_a_store_are_a_multi_epoch_dataset(work):
    found = np.load(work / "epochs.npz")
    length, numbers = int(found["length"]), found["number"].reshape(3, -1)
    # every set once per epoch, in an order of its own
    for epoch in range(3):
        expected = np.arange(epoch * length, (epoch + 1) * length)
        np.testing.assert_array_equal(np.sort(numbers[epoch]), expected)
    orders = {tuple(numbers[epoch] - epoch * length) for epoch in range(3)}
    assert len(orders) == 3
    assert tuple(range(length)) not in orders
    # the same sets as by direct access, and other cells in every epoch
    config = DataConfig(store=str(work / "store"), minimum_control_cells=2)
    module = CellSetDataModule(config, set_size=32, num_summary_cells=8, seed=7)
    dataset = CellSetDataset(module)
    assert len(dataset) == length
    for i, number in enumerate(found["number"].tolist()):
        batch = dataset[EpochIndex(number // length, number % length)]
        np.testing.assert_array_equal(batch.treated_BSG.numpy()[0], found["treated"][i])
        np.testing.assert_array_equal(batch.control_BSG.numpy()[0], found["control"][i])
    module.close()
    by_number = found["control"][np.argsort(found["number"])].reshape(3, length, -1)
    assert (by_number[0] != by_number[1]).any(axis=1).all()
    # without shuffling it is the plan's order, straight into the next epoch
    assert found["plain"].tolist() == list(range(length + 5))
    # two ranks share what one has, in its order
    first, second = found["ranks"].tolist()
    even = len(found["number"]) // 2 * 2
    shared = [n for pair in zip(first, second, strict=True) for n in pair]
    assert shared[:even] == found["number"].tolist()[:even]
    # wrapped as a dataset of plain numbers, every epoch has the sets of the first
    wrapped = found["wrapped"].reshape(2, -1)
    assert (np.sort(wrapped) == np.arange(length)).all()
    assert (wrapped[0] != wrapped[1]).any()
    assert found["direct"].tolist() == [0, 45]
