"""Damage of a store: every byte of every file, flipped or gone, is noticed and its file named."""

import itertools
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scale.config import Codec
from scale.data.genes import GeneVocabulary
from scale.data.store import CellSetStore
from scale.data.store_files import MANIFEST, seal
from scale.data.store_writer import StoreWriter
from scale.types import Condition, Perturbation, StoreError

GENES = GeneVocabulary(tuple(f"G{i}" for i in range(300)))

NAMES = {
    *(f"{table}.parquet" for table in ("genes", "perturbations", "conditions", "codes")),
    *("manifest.json", "chunks.npy", "prepare.json", "part-00000.parquet"),
    *("control-00000.scl", "treated-00000.scl", "treated-00001.scl"),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A store with every kind of file: shards of both kinds, two of them treated, and cells."""
    path = tmp_path_factory.mktemp("damage") / "store"
    with StoreWriter(
        path,
        genes=GENES,
        columns={"perturbation": "drug", "cell_type": "line", "batch": "plate"},
        control="DMSO",
        codec=Codec.zstd,
        shard_bytes=1 << 20,
        provenance={"note": "Gr\u00f6\u00dfe"},
        batches=["p1"],
    ) as writer:
        generator = np.random.default_rng(0)
        for cell_type, label in itertools.product(("A549", "K562"), ("DMSO", "x")):
            counts = sp.csr_matrix(generator.poisson(0.03, (3, 300)) * generator.integers(1, 400))
            writer.add(
                Condition(cell_type, Perturbation.parse(label), None, label == "DMSO"),
                label,
                counts,
                np.asarray(counts.sum(axis=1)).ravel() + 1,
                cells=pd.DataFrame({"barcode": list("abc")}),
                batch_codes=np.zeros(3, np.int16),
            )
    return path


@pytest.fixture
def damaged(pristine, tmp_path):
    """A copy of the store to do harm to."""
    return shutil.copytree(pristine, tmp_path / "store")


def files_of(path):
    files = sorted(file for file in path.rglob("*") if file.is_file())
    assert {file.name for file in files} == NAMES
    return files


def assert_named(path, file, *, verify="full"):
    """Check that opening the store says which file is damaged, and no other."""
    with pytest.raises(StoreError) as caught:
        CellSetStore.open(path, verify=verify)
    message = str(caught.value)
    assert file.name in message
    assert not any(name in message for name in NAMES - {file.name, MANIFEST})


class Harm:
    """A small file that is damaged in place, many times, and whole again in the end."""

    def __init__(self, file):
        self.original = file.read_bytes()
        self._descriptor = os.open(file, os.O_RDWR)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.write(self.original)
        os.close(self._descriptor)

    def write(self, content):
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))

    def flip(self, position, bits):
        content = bytearray(self.original)
        content[position] ^= bits
        self.write(content)


def test_a_flipped_bit_in_any_byte_of_any_file_is_named(damaged):
    num_bytes = 0
    for file in files_of(damaged):
        with Harm(file) as harm:
            num_bytes += len(harm.original)
            for position in range(len(harm.original)):
                harm.flip(position, 1 << (position % 8))
                assert_named(damaged, file)
    assert num_bytes > 15_000
    CellSetStore.open(damaged, verify="full")


def test_any_bit_of_a_byte_counts(damaged):
    for file in files_of(damaged):
        with Harm(file) as harm:
            for position in {*range(0, len(harm.original), 97), len(harm.original) - 1}:
                for bits in [*(1 << bit for bit in range(8)), 0xFF, ord(" ") ^ ord("\n")]:
                    harm.flip(position, bits)
                    assert_named(damaged, file)


def test_a_byte_missing_or_added_anywhere_is_noticed_by_the_quick_check(damaged):
    for file in files_of(damaged):
        with Harm(file) as harm:
            whole = harm.original
            for position in range(len(whole)):
                harm.write(whole[:position] + whole[position + 1 :])
                assert_named(damaged, file, verify="index")
            for position in range(0, len(whole) + 1, 50):
                harm.write(whole[:position] + b" " + whole[position:])
                assert_named(damaged, file, verify="index")


def test_any_truncation_is_noticed_by_the_quick_check(damaged):
    for file in files_of(damaged):
        with Harm(file) as harm:
            for size in range(len(harm.original)):
                harm.write(harm.original[:size])
                assert_named(damaged, file, verify="index")


def test_any_missing_file_is_named(damaged, tmp_path):
    for file in files_of(damaged):
        file.rename(tmp_path / "elsewhere")
        assert_named(damaged, file, verify="index")
        (tmp_path / "elsewhere").rename(file)
    CellSetStore.open(damaged, verify="full")


def test_files_that_are_not_the_stores_are_neither_read_nor_damage(damaged, pristine):
    (damaged / "shards" / "treated-00009.scl").write_bytes(b"left by somebody")
    (damaged / ".DS_Store").write_bytes(b"")
    with CellSetStore.open(damaged, verify="full") as store, CellSetStore.open(pristine) as other:
        store.verify()
        assert store.fingerprint == other.fingerprint
        assert (store.to_anndata().X != other.to_anndata().X).nnz == 0


def test_an_open_store_can_be_checked_again(damaged):
    with CellSetStore.open(damaged) as store:
        store.verify()
        for file in files_of(damaged):
            with Harm(file) as harm:
                harm.flip(len(harm.original) // 2, 4)
                with pytest.raises(StoreError, match=file.name):
                    store.verify()
        manifest = json.loads((damaged / MANIFEST).read_text())
        (damaged / MANIFEST).write_bytes(seal({**manifest, "generation": 2}))
        with pytest.raises(StoreError, match=r"manifest.json is not that of the store .* opened"):
            store.verify()


@pytest.mark.parametrize("bits", [1, 0x80, 0xFF])
def test_any_byte_of_a_chunk_is_checked_whenever_it_is_read(damaged, bits):
    with CellSetStore.open(damaged) as store:
        chunks = store.chunks.copy()
        shards = [file["path"] for file in store.manifest["files"] if "shards/" in file["path"]]
    assert len(chunks) == 4
    for number, entry in enumerate(chunks):
        shard = damaged / shards[entry["shard"]]
        with Harm(shard) as harm, CellSetStore.open(damaged) as store:
            message = rf"{shard.name}: chunk {number} of condition {entry['condition']} \("
            for position in range(entry["offset"], entry["offset"] + entry["length"]):
                harm.flip(position, bits)
                with pytest.raises(StoreError, match=message):
                    store.read_chunk(number)
            harm.write(harm.original)
            assert store.read_chunk(number).num_cells == 3


def test_a_manifest_cannot_point_out_of_its_store(damaged):
    manifest = json.loads((damaged / MANIFEST).read_text())
    for name in ("../store/genes.parquet", "/etc/hostname", "shards/../../x", ""):
        files = [*manifest["files"], {"path": name, "size": 0, "sha256": ""}]
        (damaged / MANIFEST).write_bytes(seal({**manifest, "files": files}))
        with pytest.raises(StoreError, match=r"manifest.json names .* which is not in the store"):
            CellSetStore.open(damaged)
