"""What is taken away or exchanged, one at a time, to see what each part brings.

A row is the settings of ``pretrain`` that differ from the default: each file of
configs/experiment/ablation, and some more. It is run once per data seed, with a model seed of its
own, beside the default with the same seeds. A setting that the package does not know, or cannot
run, ends the benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass

from command import ROOT

OURS = "ours"
FOLDER = ROOT / "configs" / "experiment" / "ablation"


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the ablation table."""

    name: str
    settings: tuple[str, ...] = ()


def shipped(name: str) -> Variant:
    """Return the row of a file of configs/experiment/ablation."""
    return Variant(name.replace("_", " "), (f"experiment=ablation/{name}",))


NAMED_CONTEXTS = Variant(
    "contexts by name", ("model.cell_type_dropout=0.15", "model.batch_dropout=0.5")
)
"""Cell types and batches are shown to the model as often as in the larger presets."""
ON_FEWSHOT = (
    *(shipped(path.stem) for path in sorted(FOLDER.glob("*.yaml"))),
    Variant("point .1", ("objective.point_weight=0.1", "objective.pairing=ot")),
    Variant("objective of the paper", ("objective=scale_paper",)),
    Variant("counts not whole", ("objective.whole_counts=false",)),
    Variant("genes hidden .15", ("objective.masked_gene_fraction=0.15",)),
    NAMED_CONTEXTS,
)
"""On the few-shot screen."""
ON_COMPOSITION = (
    shipped("no_cell_attention"),
    shipped("summary_of_one_cell"),
    Variant("neither", ("model.cell_attention=false", "model.num_summary_cells=1")),
    NAMED_CONTEXTS,
)
"""Where responses depend on the population: the parts that see more than one cell."""
