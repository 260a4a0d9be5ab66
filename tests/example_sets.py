"""Small models and batches of cell sets for the tests of the model."""

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from scale.config import ModelConfig, ObjectiveConfig, Precision
from scale.model.model import ScaleModel
from scale.types import ABSENT, Batch, Vocabulary

G, S, U, B = 20, 8, 6, 3
PLAIN = ObjectiveConfig(whole_counts=False)
"""Cells as the network has them: small differences of values stay visible."""
DRUGS = tuple(f"drug{i}" for i in range(5))


def sizes(**changes: Any) -> ModelConfig:
    """Return a model small enough for float64; ``gene_layers`` gives it the patch encoder."""
    values: dict[str, Any] = {
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_hidden_size": 24,
        "set_size": S,
        "num_summary_cells": U,
        "lr": 1e-3,
    }
    if changes.get("gene_layers"):
        values |= {
            "gene_hidden_size": 8,
            "gene_num_heads": 2,
            "gene_patch_size": 6,  # does not divide the genes
            "qk_norm": True,
        }
    return ModelConfig(**values | changes)


def vocabulary(genes: tuple[str, ...] = tuple(f"gene{i}" for i in range(G))) -> Vocabulary:
    return Vocabulary(
        genes=genes,
        components=("<unknown>", "DMSO", *DRUGS),
        cell_types=("A549", "K562", "MCF7"),
        batches=("plate1", "plate2"),
        perturbations=DRUGS,
        control="DMSO",
        perturbation_key="drug",
        cell_type_key="cell_line",
        batch_key="plate",
        dose_key="dose",
        separator="+",
        target_sum=1e4,
        value_scale=1.0,
    )


FEATURED: dict[str, Any] = {
    "feature_blocks": ({"kind": "vector", "size": 7},),
    "described": ("new0", "new1"),
}
"""Of a vocabulary with features: its last drug has none, two names are known by theirs alone."""


def features() -> Tensor:
    """Return the features of :data:`FEATURED` by row: unknown, control, drugs, what is new."""
    feature_CV = cells(len(DRUGS) + 4, 7, seed=12) + 0.1
    feature_CV[[0, 1, len(DRUGS) + 1]] = 0
    return feature_CV


def cells(*shape: int, seed: int = 0) -> Tensor:
    """Return values like log1p expression: never negative, half of them 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).relu()


def batch(
    num_sets: int = B,
    set_size: int = S,
    *,
    seed: int = 0,
    first_set: int = 0,
    num_summary_cells: int = U,
    control_lengths: list[int] | None = None,
    treated_lengths: list[int] | None = None,
) -> Batch:
    """Return full sets, or sets of the given lengths padded with zeros."""

    def masked(lengths: list[int] | None, size: int) -> Tensor:
        length_B1 = torch.tensor(lengths or [size] * num_sets)[:, None]
        return torch.arange(size) < length_B1

    generator = torch.Generator().manual_seed(seed + 99)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    control_mask_BS = masked(control_lengths, set_size)
    treated_mask_BS = masked(treated_lengths, set_size)
    return Batch(
        control_BSG=cells(num_sets, set_size, G, seed=seed) * control_mask_BS[:, :, None],
        control_mask_BS=control_mask_BS,
        summary_BUG=cells(num_sets, num_summary_cells, G, seed=seed + 1),
        summary_mask_BU=torch.ones(num_sets, num_summary_cells, dtype=torch.bool),
        treated_BSG=cells(num_sets, set_size, G, seed=seed + 2) * treated_mask_BS[:, :, None],
        treated_mask_BS=treated_mask_BS,
        control_library_BS=torch.ones(num_sets, set_size),
        treated_library_BS=torch.ones(num_sets, set_size),
        component_BJ=torch.cat([draw(2, 7, num_sets, 1), draw(-1, 7, num_sets, 1)], 1),
        dose_BJ=torch.tensor([[0.5, math.nan], [10.0, 0.01], [math.nan, 3.0]] * num_sets)[
            :num_sets
        ],
        cell_type_B=draw(ABSENT, 3, num_sets),
        batch_B=draw(ABSENT, 2, num_sets),
        is_control_B=torch.zeros(num_sets, dtype=torch.bool),
        condition_B=torch.arange(num_sets),
        set_index_B=torch.arange(num_sets) + first_set,
    )


def take(sets: Batch, rows: slice) -> Batch:
    return Batch(**{f.name: getattr(sets, f.name)[rows] for f in fields(sets)})


def in_float64(batch: Batch) -> Batch:
    names = ("control_BSG", "summary_BUG", "treated_BSG", "dose_BJ")
    return replace(batch, **{name: getattr(batch, name).double() for name in names})


def build(
    config: ModelConfig | None = None,
    objective: ObjectiveConfig | None = None,
    *,
    seed: int = 3,
    precision: Precision = Precision.fp32,
    recompute: bool = False,
    with_statistics: bool = True,
    with_features: bool = False,
) -> ScaleModel:
    model = ScaleModel(
        config or sizes(),
        objective or PLAIN,
        replace(vocabulary(), **FEATURED if with_features else {}),
        seed=seed,
        precision=precision,
        recompute=recompute,
    )
    if with_statistics:
        basis_GP, _ = torch.linalg.qr(cells(G, 5, seed=8))
        model.set_statistics(cells(G, seed=9), basis_GP, cells(256, G, seed=11))
    if with_features and model.pre_process:
        model.condition.set_features(features())
    return model


@torch.no_grad()
def shake(model: nn.Module, deviation: float = 0.08, seed: int = 0) -> nn.Module:
    """Add noise to all weights, so that nothing is zero by construction; keyed by name.

    At the initial weights the readout is zero and the gradient of everything before it too.
    """
    from scale.model.layers import draw_by_name

    named = getattr(model, "whole_named_parameters", model.named_parameters)
    for name, parameter in named():
        parameter.add_(draw_by_name(f"shake/{name}", parameter, seed).to(parameter) * deviation)
    return model
