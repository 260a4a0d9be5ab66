"""Stores made by ``prepare``, each in a fresh process whose CPU time and memory are taken."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
from command import run_command
from data_sets import CONTROL, COUNTS, Design, draw_cells, make_h5ad

from scale.data.tahoe import write_tahoe_parquet

MEMORY_BYTES = 512 * 1024 * 1024  # of the parquet runs: both sizes spill to disk
_CODE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
from worker import cpu_seconds, peak_mib
from scale.config import *
from scale.data.ingest.prepare import prepare
s = json.loads(sys.argv[2])
config = PrepareConfig(
    store=s["store"], overwrite=True, num_workers=1,
    source=SourceConfig(format=SourceFormat(s["format"]), files=s["files"],
                        metadata=s.get("metadata")),
    columns=ColumnsConfig(**s["columns"]), control=s["control"], counts=s["counts"],
    genes=GenesConfig(choice=GeneChoice(s["genes"])), keep_cells=KeepCells(s["keep_cells"]),
    memory_bytes=s.get("memory_bytes", PrepareConfig.__dataclass_fields__["memory_bytes"].default),
)
start, begin = cpu_seconds(), time.perf_counter()
report = prepare(config)
print("RESULT" + json.dumps({
    "cells": report.num_cells, "cpu": cpu_seconds() - start,
    "wall": time.perf_counter() - begin, "peak_mib": peak_mib(),
    "spilled_mib": report.spilled_bytes / 2**20,
}))
"""


@dataclass(frozen=True, slots=True)
class Ingest:
    """What one run of ``prepare`` took; CPU seconds after the imports, and with them."""

    cells: int
    cpu: float
    wall: float
    peak_mib: float
    spilled_mib: float
    cpu_with_start: float
    bytes_per_cell: float
    bytes_per_cell_names: float

    @property
    def us_per_cell(self) -> float:
        """CPU microseconds per cell."""
        return self.cpu / self.cells * 1e6


def ingest(store: Path, settings: Mapping[str, Any]) -> Ingest:
    """Run ``prepare`` with one worker in a process of its own."""
    code = [sys.executable, "-c", _CODE, str(Path(__file__).parent), _settings(store, settings)]
    log = store.with_suffix(".log")
    cost = run_command(code, log)
    facts = json.loads(log.read_text().split("RESULT", 1)[1].splitlines()[0])
    sizes = {f: f.stat().st_size for f in store.rglob("*") if f.is_file()}
    names = sum(size for f, size in sizes.items() if f.is_relative_to(store / "cells"))
    return Ingest(
        **facts,
        cpu_with_start=cost.cpu,
        bytes_per_cell=(sum(sizes.values()) - names) / facts["cells"],
        bytes_per_cell_names=names / facts["cells"],
    )


def _settings(store: Path, settings: Mapping[str, Any]) -> str:
    defaults = {"control": CONTROL, "counts": "auto", "genes": "all", "keep_cells": "none"}
    return json.dumps({**defaults, "store": str(store), **settings})


# --- what is prepared ---------------------------------------------------------------------------


def h5ad_settings(file: Path, **settings: Any) -> dict[str, Any]:
    """Return the settings for a set as data_sets.py writes it."""
    columns = {"perturbation": "drug", "cell_type": "cell_line", "batch": "plate"}
    common = {"format": "h5ad", "files": str(file), "counts": COUNTS, "columns": columns}
    return {**common, **settings}


def tahoe_settings(design: Design, folder: Path) -> dict[str, Any]:
    """Write the set as rows of Tahoe-100M, if not there, and return the settings to read it."""
    target = folder / f"{design.name}-{design.num_cells}-tahoe"
    if not (target / "done").exists():
        shutil.rmtree(target, ignore_errors=True)
        counts, obs = draw_cells(design)
        names = [f"G{g:05d}" for g in range(design.num_genes)]
        mechanism = dict.fromkeys(obs["drug"].cat.categories.drop(CONTROL), "unclear")
        write_tahoe_parquet(target, counts, obs, names, mechanism)
        (target / "done").touch()
    return {
        "format": "tahoe_parquet",
        "files": str(target / "data" / "*.parquet"),
        "metadata": str(target / "metadata"),
        "columns": {
            "perturbation": "drugname_drugconc",
            "cell_type": "cell_line_id",
            "batch": "plate",
        },
        "memory_bytes": MEMORY_BYTES,
        "keep_cells": "barcode",
    }


def gzip_copy(design: Design, folder: Path) -> Path:
    """Return the set as an h5ad with gzip'd matrices."""
    source = make_h5ad(design, folder)
    path = source.with_name(source.stem + "-gzip.h5ad")
    if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:
        partial = path.with_suffix(".partial")
        ad.read_h5ad(source).write_h5ad(partial, compression="gzip")
        partial.rename(path)
    return path
