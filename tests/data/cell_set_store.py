"""A small store with everything the sampler can meet, for the tests of this room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp

from scale.config import Codec
from scale.data.genes import GeneVocabulary
from scale.data.store_writer import StoreWriter
from scale.types import Condition, Perturbation

CONTROL = "DMSO"
NUM_GENES = 300
CELL_TYPES = ("A549", "HepG2", "K562")
BATCHES = ("p1", "p2")
DRUGS = ("azacitidine", "bortezomib", "crizotinib", "dasatinib", "erlotinib+crizotinib")


def counts_of(num_cells: int, seed: int) -> sp.csr_matrix:
    """Return counts with empty cells, rare large counts and gaps beyond one byte."""
    generator = np.random.default_rng(seed)
    dense = generator.poisson(0.3, (num_cells, NUM_GENES))
    dense[:, 2:280] *= generator.random((num_cells, 278)) < 0.2
    dense[generator.random(num_cells) < 0.1, 1:290] = 0
    dense[:, 295] += (generator.random(num_cells) < 0.2) * 1000
    return sp.csr_matrix(dense)


def write_store(path: Path, *, sizes: tuple[int, ...] = (150, 40, 64, 16, 97)) -> Path:
    """Write three cell types x two batches x five drugs, with a pool of 20 controls among 150."""
    genes = GeneVocabulary(tuple(f"G{i:03d}" for i in range(NUM_GENES)))
    columns = {"perturbation": "drug", "cell_type": "cell_line", "batch": "plate", "separator": "+"}
    with StoreWriter(
        path,
        genes=genes,
        columns=columns,
        control=CONTROL,
        codec=Codec.zstd,
        shard_bytes=20_000,
        provenance={},
        library={"over": "all", "num_genes": 400},
    ) as writer:
        seed = 0
        for is_control in (True, False):
            for c, cell_type in enumerate(CELL_TYPES):
                for b, batch in enumerate(BATCHES):
                    labels = (CONTROL,) if is_control else DRUGS
                    for d, label in enumerate(labels):
                        seed += 1
                        if is_control:
                            size = 20 if (cell_type, batch) == ("K562", "p2") else 150
                        elif d % 2 == b and d != 4:
                            continue
                        else:
                            size = sizes[(c + b + d) % len(sizes)]
                        perturbation = Perturbation.parse(label, separator="+")
                        counts = counts_of(size, seed)
                        library = np.asarray(counts.sum(axis=1)).ravel() + 1 + np.arange(size) % 7
                        writer.add(
                            Condition(cell_type, perturbation, batch, is_control),
                            label,
                            counts,
                            library,
                        )
    return path
