"""Noise, velocities and latent cells on several ranks: gradients and samples of one process.

In float64: a sum in another order is then no excuse. All ranks of a model have the losses of whole
sets, so a reconstruction that was summed twice, or noise that was drawn per rank, would show.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from example_sets import in_float64, shake
from layout_runs import (
    DEEP,
    SMALL,
    Run,
    describe,
    global_batch,
    make_engine,
    share,
    whole_gradients,
    worst,
)
from ranks import RankContext, run_ranks, save_weights

from scale.config import Decoder, Head, ObjectiveConfig, Pairing, Prediction, Prior, Space

LATENT = ObjectiveConfig(
    space=Space.latent,
    prior=Prior.gaussian,
    head=Head.direct,
    latent_size=6,
    decoder=Decoder.negative_binomial,
    mean_weight=1.0,
    reconstruction_weight=1.0,
    alignment_weight=0.5,
    whole_counts=False,
)
VELOCITY = ObjectiveConfig(
    prior=Prior.gaussian,
    prediction=Prediction.velocity,
    pairing=Pairing.ot,
    mean_weight=1.0,
    point_weight=0.3,
    mmd_weight=0.2,
    whole_counts=False,
)
# (objective, changes of the sizes, layouts that it is held against one process on)
CASES = {
    "latent": (LATENT, DEEP, [Run(tensor=2), Run(data=2)]),
    "velocity": (VELOCITY, SMALL | {"cell_attention": False}, [Run(tensor=2), Run(pipeline=2)]),
}


def counted(sets):
    library_BS = torch.full(sets.control_mask_BS.shape, 2e4)
    return in_float64(replace(sets, control_library_BS=library_BS, treated_library_BS=library_BS))


def measure(context: RankContext, name: str, run: Run) -> dict:
    """Return this rank's gradients of a step of two micro-batches, and what the model predicts."""
    objective, changes, _ = CASES[name]
    with run.start(context) as layout:
        engine = make_engine(run, layout, changes, objective=objective, in_double=True)
        engine.gradients([counted(sets) for sets in share(run, layout, 0, size=2)])
        model = engine.model
        sets = counted(global_batch(1))
        return {
            "gradients": {n: describe(p, p.main_grad) for n, p in model.whole_named_parameters()},
            "sample": model.eval().sample(sets, num_steps=2, guidance=1.5).numpy(),
        }


def resume(context: RankContext, run: Run, folder: str, *, saves: bool) -> np.ndarray:
    """Return what a latent model predicts that is saved, or loaded over other weights."""
    from scale.train.sharded import load_state

    objective = replace(LATENT, decoder=Decoder.residual)
    with run.start(context) as layout:
        engine = make_engine(run, layout, DEEP, objective=objective)
        if saves:
            save_weights(Path(folder), engine)
        else:
            shake(engine.model, seed=5)
            engine.model.latent.set_reference(torch.ones_like(engine.model.latent.reference_NG))
            load_state(Path(folder), engine)
        sample = engine.model.eval().sample(global_batch(1), num_steps=2)
        return sample.numpy()


def everything(context: RankContext, folder: str) -> dict:
    told = {
        name: {run: measure(context, name, run) for run in runs if run.ranks == context.size}
        for name, (_, _, layouts) in CASES.items()
        for runs in [[Run(), *layouts]]
    }
    run = Run(tensor=context.size)
    return {**told, "resumed": resume(context, run, folder, saves=context.size == 2)}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[int, list[dict]]:
    folder = tmp_path_factory.mktemp("transport")
    weights = folder / "weights"
    weights.mkdir()
    return {size: run_ranks(everything, size, folder, str(weights)) for size in (2, 1)}


@pytest.mark.parametrize(
    ("name", "run"), [(name, run) for name, case in CASES.items() for run in case[2]], ids=str
)
def test_gradients_and_samples_are_those_of_one_process(told, name, run):
    alone = told[1][0][name][Run()]
    found = whole_gradients(run, [rank[name][run]["gradients"] for rank in told[2]])
    assert worst(found, whole_gradients(Run(), [alone["gradients"]])) < 1e-9
    for rank in told[2]:
        np.testing.assert_allclose(rank[name][run]["sample"], alone["sample"], atol=1e-9)


def test_a_latent_model_of_two_ranks_goes_on_in_one(told):
    for rank in told[2]:
        np.testing.assert_allclose(rank["resumed"], told[1][0]["resumed"], atol=2e-5)
