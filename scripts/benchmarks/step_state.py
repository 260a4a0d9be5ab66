"""Training steps of arc-state 0.11.1 on given cells; runs in arc-state's own environment.

Argument of a reader: JSON with ``cells`` (the .npz of step.py) and ``sizes``.

A step is what Lightning does with its module and settings: ``training_step`` (energy distance by
geomloss), ``zero_grad``, ``backward``, clipping of the norm at 10 and the Adam that the module
configures. Spared are Lightning's loop, its loggers and the callbacks of ``state tx train``; the
whole command has them. Everything that is not a size is as in arc-state's ``model=state``, the
precision of products ("medium") as ``state tx train`` sets it.
"""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from state.tx.utils import get_lightning_module
from worker import fork_readers, serve


def settings() -> dict[str, Any]:
    """Return arc-state's own settings of model and training."""
    import state

    folder = Path(state.__file__).parent / "configs"
    model = OmegaConf.load(folder / "model" / "state.yaml")
    training = OmegaConf.load(folder / "training" / "default.yaml")
    return {"model": model, "training": OmegaConf.to_container(training)}


def build(sizes: dict[str, int], num_genes: int, num_perturbations: int) -> Any:
    """Return its LightningModule as ``state tx train`` makes it for ``embed_key=X_hvg``."""
    own = settings()
    for key, value in sizes.items():
        OmegaConf.update(own["model"], f"kwargs.{key}", value)
    kwargs = OmegaConf.to_container(OmegaConf.create({"model": own["model"]}), resolve=True)
    kwargs = kwargs["model"]["kwargs"]
    kwargs["decoder_cfg"] = {
        "latent_dim": num_genes,
        "gene_dim": num_genes,
        "hidden_dims": [1024, 1024, 512],
        "dropout": 0.1,
        "residual_decoder": False,
    }
    data = {"embed_key": "X_hvg", "output_space": "gene", "basal_mapping_strategy": "random"}
    dims = {
        "input_dim": num_genes,
        "hvg_dim": num_genes,
        "gene_dim": num_genes,
        "output_dim": num_genes,
        "pert_dim": num_perturbations,
        "batch_dim": 1,
        "gene_names": [f"G{number}" for number in range(num_genes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it prints itself
        return get_lightning_module("state", data, kwargs, own["training"], dims)


class Steps:
    """The module, its optimizer and the sets it is trained on."""

    def __init__(self, given: dict[str, Any]) -> None:
        with np.load(given["cells"]) as file:
            control_BSG, treated_BSG = file["control_BSG"], file["treated_BSG"]
            perturbation_B = torch.from_numpy(file["perturbation_B"])
        num_sets, set_size, num_genes = control_BSG.shape
        one_hot_BP = torch.nn.functional.one_hot(perturbation_B, given["num_perturbations"])
        self.batch = {
            "ctrl_cell_emb": torch.from_numpy(control_BSG).flatten(0, 1),
            "pert_cell_emb": torch.from_numpy(treated_BSG).flatten(0, 1),
            "pert_emb": one_hot_BP.float().repeat_interleave(set_size, 0),
            "batch": torch.zeros(num_sets * set_size, dtype=torch.int64),
        }
        self.module = build(given["sizes"], num_genes, given["num_perturbations"])
        self.module.log = lambda *arguments, **options: None
        self.module.train()
        self.optimizer = self.module.configure_optimizers()
        self.clip = settings()["training"]["gradient_clip_val"]
        self.loss = float("nan")

    def take(self, num_steps: int) -> int:
        """Take steps and return the treated cells they saw."""
        for _ in range(num_steps):
            loss = self.module.training_step(self.batch, 0)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
            self.optimizer.step()
            self.loss = float(loss)
        return num_steps * len(self.batch["pert_cell_emb"])

    def facts(self) -> dict[str, float]:
        """Return the parameters that get a gradient, all of them, and the last loss."""
        parameters = list(self.module.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters if p.grad is not None),
            "parameters_in_checkpoint": sum(p.numel() for p in parameters),
            "loss": self.loss,
        }


def main(arguments: list[str]) -> None:
    """Serve steps."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    steps = Steps(json.loads(arguments[0]))
    serve(steps.take, steps.facts, forget=lambda: None)


if __name__ == "__main__":
    fork_readers(main)
