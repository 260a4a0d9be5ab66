"""Trainings of arc-state 0.11.1 by its own commands: ``state tx train`` and ``state tx predict``.

They run in the environment that scripts/arc_state_environment makes, with one thread and without a
network.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import OFFLINE, environment_python, run_command

from scale.config import ModelConfig

if TYPE_CHECKING:
    from state_data import StateFiles

ARC_STATE, VERSION = "arc-state", "0.11.1"
SEED = 42
"""arc-state's default."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What a training saw, steps and sets of cells, and the sizes of its set blocks."""

    steps: int
    sets_per_step: int
    cells_per_set: int
    model: ModelConfig

    @property
    def treated_cells(self) -> int:
        """Treated cells seen, with repetition; a control cell comes with each."""
        return self.steps * self.sets_per_step * self.cells_per_set


def train_settings(
    files: StateFiles, folder: Path, budget: Budget, lr: float, seed: int
) -> list[str]:
    """Return what ``state tx train`` is told beyond its defaults."""
    model = budget.model
    sizes = {
        "cell_set_len": budget.cells_per_set,
        "hidden_dim": model.hidden_size,
        "transformer_backbone_kwargs.num_hidden_layers": model.num_layers,
        "transformer_backbone_kwargs.num_attention_heads": model.num_heads,
        "transformer_backbone_kwargs.num_key_value_heads": model.num_heads,
        "transformer_backbone_kwargs.head_dim": model.hidden_size // model.num_heads,
        "transformer_backbone_kwargs.intermediate_size": model.ffn_hidden_size,
    }
    return [
        f"data.kwargs.toml_config_path={files.training}",
        "data.kwargs.embed_key=X_hvg",
        "data.kwargs.output_space=gene",
        "data.kwargs.num_workers=0",
        "data.kwargs.basal_mapping_strategy=batch",
        f"data.kwargs.pert_col={files.perturbation_key}",
        f"data.kwargs.cell_type_key={files.cell_type_key}",
        f"data.kwargs.batch_col={files.batch_key}",
        f"data.kwargs.control_pert={files.control}",
        f"training.max_steps={budget.steps}",
        f"training.batch_size={budget.sets_per_step}",
        f"training.val_freq={max(1, budget.steps // 4)}",
        f"training.ckpt_every_n_steps={budget.steps}",
        f"training.lr={lr}",
        f"training.train_seed={seed}",
        "model=state",
        *(f"model.kwargs.{name}={value}" for name, value in sizes.items()),
        f"output_dir={folder}",
        "name=run",
        "use_wandb=false",
        "overwrite=true",
    ]


def run_state(
    files: StateFiles, folder: Path, budget: Budget, lr: float, seed: int = SEED
) -> dict[str, Any]:
    """Train arc-state and write ``predicted.h5ad`` of the test conditions; return what it cost."""
    import pandas as pd  # slow to import, and not needed for --help
    from state_data import collect

    state = [environment_python("arc_state"), "-m", "state", "tx"]
    log = folder / "train.log"
    print(f"arc-state: rate {lr:g}, seed {seed}, {budget.steps} steps", file=sys.stderr)
    settings = train_settings(files, folder, budget, lr, seed)
    trained = run_command([*state, "train", *settings], log, OFFLINE)
    arguments = ["--output-dir", str(folder / "run"), "--toml", str(files.prediction)]
    arguments += ["--checkpoint", "final.ckpt", "--predict-only"]
    predicted = run_command([*state, "predict", *arguments], folder / "predict.log", OFFLINE)
    found = folder / "run" / "eval_final.ckpt" / "adata_pred.h5ad"
    parameters = re.search(r"Trainable params: ([\d.]+ [KM])", log.read_text())
    metrics = pd.read_csv(folder / "run" / "version_0" / "metrics.csv")
    losses = metrics["val_loss"].dropna() if "val_loss" in metrics else []
    return {
        "learning_rate": lr,
        "val_loss": round(float(losses.iloc[-1]), 4) if len(losses) else None,
        "trainable_parameters": parameters[1] if parameters else None,
        "cpu_seconds_train": round(trained.cpu, 1),
        "cpu_seconds_predict": round(predicted.cpu, 1),
        "predicted_cells": collect(found, files, folder / "predicted.h5ad"),
    }
