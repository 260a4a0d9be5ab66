"""What is taken away or exchanged, one at a time, to see what each part brings.

A row is the settings of ``pretrain`` that differ from the default; it is run once per data seed,
with a model seed of its own, beside the default with the same seeds. A setting that the package
does not know, or cannot run, ends the benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass

OURS = "ours"


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the ablation table."""

    name: str
    settings: tuple[str, ...] = ()


FLOW_MATCHING = (
    *("objective.prediction=velocity", "objective.time=uniform", "objective.num_steps=10"),
    *("objective.energy_weight=0", "objective.mean_weight=0", "objective.point_weight=1"),
)
"""Velocities between pairs, and nothing else: the usual objective."""

ON_FEWSHOT = (
    Variant("time zero", ("objective.time=zero",)),
    Variant("time uniform", ("objective.time=uniform",)),
    Variant("pairing random", ("objective.pairing=random",)),
    Variant("point 0", ("objective.point_weight=0",)),
    Variant("point .1", ("objective.point_weight=0.1",)),
    Variant("point .3", ("objective.point_weight=0.3",)),
    Variant("mean 0", ("objective.mean_weight=0",)),
    Variant("mmd for energy", ("objective.energy_weight=0", "objective.mmd_weight=1")),
    Variant("head direct", ("objective.head=direct",)),
    Variant("fusion sum", ("model.fusion=sum",)),
    Variant("no attention of cells", ("model.cell_attention=false",)),
    Variant("summary of 1 cell", ("model.num_summary_cells=1",)),
    Variant("counts not whole", ("objective.whole_counts=false",)),
    Variant("velocity", ("objective.prediction=velocity", "objective.num_steps=10")),
    Variant("flow matching", FLOW_MATCHING),
    Variant("prior gaussian", ("objective.prior=gaussian",)),
    Variant("objective of the paper", ("objective=scale_paper",)),
)
"""On the few-shot screen."""

ON_COMPOSITION = (
    Variant("no attention of cells", ("model.cell_attention=false",)),
    Variant("summary of 1 cell", ("model.num_summary_cells=1",)),
    Variant("neither", ("model.cell_attention=false", "model.num_summary_cells=1")),
)
"""Where responses depend on the population: the parts that see more than one cell."""
