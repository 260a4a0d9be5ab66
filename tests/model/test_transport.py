"""Noise as the start of a path, velocities, and cells that do not see each other."""

from dataclasses import replace

import pytest
import torch
from example_sets import batch, build, cells, shake, sizes, take

from scale.config import Head, ObjectiveConfig, Pairing, Prediction, Prior
from scale.model.flow import interpolate
from scale.model.objective import Targets, velocity_losses, weighted_losses
from scale.model.pairing import pair_in_order

PLAIN = ObjectiveConfig(pairing=Pairing.ot, mean_weight=1.0, point_weight=0.3, whole_counts=False)
GAUSSIAN = replace(PLAIN, prior=Prior.gaussian)
VELOCITY = replace(PLAIN, prediction=Prediction.velocity)


@pytest.mark.parametrize(
    "changes",
    [
        {"prior": Prior.gaussian},
        {"prior": Prior.gaussian, "masked_gene_fraction": 0.3},
        {"prediction": Prediction.velocity, "point_weight": 0.3},
        {"prior": Prior.gaussian, "prediction": Prediction.velocity},
        {"prior": Prior.gaussian, "head": Head.direct},
    ],
    ids=str,
)
def test_every_weight_gets_a_gradient_and_is_counted(changes):
    model = shake(build(sizes(gene_layers=1), ObjectiveConfig(**changes)))
    model(batch()).total.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


# --- noise ----------------------------------------------------------------------------------------


def test_a_fresh_model_on_noise_returns_the_control_cells():
    sets = batch(control_lengths=[8, 5, 2])
    for num_steps in (1, 3):
        found = build(objective=GAUSSIAN).sample(sets, num_steps=num_steps, guidance=2.0)
        assert torch.equal(found, sets.control_BSG)


def test_the_noise_of_a_set_does_not_depend_on_its_batch():
    model = shake(build(objective=GAUSSIAN)).eval()
    sets = batch(control_lengths=[8, 6, 8])
    found = model.sample(sets, num_steps=2, seed=1)
    alone = model.sample(take(sets, slice(1, 2)), num_steps=2, seed=1)
    torch.testing.assert_close(alone, found[1:2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.sample(sets, num_steps=2, seed=2), found)
    model.train()
    parts = [model(take(sets, slice(i, i + 1))).total for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), model(sets).total)


# --- velocity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_fresh_velocity_stays_at_the_control_cells(num_steps):
    sets = batch(control_lengths=[8, 5, 2])
    found = build(objective=VELOCITY).sample(sets, num_steps=num_steps)
    assert torch.equal(found, sets.control_BSG)


def test_x_loss_is_the_velocity_loss_times_the_square_of_what_is_left():
    only = {"energy_weight": 0.0, "mean_weight": 0.0, "point_weight": 1.0}
    z0, z1, v = cells(2, 6, 5, seed=1), cells(2, 6, 5, seed=2), cells(2, 6, 5, seed=3)
    mask = torch.arange(6) < torch.tensor([6, 4])[:, None]
    targets = Targets(z1, mask, pair_in_order(mask, mask))
    for t in (0.0, 0.25, 0.75):
        z = interpolate(z0, z1, torch.full((2,), t))
        end = z + (1 - t) * v
        x_loss = weighted_losses(ObjectiveConfig(**only), end, mask, targets).total
        v_loss = velocity_losses(
            ObjectiveConfig(**only, prediction=Prediction.velocity), v, z0, end, mask, targets
        ).total
        torch.testing.assert_close(x_loss, (1 - t) ** 2 * v_loss)


def test_other_losses_of_a_velocity_are_those_of_its_endpoint():
    model, sets = shake(build(objective=replace(VELOCITY, point_weight=0.3))), batch()
    assert list(model(sets).parts) == ["energy", "mean", "point"]
    with torch.no_grad():
        endpoint = replace(VELOCITY, prediction=Prediction.endpoint, point_weight=0.0)
        v, z0 = cells(3, 8, 20, seed=3) - 0.5, sets.control_BSG
        targets = Targets(sets.treated_BSG, sets.treated_mask_BS, None)
        expected = weighted_losses(endpoint, z0 + v, sets.control_mask_BS, targets)
        ours = replace(VELOCITY, point_weight=0.0)
        found = velocity_losses(ours, v, z0, z0 + v, sets.control_mask_BS, targets)
    assert found.parts.keys() == expected.parts.keys() == {"energy", "mean"}
    torch.testing.assert_close(found.total, expected.total)


# --- cells alone ----------------------------------------------------------------------------------


def test_without_attention_a_cell_does_not_see_the_others():
    sets = batch(control_lengths=[8, 6, 8])
    others = sets.control_BSG.clone()
    others[:, 1:] = cells(3, 7, 20, seed=9)
    changed = replace(sets, control_BSG=others * sets.control_mask_BS[..., None])
    for attends in (False, True):
        model = shake(build(sizes(cell_attention=attends, qk_norm=True), PLAIN)).eval()
        one, two = (model.sample(x, num_steps=1)[:, 0] for x in (sets, changed))
        assert torch.equal(one, two) is not attends
        assert model.num_parameters() == sum(p.numel() for p in model.parameters())
        names = [n for n, _ in model.named_parameters() if "self_attention" in n]
        assert bool(names) is attends
        model.train()(sets).total.backward()
        assert all(p.grad.any() for p in model.parameters())
