"""The whole commands of step.py: ``scale pretrain`` and ``state tx train`` on one h5ad.

CPU seconds are those of the process and its children, from the first import to the exit.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
from command import OFFLINE, Cost, run_command
from data_sets import CONTROL, COUNTS, SET_A, Design, make_h5ad

DESIGN = SET_A.sized(12_000, 32, num_lines=2)
"""Two lines under 16 drugs each: conditions of some 370 cells."""


@dataclass(frozen=True, slots=True)
class Files:
    """The same cells for both."""

    h5ad: Path
    store: Path
    split: Path


def run(command: list[str], log: Path) -> Cost:
    """Run a command that asks nothing of a network."""
    return run_command(command, log, OFFLINE)


def make_files(folder: Path, design: Design = DESIGN) -> Files:
    """Return the cells as h5ad (counts; log-normalised in X and, dense, in X_hvg) and as store."""
    stem = folder / f"step-{design.num_cells}"
    files = Files(*(stem.with_suffix(suffix) for suffix in (".h5ad", ".store", ".toml")))
    if files.split.exists():
        return files
    cells = ad.read_h5ad(make_h5ad(design, folder))
    cells.obsm["X_hvg"] = cells.X.toarray()
    cells.uns["log1p"] = {}
    cells.write_h5ad(files.h5ad)
    settings = [
        *("source=h5ad", f"source.files={files.h5ad}", f"counts={COUNTS}", "genes=all"),
        *("columns.perturbation=drug", "columns.cell_type=cell_line", "columns.batch=plate"),
        *(f"control={CONTROL}", f"store={files.store}", "overwrite=true"),
        f"run_dir={folder / 'step-prepare'}",
    ]
    run([sys.executable, "-m", "scale", "prepare", *settings], folder / "step-prepare.log")
    files.split.write_text(f'[datasets]\ncells = "{files.h5ad}"\n[training]\ncells = "train"\n')
    return files


def our_command(files: Files, folder: Path, sizes: dict[str, int], sets: int, steps: int) -> Cost:
    """Run ``scale pretrain`` from scratch."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = [
        *("model=tiny", *(f"model.{name}={value}" for name, value in sizes.items())),
        *(f"data.store={files.store}", "data.split=null", f"run_dir={folder / 'run'}"),
        *(f"trainer.max_steps={steps}", f"trainer.sets_per_batch={sets}"),
        f"checkpoint.every_steps={steps}",
    ]
    return run([sys.executable, "-m", "scale", "pretrain", *settings], folder / "pretrain.log")


def their_command(
    python: str, files: Files, folder: Path, sizes: dict[str, int], sets: int, steps: int
) -> Cost:
    """Run ``state tx train`` from scratch; data settings that are no names are its defaults."""
    shutil.rmtree(folder, ignore_errors=True)
    settings = [
        *(f"data.kwargs.toml_config_path={files.split}", "data.kwargs.embed_key=X_hvg"),
        *("data.kwargs.output_space=gene", "data.kwargs.num_workers=0"),
        *("data.kwargs.pert_col=drug", "data.kwargs.cell_type_key=cell_line"),
        *("data.kwargs.batch_col=plate", f"data.kwargs.control_pert={CONTROL}"),
        *(f"training.max_steps={steps}", f"training.batch_size={sets}"),
        *(f"training.val_freq={steps}", f"training.ckpt_every_n_steps={steps}"),
        *("model=state", *(f"model.kwargs.{name}={value}" for name, value in sizes.items())),
        *(f"output_dir={folder}", "name=run", "use_wandb=false", "overwrite=true"),
    ]
    return run([python, "-m", "state", "tx", "train", *settings], folder / "train.log")
