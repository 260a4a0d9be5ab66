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
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command import ROOT, environment_python
from data_ingest import Ingest, gzip_copy, h5ad_settings, ingest, tahoe_settings
from data_sets import SET_A, SET_B, make_dense_h5ad, make_h5ad
from machine import describe_machine
from worker import Worker, start_readers

HERE = Path(__file__).resolve().parent
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
    """One way to get cells, by which script, and how many sets a round asks for."""

    name: str
    arguments: list[str]
    files: list[Path]
    num_sets: int
    environment: dict[str, str] = field(default_factory=dict)


def forget_files(files: list[Path]) -> None:
    """Drop the pages of files from the page cache, except those that a process has mapped."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def start(python: str, script: str, readers: list[Reader]) -> dict[str, Worker]:
    """Start the processes of readers of one script."""
    wanted = {reader.name: (reader.arguments, reader.environment) for reader in readers}
    return start_readers(python, HERE / script, wanted)


def wait(workers: dict[str, Worker]) -> None:
    """Wait until all readers can be asked."""
    for worker in workers.values():
        worker.wait_until_ready()


def measure(
    readers: list[Reader], workers: dict[str, Worker], rounds: int, cold_rounds: int
) -> dict[str, tuple[Answers, Answers]]:
    """Return the answers of every reader, with a warm and with a cold page cache."""
    warm: dict[str, Answers] = {reader.name: [] for reader in readers}
    cold: dict[str, Answers] = {reader.name: [] for reader in readers}
    for number in range(rounds + 1):
        for reader in readers:
            answer = workers[reader.name].ask(reader.num_sets)
            if number:
                warm[reader.name].append(answer)
        print(f"round {number} of {rounds} done", file=sys.stderr)
    _compare_values({name: workers[name].ask(0) for name in warm})
    for _ in range(cold_rounds):
        for reader in readers:
            forget_files(reader.files)
            cold[reader.name].append(workers[reader.name].ask(reader.num_sets))
    for name in warm:
        workers[name].close()
    return {name: (warm[name], cold[name]) for name in warm}


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


# --- what is measured ---------------------------------------------------------------------------


def cell_load_readers(case: str, file: Path, *, quick: bool) -> list[Reader]:
    """Return the readers of cell-load for a set."""
    batch = _sets_per_batch(case, quick=quick)
    many = batch * (6 if case == "A" else 2)  # per cell, the others take 50 times as long
    tuned, plain = (["scattered", str(batch)], batch, TUNED), (["scattered", str(batch)], batch, {})
    consecutive = (["consecutive", str(batch)], many, {})
    ways = {"tuned": (file, *tuned)}
    if case == "A" or not quick:
        ways |= {"default": (file, *plain), "consecutive": (file, *consecutive)}
    if case == "A" and not quick:
        dense = make_dense_h5ad(file)
        ways |= {"default, dense X": (dense, *plain), "consecutive, dense X": (dense, *consecutive)}
    return [
        Reader(f"{case} cell-load {name}", [str(path), *arguments], [path], num_sets, environment)
        for name, (path, arguments, num_sets, environment) in ways.items()
    ]


def store_readers(case: str, store: Path, *, quick: bool) -> list[Reader]:
    """Return the readers of the store of a set; ratios are taken of the first."""
    batch = _sets_per_batch(case, quick=quick)
    ways = {"dense": ["dense", "1"]}
    if not quick:
        ways |= {"dense, 2 threads": ["dense", "2"], "compact": ["compact", "1"]}
        ways |= {"chunks only": ["chunks", "1"]}
    files = [path for path in store.rglob("*") if path.is_file()]
    return [
        Reader(f"{case} scale {name}", [str(store), *way, str(batch)], files, batch * 20)
        for name, way in ways.items()
    ]


def _sets_per_batch(case: str, *, quick: bool) -> int:
    """Return how many sets make a batch: 512 cells of all genes are 128 MB."""
    return (2 if quick else 16) if case == "A" else (1 if quick else 4)


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
    case: str, made: Ingest, answers: dict[str, tuple[Answers, Answers]], figures: dict[str, Any]
) -> None:
    """Print and keep the figures of a set."""
    letter, size = case.lower(), made.bytes_per_cell
    print(f"\nset {case}: {made.cells:,} cells, {size:,.1f} bytes/cell")
    print(
        f"{'':33}{'us CPU':>9}{'min-max':>18}{'cells/CPU s':>12}{'cells/s':>12}{'peak MiB':>9}"
        f"{'cold cells/s':>13}"
    )
    figures[f"bytes_per_cell_{letter}"] = size
    figures[f"prepare_h5ad_cpu_us_per_cell_{letter}"] = made.us_per_cell
    figures["readers"] |= {name: row(name, *found) for name, found in answers.items()}
    first = f"{case} scale dense"
    ours = answers[first][0]
    figures[f"cpu_us_per_cell_dense_{letter}"] = statistics.median(per_cell(ours))
    for name, (warm, _) in answers.items():
        if "cell-load" in name:
            found = ratio(warm, ours)
            figures["ratios"][name] = found
            print(
                f"{name} / {first}: {found['median']:.1f} "
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
    parser.add_argument("--rounds", type=int, default=None, help="default 5, 1 with --quick")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "benchmarks")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    quick, folder = options.quick, options.folder.resolve()
    rounds = options.rounds or (1 if quick else 5)
    python = environment_python("cell_load")

    figures: dict[str, Any] = {"quick": quick, "rounds": rounds, "machine": describe_machine()}
    figures |= {"cell_load_version": "0.10.4", "readers": {}, "ratios": {}}
    print(f"{rounds} rounds after the first, medians; {figures['machine']['cpu']}")
    designs = (SET_A.sized(30_000, 32), SET_B.sized(12_000, 10)) if quick else (SET_A, SET_B)
    files = {design.name: make_h5ad(design, folder) for design in designs}
    theirs = {c: cell_load_readers(c, file, quick=quick) for c, file in files.items()}
    workers = start(python, "cell_load_reader.py", sum(theirs.values(), []))
    if not quick:  # else the imports go on beside the making of stores
        wait(workers)
    made = {c: ingest(f.with_suffix(".store"), h5ad_settings(f)) for c, f in files.items()}
    ours = {c: store_readers(c, f.with_suffix(".store"), quick=quick) for c, f in files.items()}
    workers |= start(sys.executable, "store_reader.py", sum(ours.values(), []))
    wait(workers)
    for case in files:
        answers = measure(ours[case] + theirs[case], workers, rounds, 0 if quick else 3)
        report_case(case, made[case], answers, figures)
    report_ingest(measure_ingest(folder, quick=quick), figures)
    for key, name in RATIOS.items():
        if name in figures["ratios"]:  # --quick has not all of them
            figures[f"ratio_vs_cell_load_{key}"] = figures["ratios"][name]["median"]
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
