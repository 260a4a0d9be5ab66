"""``scale demo``: the whole road on simulated cells, in a few minutes on a laptop.

A drug screen with known truth is simulated, a store prepared, a tiny model pretrained on four cell
lines and finetuned to two new ones in which most drugs are held out; those are predicted and judged
against baselines and the noise ceiling. Nothing it prints is a statement about biology.

scale demo
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

from scale.config import DemoConfig, compose, to_yaml
from scale.data.simulate import CONTROL, SimulationConfig, simulate
from scale.runtime import (
    EXIT_AGAIN,
    PROCESS_STARTED,
    RunRecord,
    StopSignal,
    World,
    peak_memory_bytes,
    replace_nan,
    start_logging,
    write_json,
)
from scale.tasks.evaluate import run as run_evaluate
from scale.tasks.finetune import run as run_finetune
from scale.tasks.predict import run as run_predict
from scale.tasks.prepare import run as run_prepare
from scale.tasks.pretrain import run as run_pretrain

logger = logging.getLogger(__name__)

_SUMMARY_METRICS = {
    "pearson_delta": "pearson_delta",
    "overlap_at_n": "overlap_at_N",
    "precision_at_n": "precision_at_N",
    "discrimination": "discrimination_score_l1",
    "mse": "mse",
    "energy_distance": "energy_distance",
}
_SUMMARY_METHODS = {
    "model": "model",
    "control_copy": "control_copy",
    "perturbation_mean": "perturbation_mean",
    "additive": "additive",
    "ceiling": "replicate",
}
_HELD_OUT_LINES = 2


def run(config: DemoConfig, stop: StopSignal) -> int:
    """Make the report and ``summary.json``; return the exit status."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    start_logging(run_dir / "demo.log", World(0, 1, 0))
    (run_dir / "config.yaml").write_text(to_yaml(config))
    record = RunRecord(run_dir, World(0, 1, 0), {"seed": config.seed})

    _heading("1/6  simulate a drug screen")
    source = _simulate(run_dir, config)
    store = run_dir / "store"
    steps: list[tuple[str, Callable[[], int]]] = [
        ("2/6  prepare a store", lambda: _prepare(run_dir, source, store)),
        ("3/6  pretrain on four cell lines", lambda: _pretrain(run_dir, store, config, stop)),
        ("4/6  finetune to two new lines", lambda: _finetune(run_dir, store, config, stop)),
        ("5/6  predict the held-out conditions", lambda: _predict(run_dir, store, config)),
        ("6/6  evaluate", lambda: _evaluate(run_dir, store, config)),
    ]
    for title, step in steps:
        _heading(title)
        if stop.received is not None:
            record.close(f"stopped: {stop.received}")
            return EXIT_AGAIN
        if (status := step()) != 0:
            record.close(f"stopped in {title}")
            return status
    summary = _summary(run_dir, monotonic() - PROCESS_STARTED)
    write_json(run_dir / "summary.json", summary)
    record.close("done")
    print(f"\nsummary: {run_dir / 'summary.json'}")
    print(f"report:  {run_dir / 'report' / 'report.html'}")
    return 0


def _heading(text: str) -> None:
    print(f"\n--- {text}", flush=True)


def _simulate(run_dir: Path, config: DemoConfig) -> Path:
    """Write the cells and the two splits, unless they are there."""
    source = run_dir / "atlas.h5ad"
    if source.exists():
        print(f"{source} is there")
        return source
    atlas = simulate(SimulationConfig(seed=config.seed))
    atlas.write_split(run_dir / "fewshot.toml", num_contexts=_HELD_OUT_LINES)
    unused = "\n".join(f'"synthetic.{line}" = "test"' for line in atlas.lines[-_HELD_OUT_LINES:])
    (run_dir / "zeroshot.toml").write_text(
        f'[datasets]\nsynthetic = "."\n\n[training]\nsynthetic = "train"\n\n[zeroshot]\n{unused}\n'
    )
    atlas.write_h5ad(source)
    print(
        f"{len(atlas.obs):,} simulated cells, {len(atlas.lines)} cell lines x "
        f"{len(atlas.drugs)} drugs, {len(atlas.genes):,} genes -> {source}"
    )
    return source


def _prepare(run_dir: Path, source: Path, store: Path) -> int:
    if (store / "manifest.json").exists():
        print(f"{store} is there")
        return 0
    settings = [
        "source=h5ad",
        f"source.files=[{source}]",
        f"store={store}",
        "columns.perturbation=drug",
        "columns.cell_type=cell_line",
        "columns.batch=plate",
        f"control={CONTROL}",
        "genes=all",
    ]
    return run_prepare(compose("prepare", settings, run_dir=run_dir / "prepare"))


def _training_settings(store: Path, split: Path, steps: int, seed: int) -> list[str]:
    return [
        f"data.store={store}",
        f"data.split={split}",
        f"trainer.max_steps={steps}",
        f"trainer.seed={seed}",
        "trainer.log_every_steps=50",
        f"validation.every_steps={max(1, steps // 4)}",
        f"checkpoint.every_steps={max(1, steps // 2)}",
        f"optimizer.warmup_steps={max(1, min(50, steps // 5))}",
        "optimizer.ema_decay=0.99",
    ]


def _pretrain(run_dir: Path, store: Path, config: DemoConfig, stop: StopSignal) -> int:
    settings = _training_settings(store, run_dir / "zeroshot.toml", config.steps, config.seed)
    return run_pretrain(compose("pretrain", settings, run_dir=run_dir / "pretrain"), stop)


def _finetune(run_dir: Path, store: Path, config: DemoConfig, stop: StopSignal) -> int:
    settings = [
        f"start_from={run_dir / 'pretrain'}",
        *_training_settings(
            store, run_dir / "fewshot.toml", config.finetune_steps, config.seed + 1
        ),
    ]
    return run_finetune(compose("finetune", settings, run_dir=run_dir / "finetune"), stop)


def _predict(run_dir: Path, store: Path, config: DemoConfig) -> int:
    settings = [
        f"checkpoint={run_dir / 'finetune'}",
        f"store={store}",
        f"seed={config.seed}",
        "overwrite=true",
    ]
    return run_predict(compose("predict", settings, run_dir=run_dir / "predict"))


def _evaluate(run_dir: Path, store: Path, config: DemoConfig) -> int:
    settings = [
        f"predicted=[model={run_dir / 'predict' / 'predicted.h5ad'}]",
        f"observed={store}",
        f"split={run_dir / 'fewshot.toml'}",
        f"training_run={run_dir / 'finetune'}",
        f"seed={config.seed}",
        "overwrite=true",
    ]
    return run_evaluate(compose("evaluate", settings, run_dir=run_dir / "report"))


def _summary(run_dir: Path, seconds: float) -> dict[str, Any]:
    """Per-context means of the main metrics, with what the run cost."""
    means = json.loads((run_dir / "report" / "summary.json").read_text())
    return {
        "seconds_after_install": round(seconds, 1),
        "peak_rss_gb": round(peak_memory_bytes() / 1e9, 3),
        **{
            name: {
                key: replace_nan(float("nan") if (v := means[method].get(metric)) is None else v)
                for key, metric in _SUMMARY_METRICS.items()
            }
            for name, method in _SUMMARY_METHODS.items()
        },
    }
