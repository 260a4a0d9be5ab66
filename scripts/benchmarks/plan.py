#!/usr/bin/env python
"""The plan of cell sets over 100,648,790 cells: memory, time per set, start, resume.

scripts/benchmarks/plan.py [--quick] [--generated] [--rounds 5] [--grid FILE] [--folder DIR]
    [--json FILE]

The conditions are those of Tahoe-100M: cells per (cell line, drug, dose, plate) from
obs_cell_grid.parquet, beside this checkout or given by --grid, or with --generated conditions of
the same number and distribution of sizes. They are written as a store that has everything but
cells: tables, the index of 1.6 million chunks, and shards that are holes of the right size. Each
round is a fresh process that opens it as training does (``CellSetDataModule``: manifest and hashes,
tables, vocabulary, split, plan) and then asks for sets: S = 256 treated, 256 control and 256
summary cells, 16 sets at a time, from random places of the first 1,000 epochs.

``resident_mb`` is the growth of resident memory from before the store is opened to after all these
sets (MB = 10^6 bytes), without machine code, which a plan over two conditions has loaded before;
``resident_with_machine_code_mb`` is from after the imports. ``startup_seconds`` is the wall time
from after the imports to a plan that can be asked, machine code included; ``resume_seconds`` that
of the first 16 sets at number 10^9 in a process that has just started, beside the first at 0;
``us_per_set`` CPU time. The first round is left out: it may compile kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from machine import describe_machine

from scale.config import Codec
from scale.data.codec import CHUNK_CELLS
from scale.data.genes import GeneVocabulary
from scale.data.partial import PartialDirectory
from scale.data.store_content import StoreContent, StoredCondition, write_content
from scale.data.store_files import CHUNK_DTYPE, MANIFEST
from scale.types import Component, Condition, Perturbation

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GRID = ROOT.parent / "shared" / "data" / "tahoe100m_metadata" / "obs_cell_grid.parquet"
CONTROL = "DMSO_TF"
NUM_GENES_IN, NUM_GENES = 62_710, 2_000
BYTES_PER_CELL = {Codec.zstd: 283, Codec.none: 706}
NONZERO_PER_CELL = 350
SHARD_BYTES = 512 * 1024 * 1024


def read_grid(path: Path) -> pd.DataFrame:
    """Return the real grid: cell_line, drug, dose, plate, num_cells."""
    names = {"cell_name": "cell_line", "conc": "dose", "n_cells": "num_cells"}
    grid = pd.read_parquet(path).rename(columns=names)
    grid["drug"] = grid["drug"].str.strip()
    keys = ["cell_line", "drug", "dose", "plate"]
    return grid.groupby(keys, as_index=False, observed=True)["num_cells"].sum()


def generate_grid() -> pd.DataFrame:
    """Return a grid of the same shape: log-normal sizes with the real median and sum."""
    random = np.random.default_rng(0)
    num_lines, num_plates, num_treated, num_cells = 50, 14, 65_243, 100_648_790
    wells = pd.MultiIndex.from_product(
        [
            [f"line{i:02d}" for i in range(num_lines)],
            [f"plate{i + 1}" for i in range(num_plates)],
            [f"drug{i:03d}" for i in range(-(-num_treated // (num_lines * num_plates)))],
        ],
        names=["cell_line", "plate", "drug"],
    ).to_frame(index=False)[:num_treated]
    wells["drug"] += "-" + wells["plate"]
    controls = wells[["cell_line", "plate"]].drop_duplicates().assign(drug=CONTROL, dose=0.0)
    treated = wells.assign(dose=0.5)
    size = random.lognormal(np.log(1_278), 0.574, num_treated)
    controls["num_cells"] = 2_330_156 // len(controls)
    left = num_cells - controls["num_cells"].sum()
    edges = np.rint(np.cumsum(size) / size.sum() * left).astype(np.int64)
    treated["num_cells"] = np.diff(edges, prepend=0)
    return pd.concat([treated, controls], ignore_index=True)


# --- a store without cells ------------------------------------------------------------------------


def make_store(grid: pd.DataFrame, path: Path) -> None:
    """Write the store, unless one of as many cells is there."""
    manifest = path / MANIFEST
    if manifest.exists() and json.loads(manifest.read_text())["num_cells"] == len_cells(grid):
        return
    grid = grid.assign(is_control=grid["drug"] == CONTROL)
    grid = grid.sort_values(["is_control", "cell_line", "plate", "drug", "dose"])
    directory = PartialDirectory(path, overwrite=True, mark=MANIFEST)
    try:
        (directory.partial / "shards").mkdir()
        chunks, shards = _index(grid, directory.partial)
        symbols = tuple(f"G{g:05d}" for g in range(NUM_GENES_IN))
        column = np.where(np.arange(NUM_GENES_IN) < NUM_GENES, np.arange(NUM_GENES_IN), -1)
        content = StoreContent(
            genes=GeneVocabulary(symbols[:NUM_GENES]),
            gene_table=pd.DataFrame(
                {"symbol": symbols, "ensembl_id": None, "column": column.astype(np.int32)}
            ),
            conditions=_conditions(grid),
            chunks=chunks,
            columns={"perturbation": "drugname_drugconc", "cell_type": "line", "batch": "plate"},
            control=CONTROL,
            library={"over": "all", "num_genes": NUM_GENES_IN},
            provenance={},
            batches=None,
            has_codes=False,
        )
        write_content(directory.partial, content, shards)
        directory.commit()
    except BaseException:
        directory.abort()
        raise


def len_cells(grid: pd.DataFrame) -> int:
    """Return the number of cells."""
    return int(grid["num_cells"].sum())


def _conditions(grid: pd.DataFrame) -> list[StoredCondition]:
    conditions = []
    for row in grid.itertuples():
        perturbation = Perturbation((Component(row.drug, float(row.dose), "uM"),))
        condition = Condition(row.cell_line, perturbation, row.plate, bool(row.is_control))
        num_chunks = -(-row.num_cells // CHUNK_CELLS)
        stored = StoredCondition(condition, perturbation.label, int(row.num_cells), num_chunks)
        conditions.append(stored)
    return conditions


def _index(grid: pd.DataFrame, partial: Path) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Return index entries, and the shards as the manifest lists them: files of nothing."""
    num_cells_C = grid["num_cells"].to_numpy()
    num_chunks_C = -(-num_cells_C // CHUNK_CELLS)
    last_C = np.cumsum(num_chunks_C) - 1
    chunks = np.zeros(num_chunks_C.sum(), CHUNK_DTYPE)
    chunks["num_cells"] = CHUNK_CELLS
    chunks["num_cells"][last_C] = num_cells_C - (num_chunks_C - 1) * CHUNK_CELLS
    chunks["num_nonzero"] = chunks["num_cells"] * np.uint32(NONZERO_PER_CELL)
    is_control_M = np.repeat(grid["is_control"].to_numpy(), num_chunks_C)
    per_cell = np.where(is_control_M, BYTES_PER_CELL[Codec.none], BYTES_PER_CELL[Codec.zstd])
    chunks["length"] = chunks["num_cells"] * per_cell
    padded = (chunks["length"].astype(np.int64) + 7) // 8 * 8
    # a shard holds one cell type, or controls, and at most SHARD_BYTES
    group = np.where(grid["is_control"], "", grid["cell_line"].astype(str))
    is_new_group_C = np.concatenate([[True], group[1:] != group[:-1]])
    group_M = np.repeat(np.cumsum(is_new_group_C), num_chunks_C)
    within = np.cumsum(padded) - padded
    within -= within[np.searchsorted(group_M, group_M)]
    is_new_M = np.diff(group_M * 10**6 + within // SHARD_BYTES, prepend=-1) != 0
    shard_M = np.cumsum(is_new_M) - 1
    chunks["shard"] = shard_M
    chunks["offset"] = 16 + within - within[np.flatnonzero(is_new_M)][shard_M]
    shards: list[dict[str, object]] = []
    for number, first in enumerate(np.flatnonzero(is_new_M).tolist()):
        kind = "control" if is_control_M[first] else "treated"
        size = 16 + int(padded[shard_M == number].sum())
        name = f"shards/{kind}-{number:05d}.scl"
        with (partial / name).open("wb") as file:
            file.truncate(size)
        shards.append({"path": name, "size": size, "sha256": "0" * 64})
    return chunks, shards


# --- measuring ------------------------------------------------------------------------------------


def measure(store: Path, num_blocks: int) -> dict[str, float]:
    """Return the figures of a fresh process."""
    done = subprocess.run(
        [sys.executable, str(HERE / "plan_process.py"), str(store), str(num_blocks)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    figures: dict[str, float] = json.loads(done.stdout.split("RESULT", 1)[1])
    return figures


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer sets and rounds")
    parser.add_argument("--generated", action="store_true", help="sizes of the same distribution")
    parser.add_argument("--rounds", type=int, default=None, help="default 5, 2 with --quick")
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "benchmarks")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 5)
    if not options.generated and not options.grid.exists():
        sys.exit(f"{options.grid} is not here; give --grid FILE, or --generated")
    grid = generate_grid() if options.generated else read_grid(options.grid)
    store = options.folder.resolve() / ("plan-generated" if options.generated else "plan-tahoe")
    make_store(grid, store)

    runs = [measure(store, 100 if options.quick else 1_000) for _ in range(rounds + 1)][1:]
    figures: dict[str, object] = {
        "grid": "generated" if options.generated else "real",
        "rounds": rounds,
        "cells": len_cells(grid),
        "conditions": len(grid),
        "index_bytes": (store / "chunks.npy").stat().st_size,
        "machine": describe_machine(),
    }
    print(f"{len_cells(grid):,} cells, {len(grid):,} conditions ({figures['grid']} grid)")
    print(f"{rounds} rounds after the first, medians; {figures['machine']['cpu']}")
    print(f"{'':32}{'median':>12}{'min':>12}{'max':>12}")
    for key in runs[0]:
        values = [run[key] for run in runs]
        figures[key] = statistics.median(values)
        figures[f"{key}_min"], figures[f"{key}_max"] = min(values), max(values)
        print(f"{key:32}{figures[key]:12,.4g}{min(values):12,.4g}{max(values):12,.4g}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
