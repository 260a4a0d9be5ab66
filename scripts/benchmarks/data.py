#!/usr/bin/env python
"""Cells read per CPU second, here and in cell-load 0.10.4; bytes per cell; cells prepared.

scripts/benchmarks/data.py [--quick] [--rounds 5] [--folder DIR] [--json FILE]

Sets A and B are made by data_sets.py (once, in FOLDER), and stores of them by ``prepare`` with all
genes. Every reader is a process of its own with one thread for arithmetic; they take turns, round
by round. Counted are the cells that were asked for, treated and control, per CPU second of the
process with its threads. The first round of each reader is thrown away, and no row is kept from one
round to the next. Both sides give dense log-normalised float32 sets of 256 treated and 256 control
cells; short sets count with the cells they have.

cell-load reads an h5ad sorted by condition, X log-normalised in float32, CSR as anndata writes it:
``default``; ``tuned``, with CELL_LOAD_H5_RDCC_NSLOTS=521 (its default clears 24 MB of empty cache
slots for every cell); ``consecutive``, ``use_consecutive_loading``. On set A also default and
consecutive on a file with dense X, as an ``X_hvg`` is stored. See cell_load_reader.py for its other
settings. It runs in the environment that scripts/cell_load_environment makes.

The keys ``ratio_vs_...`` are CPU seconds per cell of cell-load over those here, ratios of medians;
``_csr_b`` is against the tuned default on set B. ``bytes_per_cell_...`` is the whole directory of
the store made with keep_cells=none. ``ingest_...`` is ``prepare`` with one worker, in CPU seconds
after the imports; rows of Tahoe-100M in two sizes with memory_bytes of 512 MiB: peaks compare.
Cold figures follow posix_fadvise(DONTNEED) on every file; what a reader keeps in memory or mapped
stays there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_ingest import Ingest, gzip_copy, h5ad_settings, ingest, tahoe_settings
from data_sets import SET_A, SET_B, Design, make_dense_h5ad, make_h5ad
from machine import describe_machine
from worker import Worker

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TUNED = {"CELL_LOAD_H5_RDCC_NSLOTS": "521"}
Answers = list[dict[str, float]]
RATIOS = {
    "default": "A cell-load default",
    "tuned": "A cell-load tuned",
    "consecutive": "A cell-load consecutive",
    "default_dense_x": "A cell-load default, dense X",
    "consecutive_dense_x": "A cell-load consecutive, dense X",
    "csr_b": "B cell-load tuned",
    "csr_b_default": "B cell-load default",
    "csr_b_consecutive": "B cell-load consecutive",
}


@dataclass(frozen=True, slots=True)
class Reader:
    """One way to get cells, and how many sets a round asks it for."""

    name: str
    command: list[str]
    files: list[Path]
    num_sets: int
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """A set and the readers that are measured on it; the first is what ratios are taken of."""

    name: str
    readers: list[Reader]
    store: Ingest


def store_readers(
    case: str, store: Path, ways: dict[str, tuple[str, int]], batch: int, num_sets: int
) -> list[Reader]:
    """Return readers of a store: name -> mode of store_reader.py and threads."""
    script = str(HERE / "store_reader.py")
    files = [path for path in store.rglob("*") if path.is_file()]
    return [
        Reader(
            f"{case} scale {name}",
            [sys.executable, script, str(store), mode, str(threads), str(batch)],
            files,
            num_sets,
        )
        for name, (mode, threads) in ways.items()
    ]


def cell_load_reader(
    name: str, python: str, file: Path, batch: int, num_sets: int, *, tuned: bool = False
) -> Reader:
    """Return a reader of cell-load; "consecutive" in its name turns that on."""
    mode = "consecutive" if "consecutive" in name else "scattered"
    command = [python, str(HERE / "cell_load_reader.py"), str(file), mode, str(batch)]
    return Reader(name, command, [file], num_sets, TUNED if tuned else {})


def forget_files(files: list[Path]) -> None:
    """Drop the pages of files from the page cache, except those that a process has mapped."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(case: Case, rounds: int, cold_rounds: int) -> dict[str, tuple[Answers, Answers]]:
    """Return the answers of every reader, with a warm and with a cold page cache."""
    workers = {r.name: Worker(r.command, r.environment) for r in case.readers}
    for worker in workers.values():
        worker.wait_until_ready()
    warm: dict[str, Answers] = {r.name: [] for r in case.readers}
    cold: dict[str, Answers] = {r.name: [] for r in case.readers}
    for number in range(rounds + 1):
        for reader in case.readers:
            answer = workers[reader.name].ask(reader.num_sets)
            if number:
                warm[reader.name].append(answer)
        print(f"set {case.name}: round {number} of {rounds} done", file=sys.stderr)
    _compare_values({name: worker.ask(0) for name, worker in workers.items()})
    for _ in range(cold_rounds):
        for reader in case.readers:
            forget_files(reader.files)
            cold[reader.name].append(workers[reader.name].ask(reader.num_sets))
    for worker in workers.values():
        worker.close()
    return {name: (warm[name], cold[name]) for name in workers}


def _compare_values(facts: dict[str, dict[str, float]]) -> None:
    """Stop where readers that give dense cells differ: a reader of zeros would be fast."""
    dense = {name: fact for name, fact in facts.items() if fact["mean"]}
    for key in ("mean", "nonzero"):
        values = [fact[key] for fact in dense.values()]
        if max(values) > 1.25 * min(values):
            sys.exit(f"{key} of the cells differs: {dense}")


def per_cell(answers: Answers) -> list[float]:
    """Return CPU microseconds per cell of each round."""
    return [a["cpu"] / a["cells"] * 1e6 for a in answers]


def ratio(theirs: Answers, ours: Answers) -> dict[str, float]:
    """Return the ratio of medians of CPU seconds per cell, and least and most over the rounds."""
    a, b = per_cell(theirs), per_cell(ours)
    each = [x / y for x, y in zip(a, b, strict=True)]
    median = statistics.median(a) / statistics.median(b)
    return {"median": median, "min": min(each), "max": max(each)}


# --- cases --------------------------------------------------------------------------------------


def make_case_a(design: Design, folder: Path, python: str, *, quick: bool) -> Case:
    """Make set A and its store, and list its readers."""
    file, store = make_h5ad(design, folder), folder / f"{design.name}-{design.num_cells}.store"
    made = ingest(store, h5ad_settings(file))
    batch, few, some, many = (8, 8, 32, 64) if quick else (16, 16, 96, 320)
    ways = {"dense": ("dense", 1)}
    if not quick:
        ways |= {"dense, 2 threads": ("dense", 2), "compact": ("compact", 1)}
        ways |= {"chunks only": ("chunks", 1)}
    readers = store_readers("A", store, ways, batch, many)
    readers += [
        cell_load_reader("A cell-load default", python, file, batch, few),
        cell_load_reader("A cell-load tuned", python, file, batch, few, tuned=True),
        cell_load_reader("A cell-load consecutive", python, file, batch, some),
    ]
    if not quick:
        dense = make_dense_h5ad(file)
        readers += [
            cell_load_reader("A cell-load default, dense X", python, dense, batch, few),
            cell_load_reader("A cell-load consecutive, dense X", python, dense, batch, some),
        ]
    return Case("A", readers, made)


def make_case_b(design: Design, folder: Path, python: str, *, quick: bool) -> Case:
    """Make set B and its store, and list its readers."""
    file, store = make_h5ad(design, folder), folder / f"{design.name}-{design.num_cells}.store"
    made = ingest(store, h5ad_settings(file))
    batch, few, many = (2, 2, 8) if quick else (4, 4, 40)
    ways = {"dense": ("dense", 1)}
    if not quick:
        ways |= {"dense, 2 threads": ("dense", 2), "compact": ("compact", 1)}
    readers = store_readers("B", store, ways, batch, many)
    readers += [cell_load_reader("B cell-load tuned", python, file, batch, few, tuned=True)]
    if not quick:
        readers += [
            cell_load_reader("B cell-load default", python, file, batch, few),
            cell_load_reader("B cell-load consecutive", python, file, batch, few * 2),
        ]
    return Case("B", readers, made)


def measure_ingest(folder: Path, *, quick: bool) -> dict[str, Ingest]:
    """Prepare rows of Tahoe-100M in two sizes, and h5ad files of all genes to 2,000 of them."""
    small, large = (1_500, 6_000) if quick else (60_000, 180_000)
    runs: dict[str, Ingest] = {}
    sizes = [("small", small), ("large", large)]
    # a run before the first: numba's machine code is on disk from then on
    for name, size in sizes if quick else [("", 1_500), *sizes]:
        settings = tahoe_settings(SET_B.sized(size, max(size // 1_150, 2)), folder)
        runs[f"tahoe_parquet_{name}"] = ingest(folder / "tahoe.store", settings)
    if not quick:
        del runs["tahoe_parquet_"]
        for name, file in (("h5ad", make_h5ad(SET_B, folder)), ("gzip", gzip_copy(SET_B, folder))):
            runs[f"{name}_to_hvg"] = ingest(folder / "h.store", h5ad_settings(file, genes="hvg"))
    return runs


# --- what is printed and kept -------------------------------------------------------------------


def row(name: str, warm: Answers, cold: Answers) -> dict[str, float]:
    """Print a line of the table and return its figures."""
    cpu = per_cell(warm)
    figures = {
        "cpu_us_per_cell": statistics.median(cpu),
        "cpu_us_per_cell_min": min(cpu),
        "cpu_us_per_cell_max": max(cpu),
        "cells_per_cpu_second": 1e6 / statistics.median(cpu),
        "cells_per_second": statistics.median(a["cells"] / a["wall"] for a in warm),
        "peak_mib": max(a["peak_mib"] for a in warm),
        "cells_per_round": warm[0]["cells"],
    }
    shown = ""
    if cold:
        figures["cold_cells_per_second"] = statistics.median(a["cells"] / a["wall"] for a in cold)
        figures["cold_read_mib"] = statistics.median(a["read_mib"] for a in cold)
        shown = f"{figures['cold_cells_per_second']:13,.0f}"
    spread = f"{figures['cpu_us_per_cell_min']:.2f}-{figures['cpu_us_per_cell_max']:.2f}"
    print(
        f"{name:33}{figures['cpu_us_per_cell']:9.2f}{spread:>18}"
        f"{figures['cells_per_cpu_second']:12,.0f}{figures['cells_per_second']:12,.0f}"
        f"{figures['peak_mib']:9,.0f}{shown}"
    )
    return figures


def report_case(
    case: Case, answers: dict[str, tuple[Answers, Answers]], figures: dict[str, Any]
) -> None:
    """Print and keep the figures of a set."""
    letter = case.name.lower()
    size = case.store.bytes_per_cell
    print(f"\nset {case.name}: {case.store.cells:,} cells, {size:,.1f} bytes/cell")
    print(
        f"{'':33}{'us CPU':>9}{'min-max':>18}{'cells/CPU s':>12}{'cells/s':>12}{'peak MiB':>9}"
        f"{'cold cells/s':>13}"
    )
    figures[f"bytes_per_cell_{letter}"] = size
    figures[f"prepare_h5ad_cpu_us_per_cell_{letter}"] = case.store.us_per_cell
    figures["readers"] |= {name: row(name, *found) for name, found in answers.items()}
    ours = answers[case.readers[0].name][0]
    figures[f"cpu_us_per_cell_dense_{letter}"] = statistics.median(per_cell(ours))
    for name, (warm, _) in answers.items():
        if "cell-load" in name:
            found = ratio(warm, ours)
            figures["ratios"][name] = found
            print(
                f"{name} / {case.readers[0].name}: {found['median']:.1f} "
                f"({found['min']:.1f}-{found['max']:.1f} over rounds)"
            )


def report_ingest(runs: dict[str, Ingest], figures: dict[str, Any]) -> None:
    """Print and keep the figures of ``prepare``."""
    print(f"\n{'prepare, 1 worker':26}{'cells':>8}{'us CPU':>9}{'cells/CPU s':>13}", end="")
    print(f"{'with start':>12}{'peak MiB':>10}{'spilled MiB':>13}{'bytes/cell':>12}")
    for name, run in runs.items():
        print(
            f"{name:26}{run.cells:8,}{run.us_per_cell:9.1f}{run.cells / run.cpu:13,.0f}"
            f"{run.cells / run.cpu_with_start:12,.0f}{run.peak_mib:10,.0f}{run.spilled_mib:13,.0f}"
            f"{run.bytes_per_cell:12,.0f}"
        )
        figures[f"ingest_{name}_cpu_us_per_cell"] = run.us_per_cell
        figures[f"ingest_{name}_cells_per_cpu_second_with_start"] = run.cells / run.cpu_with_start
        figures[f"ingest_{name}_peak_mib"] = run.peak_mib
    small, large = (runs[f"tahoe_parquet_{size}"] for size in ("small", "large"))
    figures["ingest_cells_per_cpu_second_parquet"] = large.cells / large.cpu
    figures["ingest_peak_mib_small"] = small.peak_mib
    figures["ingest_peak_mib_large"] = large.peak_mib
    figures["bytes_per_cell_barcodes"] = large.bytes_per_cell_names


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sets, under a minute")
    parser.add_argument("--rounds", type=int, default=None, help="default 5, 2 with --quick")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "benchmarks")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    quick, folder = options.quick, options.folder.resolve()
    rounds = options.rounds or (2 if quick else 5)
    made = subprocess.run(
        [str(ROOT / "scripts" / "cell_load_environment")], capture_output=True, text=True
    )
    if made.returncode:
        sys.exit(f"no environment with cell-load: {made.stderr[-500:]}")
    python = made.stdout.strip()

    figures: dict[str, Any] = {"quick": quick, "rounds": rounds, "machine": describe_machine()}
    figures |= {"cell_load_version": "0.10.4", "readers": {}, "ratios": {}}
    a, b = (SET_A.sized(30_000, 32), SET_B.sized(12_000, 10)) if quick else (SET_A, SET_B)
    print(f"{rounds} rounds after the first, medians; {figures['machine']['cpu']}")
    for make, design in ((make_case_a, a), (make_case_b, b)):
        case = make(design, folder, python, quick=quick)
        answers = measure(case, rounds, 0 if quick else 3)
        report_case(case, answers, figures)
    report_ingest(measure_ingest(folder, quick=quick), figures)
    for key, name in RATIOS.items():
        if name in figures["ratios"]:  # --quick has not all of them
            figures[f"ratio_vs_cell_load_{key}"] = figures["ratios"][name]["median"]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
