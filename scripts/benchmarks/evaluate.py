#!/usr/bin/env python
"""CPU seconds of the gene tests and metrics of one context, here and in cell-eval 0.8.2.

scripts/benchmarks/evaluate.py [--quick] [--rounds 5] [--json FILE]

Both sides get the same two h5ad files (negative-binomial counts, log1p of counts per 10,000), one
thread, a fresh process per run, and take turns. Counted is what comes after the imports and the
reading: both gene tests and all metrics of cell-eval's profile `full` without pearson_edistance and
clustering_agreement, which are not computed here. The first round of each side is printed apart: it
may compile kernels. cell-eval runs in the environment that scripts/cell_eval_environment makes. The
numbers of both sides are compared in every round.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("pearson_delta", "mse", "overlap_at_N", "precision_at_N", "discrimination_score_l1")

OURS = """
import json, resource, sys, time, warnings
import anndata as ad
from scale.config import Profile, ProtocolConfig
from scale.evaluate.protocol import run_protocol
warnings.simplefilter("ignore")
folder = sys.argv[1]
predicted, observed = (ad.read_h5ad(f"{folder}/{n}.h5ad") for n in ("predicted", "observed"))
cpu, wall = time.process_time(), time.perf_counter()
result = run_protocol(
    {"model": predicted}, observed, perturbation_key="perturbation", cell_type_key="line",
    control="control",
    protocol=ProtocolConfig(profile=Profile.cell_eval, baselines=False, ceiling=False),
)
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
scores = result.scores[result.scores["method"] == "model"].groupby("metric")["value"].mean()
"""
THEIRS = """
import json, resource, sys, time, warnings
import anndata as ad
from cell_eval import MetricsEvaluator
warnings.simplefilter("ignore")
folder = sys.argv[1]
predicted, observed = (ad.read_h5ad(f"{folder}/{n}.h5ad") for n in ("predicted", "observed"))
cpu, wall = time.process_time(), time.perf_counter()
results, _ = MetricsEvaluator(
    adata_pred=predicted, adata_real=observed, control_pert="control", pert_col="perturbation",
    num_threads=1, outdir=folder + "/out",
).compute(profile="full", skip_metrics=["pearson_edistance", "clustering_agreement"],
          break_on_error=True)
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
scores = results.to_pandas().mean(numeric_only=True)
"""
REPORT = """
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("RESULT" + json.dumps({"cpu": cpu, "wall": wall, "peak": peak, "scores": scores.to_dict()}))
"""
GENERATE = """
import sys
import anndata as ad, numpy as np, pandas as pd, scipy.sparse as sp
folder, perturbations, cells, genes, controls = sys.argv[1], *map(int, sys.argv[2:])
rng = np.random.default_rng(0)
base = np.exp(rng.normal(0, 1.6, genes)); base *= 3000 / base.sum()
shared = np.zeros(genes); shared[rng.choice(genes, genes * 3 // 100, False)] = 0.5
effects = []
for p in range(perturbations):
    own = np.zeros(genes)
    own[rng.choice(genes, 5 + 144 * p // perturbations, False)] = rng.normal(0, 1)
    effects.append(own + shared * rng.normal(1, 0.2, genes))
for name, strength in (("observed", 1.0), ("predicted", 0.6)):
    blocks, labels = [], []
    for p, effect in enumerate([*effects, np.zeros(genes)]):
        size = controls if p == perturbations else cells
        draw = np.random.default_rng([1, p, 0 if p == perturbations else int(strength * 10)])
        rate = base * np.exp(strength * effect) * draw.lognormal(0, 0.3, (size, 1))
        counts = draw.poisson(draw.gamma(2.0, rate / 2.0))
        values = np.log1p(counts * (1e4 / counts.sum(1, keepdims=True))).astype(np.float32)
        blocks.append(sp.csr_matrix(values))
        labels += ["control" if p == perturbations else f"p{p:03d}"] * size
    names = [f"c{i}" for i in range(len(labels))]
    obs = pd.DataFrame({"perturbation": labels, "line": "one"}, index=names)
    var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    cells_of_file = ad.AnnData(sp.vstack(blocks, format="csr"), obs=obs, var=var)
    cells_of_file.write_h5ad(f"{folder}/{name}.h5ad")
"""


def run(python: str, code: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    environment |= {"NUMBA_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


def measure(python: str, code: str, folder: str) -> dict:
    text = run(python, code + REPORT, folder)
    return json.loads(text.split("RESULT", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small case, under a minute")
    parser.add_argument("--rounds", type=int, default=None, help="default 5, 2 with --quick")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    rounds = options.rounds or (2 if options.quick else 5)
    sizes = (10, 50, 500, 200) if options.quick else (50, 100, 2000, 1000)

    made = subprocess.run(
        [str(ROOT / "scripts" / "cell_eval_environment")], capture_output=True, text=True
    )
    if made.returncode:
        sys.exit(f"no environment with cell-eval: {made.stderr[-500:]}")
    sides = {"scale": (sys.executable, OURS), "cell-eval": (made.stdout.strip(), THEIRS)}
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, GENERATE, folder, *map(str, sizes))
        for number in range(rounds + 1):
            for name, (python, code) in sides.items():
                runs[name].append(measure(python, code, folder))
            ours, theirs = (runs[n][-1]["scores"] for n in sides)
            for metric in COMPARED:
                if abs(ours[metric] - theirs[metric]) > 1e-6:
                    sys.exit(f"{metric} differs: {ours[metric]} and {theirs[metric]}")
            print(f"round {number} of {rounds} done", file=sys.stderr)

    case = "{} perturbations x {} cells, {} genes, {} controls".format(*sizes)
    figures: dict[str, object] = {"case": case, "rounds": rounds}
    print(f"{case}; {rounds} rounds after the first, medians; {platform.processor() or 'cpu'}")
    print(f"{'':12}{'CPU s':>8}{'min-max':>14}{'first, CPU s':>14}{'wall s':>8}{'peak MiB':>10}")
    for name, results in runs.items():
        cpu = [r["cpu"] for r in results[1:]]
        row = {
            "cpu_seconds_median": statistics.median(cpu),
            "cpu_seconds_min": min(cpu),
            "cpu_seconds_max": max(cpu),
            "first_run_cpu_seconds": results[0]["cpu"],
            "wall_seconds_median": statistics.median(r["wall"] for r in results[1:]),
            "peak_rss_mebibytes": max(r["peak"] for r in results),
        }
        figures[name] = row
        spread = f"{row['cpu_seconds_min']:.2f}-{row['cpu_seconds_max']:.2f}"
        print(
            f"{name:12}{row['cpu_seconds_median']:8.2f}{spread:>14}"
            f"{row['first_run_cpu_seconds']:14.2f}{row['wall_seconds_median']:8.2f}"
            f"{row['peak_rss_mebibytes']:10.0f}"
        )
    pairs = zip(runs["scale"][1:], runs["cell-eval"][1:], strict=True)
    ratios = [theirs["cpu"] / ours["cpu"] for ours, theirs in pairs]
    figures["ratio_of_median_cpu_seconds"] = statistics.median(
        r["cpu"] for r in runs["cell-eval"][1:]
    ) / statistics.median(r["cpu"] for r in runs["scale"][1:])
    print(
        f"cell-eval / scale: {figures['ratio_of_median_cpu_seconds']:.1f} "
        f"({min(ratios):.1f}-{max(ratios):.1f} over rounds)"
    )
    if options.json:
        figures["versions"] = {
            "python": platform.python_version(),
            **{n: metadata.version(n) for n in ("numpy", "numba", "scale-virtual-cell")},
            "cell-eval": "0.8.2",
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
