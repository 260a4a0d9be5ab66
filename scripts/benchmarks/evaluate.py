#!/usr/bin/env python
"""CPU seconds and memory of an evaluation, here and in cell-eval 0.8.2.

scripts/benchmarks/evaluate.py [--quick] [--rounds 5] [--json FILE]

First the metrics of cell-eval: 50 perturbations x 100 cells, 1,000 controls, 2,000 genes. Both
sides get the same two h5ad files (negative-binomial counts, log1p of counts per 10,000), one
thread, a fresh process per run, and take turns. Counted is what comes after the imports and the
reading: both gene tests and all metrics of cell-eval's profile ``full`` without pearson_edistance
and clustering_agreement, which are not computed here (ours includes the metrics that cell-eval does
not have). The first round of each side is printed apart: cell-eval may compile kernels. It runs in
the environment that scripts/cell_eval_environment makes. Every metric of every perturbation is
compared in every round.

Then a whole evaluation of the size of the Replogle-Nadig benchmark: 380 perturbations x 70 cells
of one line with 4,976 controls, 2,000 genes, 45 % of them seen in a cell; profile ``strict`` as it
comes, with every baseline and the split-half ceiling, and with training cells of three lines (20
cells a perturbation, 300 other perturbations of the line itself among them). ``--quick`` leaves it,
and its keys, out.

``ratio`` is of medians, ours over cell-eval; ``peak_gb`` is the largest resident size of a process,
imports and input included, in 10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from command import environment_python
from machine import describe_machine

from scale.evaluate.protocol import split_controls

CELL_EVAL = "0.8.2"
CONTROL = "control"
KEYS = {"perturbation_key": "perturbation", "cell_type_key": "line"}
AGREEMENT = 1e-6

START = """
import json, resource, sys, time, warnings
import anndata as ad
warnings.simplefilter("ignore")
folder = sys.argv[1]
predicted, observed = (ad.read_h5ad(f"{folder}/{n}.h5ad") for n in ("predicted", "observed"))
"""
OURS = f"""{START}
from scale.config import Profile, ProtocolConfig
from scale.evaluate.protocol import run_protocol
cpu, wall = time.process_time(), time.perf_counter()
result = run_protocol(
    {{"model": predicted}}, observed, perturbation_key="perturbation", cell_type_key="line",
    control="control",
    protocol=ProtocolConfig(profile=Profile.cell_eval, baselines=False, ceiling=False),
)
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
scores = result.scores[result.scores["method"] == "model"]
scores = scores.pivot(index="perturbation", columns="metric", values="value")
"""
THEIRS = f"""{START}
from cell_eval import MetricsEvaluator
cpu, wall = time.process_time(), time.perf_counter()
results, _ = MetricsEvaluator(
    adata_pred=predicted, adata_real=observed, control_pert="control", pert_col="perturbation",
    num_threads=1, outdir=folder + "/out",
).compute(profile="full", skip_metrics=["pearson_edistance", "clustering_agreement"],
          break_on_error=True)
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
scores = results.to_pandas().set_index("perturbation").sort_index().astype(float)
"""
WHOLE = f"""{START}
from scale.config import ProtocolConfig
from scale.evaluate.protocol import run_protocol, split_controls
train = ad.read_h5ad(f"{{folder}}/train.h5ad")
observed = split_controls(
    observed, perturbation_key="perturbation", cell_type_key="line", control="control"
)
cpu, wall = time.process_time(), time.perf_counter()
result = run_protocol(
    {{"model": predicted}}, observed, train=train, perturbation_key="perturbation",
    cell_type_key="line", control="control", protocol=ProtocolConfig(),
)
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
scores = result.aggregate[["method", "form", "metric", "mean"]]
"""
REPORT = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
scores = json.loads(scores.to_json(orient="split", double_precision=15))
print("RESULT" + json.dumps({"cpu": cpu, "wall": wall, "peak": peak, "scores": scores}))
"""


class Law:
    """Rates of genes, and what perturbations do to them."""

    def __init__(self, num_genes: int, num_perturbations: int, depth: float, spread: float) -> None:
        rng = np.random.default_rng(0)
        self.depth = depth
        self.base = np.exp(rng.normal(0, spread, num_genes))
        shared = np.zeros(num_genes)
        shared[rng.choice(num_genes, num_genes * 3 // 100, replace=False)] = 0.5
        self.effects = []
        for p in range(num_perturbations):
            own = np.zeros(num_genes)
            size = 5 + 144 * p // num_perturbations
            own[rng.choice(num_genes, size, replace=False)] = rng.normal(0, 1, size)
            self.effects.append(own + shared * rng.normal(1, 0.2, num_genes))

    def draw(self, effect: npt.ArrayLike, size: int, rng: np.random.Generator) -> sp.csr_matrix:
        """Counts of cells: negative binomial, of unequal depth."""
        rate = self.base * np.exp(effect)
        rate = self.depth * rate / rate.sum() * rng.lognormal(0, 0.3, (size, 1))
        counts = rng.poisson(rng.gamma(2.0, rate / 2.0))
        return sp.csr_matrix(counts, dtype=np.float32)


def to_anndata(blocks: list[tuple[str, str, sp.csr_matrix]], *, keep_counts: bool) -> ad.AnnData:
    """Cells of (line, perturbation, counts) blocks, log1p of counts per 10,000."""
    counts = sp.vstack([block for _, _, block in blocks], format="csr")
    total = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
    values = sp.csr_matrix((sp.diags(1e4 / total) @ counts).log1p(), dtype=np.float32)
    size = [block.shape[0] for _, _, block in blocks]
    obs = pd.DataFrame(
        {
            "line": np.repeat([line for line, _, _ in blocks], size),
            "perturbation": np.repeat([label for _, label, _ in blocks], size),
        },
        index=[f"c{i}" for i in range(sum(size))],
    )
    var = pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])])
    layers = {"counts": counts} if keep_counts else None
    return ad.AnnData(values, obs=obs, var=var, layers=layers)


def make_pair(
    folder: Path, law: Law, perturbations: range, cells: int, controls: int, *, keep_counts: bool
) -> None:
    """Write observed.h5ad and predicted.h5ad, 60 % of the effect, with the same controls."""
    nothing = np.zeros(law.base.size)
    control = law.draw(nothing, controls, np.random.default_rng([1, len(law.effects), 0]))
    for name, strength in (("observed", 1.0), ("predicted", 0.6)):
        blocks = [("one", CONTROL, control)]
        for p in perturbations:
            rng = np.random.default_rng([1, p, int(strength * 10)])
            blocks.append(("one", f"p{p:03d}", law.draw(strength * law.effects[p], cells, rng)))
        adata = to_anndata(blocks, keep_counts=keep_counts and name == "observed")
        if name == "observed":  # predictions started from none of them, and need not say so
            adata = split_controls(adata, control=CONTROL, **KEYS)
        adata.write_h5ad(folder / f"{name}.h5ad")


def make_train(folder: Path, law: Law, held_out: range, cells: int) -> None:
    """Write train.h5ad: the line itself without what is held out, and two other lines."""
    rng = np.random.default_rng(2)
    blocks = []
    for line in ("one", "two", "three"):
        shift = np.zeros(law.base.size) if line == "one" else rng.normal(0, 0.3, law.base.size)
        blocks.append((line, CONTROL, law.draw(shift, 1000, rng)))
        for p, effect in enumerate(law.effects):
            if line != "one" or p not in held_out:
                blocks.append((line, f"p{p:03d}", law.draw(shift + effect, cells, rng)))
    to_anndata(blocks, keep_counts=True).write_h5ad(folder / "train.h5ad")


def measure(python: str, code: str, folder: Path) -> dict[str, Any]:
    """Run code in a fresh process with one thread; return what it reports."""
    threads = ("OMP", "POLARS_MAX", "NUMBA", "OPENBLAS", "MKL")
    names = [f"{t}_THREADS" if t == "POLARS_MAX" else f"{t}_NUM_THREADS" for t in threads]
    done = subprocess.run(
        [python, "-c", code + REPORT, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, **dict.fromkeys(names, "1")},
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    answer: dict[str, Any] = json.loads(done.stdout.split("RESULT", 1)[1])
    scores = answer["scores"]
    answer["scores"] = pd.DataFrame(scores["data"], scores["index"], scores["columns"])
    return answer


def largest_difference(ours: pd.DataFrame, theirs: pd.DataFrame) -> float:
    """Return the largest difference of any metric of any perturbation; NaN must meet NaN."""
    largest = 0.0
    for metric in theirs.columns:
        x = ours[metric].to_numpy(np.float64)
        y = theirs.loc[ours.index, metric].to_numpy(np.float64)
        if (np.isnan(x) != np.isnan(y)).any():
            sys.exit(f"{metric} is undefined for other perturbations than in cell-eval")
        difference = float(np.nanmax(np.abs(x - y), initial=0.0))
        if difference > AGREEMENT:
            sys.exit(f"{metric} differs by {difference:.2g}")
        largest = max(largest, difference)
    return largest


def compare(python: str, sizes: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    """Return the figures of both sides, which take turns on the same files."""
    perturbations, cells, genes, controls = sizes
    sides = {"scale": (sys.executable, OURS), "cell-eval": (python, THEIRS)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    differences = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        law = Law(genes, perturbations, depth=1.5 * genes, spread=1.6)
        make_pair(folder, law, range(perturbations), cells, controls, keep_counts=False)
        for number in range(rounds + 1):
            for side, (interpreter, code) in sides.items():
                runs[side].append(measure(interpreter, code, folder))
            differences.append(largest_difference(*(runs[s][-1]["scores"] for s in sides)))
            print(f"round {number} of {rounds} done", file=sys.stderr)
    details = {side: _row(results) for side, results in runs.items()}
    ours, theirs = (details[side]["cpu_seconds_median"] for side in sides)
    case = f"{perturbations} perturbations x {cells} cells, {genes} genes, {controls} controls"
    return {
        "case": case,
        "rounds": rounds,
        "cpu_seconds": ours,
        "cell_eval_cpu_seconds": theirs,
        "ratio": ours / theirs,
        "peak_gb": details["scale"]["peak_gb"],
        "max_abs_difference_vs_cell_eval": max(differences),
        "num_metrics_compared": len(runs["cell-eval"][0]["scores"].columns),
        "scale": details["scale"],
        "cell_eval": details["cell-eval"],
    }


def _row(results: list[dict[str, Any]]) -> dict[str, float]:
    cpu = [r["cpu"] for r in results[1:]]
    return {
        "cpu_seconds_median": statistics.median(cpu),
        "cpu_seconds_min": min(cpu),
        "cpu_seconds_max": max(cpu),
        "first_run_cpu_seconds": results[0]["cpu"],
        "wall_seconds_median": statistics.median(r["wall"] for r in results[1:]),
        "peak_gb": max(r["peak"] for r in results),
    }


def replogle() -> dict[str, Any]:
    """Return the figures of a whole evaluation of the size of the Replogle-Nadig benchmark."""
    held_out, perturbations, cells, controls = range(380), 680, 70, 4976
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        law = Law(2000, perturbations, depth=4000.0, spread=1.6)
        make_pair(folder, law, held_out, cells, controls, keep_counts=True)
        make_train(folder, law, held_out, cells=20)
        print("cells of Replogle's size are made", file=sys.stderr)
        found = measure(sys.executable, WHOLE, folder)
        values = ad.read_h5ad(folder / "observed.h5ad", backed="r").X
        seen = values[:500].nnz / (500 * values.shape[1])
    return {
        "replogle_case": "380 perturbations x 70 cells, 2000 genes, 4976 controls, strict",
        "replogle_share_seen": round(seen, 3),
        "replogle_cpu_seconds": found["cpu"],
        "replogle_wall_seconds": found["wall"],
        "replogle_peak_gb": found["peak"],
        "replogle_methods": sorted(set(found["scores"]["method"])),
    }


def show(figures: dict[str, Any]) -> None:
    """Print the figures."""
    print(f"{figures['case']}; {figures['rounds']} rounds after the first, medians")
    print(f"{'':12}{'CPU s':>8}{'min-max':>14}{'first, CPU s':>14}{'wall s':>8}{'peak GB':>10}")
    for side in ("scale", "cell_eval"):
        row = figures[side]
        spread = f"{row['cpu_seconds_min']:.2f}-{row['cpu_seconds_max']:.2f}"
        print(
            f"{side:12}{row['cpu_seconds_median']:8.2f}{spread:>14}"
            f"{row['first_run_cpu_seconds']:14.2f}{row['wall_seconds_median']:8.2f}"
            f"{row['peak_gb']:10.2f}"
        )
    print(
        f"ratio {figures['ratio']:.3f}; {figures['num_metrics_compared']} metrics differ by "
        f"{figures['max_abs_difference_vs_cell_eval']:.1g} at most"
    )
    if "replogle_cpu_seconds" in figures:
        print(
            f"{figures['replogle_case']}: {figures['replogle_cpu_seconds']:.0f} CPU s, "
            f"{figures['replogle_peak_gb']:.2f} GB"
        )
    else:
        print("--quick: the case of Replogle's size was left out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small case, under a minute")
    parser.add_argument("--rounds", type=int, default=None, help="default 5, 1 with --quick")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    rounds = options.rounds or (1 if options.quick else 5)
    machine = describe_machine()
    python = environment_python("cell_eval")
    sizes = (10, 50, 500, 200) if options.quick else (50, 100, 2000, 1000)
    figures = compare(python, sizes, rounds)
    if not options.quick:
        figures |= replogle()
    figures["machine"] = machine | {"cell_eval": CELL_EVAL}
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
