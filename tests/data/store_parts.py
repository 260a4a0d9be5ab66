"""Stores of one or more parts, each a cell type with its drugs and batches, written together."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from cell_set_store import CONTROL, counts_of

from scale.config import Codec
from scale.data.genes import GeneVocabulary
from scale.data.store_writer import StoreWriter
from scale.types import Condition, Perturbation

GENES = tuple(f"G{i:03d}" for i in range(300))


@dataclass(frozen=True)
class Part:
    """What a store is written from."""

    cell_type: str
    drugs: tuple[str, ...] = ("azacitidine", "bortezomib")
    batches: tuple[str, ...] = ("p1", "p2")
    seed: int = 0
    genes: tuple[str, ...] = GENES
    control: str = CONTROL
    library: dict = field(default_factory=lambda: {"over": "all", "num_genes": 400})
    columns: dict = field(
        default_factory=lambda: {"perturbation": "drug", "cell_type": "line", "batch": "plate"}
    )
    condition_by: str = "batch"
    codes: tuple[str, ...] | None = None
    """Names of batches that the treated cells carry codes for."""
    names_cells: bool = True

    def conditions(self):
        """Condition, label, counts, library, table of cells, codes."""
        generator = np.random.default_rng(self.seed)
        keys = [(self.control, batch) for batch in self.batches]
        treated = self.batches if self.codes is None else (None,)
        keys += [(drug, batch) for batch in treated for drug in self.drugs]
        for number, (label, batch) in enumerate(keys):
            size = int(generator.integers(20, 200))
            counts = counts_of(size, 1000 * self.seed + number)
            library = np.asarray(counts.sum(axis=1)).ravel() + 1
            is_control = label == self.control
            dose = 0.5 * number if "dose" in self.columns and not is_control else None
            perturbation = Perturbation.parse(label, dose=dose, unit="uM")
            condition = Condition(self.cell_type, perturbation, batch, is_control)
            names = [f"{self.cell_type}-{number}-{i}" for i in range(size)]
            cells = pd.DataFrame({"barcode": names}) if self.names_cells else None
            codes = (
                generator.integers(0, len(self.codes), size)
                if self.codes is not None and not is_control
                else None
            )
            yield condition, label, counts, library, cells, codes


def write(path, parts, *, batches=None):
    """Write the conditions of all parts as one store."""
    first = parts[0]
    with StoreWriter(
        path,
        genes=GeneVocabulary(first.genes),
        columns=first.columns,
        control=first.control,
        codec=Codec.zstd,
        shard_bytes=20_000,
        provenance={"from": [part.cell_type for part in parts]},
        library=first.library,
        batches=batches or first.codes,
        facts={"condition_by": first.condition_by},
    ) as writer:
        for part in parts:
            for condition, label, counts, library, cells, codes in part.conditions():
                writer.add(condition, label, counts, library, cells=cells, batch_codes=codes)
    return path


def coded(cell_type, names, seed, **changes):
    """Return a part whose treated cells carry codes of batches."""
    return Part(
        cell_type, batches=names[:1], codes=names, condition_by="perturbation", seed=seed, **changes
    )
