"""The recorded objective learns: a path in latent space is better than its own start."""

import json

import pytest
from test_transfer import train, write_store

from scale.data.simulate import SimulationConfig, simulate

WORLD = SimulationConfig(
    num_cells=11_000,
    num_lines=6,
    num_drugs=16,
    num_genes=200,
    num_mechanisms=4,
    num_inert=1,
    mean_library=500.0,
)
SETTINGS = (
    *("objective=scale_paper", "objective.decoder=residual", "objective.latent_size=32"),
    "optimizer.lr=1.5e-3",
    *("model.hidden_size=64", "model.ffn_hidden_size=192"),
)


@pytest.mark.slow
def test_the_recorded_objective_beats_the_control_cells(tmp_path):
    atlas = simulate(WORLD)
    drugs = atlas.drugs
    store = write_store(tmp_path, "atlas", atlas.part(atlas.lines, drugs, atlas.genes))
    split = tmp_path / "split.toml"
    held_out = {atlas.lines[-2]: drugs[0::2], atlas.lines[-1]: drugs[1::2]}
    split.write_text(
        '[datasets]\nx = "."\n[training]\nx = "train"\n'
        + "".join(f'[fewshot."x.{k}"]\nval = {json.dumps(v)}\n' for k, v in held_out.items())
    )
    here = f"data.split={split}"
    trained = train("pretrain", tmp_path / "trained", store, 250, here, *SETTINGS)
    # the decoder starts at nothing, so that what was not trained returns the control cells
    control = train(
        "pretrain", tmp_path / "control", store, 1, here, *SETTINGS, "optimizer.lr=1e-30"
    )
    # seen: .94 of the distance of the control cells, and .22; unchanged cells have no correlation
    assert trained.energy_distance < 0.97 * control.energy_distance
    assert trained.pearson_delta > 0.08
