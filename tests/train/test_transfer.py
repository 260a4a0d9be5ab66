"""Pretraining on an atlas pays on a second one with other lines, other drugs and half new genes."""

import json
import math
from typing import NamedTuple

import pytest
from training_runs import read_metrics

from scale.config import compose
from scale.data.simulate import CONTROL, SimulationConfig, simulate
from scale.runtime import StopSignal

# One truth for both: lines 1 to 6 under drugs 1 to 24 in genes 1 to 250, then lines 7 to 10 under
# drugs 9 to 32 in genes 126 to 375.
WORLD = SimulationConfig(
    num_cells=27_300,
    num_lines=10,
    num_drugs=32,
    num_genes=375,
    num_mechanisms=4,
    num_inert=2,
    mean_library=937.5,
)
SMALL = ("model.hidden_size=64", "model.ffn_hidden_size=192")
STEPS = 40


class Scores(NamedTuple):
    energy_distance: float
    pearson_delta: float


def write_store(folder, name, cells):
    from scale.tasks.prepare import run

    cells.obs["plate"] = [f"{name}-{plate}" for plate in cells.obs["plate"]]
    cells.write_h5ad(folder / f"{name}.h5ad")
    settings = [
        *("source=h5ad", f"source.files=[{folder / name}.h5ad]", f"store={folder / name}"),
        *("columns.perturbation=drug", "columns.cell_type=cell_line", "columns.batch=plate"),
        *(f"control={CONTROL}", "genes=all"),
    ]
    assert run(compose("prepare", settings, run_dir=folder / f"prepare-{name}")) == 0
    return folder / name


def train(task, run_dir, store, steps, *changes):
    """Return the scores of the held-out conditions after the last step."""
    from scale.tasks import finetune, pretrain

    settings = [
        *(f"data.store={store}", f"trainer.max_steps={steps}", f"validation.every_steps={steps}"),
        *("optimizer.warmup_steps=15", "optimizer.ema_decay=0.97", "trainer.log_every_steps=20"),
        *("validation.max_sets_per_condition=2", f"checkpoint.every_steps={steps}"),
    ]
    run = {"pretrain": pretrain, "finetune": finetune}[task].run
    assert run(compose(task, [*settings, *changes], run_dir=run_dir), StopSignal()) == 0
    last = read_metrics(run_dir)[-1]
    return Scores(*(last.get(f"val/{name}", math.nan) for name in Scores._fields))


@pytest.mark.slow
def test_finetuning_beats_scratch_and_needs_half_its_steps(tmp_path):
    atlas = simulate(WORLD)
    lines, drugs, genes = atlas.lines, atlas.drugs, atlas.genes
    first = write_store(tmp_path, "first", atlas.part(lines[:6], drugs[:24], genes[:250]))
    second = write_store(tmp_path, "second", atlas.part(lines[6:], drugs[8:], genes[125:]))
    split = tmp_path / "split.toml"
    # in two lines 16 of 24 drugs are held out, new ones too, each seen in two others at least
    held_out = {lines[-2]: drugs[8::3] + drugs[9::3], lines[-1]: drugs[9::3] + drugs[10::3]}
    split.write_text(
        '[datasets]\nx = "."\n[training]\nx = "train"\n'
        + "".join(f'[fewshot."x.{k}"]\nval = {json.dumps(v)}\n' for k, v in held_out.items())
    )
    train("pretrain", tmp_path / "start", first, 300, *SMALL)
    here = f"data.split={split}"
    scratch = train("pretrain", tmp_path / "scratch", second, STEPS, here, *SMALL)
    # a model that was not trained returns the control cells
    control = train("pretrain", tmp_path / "control", second, 1, here, *SMALL, "optimizer.lr=1e-30")
    onwards = (here, f"start_from={tmp_path / 'start'}", "replace_genes=true")
    same = train("finetune", tmp_path / "same", second, STEPS, *onwards)
    half = train("finetune", tmp_path / "half", second, STEPS // 2, *onwards)
    for finetuned in (same, half):
        assert finetuned.energy_distance < scratch.energy_distance
        assert finetuned.pearson_delta > scratch.pearson_delta
    assert same.energy_distance < 0.75 * control.energy_distance
