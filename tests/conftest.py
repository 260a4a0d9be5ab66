"""A toy store for the tests of every room, and one thread per process."""

import logging
from itertools import product

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from scale.config import Codec
from scale.data.genes import GeneVocabulary
from scale.data.store import CellSetStore
from scale.data.store_writer import StoreWriter
from scale.types import Condition, Perturbation

torch.set_num_threads(1)

# Run by the Python of another environment, which has cell-eval.
collect_ignore_glob = ["*/run_*.py"]


@pytest.fixture(autouse=True)
def _log_of_one_test():
    """A command that was run in a test logs to the console of that test, which is then closed."""
    package = logging.getLogger("scale")
    before = (list(package.handlers), package.level, package.propagate)
    yield
    for handler in set(package.handlers) - set(before[0]):
        package.removeHandler(handler)
        handler.close()
    package.setLevel(before[1])
    package.propagate = before[2]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


TOY_CELL_TYPES = ("A549", "HepG2", "K562")
TOY_BATCHES = ("plate1", "plate2")
TOY_CONTROL = "DMSO"
TOY_LABELS = (
    "[('drugA', 0.5, 'uM')]",
    "[('drugA', 5.0, 'uM')]",
    "[('drugB', 0.5, 'uM')]",
    "[('drugC', 0.5, 'uM')]",
    "[('drugA', 0.5, 'uM'), ('drugB', 0.5, 'uM')]",
    "[('drugD ', 0.05, 'uM')]",
)
TOY_NUM_GENES = 60
TOY_COLUMNS = {"perturbation": "drug", "cell_type": "cell_line", "batch": "plate"}


def make_toy_conditions():
    """(condition, label, counts, library) of every condition, in the order of the store."""
    rng = np.random.default_rng(0)
    control = Perturbation.parse(TOY_CONTROL)
    base = rng.gamma(0.5, 1.0, (len(TOY_CELL_TYPES), TOY_NUM_GENES)) + 0.02
    effect = np.exp(rng.normal(0, 0.7, (len(TOY_LABELS), TOY_NUM_GENES)))
    for (i, cell_type), (j, batch) in product(enumerate(TOY_CELL_TYPES), enumerate(TOY_BATCHES)):
        # drug k is on plate k % 2, so that controls of the right plate can be told apart
        labels = [(-1, TOY_CONTROL), *((k, x) for k, x in enumerate(TOY_LABELS) if k % 2 == j)]
        for k, label in labels:
            rate = base[i] * (1.0 + 0.3 * j) * (1.0 if k < 0 else effect[k])
            size = int(rng.integers(20, 32)) if k == 3 else int(rng.integers(33, 91))
            depth = rng.lognormal(0.0, 0.3, (size, 1))
            counts = rng.poisson(depth * rate)
            counts[:, 0] += 1
            library = counts.sum(1) + rng.integers(0, 50, size)  # genes that are not stored
            yield (
                Condition(cell_type, control if k < 0 else Perturbation.parse(label), batch, k < 0),
                label,
                sp.csr_matrix(counts),
                library,
            )


def write_toy_store(path, **changes):
    settings = {
        "genes": GeneVocabulary(tuple(f"gene{g:02d}" for g in range(TOY_NUM_GENES))),
        "columns": TOY_COLUMNS,
        "control": TOY_CONTROL,
        "codec": Codec.zstd,
        "shard_bytes": 1 << 20,
        "provenance": {"made_by": "tests"},
        "library": {"over": "all", "num_genes": 70},
    }
    with StoreWriter(path, **(settings | changes)) as writer:
        for condition, label, counts, library in make_toy_conditions():
            barcodes = pd.DataFrame({"barcode": [f"{label}-{i}" for i in range(len(library))]})
            writer.add(condition, label, counts, library, cells=barcodes)
    return path


@pytest.fixture(scope="session")
def toy_conditions():
    """What is in the toy store, in its order: (condition, label, counts, library)."""
    return list(make_toy_conditions())


@pytest.fixture(scope="session")
def toy_store_path(tmp_path_factory):
    """3 cell types x (6 perturbations + control) on 2 plates, 20 to 90 cells per condition."""
    return write_toy_store(tmp_path_factory.mktemp("toy") / "store")


@pytest.fixture(scope="session")
def toy_anndata(toy_store_path):
    """All cells of the toy store."""
    return CellSetStore.open(toy_store_path).to_anndata()
