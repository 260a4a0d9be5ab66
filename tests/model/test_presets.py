"""Presets have the sizes that are told of them, and ``scale info`` prints them."""

from dataclasses import replace

import pytest
from example_sets import vocabulary

from scale.config import ObjectiveConfig, compose
from scale.model.model import ScaleModel
from scale.model.sizes import count_parameters, forward_flops_per_cell
from scale.tasks import info
from scale.types import Vocabulary

# genes; millions of parameters; MFLOP of a forward pass and GFLOP of training per treated cell.
# The tables of names have rows for 1,200 perturbations, 60 cell types and 200 batches, features
# 1,024 numbers; set sizes are the presets'. The last column: cells of the summary of that table;
# the presets draw fewer since.
TOLD = {
    "tiny": (500, 1.2, 1.3, 0.004, 32),
    "small": (2000, 18.0, 83, 0.25, 64),
    "base": (2000, 188, 508, 1.53, 64),
    "large": (2000, 374, 1180, 3.54, 64),
    "xl": (2000, 1350, 3781, 11.3, 64),
}
PRESETS = pytest.mark.parametrize("preset", TOLD)


def sizes_of(preset):
    return compose("info", [f"model={preset}"], run_dir="info").model


def names(num_genes: int) -> Vocabulary:
    def numbers(count):
        return tuple(str(i) for i in range(count))

    return replace(
        vocabulary(numbers(num_genes)),
        components=numbers(1202),
        cell_types=numbers(60),
        batches=numbers(200),
        feature_blocks=({"size": 1024},),
    )


@PRESETS
def test_parameters_and_flops_are_those_that_are_told(preset):
    genes, parameters, forward, training, num_summary_cells = TOLD[preset]
    config = replace(sizes_of(preset), num_summary_cells=num_summary_cells)
    millions = count_parameters(config, names(genes)) / 1e6
    flops = forward_flops_per_cell(config, genes)
    # 1.35 B has three digits; tiny's arithmetic has one
    assert millions == pytest.approx(parameters, rel=0.005 if parameters > 2 else 0.04)
    # the formulas that were told count the second map of the summary per cell, not per set
    tolerance = 0.05 if preset == "tiny" else 0.01
    assert flops / 1e6 == pytest.approx(forward, rel=tolerance)
    assert 3 * flops / 1e9 == pytest.approx(training, rel=tolerance)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_a_built_preset_has_the_parameters_that_are_counted(preset):
    config, known = sizes_of(preset), names(TOLD[preset][0])
    model = ScaleModel(config, ObjectiveConfig(), known, seed=0)
    count = sum(p.numel() for p in model.parameters())
    assert count == count_parameters(config, known) == model.num_parameters()
    assert model.flops_per_cell() == 3 * forward_flops_per_cell(config, len(known.genes))


@PRESETS
def test_info_prints_them_without_a_store(preset, capsys):
    genes = TOLD[preset][0]
    config = compose("info", [f"model={preset}", f"num_genes={genes}"], run_dir="info")
    assert info.run(config) == 0
    out = capsys.readouterr().out
    empty = replace(
        names(genes),
        components=("unknown", "control"),
        cell_types=(),
        batches=(),
        feature_blocks=(),
    )
    assert f"{count_parameters(config.model, empty):,} (each further name adds" in out
    forward = forward_flops_per_cell(config.model, genes) / 1e6
    assert f"{forward:,.1f} MFLOP per treated cell" in out
    assert f"{3 * forward:,.1f} MFLOP per treated cell (recompute not counted)" in out
    assert "memory of a rank" in out
