"""Training steps of this package on given cells; runs in this package's environment.

Argument of a reader: JSON with ``cells`` (the .npz of step.py), ``sizes`` and ``precision``.

The process is set up as ``scale pretrain`` sets itself up on a CPU, and a step is the whole of
``Engine.step``: draws, pairing, path, forward, losses, backward, clipping, AdamW, moving average.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker import fork_readers, serve

from scale.config import ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig, Precision
from scale.model.model import ScaleModel
from scale.runtime import World, keep_freed_memory
from scale.train import parallel
from scale.train.engine import Engine
from scale.types import Batch, Vocabulary

CPU = torch.device("cpu")
NUM_COMPONENTS = 30


def read_batch(cells: Path) -> Batch:
    """Return the sets of step.py, every one full."""
    with np.load(cells) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    num_sets, set_size = arrays["control_BSG"].shape[:2]
    num_summary = arrays["summary_BUG"].shape[1]
    is_real_BS = torch.ones(num_sets, set_size, dtype=torch.bool)
    library_BS = torch.full((num_sets, set_size), 1e4)
    zero_B = torch.zeros(num_sets, dtype=torch.int64)
    return Batch(
        control_BSG=arrays["control_BSG"],
        control_mask_BS=is_real_BS,
        summary_BUG=arrays["summary_BUG"],
        summary_mask_BU=torch.ones(num_sets, num_summary, dtype=torch.bool),
        treated_BSG=arrays["treated_BSG"],
        treated_mask_BS=is_real_BS,
        control_library_BS=library_BS,
        treated_library_BS=library_BS,
        component_BJ=arrays["perturbation_B"][:, None] + 2,
        dose_BJ=torch.full((num_sets, 1), math.nan),
        cell_type_B=zero_B,
        batch_B=zero_B,
        is_control_B=torch.zeros(num_sets, dtype=torch.bool),
        condition_B=torch.arange(num_sets),
        set_index_B=torch.arange(num_sets),
    )


def vocabulary(num_genes: int, num_perturbations: int) -> Vocabulary:
    """Return names for what the cells of step.py hold."""
    drugs = tuple(f"drug{number}" for number in range(num_perturbations))
    return Vocabulary(
        genes=tuple(f"G{number}" for number in range(num_genes)),
        components=("", "control", *drugs),
        cell_types=("line",),
        batches=("plate",),
        perturbations=drugs,
        control="control",
        perturbation_key="drug",
        cell_type_key="cell_line",
        batch_key="plate",
        dose_key=None,
        separator=None,
        target_sum=1e4,
        value_scale=1.0,
    )


class Steps:
    """A model, its optimizer and the sets it is trained on."""

    def __init__(self, given: dict[str, Any]) -> None:
        sizes = given["sizes"]
        self.batch = read_batch(Path(given["cells"]))
        num_genes = self.batch.control_BSG.shape[2]
        precision = Precision(given["precision"])
        layout = parallel.start(ParallelConfig(), World(0, 1, 0), seed=0, device=CPU)
        self.model = ScaleModel(
            ModelConfig(**sizes, lr=3e-4, qk_norm=False),
            ObjectiveConfig(),
            vocabulary(num_genes, given["num_perturbations"]),
            seed=0,
            precision=precision,
        )
        generator = torch.Generator().manual_seed(0)
        basis_GP = torch.randn(num_genes, NUM_COMPONENTS, generator=generator)
        mean_G = self.batch.treated_BSG.mean((0, 1))
        self.model.set_statistics(mean_G, torch.linalg.qr(basis_GP)[0])
        self.engine = Engine(self.model, layout, OptimizerConfig(), lr=3e-4, precision=precision)
        self.step = 0
        self.loss = math.nan

    def take(self, num_steps: int) -> int:
        """Take steps and return the treated cells they saw."""
        cells = 0
        for _ in range(num_steps):
            # the sets of the next step: their numbers are the key of every draw
            index_B = self.batch.set_index_B + self.step * self.batch.num_sets
            self.step += 1
            batch = replace(self.batch, set_index_B=index_B)
            result = self.engine.step([batch], step=self.step, lr=3e-4)
            cells, self.loss = cells + result.num_cells, result.loss
        return cells

    def facts(self) -> dict[str, float]:
        """Return the size of the model and its last loss."""
        return {
            "parameters": self.model.num_parameters(),
            "mflop_per_cell": self.model.flops_per_cell() / 1e6,
            "loss": self.loss,
        }


def main(arguments: list[str]) -> None:
    """Serve steps."""
    torch.set_num_threads(1)
    keep_freed_memory()
    steps = Steps(json.loads(arguments[0]))
    serve(steps.take, steps.facts, forget=lambda: None)


if __name__ == "__main__":
    fork_readers(main)
